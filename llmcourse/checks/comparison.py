"""Where two values differ, in one line: nested structures of tensors, arrays, numbers, strings.

Mathematically equal answers are equal here (a list for a tuple, 3.0 for 3, a float for a tensor without dimensions);
what changes how the value can be used further (shape, dtype, a cut gradient, NaN) is reported by its own name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def difference(
    expected: Any, got: Any, *, rtol: float = 1e-5, atol: float = 1e-6, where: str = ""
) -> str | None:
    """The first difference between two values as one line, or `None` when they agree.

    Floating-point numbers agree when |got - expected| <= atol + rtol * |expected|; NaN agrees with NaN only. Integers,
    booleans and strings must be equal. Containers are compared element by element, dataclasses field by field, modules
    by their state.

    Args:
        where: what to call the value in the message, for example `"[1]['loss']"`.

    Raises:
        ValueError: `expected` is of a type that cannot be compared; give the exercise a `run` that returns plain data.
    """
    if got is None and expected is not None:
        return f"{_subject(where)} is None: is a return statement missing?"
    if isinstance(expected, Tensor):
        return _tensor(expected, got, rtol, atol, where)
    if isinstance(expected, np.ndarray):
        if not isinstance(got, np.ndarray):
            return _kinds(expected, got, where)
        if expected.dtype != got.dtype:
            return f"{_subject(where)} has dtype {got.dtype}, expected {expected.dtype}"
        return _tensor(torch.from_numpy(expected.copy()), torch.from_numpy(got.copy()), rtol, atol, where)
    if isinstance(expected, (Number, np.generic)):
        return _number(expected, got, rtol, atol, where)
    if isinstance(expected, (str, bytes, type(None), torch.dtype, torch.device, torch.Size, set, frozenset)):
        equal = type(got) is type(expected) and got == expected
        return None if equal else f"{_subject(where)} is {short(got)}, expected {short(expected)}"
    return _container(expected, got, rtol, atol, where)


def short(value: Any, limit: int = 60) -> str:
    """A value in a few characters: a tensor as its shape and dtype, anything else as its cut `repr`."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 0:
            return f"{value.item():.6g}" if np.isreal(value.item()) else str(value.item())
        return (
            f"{type(value).__name__.lower()} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
        )
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, nn.Module):
        return type(value).__name__
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _subject(where: str) -> str:
    return f"result{where}"


def _kinds(expected: Any, got: Any, where: str) -> str:
    return f"{_subject(where)} is a {type(got).__name__} ({short(got)}), expected {short(expected)}"


def _tensor(expected: Tensor, got: Any, rtol: float, atol: float, where: str) -> str | None:
    if not isinstance(got, Tensor):
        plain = expected.ndim == 0 and not expected.requires_grad and isinstance(got, (Number, np.generic))
        return _number(expected.item(), got, rtol, atol, where) if plain else _kinds(expected, got, where)
    name = _subject(where)
    if expected.shape != got.shape:
        return f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if expected.dtype != got.dtype:
        return f"{name} has dtype {_dtype(got)}, expected {_dtype(expected)}"
    if expected.requires_grad and not got.requires_grad:
        return f"{name} is cut off from the gradient: detach(), item(), no_grad() or a copy as a new tensor"
    expected, got = expected.detach().cpu(), got.detach().cpu()
    if expected.is_floating_point() and bool((got.isnan() & ~expected.isnan()).any()):
        return f"{name} holds NaN in {int(got.isnan().sum())} of {got.numel()} places"
    wrong = (
        ~torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
        if _inexact(got)
        else got != expected
    )
    if not bool(wrong.any()):
        return None
    at = tuple(wrong.nonzero()[0].tolist())
    place = f" at {list(at)}" if at else ""
    count = f" ({int(wrong.sum())} of {wrong.numel()} values differ)" if wrong.numel() > 1 else ""
    return f"{name}{place} is {_value(got[at])}, expected {_value(expected[at])}{count}"


def _inexact(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _value(scalar: Tensor) -> str:
    return f"{scalar.item():.6g}" if scalar.is_floating_point() else str(scalar.item())


def _number(expected: Any, got: Any, rtol: float, atol: float, where: str) -> str | None:
    if isinstance(got, (Tensor, np.ndarray)):
        if got.ndim:
            return f"{_subject(where)} has shape {tuple(got.shape)}, expected a single number"
        got = got.item()
    expected, got = (value.item() if isinstance(value, np.generic) else value for value in (expected, got))
    if not isinstance(got, Number) or isinstance(expected, bool) != isinstance(got, bool):
        return _kinds(expected, got, where)
    if isinstance(got, float) and math.isnan(got):
        both = isinstance(expected, float) and math.isnan(expected)
        return None if both else f"{_subject(where)} is NaN, expected {short(expected)}"
    if isinstance(expected, int) and isinstance(got, int):
        agree = expected == got
    else:
        agree = got == expected or abs(got - expected) <= atol + rtol * abs(expected)
    return None if agree else f"{_subject(where)} is {short(got)}, expected {short(expected)}"


def _container(expected: Any, got: Any, rtol: float, atol: float, where: str) -> str | None:
    if isinstance(expected, Mapping):
        if not isinstance(got, Mapping):
            return _kinds(expected, got, where)
        if set(expected) != set(got):
            return (
                f"{_subject(where)} has the keys {short(sorted(map(str, got)))}, expected {_keys(expected)}"
            )
        pairs = [(expected[key], got[key], f"{where}[{key!r}]") for key in expected]
    elif isinstance(expected, nn.Module):
        if not isinstance(got, nn.Module):
            return _kinds(expected, got, where)
        pairs = [(expected.state_dict(), got.state_dict(), f"{where}.state_dict()")]
    elif dataclasses.is_dataclass(expected):
        if type(got) is not type(expected):
            return _kinds(expected, got, where)
        names = [field.name for field in dataclasses.fields(expected)]
        pairs = [(getattr(expected, name), getattr(got, name), f"{where}.{name}") for name in names]
    elif isinstance(expected, Sequence):
        if not isinstance(got, Sequence) or isinstance(got, (str, bytes)):
            return _kinds(expected, got, where)
        if len(expected) != len(got):
            return f"{_subject(where)} has {len(got)} elements, expected {len(expected)}"
        pairs = [(*both, f"{where}[{i}]") for i, both in enumerate(zip(expected, got, strict=True))]
    else:
        kind = type(expected).__name__
        raise ValueError(
            f"cannot compare a {kind}: give the exercise a `run` that returns tensors, numbers or strings"
        )
    found = (difference(a, b, rtol=rtol, atol=atol, where=place) for a, b, place in pairs)
    return next((message for message in found if message), None)


def _keys(mapping: Mapping[Any, Any]) -> str:
    return short(sorted(map(str, mapping)))
