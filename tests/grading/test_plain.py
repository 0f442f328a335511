"""Values survive the codec unchanged; what is no plain data, too much or forged is refused in one line."""

from __future__ import annotations

import collections
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llmcourse.checks.comparison import difference
from llmcourse.grading.plain import ModuleState, Opaque, PlainError, decode, encode
from llmcourse.grading.plain_reading import MAX_NODES


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: torch.Tensor


@dataclasses.dataclass
class Other:
    x: int


def through(value, like=None, limit=1 << 24):
    return decode(encode(value, limit_bytes=limit), like=like)


def same(a, b) -> bool:
    """Equal with equal types all the way down, NaN equal to NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        return alike and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    if isinstance(a, np.ndarray | np.generic):
        return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, float | complex):
        return repr(a) == repr(b)
    return a == b


VALUES = [
    None, True, 0, -1, 2**63 - 1, -(2**63), 2**63, -(10**400), 3.0, -0.0, 1e-320, math.inf, -math.inf, math.nan,
    1 + 2j, complex(math.nan, -math.inf), "", "é\U0001f600\n\0", "\ud800", b"", b"\0\xff", [], [[]],
    (), (1, (2.0,), [3]),
    {}, {"a": 1, 2: "b", (1, 2): [None], None: {}}, {1: 1.0, "1": 2}, set(), {1, 2.5, "x"}, frozenset({(1, 2)}),
    range(3, 30, 5), torch.float16, torch.device("cpu"), torch.device("cuda:1"), torch.Size([2, 3]), torch.Size([]),
    np.float32(1.5), np.int8(-3), np.bool_(True), np.str_("word"), np.datetime64("2020-01-01"),
    np.zeros((0, 3)), np.arange(6.0).reshape(2, 3), np.array(5), np.array(["a", "bcd"]), np.array([True, False]),
    np.array([1 + 2j]), list(range(1000)), [0.5] * 40 + [math.nan, math.inf], [True] * 40, [1, 2.0] * 20, [2**64] * 20,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_values_come_back_as_they_were(value):
    assert same(through(value), value)


TENSORS = [
    torch.tensor(3), torch.tensor([]), torch.zeros(0, 5, 2), torch.arange(12.0).reshape(3, 4).T,
    torch.randn(5, 6, dtype=torch.float64)[::2, 1::3], torch.tensor([True, False]), torch.zeros(3, 2, dtype=torch.int8),
    torch.tensor([math.nan, -0.0, math.inf]), torch.randn(3, dtype=torch.complex64).conj(), torch.ones(1).expand(50),
    torch.randn(4, requires_grad=True), nn.Parameter(torch.randn(2, 2)),
    nn.Parameter(torch.ones(2), requires_grad=False),
]  # fmt: skip


@pytest.mark.parametrize("value", TENSORS, ids=lambda value: f"{value.dtype} {tuple(value.shape)}")
def test_tensors_come_back_with_dtype_shape_and_gradient_flag(value):
    found = through(value)
    assert type(found) is type(value) and (found.shape, found.dtype) == (value.shape, value.dtype)
    assert found.requires_grad == value.requires_grad
    assert torch.equal(found.detach().nan_to_num(), value.detach().nan_to_num())
    found.detach().fill_(1)  # the memory is its own


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.uint8, torch.int64]
)
def test_every_kind_of_number_of_torch(dtype):
    value = torch.arange(6).to(dtype).reshape(2, 3)
    assert torch.equal(through(value).float(), value.float()) and through(value).dtype == dtype


def test_dictionaries_of_collections_become_plain_ones_and_modules_their_state():
    counter, ordered = collections.Counter("abca"), collections.OrderedDict(b=1, a=2)
    assert through([counter, ordered, collections.defaultdict(int, x=1)]) == [
        dict(counter),
        dict(ordered),
        {"x": 1},
    ]
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    state = through(module)
    assert type(state) is ModuleState and list(state.state_dict()) == list(module.state_dict())
    assert difference(state, through(module)) is None
    with torch.no_grad():
        module[0].weight += 1
    assert "state" in difference(state, through(module))
    assert through(torch.randn(5).topk(2))[1].dtype == torch.int64


def test_a_dataclass_comes_back_only_if_it_is_expected():
    value = [Point(1, torch.ones(2)), {"k": Other(3)}]
    found = through(value, like=value)
    assert type(found[0]) is Point and torch.equal(found[0].y, torch.ones(2)) and found[1]["k"] == Other(3)
    unexpected = through(value, like=[Point(2, torch.ones(1))])
    assert type(unexpected[0]) is Point and unexpected[1]["k"] == Opaque(f"{__name__}:Other", {"x": 3})
    assert type(through(Point(1, torch.ones(1)))) is Opaque
    forged = encode(Point(1, torch.ones(1)), limit_bytes=999).replace(b'"x"', b'"z"')
    assert type(decode(forged, like=Point(1, torch.ones(1)))) is Opaque


def test_the_order_of_a_set_does_not_show_in_its_bytes():
    assert encode({"b", "a", "c"}, limit_bytes=99) == encode({"c", "b", "a"}, limit_bytes=99)


class AlwaysEqual(float):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = float.__hash__


REFUSED = [
    AlwaysEqual(1.0), type("S", (str,), {})("x"), type("L", (list,), {})(), type("D", (dict,), {})(), object(), len,
    type("A", (np.ndarray,), {})((2,)), type("T", (torch.Tensor,), {})(), np.array([object()]), np.zeros(2, "i4,f4"),
    torch.eye(2).to_sparse(), torch.empty(2, device="meta"), int, Point, (n for n in ()), memoryview(b"x"),
    collections.namedtuple("N", "a")(1), 2**5000,
]  # fmt: skip


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_is_no_plain_data_is_refused_and_named(value):
    with pytest.raises(PlainError, match="^the value\\[0\\]") as caught:
        encode([value], limit_bytes=10**6)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict"])
def test_keys_of_one_hash_are_refused(kind):
    """A hundred thousand of them would take hours, in one call that nothing interrupts."""
    keys = [{"int": hex(n * (2**61 - 1))} for n in range(1, 100_000)]
    content = [[key, 0] for key in keys[:50_000]] if kind == "dict" else keys
    with pytest.raises(PlainError, match="have the same hash"):
        decode(json.dumps({kind: content}).encode())


def test_too_much_is_refused_before_it_is_built():
    for value in (
        "x" * 2000,
        b"x" * 2000,
        torch.zeros(1).expand(10**12),
        np.broadcast_to(1.0, (10**9,)),
        [1.0] * 500,
    ):
        with pytest.raises(PlainError, match="takes more than 1000 bytes"):
            encode(value, limit_bytes=1000)
    with pytest.raises(PlainError, match="parts"):
        encode([None] * (MAX_NODES + 1), limit_bytes=1 << 30)
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(PlainError, match="nested too deeply"):
        encode(circle, limit_bytes=1 << 20)
    assert len(encode("x" * 50, limit_bytes=52)) == 52


FORGED = [
    b"", b"{", b"nul", b"NaN", b"[Infinity]", b"1e", b'"\\x"', b"\xff\xfe", b"\x80\x04.", b"{}", b'{"a":1}',
    b'{"tuple":1}', b'{"tuple":[1],"set":[1]}', b'{"dict":[[1]]}', b'{"dict":[[[],1]]}', b'{"dict":[[1,1],[1,2]]}',
    b'{"set":[[]]}', b'{"int":"zz"}', b'{"int":' + b'"0x' + b"f" * 5000 + b'"}', b'{"float":"1"}', b'{"float":[]}',
    b'{"complex":[1,2]}', b'{"complex":[1.0]}', b'{"bytes":"*"}', b'{"bytes":3}', b'{"dlist":"AAAA"}',
    b'{"range":[1,2,0]}',
    b'{"range":[1]}', b'{"device":"moon"}', b'{"dtype":"load"}', b'{"dtype":[]}', b'{"size":["a"]}', b'{"size":3}',
    b'{"tensor":[]}', b'{"tensor":["float32",[1],false,""]}', b'{"tensor":["float32",[-1],false,"AAAA"]}',
    b'{"tensor":["float32",[true],false,"AAAAAA=="]}', b'{"tensor":["int64",[0],true,""]}',
    b'{"tensor":["load",[0],false,""]}',
    b'{"tensor":["float32",' + json.dumps([1] * 99).encode() + b',false,"AAAAAA=="]}',
    b'{"array":["O",[1],"AAAAAAAAAAA="]}',
    b'{"array":["|O8",[1],"AAAAAAAAAAA="]}', b'{"array":["<f8,<f8",[1],""]}', b'{"array":["<f8",[2],"AAAAAAAAAAA="]}',
    b'{"scalar":["<f8","AAAA"]}', b'{"module":["a",[1]]}', b'{"module":["a",{"dict":[["w",1]]}]}',
    b'{"data":["a",[[1,1]]]}',
    b'{"data":[1,[]]}', b'{"parameter":["int64",[1],true,"AAAAAAAAAAA="]}', b"1" * 30, b"[" * 100_000,
    b'{"tuple":[' * 50_000, b"[" + b"{}," * 10**6 + b"1]", b'"' + b"," * 10**6 + b'"',
]  # fmt: skip


@pytest.mark.parametrize("data", FORGED, ids=lambda data: repr(data[:24]))
def test_forged_bytes_are_refused_in_one_line(data):
    with pytest.raises(PlainError) as caught:
        decode(data, like=Point(1, torch.ones(1)))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN)
def test_any_nesting_of_plain_values_comes_back(value):
    assert same(through(value), value)


@settings(max_examples=300, deadline=None)
@given(PLAIN, st.data())
def test_damaged_bytes_give_a_value_or_a_plain_error(value, data):
    good = bytearray(encode(value, limit_bytes=1 << 20))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(
            st.sampled_from(b'[]{}",:0159.eE-tfn\\ aA\xff')
        )
    try:
        decode(bytes(good))
    except PlainError as error:
        assert "\n" not in str(error)
