"""Adapters as folders in the format of Hugging Face's peft: ours open there, LoRA and prompts from there open here.

A folder holds adapter_config.json and adapter_model.safetensors. Beside the tensors ours record a fingerprint of the
base model, because an adapter on the wrong base of the right size is not an error that anyone sees, only a bad model.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmcourse.models.adapters import PromptEmbedding, PromptSettings, add_prompt
from llmcourse.models.lora import LINEARS, LoRASettings, add_lora, lora_layers
from llmcourse.models.pretrained import BLOCK_NAMES, hub_name, local_folder
from llmcourse.models.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HUB_LEAVES = {BLOCK_NAMES[name].split(".")[-1]: name.split(".")[-1] for name in BLOCK_NAMES}
"""peft's names of the matrices of a block -> ours"""
PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "magnitude"}
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""the others change the base weights too, which an adapter folder does not hold"""
PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "trainable_token_indices": None,
    "target_parameters": None,
    "use_qalora": False,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "velora_config": None,
    "monteclora_config": None,
    "kasa_config": None,
}
"""entries of adapter_config.json whose other values mean something that is not implemented here"""


def base_fingerprint(model: Transformer) -> str:
    """SHA-256 of the base's sizes and of its embeddings, norms and head in bfloat16, in hexadecimal.

    These are the tensors that neither quantization nor an adapter touches, so that a base has one fingerprint in
    float32, bfloat16 and NF4, with and without adapters. Another training run changes all of them.
    """
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    embedding = model.embedding
    tensors = {"embedding": embedding.weight, "final_norm": model.final_norm.weight}
    if not model.config.tie_embeddings:
        tensors["head"] = model.head.weight
    for number, block in enumerate(model.blocks):
        tensors |= {
            f"attention_norm.{number}": block.attention_norm.weight,
            f"mlp_norm.{number}": block.mlp_norm.weight,
        }
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()
        )
    return digest.hexdigest()


def lora_config_to_peft(settings: LoRASettings, base_name: str | None = None) -> dict[str, Any]:
    """The adapter_config.json of the same LoRA."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": [hub for hub, own in HUB_LEAVES.items() if own in settings.targets],
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "bias": "none",
        "fan_in_fan_out": False,
    }


def lora_config_from_peft(config: dict[str, Any], targets: tuple[str, ...]) -> LoRASettings:
    """Settings of an adapter_config.json; `targets` are read off the tensors, since the file may hold a pattern.

    Raises:
        ValueError: the file asks for something that is not implemented here, or has no rank.
    """
    found = [
        f"{name}={config[name]!r}" for name, plain in PLAIN.items() if config.get(name) not in (plain, None)
    ]
    if config.get("init_lora_weights") not in PLAIN_INITS:
        found.append(f"init_lora_weights={config['init_lora_weights']!r}")
    if found:
        raise ValueError(f"the adapter uses {', '.join(found)}, which is not implemented here")
    if not isinstance(config.get("r"), int):
        raise ValueError(
            f"{CONFIG} has r={config.get('r')!r}, no rank: give a folder that peft or save_adapter wrote"
        )
    return LoRASettings(
        rank=config["r"],
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        targets=targets,
        init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
        rslora=config.get("use_rslora", False),
        dora=config.get("use_dora", False),
    )


def save_adapter(model: Transformer, folder: str | Path, *, base_name: str | None = None) -> Path:
    """Write the model's LoRA or its trained prompt, and nothing of the base; returns the folder.

    `base_name` is the base's folder or Hub name, which peft's `AutoPeftModel` opens by itself.

    Raises:
        ValueError: the model has neither, or both.
        OSError: the folder cannot be written or is full.
    """
    layers = lora_layers(model)
    has_prompt = isinstance(model.embedding, PromptEmbedding)
    if bool(layers) == has_prompt:
        found = "both LoRA and a prompt" if layers else "neither LoRA nor a prompt"
        raise ValueError(f"the model has {found}: an adapter folder holds one of them")
    if has_prompt:
        config, tensors = _prompt_config(model, base_name), {"prompt_embeddings": model.embedding.prompt}
    else:
        config = lora_config_to_peft(next(iter(layers.values())).settings, base_name)
        tensors = {
            f"{_peft_stem(name)}.{part}": getattr(layer, own)
            for name, layer in layers.items()
            for part, own in PARTS.items()
            if getattr(layer, own) is not None
        }
    return _write(Path(folder), config, tensors, base_fingerprint(model))


def _prompt_config(model: Transformer, base_name: str | None) -> dict[str, Any]:
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "num_virtual_tokens": len(model.embedding.prompt),
        "token_dim": model.config.d_model,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.config.n_heads,
        "num_layers": model.config.n_layers,
    }


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], fingerprint: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    partial = {name: folder / f".{name}.{os.getpid()}.partial" for name in (WEIGHTS, CONFIG)}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(content, partial[WEIGHTS], metadata={"format": "pt", "base_fingerprint": fingerprint})
        partial[CONFIG].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, path in partial.items():
            path.replace(folder / name)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{folder} cannot be written ({error}): is the disk full?") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return folder


