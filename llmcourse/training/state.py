"""The state of a run as named tensors and plain data: weights, optimizers, random generators.

Nothing here is pickled. A pickle is a program that runs when it is opened, so a checkpoint from elsewhere
could do anything; it also ties the file to the classes of today. Tensors go to safetensors, which holds only
names, shapes, types and bytes, and all the rest is JSON.
"""

from __future__ import annotations

import base64
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse.durable import plain


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, without the wrappers of `torch.compile`, DistributedDataParallel and DataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharing memory with the model, wrappers' prefixes removed.

    Raises:
        ValueError: a module keeps extra state that is no tensor.
    """
    tensors = {}
    for name, value in unwrap(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} in the model's state is no tensor but a {type(value).__name__}")
        tensors[name.replace("_orig_mod.", "")] = value.detach()  # of a compiled submodule
    return tensors


def _place(tensor: Tensor) -> tuple[Any, ...]:
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return (tensor.device, tensor.untyped_storage().data_ptr(), *layout)


def separate_shared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that safetensors accepts, and the ties among them as {second name: first name}.

    Tied weights are one tensor with two names; safetensors refuses shared memory, so it is stored once.
    Different views of one storage are copied apart. Returns contiguous tensors, on the device where they
    were.
    """
    distinct: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first_at: dict[tuple[Any, ...], str] = {}
    storages: set[tuple[torch.device, int]] = set()
    for name, tensor in tensors.items():
        place, storage = _place(tensor), (tensor.device, tensor.untyped_storage().data_ptr())
        if tensor.numel() and place in first_at:
            ties[name] = first_at[place]
            continue
        first_at[place] = name
        distinct[name] = tensor.clone() if storage in storages else tensor
        distinct[name] = distinct[name].contiguous()
        storages.add(storage)
    return distinct, ties


def check_tensors(found: dict[str, Tensor], ties: dict[str, str], model: nn.Module) -> None:
    """Refuse saved tensors that are not this model's.

    Raises:
        ValueError: the first tensor that is missing, unknown, tied otherwise, or of another shape or type.
    """
    own = model_tensors(model)
    own_ties = separate_shared(own)[1]
    advice = "build the model with the settings of the run that saved it"
    for name in sorted(own.keys() | found.keys() | ties.keys()):
        if name not in own:
            tensor = found[ties.get(name, name)]
            raise ValueError(f"the checkpoint has {name} {tuple(tensor.shape)}, this model has not: {advice}")
        if name not in found and name not in ties:
            raise ValueError(
                f"this model has {name} {tuple(own[name].shape)}, the checkpoint has not: {advice}"
            )
        saved, here = found[ties.get(name, name)], own[name]
        if saved.shape != here.shape or saved.dtype != here.dtype:
            raise ValueError(
                f"{name} is {tuple(saved.shape)} {saved.dtype} in the checkpoint and "
                f"{tuple(here.shape)} {here.dtype} in this model: {advice}"
            )
        if (name in ties) != (name in own_ties):
            where = (
                "the checkpoint but not this model" if name in ties else "this model but not the checkpoint"
            )
            raise ValueError(f"{name} is tied to {ties.get(name) or own_ties[name]} in {where}: {advice}")


@torch.no_grad()
def restore_model(model: nn.Module, found: dict[str, Tensor], ties: dict[str, str]) -> None:
    """Copy checked tensors into the model in place, so that ties and optimizers stay valid."""
    for name, tensor in model_tensors(model).items():
        if name not in ties:
            tensor.copy_(found[name])


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Any nest of dict, tuple, list, number and text as plain data; tensors go to `tensors[name/...]`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        items = [_encode(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return plain(value, name)


def _decode(value: Any, tensors: dict[str, Tensor], ties: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors, ties) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[ties.get(content, content)]
    if kind == "tuple":
        return tuple(_decode(item, tensors, ties) for item in content)
    return {key: _decode(item, tensors, ties) for key, item in content}


def _describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    shapes = [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "shapes": shapes}


def optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The optimizers' states as tensors with flat names, such as "0/state/3/exp_avg", and plain data.

    Raises:
        ValueError: an optimizer keeps something that is neither tensor, number, text, list, tuple nor dict.
    """
    tensors: dict[str, Tensor] = {}
    entries = [
        {**_describe(optimizer), "state": _encode(optimizer.state_dict(), str(i), tensors)}
        for i, optimizer in enumerate(optimizers)
    ]
    return tensors, entries


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], entries: list[dict[str, Any]]) -> None:
    """Refuse a saved state that belongs to other optimizers.

    Raises:
        ValueError: their number, a class, or the shape of a parameter differs.
    """
    here, saved = (
        [type(optimizer).__name__ for optimizer in optimizers],
        [entry["class"] for entry in entries],
    )
    advice = "build the optimizers with the settings of the run that saved them"
    if here != saved:
        raise ValueError(f"the checkpoint holds optimizers {saved}, this run has {here}: {advice}")
    for i, (optimizer, entry) in enumerate(zip(optimizers, entries, strict=True)):
        own, found = _describe(optimizer)["shapes"], entry["shapes"]
        if own != found:
            raise ValueError(
                f"optimizer {i} ({here[i]}) has groups of {[len(group) for group in own]} parameters, "
                f"in shape or order unlike the checkpoint's {[len(group) for group in found]}: {advice}"
            )


def restore_optimizers(
    optimizers: Sequence[torch.optim.Optimizer],
    entries: list[dict[str, Any]],
    tensors: dict[str, Tensor],
    ties: dict[str, str],
) -> None:
    """Load checked states; each tensor moves to its parameter's device."""
    for optimizer, entry in zip(optimizers, entries, strict=True):
        optimizer.load_state_dict(_decode(entry["state"], tensors, ties))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _to_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy (if imported), torch, and CUDA (if in use), as plain data."""
    state: dict[str, Any] = {
        "python": plain(random.getstate(), "python"),
        "torch": _to_text(torch.get_rng_state()),
    }
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [name, keys.tolist(), *rest]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _to_text(torch.cuda.get_rng_state())
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned; a CUDA state is put back only where there is a CUDA device."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    torch.set_rng_state(_to_tensor(state["torch"]))
    if "numpy" in state:
        import numpy as np

        np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_to_tensor(state["cuda"]))
