"""The sizes of a decoder that its arithmetic depends on, and how to read them from a checkpoint's configuration.

Symbols: D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size, T context_length.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a dense or mixture-of-experts decoder; enough for parameters, FLOPs and bytes.

    The defaults are those of a Llama: gated feed-forward, RMSNorm, no biases, rotary positions, one expert. Attention
    is over the whole context; a sliding window would only make the products and the cache smaller than counted here.

    Raises:
        ValueError: a size is not positive, `n_heads` is not a multiple of `n_kv_heads`, or the expert sizes disagree.
    """

    vocab_size: int
    """number of token ids, V (rows of the embedding, padding rows included)"""
    context_length: int
    """longest sequence in tokens, T; with learned positions also the rows of their table"""
    d_model: int
    """width of the residual stream, D"""
    n_layers: int
    """number of blocks"""
    n_heads: int
    """query heads per layer, H"""
    n_kv_heads: int
    """key and value heads per layer, K"""
    d_head: int
    """channels per head, C"""
    d_ff: int
    """hidden width of a dense feed-forward layer, F"""
    tie_embeddings: bool = True
    """one matrix for the token embedding and the output head"""
    qk_norm: bool = False
    """normalization of queries and keys before the rotation"""
    qk_norm_all_heads: bool = False
    """that normalization spans all heads together (OLMo 2) instead of each head alone (Qwen3)"""
    gated_mlp: bool = True
    """three feed-forward matrices (SwiGLU, GeGLU) instead of two"""
    qkv_bias: bool = False
    """biases on queries, keys and values"""
    output_bias: bool = False
    """bias on attention's output projection"""
    mlp_bias: bool = False
    """biases on the feed-forward matrices"""
    norm_bias: bool = False
    """LayerNorm with gain and bias instead of RMSNorm with a gain"""
    norms_per_block: int = 2
    """normalizations of the residual width in a block: 2, or 4 where outputs are normalized too (Gemma 2 and 3)"""
    learned_positions: bool = False
    """a table of position embeddings (GPT-2)"""
    n_experts: int = 0
    """experts of a mixture layer; 0 for a dense model"""
    n_active_experts: int = 0
    """experts that one token uses"""
    d_expert: int = 0
    """hidden width of one expert"""
    d_shared_expert: int = 0
    """hidden width of the expert that every token uses, 0 for none (Qwen2-MoE; with a D-wide gate)"""
    n_mixture_layers: int | None = None
    """blocks with a mixture layer, the others are dense with d_ff; `None` means all, where there are experts"""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a positive number")
        if self.d_ff < (0 if self.n_experts else 1):
            raise ValueError(f"d_ff={self.d_ff}: give a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}: choose a divisor"
            )
        if self.n_experts and not (0 < self.n_active_experts <= self.n_experts and self.d_expert > 0):
            raise ValueError(
                f"n_experts={self.n_experts} with n_active_experts={self.n_active_experts} and "
                f"d_expert={self.d_expert}: give 1 to n_experts active ones and a positive width"
            )
        if self.n_mixture_layers is None:
            object.__setattr__(self, "n_mixture_layers", self.n_layers if self.n_experts else 0)
        if not 0 <= self.n_mixture_layers <= (self.n_layers if self.n_experts else 0):
            raise ValueError(
                f"n_mixture_layers={self.n_mixture_layers} with n_layers={self.n_layers} and "
                f"n_experts={self.n_experts}: give at most n_layers, and 0 without experts"
            )

    @property
    def n_dense_layers(self) -> int:
        """Blocks whose feed-forward layer is dense."""
        return self.n_layers - self.n_mixture_layers

    @property
    def mlp_matrices(self) -> int:
        """Matrices of one feed-forward layer: 3 with a gate, else 2."""
        return 3 if self.gated_mlp else 2


def shape_of(config: Any) -> ModelShape:
    """The shape of any supported description of a model.

    Args:
        config: a `ModelShape`; a `ModelConfig`, or anything with its attributes; a `transformers` configuration; its
            dictionary; or the path of a config.json or of the folder that holds one.

    Raises:
        ValueError: an unsupported `model_type`, a missing entry, or a file that is no JSON object.
    """
    if isinstance(config, ModelShape):
        return config
    if isinstance(config, str | Path):
        config = _read(Path(config))
    if isinstance(config, dict):
        return _from_dictionary(config)
    if hasattr(config, "to_dict"):
        return _from_dictionary(config.to_dict())
    return _from_attributes(config)


