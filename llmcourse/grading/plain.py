"""Values as plain data: the only form in which an answer leaves the process that ran it.

Bytes of JSON, never pickle, so that reading them runs no code and costs at most a small multiple of their length. Only
exact types are written: an object of a class of the student's (a float that equals everything, an array whose
methods were replaced) is refused, and so no method of such a class ever takes part in a comparison. Numbers and
texts are themselves; everything else is an object with one key, the kind:

    {"tensor": ["float32", [2, 3], false, "<base64>"]}   {"tuple": [1, 2]}   {"float": "nan"}   {"dict": [[key, value]]}
"""

from __future__ import annotations

import array
import base64
import dataclasses
import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmcourse.grading.plain_reading import (
    MAX_INT_BITS,
    MAX_NODES,
    ModuleState,
    Opaque,
    PlainError,
    check_parts,
    read,
)

__all__ = ["ModuleState", "Opaque", "PlainError", "decode", "encode"]

PACKED_LENGTH = 16
"""lists of at least so many floats, or of so many integers, are written as their bytes"""


def encode(value: Any, *, limit_bytes: int, depth: int = 64) -> bytes:
    """A value as plain data.

    Tensors and parameters keep dtype, shape and whether they require a gradient, and become contiguous on the CPU; a
    module becomes its state; a dictionary of a kind of `collections` a plain one.

    Args:
        value: numbers, texts, bytes, None, lists, tuples, dictionaries, sets, ranges, numpy arrays and scalars,
            tensors, modules, instances of dataclasses, `torch.dtype`, `torch.device`, `torch.Size`, nested at will.
        limit_bytes: greatest length of the result.
        depth: greatest nesting.

    Raises:
        PlainError: an object of another kind, too much data, or too deep; one line.
    """
    writer = _Writer(limit_bytes)
    tree = writer.write(value, depth, "the value")
    data = json.dumps(tree, separators=(",", ":"), allow_nan=False).encode("ascii")
    check_parts(data)
    if len(data) > limit_bytes:
        raise PlainError(f"the value takes more than {limit_bytes} bytes as plain data")
    return data


def decode(data: bytes, *, like: Any = None) -> Any:
    """The value that `encode` wrote, of bytes that anyone may have written.

    Args:
        data: the bytes.
        like: the expected value: an instance of a dataclass becomes one again only if its class occurs in here (it is
            filled without calling its `__init__`); otherwise it becomes an `Opaque`. A module becomes a `ModuleState`.

    Raises:
        PlainError: these are not the bytes of a value; one line.
    """
    return read(data, _dataclasses_in(like))


