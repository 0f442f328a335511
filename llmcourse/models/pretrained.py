"""Folders in Hugging Face's format, in and out: Llama and Qwen3 checkpoints open here, ours open there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

# our name -> Hugging Face's, inside a block
BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
TOP_NAMES = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
MODEL_TYPES = {"llama": False, "qwen3": True}  # model_type -> has q/k norm
REQUIRED = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


class Savable(Protocol):
    """A tokenizer that can write itself."""

    def save(self, folder: str | Path) -> Any:
        """Write tokenizer files."""
        ...


def hub_name(name: str) -> str:
    """Hugging Face's name of one of our parameters: "blocks.3.mlp.up.weight" -> "model.layers.3.mlp.up_proj.weight"."""
    stem, _, kind = name.rpartition(".")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    return f"model.layers.{layer}.{BLOCK_NAMES[inner]}.{kind}"


def config_to_hub(config: ModelConfig) -> dict[str, Any]:
    """The config.json of the same architecture."""
    model_type, architecture = (
        ("qwen3", "Qwen3ForCausalLM") if config.qk_norm else ("llama", "LlamaForCausalLM")
    )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "intermediate_size": config.d_ff,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def config_from_hub(hub: dict[str, Any]) -> ModelConfig:
    """Our configuration of a config.json.

    Raises:
        ValueError: another family, an entry is missing, or a feature that this model lacks (biases, scaled or partial
            rotary positions, another activation, a sliding window in use).
    """
    model_type = hub.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type={model_type!r}: only {' and '.join(MODEL_TYPES)} checkpoints open here")
    rope = hub.get("rope_parameters") or hub.get("rope_scaling") or {}
    unsupported = {
        "hidden_act": hub.get("hidden_act", "silu") != "silu",
        "attention_bias": hub.get("attention_bias", False),
        "mlp_bias": hub.get("mlp_bias", False),
        "rope scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial rotary positions": (rope | hub).get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": hub.get("use_sliding_window", False),
    }
    found = [name for name, is_set in unsupported.items() if is_set]
    if found:
        raise ValueError(f"the checkpoint uses {', '.join(found)}, which this model does not have")
    missing = [name for name in REQUIRED if hub.get(name) is None]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: give a folder that save_pretrained wrote")
    n_heads = hub["num_attention_heads"]
    return ModelConfig(
        vocab_size=hub["vocab_size"],
        context_length=hub["max_position_embeddings"],
        d_model=hub["hidden_size"],
        n_layers=hub["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=hub.get("num_key_value_heads") or n_heads,
        d_head=hub.get("head_dim"),
        d_ff=hub["intermediate_size"],
        rope_theta=float(rope.get("rope_theta") or hub.get("rope_theta") or 10_000.0),
        norm_eps=hub.get("rms_norm_eps", 1e-6),
        tie_embeddings=hub.get("tie_word_embeddings", False),
        qk_norm=MODEL_TYPES[model_type],
    )


def state_to_hub(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors under Hugging Face's names; a tied head is left out, as there."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "head.weight" and model.config.tie_embeddings:
            continue
        tensors[hub_name(name)] = tensor.detach().contiguous()
    return tensors


def save_pretrained(model: Transformer, folder: str | Path, tokenizer: Savable | None = None) -> Path:
    """Write config.json and model.safetensors (and the tokenizer's files), which `AutoModelForCausalLM` opens.

    All is written under other names first, so that a full disk leaves what was there.

    Raises:
        OSError: the folder cannot be written or is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    texts = {"config.json": config_to_hub(model.config), "generation_config.json": generation}
    names = ("model.safetensors", *texts)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in names}
    try:
        save_file(state_to_hub(model), partial["model.safetensors"], metadata={"format": "pt"})
        for name, content in texts.items():
            partial[name].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        for name in names:
            partial[name].replace(folder / name)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{folder} cannot be written ({error}): is the disk full?") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder


def from_pretrained(name_or_folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """Open a Llama or Qwen3 checkpoint from a local folder, or by its Hub name from the cache or the network.

    Raises:
        ValueError: no such folder and no network, no config.json, an unsupported architecture, a damaged file, or
            tensors that do not fit the configuration.
    """
    folder = local_folder(name_or_folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that save_pretrained wrote")
    try:
        hub = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): save or download the model again") from None
    config = config_from_hub(hub)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or damaged ({error}): save or download it again") from None
    if not tensors:
        raise ValueError(f"{folder} holds no model*.safetensors: only safetensors checkpoints are read")
    return model_from_hub(config, tensors, dtype=dtype)


def model_from_hub(
    config: ModelConfig, tensors: dict[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> Transformer:
    """A model with the weights of `tensors`, which have Hugging Face's names.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    model = Transformer(config).to(dtype)
    tensors = dict(tensors)
    state = {}
    for name, own in model.state_dict().items():
        hub = hub_name(name)
        if hub == "lm_head.weight" and config.tie_embeddings:
            tensors.pop(hub, None)
            state[name] = state["embedding.weight"]
            continue
        tensor = tensors.pop(hub, None)
        if tensor is None or tensor.shape != own.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"tensor {hub} is {found}, config.json asks for {tuple(own.shape)}: not the same model"
            )
        state[name] = tensor.to(dtype)
    left_over = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]
    if left_over:
        raise ValueError(
            f"the checkpoint holds {left_over[0]}, which config.json has no place for: not the same model"
        )
    model.load_state_dict(state)
    return model.eval()


def local_folder(name_or_folder: str | Path) -> Path:
    """The folder itself, or that of the Hub's model of that name, downloaded first if it is not in the cache.

    Raises:
        ValueError: no such folder, and no such name or no network.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(name_or_folder).count("/") != 1:
        raise ValueError(
            f"{name_or_folder}: no such folder; give a checkpoint folder or a Hub name like org/model"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(name_or_folder), allow_patterns=["*.json", "*.jinja", "*.safetensors"])
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"{name_or_folder}: no such folder here, and the Hub cannot be reached or has no such model "
            f"({type(error).__name__}); give a local folder"
        ) from error
