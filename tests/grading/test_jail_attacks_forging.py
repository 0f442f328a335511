"""Submissions that change what judges them: what is compared is compared elsewhere, as plain data."""

from __future__ import annotations

import time

import pytest

from llmcourse.grading.jail.client import Cell, Job, Question
from llmcourse.grading.plain import PlainError, decode
from llmcourse.grading.verdicts import Verdict
from tests.grading.jails import (
    ASK_COUNT,
    ASK_MASK,
    COUNT,
    MASK,
    SEED,
    full,
    graded,
    jail,
    limits,
    linux,
    points,
    run,
)

pytestmark = linux
WRONG = "\ndef count(**sizes):\n    return 7\n"
FIND_SOCKET = (
    "import gc, socket, json, os\n"
    "line = next(s for s in gc.get_objects() if type(s) is socket.socket and s.family == socket.AF_UNIX)\n"
    "def send(message, body=b''):\n    data = json.dumps(message).encode() + b'\\n' + body\n"
    "    line.sendall(len(data).to_bytes(4, 'big') + data)\n"
)

# In a notebook whose tests run beside the answer each of these earned full points.
TAMPERING = {
    "i9_patch_numpy_testing": "import numpy.testing as t\nt.assert_allclose = t.assert_equal = lambda *a, **k: None",
    "i10_drop_asserts": (
        "import ast\nclass Drop(ast.NodeTransformer):\n    def visit_Assert(self, node): return ast.Pass()\n"
        "get_ipython().ast_transformers.append(Drop())"
    ),
    "i11_custom_exc": "get_ipython().set_custom_exc((Exception,), lambda *a, **k: None)",
    "i12_run_cell": "get_ipython().run_cell = lambda *a, **k: None",
    "i13_input_transform": "get_ipython().input_transformers_cleanup.append(lambda lines: ['pass\\n'])",
    "i14_interactivity_none": "get_ipython().ast_node_interactivity = 'none'",
    "i15_dispatch_patch": "import llmcourse.checks.checking as c\nc.check = c.judge = lambda *a, **k: None",
    "i16_difference_patch": (
        "import llmcourse.checks.comparison as c, llmcourse.checks.checking as k\n"
        "c.difference = k.difference = lambda *a, **kw: None"
    ),
    "i17_builtins": "import builtins\n"
    "builtins.AssertionError = Warning\nbuiltins.abs = lambda x: 0\nbuiltins.len = len",
    "i18_showtraceback": "get_ipython().showtraceback = lambda *a, **k: None",
    "i23_frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n"
        "    for name in ('points', 'score', 'max_points', 'result'):\n"
        "        if name in frame.f_locals: frame.f_locals[name] = 1e9\n    frame = frame.f_back"
    ),
    "reference_replaced": (
        "import llmcourse.checks.hardware as h\nfor e in h.EXERCISES:\n"
        "    object.__setattr__(e, 'reference', lambda **k: 7)\n    object.__setattr__(e, 'compare', lambda a, b: None)"
    ),
    "cases_replaced": (
        "import llmcourse.checks.hardware as h\nfor e in h.EXERCISES: object.__setattr__(e, 'cases', lambda seed: [])"
    ),
}


@pytest.mark.parametrize("source", TAMPERING.values(), ids=TAMPERING)
def test_i9_to_i18_i23_tampering_earns_nothing(source):
    result = run(source, WRONG)
    try:
        assert points(result) == 0
    except ValueError as error:  # other numbers of outcomes than of cases are no answer
        assert "outcomes" in str(error)


def test_i13_i14_an_honest_answer_beside_tampering_still_counts():
    result = run(COUNT, TAMPERING["i13_input_transform"], "this is no Python", ask=(ASK_COUNT,))
    assert result.ended is Verdict.GRADED and points(result) == full()


OBJECTS = {
    "i19_always_equal_int": "class C(int):\n    __eq__ = lambda s, o: True\n    __hash__ = int.__hash__\nanswer = C(7)",
    "i19_always_equal_float": "class C(float):\n"
    "    __eq__ = lambda s, o: True\n    __sub__ = lambda s, o: 0.0\nanswer = C(7)",
    "i19_always_equal_list": "class C(list):\n    __eq__ = lambda s, o: True\nanswer = C()",
    "i19_always_equal_text": "class C(str):\n    __eq__ = lambda s, o: True\nanswer = C('')",
    "i20_array_function": "class C:\n    def __array_function__(s, *a): return True\n"
    "    __torch_function__ = __array_function__\nanswer = C()",
    "i21_endless_tolist": (
        "import numpy as np\nclass C(np.ndarray):\n    def tolist(s):\n        while True: pass\n    tobytes = tolist\n"
        "answer = np.zeros(3).view(C)"
    ),
    "i21_tensor_subclass": "import torch\nclass C(torch.Tensor): pass\nanswer = torch.zeros(3).as_subclass(C)",
    "a_generator": "answer = (n for n in range(10**12))",
    "a_module": "import os\nanswer = os",
}


