"""The reading half of `plain`: bytes that anyone may have written become values, or a `PlainError`."""

from __future__ import annotations

import array
import base64
import binascii
import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_NODES = 400_000
"""parts of one value; each costs the reader some 100 bytes of memory, however few bytes it has"""
MAX_INT_BITS = 4096
MAX_DIMENSIONS = 16
MAX_SAME_HASH = 64


class PlainError(ValueError):
    """A value that cannot be written as plain data, or bytes that are none; the message is one line."""


@dataclasses.dataclass(frozen=True)
class ModuleState:
    """What is left of an `nn.Module`: its state.

    Attributes:
        state: tensors by name.
    """

    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """The tensors by name, as of the module."""
        return dict(self.state)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """An instance of a dataclass that is not the expected one.

    Attributes:
        kind: "module:qualname" of its class.
        fields: its fields.
    """

    kind: str
    fields: dict[str, Any]


def check_parts(data: bytes) -> None:
    """Refuse bytes that would become too many objects.

    Each part of a tree has a comma or a bracket before it: an upper bound without parsing.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > 2 * MAX_NODES:
        raise PlainError(f"the value has more than {MAX_NODES} parts")


def read(data: bytes, classes: Mapping[str, type]) -> Any:
    """The value of `data`; see `plain.decode`."""
    check_parts(data)
    try:
        tree = json.loads(data, parse_constant=_refuse, parse_int=_integer)
        return _Reader(classes).read(tree)
    except PlainError:
        raise
    except RecursionError:
        raise PlainError("the value is nested too deeply") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        RuntimeError,
        OverflowError,
        MemoryError,
        binascii.Error,
    ) as error:
        text = " ".join(str(error).split())[:100]
        raise PlainError(f"these bytes are no plain data: {type(error).__name__}: {text}") from None


class _Reader:
    """Turns the JSON tree into values; counts what packed lists unfold to."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self.classes, self.nodes = classes, 0

    def read(self, tree: Any) -> Any:
        """The value of one part of the tree."""
        self._count(1)
        if isinstance(tree, list):
            return [self.read(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        if len(tree) != 1:
            raise PlainError("an object of plain data has one key, its kind")
        ((kind, content),) = tree.items()
        if kind not in _READERS:
            raise PlainError(f"unknown kind {kind[:20]!r} of plain data")
        return _READERS[kind](self, content)

    def _count(self, nodes: int) -> None:
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise PlainError(f"the value has more than {MAX_NODES} parts")

    def items(self, content: Any) -> list[Any]:
        """The values of a JSON list."""
        return [self.read(item) for item in _typed(content, list)]

    def pairs(self, content: Any) -> dict[Any, Any]:
        """The dictionary of a list of pairs."""
        pairs = [(self.read(key), self.read(item)) for key, item in _typed(content, list)]
        check_hashes(key for key, _ in pairs)
        found = dict(pairs)
        if len(found) != len(pairs):
            raise PlainError("a dictionary of plain data has a key twice")
        return found

    def packed(self, typecode: str, content: Any) -> list[Any]:
        """The list whose bytes these are."""
        data = _base64(content)
        self._count(len(data) // 8)
        values = array.array(typecode)
        values.frombytes(data)
        if sys.byteorder == "big":
            values.byteswap()
        return values.tolist()

    def tensor(self, content: Any) -> Tensor:
        """A tensor in memory of its own."""
        name, shape, requires_grad, text = content
        dtype = _dtype(name)
        data = _base64(text)
        _check_shape(shape, len(data), dtype.itemsize)
        if not data:
            return torch.empty(shape, dtype=dtype, requires_grad=_typed(requires_grad, bool))
        found = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
        return found.requires_grad_() if _typed(requires_grad, bool) else found

    def parameter(self, content: Any) -> Tensor:
        """A parameter."""
        found = self.tensor(content)
        return nn.Parameter(found.detach(), requires_grad=found.requires_grad)

    def array(self, content: Any) -> np.ndarray:
        """An array in memory of its own."""
        name, shape, text = content
        data = _base64(text)
        dtype = _array_dtype(name)
        _check_shape(shape, len(data), dtype.itemsize)
        found = np.frombuffer(data, dtype=dtype) if data else np.empty(0, dtype)
        return found.reshape(shape).astype(dtype.newbyteorder("="), copy=True)

    def scalar(self, content: Any) -> np.generic:
        """A scalar of numpy."""
        name, text = content
        return self.array([name, [], text])[()]

    def module(self, content: Any) -> ModuleState:
        """A module's state."""
        _, state = content
        found = self.read(state)
        if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
            raise PlainError("the state of a module is a dictionary of tensors")
        return ModuleState(found)

    def data(self, content: Any) -> Any:
        """An instance of an expected dataclass, else an `Opaque`."""
        name, pairs = content
        fields = self.pairs(pairs)
        if not all(isinstance(key, str) for key in fields):
            raise PlainError("the fields of a dataclass have names")
        kind = self.classes.get(_typed(name, str))
        if kind is None or {field.name for field in dataclasses.fields(kind)} != set(fields):
            return Opaque(name, fields)
        found = object.__new__(kind)
        for field, value in fields.items():
            object.__setattr__(found, field, value)
        return found


def _refuse(text: str) -> None:
    raise PlainError(f"{text} is no number of plain data")


def _integer(text: str) -> int:
    if len(text) > 20:
        raise PlainError("an integer of plain data is too long")
    return int(text)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise PlainError(f"plain data has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _base64(text: Any) -> bytes:
    return base64.b64decode(_typed(text, str), validate=True)


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, _typed(name, str), None)
    if not isinstance(found, torch.dtype):
        raise PlainError(f"unknown dtype {name[:20]!r}")
    return found


def _array_dtype(name: Any) -> np.dtype:
    if not re.fullmatch(r"[<|][biufcUSmM][0-9]{1,6}(\[[0-9]{0,3}[a-zA-Z]{1,2}\])?", _typed(name, str)):
        raise PlainError(f"unknown dtype {name[:20]!r}")
    return np.dtype(name)


def _check_shape(shape: Any, size: int, item_size: int) -> None:
    """Refuse a shape that is not that of so many bytes: nothing is allocated by what a shape claims."""
    lengths = _typed(shape, list)
    if len(lengths) > MAX_DIMENSIONS or not all(
        type(length) is int and 0 <= length < 2**40 for length in lengths
    ):
        raise PlainError("a shape of plain data has too many or impossible dimensions")
    if math.prod(lengths) * item_size != size:
        raise PlainError(f"plain data has {size} bytes for the shape {lengths} of {item_size} bytes each")


def _float(reader: _Reader, content: Any) -> float:
    if content not in ("nan", "inf", "-inf"):
        raise PlainError("plain data writes as text only floats that are not finite")
    return float(content)


def _int(reader: _Reader, content: Any) -> int:
    if len(_typed(content, str)) > MAX_INT_BITS // 4 + 4:
        raise PlainError("an integer of plain data is too long")
    return int(content, 16)


def _complex(reader: _Reader, content: Any) -> complex:
    real, imaginary = (_typed(part, float) for part in reader.items(content))
    return complex(real, imaginary)


def _range(reader: _Reader, content: Any) -> range:
    start, stop, step = (_typed(part, int) for part in reader.items(content))
    if max(map(abs, (start, stop, step))) > 2**53:
        raise PlainError("a range of plain data is too long")
    return range(start, stop, step)


def check_hashes(items: Iterable[Any]) -> None:
    """Refuse keys of which many have one hash: a set or dictionary of them takes time quadratic in their number."""
    most = max(Counter(map(hash, items)).values(), default=0)
    if most > MAX_SAME_HASH:
        raise PlainError(f"{most} keys of a set or dictionary have the same hash")


def _set(kind: type) -> Callable[[_Reader, Any], Any]:
    def read_set(reader: _Reader, content: Any) -> Any:
        items = reader.items(content)
        check_hashes(items)
        return kind(items)

    return read_set


def _size(reader: _Reader, content: Any) -> torch.Size:
    return torch.Size([_typed(length, int) for length in reader.items(content)])


_READERS: dict[str, Callable[[_Reader, Any], Any]] = {
    "int": _int,
    "float": _float,
    "complex": _complex,
    "bytes": lambda reader, content: _base64(content),
    "tuple": lambda reader, content: tuple(reader.items(content)),
    "dict": _Reader.pairs,
    "set": _set(set),
    "frozenset": _set(frozenset),
    "dlist": lambda reader, content: reader.packed("d", content),
    "qlist": lambda reader, content: reader.packed("q", content),
    "range": _range,
    "array": _Reader.array,
    "scalar": _Reader.scalar,
    "tensor": _Reader.tensor,
    "parameter": _Reader.parameter,
    "dtype": lambda reader, content: _dtype(content),
    "device": lambda reader, content: torch.device(_typed(content, str)),
    "size": _size,
    "module": _Reader.module,
    "data": _Reader.data,
}