def _from_attributes(config: Any) -> ModelShape:
    names = ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_ff")
    missing = [name for name in names if not hasattr(config, name)]
    if missing:
        raise ValueError(
            f"a {type(config).__name__} has no {missing[0]}: give a ModelShape, a ModelConfig, a transformers "
            "configuration, its dictionary, or the path of a config.json"
        )
    values = {name: getattr(config, name) for name in names}
    if values["d_head"] is None:
        values["d_head"] = config.d_model // config.n_heads
    flags = ("tie_embeddings", "qk_norm")
    return ModelShape(**values, **{name: getattr(config, name) for name in flags if hasattr(config, name)})


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give the path of a config.json or its folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _from_dictionary(config: dict[str, Any]) -> ModelShape:
    kind = config.get("model_type")
    if kind not in READERS:
        raise ValueError(f"model_type={kind!r} is not supported: choose one of {', '.join(sorted(READERS))}")
    if kind == "gpt2":
        return _gpt2(config)
    return ModelShape(**(_llama(config) | READERS[kind](config)))


def _entry(config: dict[str, Any], *names: str) -> Any:
    """The first of these entries that is there and not null."""
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise ValueError(
        f"the {config.get('model_type')} configuration has no {names[0]}: give the model's whole config.json"
    )


def _gpt2(config: dict[str, Any]) -> ModelShape:
    """GPT-2 (Radford et al., 2019): LayerNorm, biases everywhere, two feed-forward matrices, learned positions."""
    d_model, n_heads = _entry(config, "n_embd"), _entry(config, "n_head")
    return ModelShape(
        vocab_size=_entry(config, "vocab_size"),
        context_length=_entry(config, "n_positions", "n_ctx"),
        d_model=d_model,
        n_layers=_entry(config, "n_layer"),
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_head=d_model // n_heads,
        d_ff=config.get("n_inner") or 4 * d_model,
        tie_embeddings=config.get("tie_word_embeddings", True),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        norm_bias=True,
        learned_positions=True,
    )


def _llama(config: dict[str, Any]) -> dict[str, Any]:
    """What Llama-like families share. Absent entries mean what `transformers` takes them for."""
    d_model, n_heads = _entry(config, "hidden_size"), _entry(config, "num_attention_heads")
    tied_by_default = config["model_type"] in ("gemma", "gemma2", "gemma3_text", "smollm3")
    return {
        "vocab_size": _entry(config, "vocab_size"),
        "context_length": _entry(config, "max_position_embeddings"),
        "d_model": d_model,
        "n_layers": _entry(config, "num_hidden_layers"),
        "n_heads": n_heads,
        "n_kv_heads": config.get("num_key_value_heads") or n_heads,
        "d_head": config.get("head_dim") or d_model // n_heads,
        "d_ff": _entry(config, "intermediate_size"),
        "tie_embeddings": config.get("tie_word_embeddings", tied_by_default),
    }


def _biases(config: dict[str, Any]) -> dict[str, Any]:
    attention = config.get("attention_bias", False)
    return {"qkv_bias": attention, "output_bias": attention, "mlp_bias": config.get("mlp_bias", False)}


def _mixtral(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "n_experts": _entry(config, "num_local_experts"),
        "n_active_experts": _entry(config, "num_experts_per_tok"),
        "d_expert": _entry(config, "intermediate_size"),
    }


def _qwen_mixture(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-MoE and Qwen3-MoE: a mixture in every `decoder_sparse_step`-th block that is not listed as dense."""
    step, dense = config.get("decoder_sparse_step", 1), set(config.get("mlp_only_layers") or ())
    layers = range(_entry(config, "num_hidden_layers"))
    return {
        "n_experts": _entry(config, "num_experts", "num_local_experts"),
        "n_active_experts": _entry(config, "num_experts_per_tok"),
        "d_expert": _entry(config, "moe_intermediate_size"),
        "d_shared_expert": config.get("shared_expert_intermediate_size") or 0,
        "n_mixture_layers": sum(layer not in dense and (layer + 1) % step == 0 for layer in layers),
    }


# model_type -> what the family adds to a Llama
READERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gpt2": _gpt2,
    "llama": _biases,
    "smollm3": _biases,
    "mistral": lambda config: {},
    "phi3": lambda config: {},
    "qwen2": lambda config: {"qkv_bias": True},
    "qwen3": lambda config: _biases(config) | {"qk_norm": True, "mlp_bias": False},
    "olmo2": lambda config: _biases(config) | {"qk_norm": True, "qk_norm_all_heads": True, "mlp_bias": False},
    "gemma": lambda config: _biases(config) | {"mlp_bias": False},
    "gemma2": lambda config: _biases(config) | {"norms_per_block": 4, "mlp_bias": False},
    "gemma3_text": lambda config: (
        _biases(config) | {"norms_per_block": 4, "qk_norm": True, "mlp_bias": False}
    ),
    "mixtral": _mixtral,
    "qwen3_moe": lambda config: (
        _biases(config) | _qwen_mixture(config) | {"qk_norm": True, "mlp_bias": False}
    ),
    "qwen2_moe": lambda config: _qwen_mixture(config) | {"qkv_bias": config.get("qkv_bias", True)},
}