@pytest.mark.parametrize("source", OBJECTS.values(), ids=OBJECTS)
def test_i19_i20_i21_objects_with_methods_of_their_own_do_not_leave(source):
    result = run(source + "\ndef count(**sizes):\n    return answer")
    assert result.ended is Verdict.GRADED
    assert result.answers[0].outcomes is None and result.answers[0].problem.startswith("not plain")


def test_i22_nan_is_not_equal_to_a_number():
    result = run("def count(**sizes):\n    return float('nan')")
    assert points(result) == 0 and "NaN" in graded(result.answers[0], ASK_COUNT).message


def test_i24_nested_1e5_deep():
    deep = "answer = []\nfor n in range(10**5): answer = [answer]\ndef count(**sizes):\n    return answer"
    circle = "answer = []\nanswer.append(answer)\ndef count(**sizes):\n    return answer"
    for source in (deep, circle):
        assert "nested too deeply" in run(source).answers[0].problem
    with pytest.raises(PlainError, match="nested too deeply|no plain data"):
        decode(b"[" * 10**5 + b"]" * 10**5)


def test_i24_values_beyond_the_cap():
    big = run("import torch\ndef count(**sizes):\n    return torch.zeros(1).expand(10**10)", answer_mb=1)
    assert "takes more than 1048576 bytes" in big.answers[0].problem
    many = run("def count(**sizes):\n    return [None] * 10**6", answer_mb=64)
    assert "more than" in many.answers[0].problem
    text = run("def count(**sizes):\n    return 'x' * (3 << 20)", answer_mb=1)
    assert "takes more than" in text.answers[0].problem


EARLY = {
    "i25_a_reply_before_the_question": FIND_SOCKET + "send({'nonce': 'x', 'status': 'ok', 'error': ''})",
    "i25_many_replies": FIND_SOCKET
    + "for n in range(50): send({'nonce': str(n), 'outcomes': [], 'called': []})",
    "i25_garbage": FIND_SOCKET + "line.sendall(b'\\xff' * 100)",
    "i25_a_length_of_4_gib": FIND_SOCKET + "line.sendall(b'\\xff\\xff\\xff\\xff')",
    "i25_no_json": FIND_SOCKET + "line.sendall(b'\\0\\0\\0\\4abc\\n')",
    "i25_deep_json": FIND_SOCKET
    + "data = b'[' * 200000 + b'\\n'\nline.sendall(len(data).to_bytes(4, 'big') + data)",
    "i25_nothing_but_a_length": FIND_SOCKET + "line.sendall(b'\\0\\0\\0\\x10')",
}


@pytest.mark.parametrize("source", EARLY.values(), ids=EARLY)
def test_i25_speaking_out_of_turn(source):
    result = run(COUNT, source, MASK)
    assert result.ended is Verdict.REVIEW and points(result) == 0
    assert result.cells[0].status == "ok"


def test_i25_forging_while_a_question_is_answered():
    """A reply in the harness's place earns what its values are worth; it cannot know the number of the question."""
    forge = "def count(**sizes):\n    send({'nonce': 'x', 'problem': '', 'outcomes': [], 'called': []})\n    return 7"
    assert run(FIND_SOCKET + forge).ended is Verdict.REVIEW
    steal = (
        "import sys\nfrom llmcourse.grading.plain import encode\n"
        "def count(**sizes):\n    frame = sys._getframe()\n"
        "    while 'request' not in frame.f_locals: frame = frame.f_back\n"
        "    nonce = frame.f_locals['request']['nonce']\n    value = encode(7, limit_bytes=99)\n"
        "    outcomes = [{'size': 1, 'changed': None}] * 3\n"
        "    send({'nonce': nonce, 'problem': '', 'outcomes': outcomes, 'called': []}, value * 3)\n"
        "    import os; os._exit(0)"
    )
    result = run(FIND_SOCKET + steal)
    assert points(result) == 0
    assert result.ended is Verdict.GRADED  # a constant, by a way of its own