def load_adapter(model: Transformer, name_or_folder: str | Path, *, any_base: bool = False) -> Transformer:
    """Put the adapter of a folder (or a Hub name) on its base, in place; returns the model, its adapter trainable.

    Everything is checked before the model is touched. Adapters that peft wrote carry no fingerprint: for them names and
    sizes are all that can be compared. `any_base` skips the fingerprint, for an adapter that is to move on purpose.

    Raises:
        ValueError: no such folder, a damaged file, an unsupported kind or option, numbers that are not finite, a model
            that has an adapter already, or an adapter for another base.
    """
    folder = local_folder(name_or_folder)
    config = _read_config(folder / CONFIG)
    tensors, fingerprint = _read_tensors(folder / WEIGHTS)
    kind = config.get("peft_type")
    if kind not in ("LORA", "PROMPT_TUNING"):
        raise ValueError(f"{folder} holds an adapter of type {kind!r}: LORA and PROMPT_TUNING open here")
    if lora_layers(model) or isinstance(model.embedding, PromptEmbedding):
        raise ValueError("the model has an adapter already: fold_lora, remove_lora or remove_prompt first")
    own = base_fingerprint(model)
    if kind == "LORA":
        loaded = _check_lora(model, config, tensors)
    else:
        _check_prompt(model, tensors)
    if fingerprint not in (None, own) and not any_base:
        raise ValueError(
            f"the adapter was trained on another base (fingerprint {fingerprint[:12]}, this model has {own[:12]}): "
            "open "
            "the base that it was trained on, or pass any_base=True"
        )
    with torch.no_grad():
        if kind == "LORA":
            add_lora(model, loaded)
            for name, layer in lora_layers(model).items():
                for part, attribute in PARTS.items():
                    if getattr(layer, attribute) is not None:
                        getattr(layer, attribute).copy_(tensors[f"{_peft_stem(name)}.{part}"])
        else:
            rows = tensors["prompt_embeddings"]
            add_prompt(model, PromptSettings(length=len(rows)))
            model.embedding.prompt.copy_(rows)
    return model


def _peft_stem(name: str) -> str:
    """Of "blocks.0.mlp.up": "base_model.model.model.layers.0.mlp.up_proj"."""
    try:
        return PREFIX + hub_name(f"{name}.weight").removesuffix(".weight")
    except KeyError:
        raise ValueError(f"layer {name} stands inside another adapter: call remove_adapters first") from None


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {CONFIG}: give a folder that save_adapter or peft wrote")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not readable as JSON ({error}): save or download the adapter again"
        ) from None


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {WEIGHTS}: only safetensors adapters are read")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            fingerprint = (file.metadata() or {}).get("base_fingerprint")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): save or download it again") from None
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise ValueError(
            f"{path} holds NaN or infinity in {broken[0]}: the training run that wrote it failed"
        )
    return tensors, fingerprint


def _check_lora(model: Transformer, config: dict[str, Any], tensors: dict[str, Tensor]) -> LoRASettings:
    """The settings, once every tensor has a place of its shape and every place a tensor."""
    sizes = {
        _peft_stem(name): (module.out_features, module.in_features, name.split(".")[-1])
        for name, module in model.named_modules()
        if name.split(".")[-1] in LINEARS and hasattr(module, "out_features")
    }
    stems = {name.split(".lora_")[0] for name in tensors}
    strange = sorted(stems - set(sizes))
    if strange or not stems:
        place = strange[0].removeprefix(PREFIX) if strange else "nothing"
        raise ValueError(
            f"the adapter is for {place}, which this model cannot adapt: it belongs to another base"
        )
    targets = tuple(own for own in LINEARS if own in {sizes[stem][2] for stem in stems})
    settings = lora_config_from_peft(config, targets)
    expected: dict[str, tuple[int, ...]] = {}
    for stem, (out, into, own) in sizes.items():
        if own in targets:
            expected |= {
                f"{stem}.lora_A.weight": (settings.rank, into),
                f"{stem}.lora_B.weight": (out, settings.rank),
            }
            if settings.dora:
                expected[f"{stem}.lora_magnitude_vector"] = (out,)
    _compare(expected, tensors)
    return settings


def _check_prompt(model: Transformer, tensors: dict[str, Tensor]) -> None:
    rows = len(tensors.get("prompt_embeddings", ()))
    _compare({"prompt_embeddings": (rows, model.config.d_model)}, tensors)


def _compare(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    for name, shape in expected.items():
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        if found != shape:
            raise ValueError(
                f"adapter tensor {name.removeprefix(PREFIX)} is {found}, this model needs {shape}: it belongs to "
                "another base"
            )
    left_over = sorted(set(tensors) - set(expected))
    if left_over:
        raise ValueError(
            f"the adapter holds {left_over[0]}, which {CONFIG} does not account for: not one adapter"
        )