class _Writer:
    """Builds the JSON tree and counts bytes and nodes, so that it stops before it built too much."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.left, self.nodes = limit_bytes, limit_bytes, 0

    def write(self, value: Any, depth: int, where: str) -> Any:
        """The JSON tree of one value."""
        if depth < 0:
            raise PlainError(f"{where[:60]} is nested too deeply")
        self._count(1, 1)
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in _SCALARS:
            return _SCALARS[kind](self, value, where)
        if kind in _CONTAINERS or _is_return_tuple(kind):
            return self._container(value, kind, depth, where)
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, where)
        if kind is np.ndarray:
            return self._array(value, where)
        if kind in _NUMPY_SCALARS:
            name, _, data = self._array(np.asarray(value), where)["array"]
            return {"scalar": [name, data]}
        if isinstance(value, nn.Module):
            return {"module": [_name(kind), self.write(_state(value), depth - 1, f"{where}.state_dict()")]}
        if dataclasses.is_dataclass(kind):
            names = [field.name for field in dataclasses.fields(kind)]
            pairs = [(name, object.__getattribute__(value, name)) for name in names]
            return {"data": [_name(kind), self._pairs(pairs, depth, where)]}
        raise PlainError(f"{where[:60]} is no plain data but of the type {_name(kind)}")

    def _require(self, size: int) -> None:
        if size > self.left:
            raise PlainError(f"the value takes more than {self.limit_bytes} bytes as plain data")

    def _count(self, size: int, nodes: int) -> None:
        self._require(size)
        self.left -= size
        self.nodes += nodes
        if self.nodes > MAX_NODES:
            raise PlainError(f"the value has more than {MAX_NODES} parts")

    def integer(self, value: int, where: str) -> Any:
        """Small ones as themselves, great ones in hexadecimal: JSON readers take quadratic time for these."""
        if -(2**63) <= value < 2**63:
            return value
        if value.bit_length() > MAX_INT_BITS:
            raise PlainError(f"{where[:60]} is an integer of more than {MAX_INT_BITS} bits")
        return {"int": hex(value)}

    def text(self, value: str, where: str) -> str:
        """Itself."""
        self._count(len(value), 0)
        return value

    def bytes_(self, value: bytes | bytearray, where: str) -> Any:
        """In base64."""
        return {"bytes": self._base64(value)}

    def _base64(self, data: Any) -> str:
        self._count(4 * (memoryview(data).nbytes // 3 + 1), 0)
        return base64.b64encode(data).decode("ascii")

    def _container(self, value: Any, kind: type, depth: int, where: str) -> Any:
        if kind in (dict, OrderedDict, defaultdict, Counter):
            return {"dict": self._pairs(dict.items(value), depth, where)}
        if kind in (set, frozenset):
            items = self._items(kind.__iter__(value), depth, where)
            return {kind.__name__: sorted(items, key=lambda item: json.dumps(item))}
        if kind is list and (packed := _packed(value)):
            self._count(0, len(value))
            return {packed.typecode + "list": self._base64(packed)}
        items = self._items(list.__iter__(value) if kind is list else tuple.__iter__(value), depth, where)
        return items if kind is list else {"tuple": items}

    def _items(self, values: Iterable[Any], depth: int, where: str) -> list[Any]:
        return [self.write(item, depth - 1, f"{where}[{number}]") for number, item in enumerate(values)]

    def _pairs(self, pairs: Iterable[tuple[Any, Any]], depth: int, where: str) -> list[Any]:
        return [
            [
                self.write(key, depth - 1, f"a key of {where}"),
                self.write(item, depth - 1, f"{where}[{key!r:.20}]" if type(key) in (str, int) else where),
            ]
            for key, item in pairs
        ]

    def _tensor(self, value: Tensor, where: str) -> Any:
        if Tensor.layout.__get__(value) is not torch.strided or Tensor.device.__get__(value).type == "meta":
            raise PlainError(f"{where[:60]} is a tensor without plain values (sparse, or on the meta device)")
        dtype, shape = str(Tensor.dtype.__get__(value)).removeprefix("torch."), list(Tensor.size(value))
        self._require(Tensor.numel(value) * Tensor.element_size(value))  # before an expanded one is copied
        if value.is_quantized:
            raise PlainError(f"{where[:60]} is a quantized tensor: dequantize it first")
        plain = Tensor.cpu(Tensor.detach(value)).resolve_conj().resolve_neg()
        data = self._base64(
            Tensor.numpy(Tensor.view(Tensor.contiguous(Tensor.reshape(plain, (-1,))), torch.uint8))
        )
        kind = "parameter" if type(value) is nn.Parameter else "tensor"
        return {kind: [dtype, shape, bool(Tensor.requires_grad.__get__(value)), data]}

    def _array(self, value: np.ndarray, where: str) -> Any:
        if value.dtype.kind not in "biufcUSmM" or value.dtype.hasobject:
            raise PlainError(f"{where[:60]} is an array of {value.dtype}: use numbers or texts")
        self._require(value.nbytes)
        data = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        raw = data.tobytes()
        return {"array": [data.dtype.str, list(value.shape), self._base64(raw)]}


def _float(writer: _Writer, value: float, where: str) -> Any:
    return value if math.isfinite(value) else {"float": repr(value)}


def _complex(writer: _Writer, value: complex, where: str) -> Any:
    return {"complex": [_float(writer, value.real, where), _float(writer, value.imag, where)]}


_SCALARS: dict[type, Any] = {
    int: _Writer.integer,
    float: _float,
    str: _Writer.text,
    bytes: _Writer.bytes_,
    bytearray: _Writer.bytes_,
    complex: _complex,
    torch.dtype: lambda writer, value, where: {"dtype": str(value).removeprefix("torch.")},
    torch.device: lambda writer, value, where: {"device": str(value)},
    torch.Size: lambda writer, value, where: {"size": [int(length) for length in value]},
    range: lambda writer, value, where: {
        "range": [writer.integer(part, where) for part in (value.start, value.stop, value.step)]
    },
}
_NUMPY_SCALARS = frozenset(np.sctypeDict.values())
_CONTAINERS = frozenset({list, tuple, dict, set, frozenset, OrderedDict, defaultdict, Counter})


def _is_return_tuple(kind: type) -> bool:
    """Whether it is what `torch.topk` and its kin return."""
    return issubclass(kind, tuple) and kind is getattr(torch.return_types, kind.__name__, None)


def _packed(values: list[Any]) -> array.array[Any] | None:
    """A long list of floats only, or of integers only, as an array; `None` for any other."""
    if len(values) < PACKED_LENGTH:
        return None
    kinds = set(map(type, values))
    if kinds == {float}:
        return array.array("d", values)
    if kinds == {int} and -(2**63) <= min(values) and max(values) < 2**63:
        return array.array("q", values)
    return None


def _state(module: nn.Module) -> dict[str, Any]:
    state = nn.Module.state_dict(module)
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"[:200]


def _dataclasses_in(value: Any, depth: int = 64) -> dict[str, type]:
    """The dataclasses whose instances occur in a trusted value, by the name that `encode` writes."""
    found: dict[str, type] = {}

    def visit(item: Any, depth: int) -> None:
        for inner in _inside(item) if depth else ():
            visit(inner, depth - 1)
        if dataclasses.is_dataclass(item) and not isinstance(item, type | ModuleState | Opaque):
            found[_name(type(item))] = type(item)

    visit(value, depth)
    return found


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