FIELDS = [
    "{'problem': 3, 'outcomes': None, 'called': []}",
    "{'problem': '', 'outcomes': 7, 'called': []}",
    "{'problem': '', 'outcomes': [{'size': 10**9, 'changed': None}], 'called': []}",
    "{'problem': '', 'outcomes': [{'size': -1, 'changed': None}], 'called': []}",
    "{'problem': '', 'outcomes': [{'size': True, 'changed': None}], 'called': []}",
    "{'problem': '', 'outcomes': [{}] * 5000, 'called': []}",
    "{'problem': '', 'outcomes': [{'failure': {'kind': 1}}], 'called': []}",
    "{'problem': '', 'called': [], 'outcomes': [{'failure': dict(kind='', text='', described=[], unwritten=False)}]}",
    "{'problem': '', 'outcomes': [], 'called': ['<script>']}",
    "{'problem': '', 'outcomes': [], 'called': ['llmcourse:x'] * 99}",
    "{'problem': '', 'outcomes': [{'size': 1, 'changed': {}}], 'called': []}",
]


@pytest.mark.parametrize("fields", FIELDS)
def test_i25_fields_that_the_harness_does_not_write(fields):
    source = (
        "import sys\ndef count(**sizes):\n    frame = sys._getframe()\n"
        "    while 'request' not in frame.f_locals: frame = frame.f_back\n"
        f"    send({{'nonce': frame.f_locals['request']['nonce'], **{fields}}}, b'7')"
    )
    assert run(FIND_SOCKET + source).ended is Verdict.REVIEW


def test_i26_the_encoder_is_the_submissions_to_patch_and_gains_nothing():
    for body in ("b'7'", "b'{\"tuple\": 1}'", "b'\\x80\\x04.'", "b'[' * 1000"):
        source = (
            "import llmcourse.grading.jail.child as c, llmcourse.grading.plain as p\n"
            f"c.encode = p.encode = lambda *a, **k: {body}" + WRONG
        )
        result = run(source)
        try:
            assert points(result) == 0
        except PlainError as error:
            assert "\n" not in str(error)


def test_i27_answers_written_in_advance():
    files = {"answers.json": b'{"hardware/block_parameters": [1, 2, 3]}', "results.pickle": b"\x80\x04."}
    source = "import json\nreplies = iter(json.load(open('answers.json'))['hardware/block_parameters'])\n"
    source += "def count(**sizes):\n    return next(replies)"
    result = jail().run(Job((Cell("a", source),), (ASK_COUNT,), limits(), files))
    assert points(result) == 0 and result.ended is Verdict.GRADED


def test_i27_a_constant_answer_is_right_for_no_other_seed():
    seen = "def count(**sizes):\n    return 23456"
    for seed in range(SEED, SEED + 3):
        question = Question(ASK_COUNT.exercise, "count", seed)
        assert points(run(seen, ask=(question,)), question) == 0


def test_i28_nothing_is_unpickled_here():
    evil = "class Evil:\n    def __reduce__(self): return (print, ('RAN',))\ndef count(**sizes):\n    return Evil()"
    result = run(evil)
    assert result.answers[0].outcomes is None and result.ended is Verdict.GRADED
    for data in (b"\x80\x04.", b"cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04"):
        with pytest.raises(PlainError):
            decode(data)


def test_i29_claims_about_sizes_allocate_nothing():
    started = time.monotonic()
    for data in (
        b'{"tensor":["float32",[1000000000000],false,""]}',
        b'{"tensor":["float32",[1000000,1000000],false,"AAAA"]}',
        b'{"array":["<f8",[1000000000000],""]}',
        b'{"array":["<U999999",[1],""]}',
        b'{"dlist":"' + b"A" * (MAX := 16 << 20) + b'"}',
        b'{"range":[0,9223372036854775807,1]}',
        b"[" + b"[]," * 10**6 + b"1]",
    ):
        with pytest.raises(PlainError):
            decode(data)
    assert time.monotonic() - started < 3 and MAX


def test_i29_a_template_loop_in_an_answer_is_ended_by_the_limit():
    source = (
        "from jinja2.sandbox import ImmutableSandboxedEnvironment as E\ndef count(**sizes):\n"
        "    return len(E().from_string('{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}').render())"
    )
    result = run(source, wall_seconds=1)
    assert result.ended is Verdict.TIMEOUT and result.seconds < 2


def test_the_order_and_number_of_replies_are_the_graders():
    result = run(COUNT, MASK, ask=(ASK_MASK, ASK_COUNT, ASK_MASK))
    assert [answer.exercise for answer in result.answers] == [
        ASK_MASK.exercise,
        ASK_COUNT.exercise,
        ASK_MASK.exercise,
    ]
