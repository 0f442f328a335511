"""Points: right answers get them, wrong ones their diagnosis, forged replies nothing, and nobody a hidden input."""

from __future__ import annotations

import dataclasses
import json

import pytest

from llmcourse.checks import Outcome, Trial, find_exercise, run_cases
from llmcourse.grading.grades import Grade
from llmcourse.grading.jail.client import Answer, CellOutcome, JobResult
from llmcourse.grading.plain import encode
from llmcourse.grading.scoring import Scorer, difference_kind, known_kind, outcomes_of, through_codec
from llmcourse.grading.skeleton import rebuild
from llmcourse.grading.station import Station
from llmcourse.grading.verdicts import Finding, Verdict

INTENSITY, ROOFLINE, ROWS = "hardware/intensity", "hardware/roofline", "hardware/cache_rows"
STUDENT = "s001"


@pytest.fixture(scope="module")
def scorer(tiny_release):
    return Scorer(tiny_release.key)


@pytest.fixture
def rebuilt(tiny_release):
    return rebuild(tiny_release.key.solved(), tiny_release.key)


def reply(outcome: Outcome) -> dict:
    """An outcome as the jail sends it."""
    if outcome.failure is not None:
        return {"failure": vars(outcome.failure), "changed": outcome.changed}
    return {"value": encode(outcome.value, limit_bytes=1 << 20), "changed": outcome.changed}


def answer_of(scorer: Scorer, name: str, function: object, **more: object) -> Answer:
    """What an honest jail sends back for an answer."""
    seed = scorer.key.seed(STUDENT, name)
    return Answer(name, [reply(one) for one in run_cases(find_exercise(name), function, seed)], **more)


def job(*answers: Answer, ended: Verdict = Verdict.GRADED, cells: tuple = (), note: str = "") -> JobResult:
    return JobResult(cells, answers, ended, 0.1, 10.0, note)


def all_right(scorer: Scorer) -> list[Answer]:
    return [answer_of(scorer, name, find_exercise(name).reference) for name in scorer.key.manifest.points]


def item(grade: Grade, name: str):
    return next(one for one in grade.items if one.exercise == name)


def test_right_answers_get_all_points(scorer, rebuilt):
    grade = scorer.grade(STUDENT, job(*all_right(scorer)), rebuilt)
    assert (grade.verdict, grade.points, grade.max_points) == (Verdict.GRADED, 4, 4) and not grade.findings
    assert {one.message for one in grade.items} == {"Correct."} and {one.detail for one in grade.items} == {
        ""
    }
    assert Grade.from_json(json.loads(json.dumps(grade.to_json()))) == grade


def test_points_are_the_release_s(tiny_release, rebuilt):
    worth = {**tiny_release.key.manifest.points, INTENSITY: 2.5}
    manifest = dataclasses.replace(tiny_release.key.manifest, points=worth)
    scorer = Scorer(dataclasses.replace(tiny_release.key, manifest=manifest))
    assert scorer.grade(STUDENT, job(*all_right(scorer)), rebuilt).points == 5.5 == scorer.max_points


@pytest.mark.parametrize("name", [INTENSITY, ROOFLINE, ROWS])
def test_each_known_mistake_gets_its_diagnosis_and_no_hidden_input(scorer, rebuilt, name):
    for mutant in find_exercise(name).mutants:
        grade = scorer.grade(STUDENT, job(answer_of(scorer, name, mutant.function)), rebuilt)
        found = item(grade, name)
        assert (found.points, found.mutant) == (0, mutant.name) and mutant.diagnosis in found.message
        assert "Case" in found.detail and "Case" not in found.message


def test_questions_are_the_student_s_own(scorer, rebuilt):
    questions = scorer.questions(STUDENT, rebuilt)
    assert [one.exercise for one in questions] == [INTENSITY, ROOFLINE, ROWS]
    assert [one.seed for one in questions] == [scorer.key.seed(STUDENT, one.exercise) for one in questions]
    assert {one.expression for one in questions} == {"my_intensity", "my_roofline", "my_rows"}
    assert {one.after for one in questions} <= {cell.id for cell in rebuilt.cells}
    seeds = {tuple(q.seed for q in scorer.questions(f"s{i}")) for i in range(40)}
    assert len(seeds) > 5


def test_answers_for_other_inputs_get_nothing(scorer, rebuilt):
    """I27: replies computed in advance for the public seed, or for somebody else's."""
    for name in scorer.key.manifest.points:
        replies = [reply(one) for one in run_cases(find_exercise(name), find_exercise(name).reference, 0)]
        grade = scorer.grade(STUDENT, job(Answer(name, replies)), rebuilt)
        assert grade.points == 0


@pytest.mark.parametrize(
    ("replies", "finding"),
    [
        ([], True),
        ([{}], True),
        ([{"value": "text"}], True),
        ([{"value": b"{"}], False),
        ([{"value": b'{"tensor": ["float32", [1000000000000], false, ""]}'}], False),
        ([{"failure": {"kind": 3, "text": "", "described": ""}}], True),
        ([{"failure": "x"}], True),
        ([{"value": encode(1.0, limit_bytes=100), "changed": 7}], True),
        ([{"value": encode(1.0, limit_bytes=100)}] * 50, True),
        ("x", True),
    ],
)
def test_forged_replies_score_nothing_and_stop_nothing(scorer, rebuilt, replies, finding):
    others = [one for one in all_right(scorer) if one.exercise != INTENSITY]
    grade = scorer.grade(STUDENT, job(Answer(INTENSITY, replies), *others), rebuilt)
    assert grade.points == 3 and item(grade, INTENSITY).points == 0
    assert [one.kind for one in grade.findings] == (["ANSWER_MALFORMED"] if finding else [])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**1000, "1.0", None, [[1.0]], True, 1j, b"", {}]
)
def test_I22_odd_values_are_no_credit(scorer, rebuilt, value):
    cases = find_exercise(INTENSITY).cases(scorer.key.seed(STUDENT, INTENSITY))
    replies = [{"value": encode(value, limit_bytes=10_000)} for _ in cases]
    grade = scorer.grade(STUDENT, job(Answer(INTENSITY, replies)), rebuilt)
    assert grade.points == 0 and item(grade, INTENSITY).status == "wrong" and not grade.findings


def test_too_few_replies_are_no_credit(scorer, rebuilt):
    right = answer_of(scorer, INTENSITY, find_exercise(INTENSITY).reference)
    grade = scorer.grade(STUDENT, job(Answer(INTENSITY, right.outcomes[:1])), rebuilt)
    assert grade.points == 0 and len(right.outcomes) > 1


def test_an_unwritten_and_a_missing_answer(scorer, rebuilt):
    def unwritten(*args, **kwargs):
        raise NotImplementedError

    missing = Answer(ROOFLINE, None, "missing name: my_roofline")
    cells = (CellOutcome(rebuilt.after[ROOFLINE], "error", "", "SyntaxError: secret 3.14"),)
    grade = scorer.grade(STUDENT, job(answer_of(scorer, INTENSITY, unwritten), missing, cells=cells), rebuilt)
    assert item(grade, INTENSITY).status == item(grade, ROOFLINE).status == "not answered"
    assert "`my_roofline` is not there" in item(grade, ROOFLINE).message
    assert "SyntaxError" in item(grade, ROOFLINE).message and "3.14" not in item(grade, ROOFLINE).message
    assert item(grade, ROWS).status == "not reached"


def test_C15_what_an_answer_raises_is_not_shown(scorer, rebuilt):
    def leaking(**kwargs):
        raise type(f"Inputs{kwargs['m']}", (ValueError,), {})(f"the inputs are {kwargs}")

    found = item(scorer.grade(STUDENT, job(answer_of(scorer, INTENSITY, leaking)), rebuilt), INTENSITY)
    assert found.status == "error" and "raised an exception" in found.message
    assert (
        "inputs are" not in found.message and "Inputs" not in found.message and "inputs are" in found.detail
    )

    def failing(*args, **kwargs):
        raise ZeroDivisionError(kwargs)

    found = item(scorer.grade(STUDENT, job(answer_of(scorer, INTENSITY, failing)), rebuilt), INTENSITY)
    assert "raised ZeroDivisionError" in found.message and "{" not in found.message and "{" in found.detail


def test_only_built_in_exceptions_are_named():
    assert known_kind("KeyError") == "KeyError"
    assert known_kind("print") == known_kind("x=3") == known_kind("") == known_kind(None) == ""


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        ("result has shape (3, 5, 9), expected (2, 3)", "another shape"),
        (
            "result['gradients'] is a str ('none: the result is cut off from the gradient'), expected",
            "cut off",
        ),
        ("result at [0, 1] is 0.25, expected 0.5 (3 of 6 values differ)", "other values"),
        ("result holds NaN in 3 of 9 places", "holds NaN"),
        ("the answer writes into its input (argument 1); work on a new tensor", "writes into its inputs"),
    ],
)
def test_differences_without_their_numbers(problem, expected):
    text = difference_kind(problem)
    assert expected in text and not any(character.isdigit() for character in text)


@pytest.mark.parametrize("ended", [Verdict.TIMEOUT, Verdict.MEMORY, Verdict.CRASH, Verdict.OUTPUT_LIMIT])
def test_a_run_that_ended_keeps_what_was_answered(scorer, rebuilt, ended):
    some = scorer.grade(STUDENT, job(all_right(scorer)[0], ended=ended, note="signal 9"), rebuilt)
    assert (some.verdict, some.points) == (
        Verdict.PARTIAL,
        1,
    ) and "after 1 of 3 exercises; signal 9" in some.note
    none = scorer.grade(STUDENT, job(ended=ended), rebuilt)
    assert (none.verdict, none.points, none.decided) == (ended, 0, True)
    assert {one.status for one in none.items} == {"not reached"}


def test_a_review_is_not_decided(scorer, rebuilt):
    grade = scorer.grade(STUDENT, job(*all_right(scorer), ended=Verdict.REVIEW, note="spoke early"), rebuilt)
    assert grade.verdict == Verdict.REVIEW and not grade.decided and grade.note == "spoke early"


def test_calling_the_package_is_reported_and_not_punished(scorer, rebuilt):
    answer = answer_of(scorer, ROWS, find_exercise(ROWS).reference, called=("llmcourse.roofline:cache_rows",))
    grade = scorer.grade(STUDENT, job(answer), rebuilt)
    assert grade.points == 2
    assert grade.findings == (
        Finding("REFERENCE_CALLED", "the answer calls llmcourse.roofline:cache_rows of the package", ROWS),
    )


def test_findings_are_limited(scorer):
    grade = scorer.ungraded(STUDENT, Verdict.MALFORMED, "x" * 10**5, [Finding("DUPLICATE", "x")] * 10**4)
    assert len(grade.findings) == 101 and grade.findings[-1].kind == "MORE" and len(grade.note) == 2000


def test_expected_values_pass_the_codec_as_answers_do():
    exercise = find_exercise("hardware/intensity")
    trial = Trial(exercise, 3, translate=through_codec)
    replies = [reply(one) for one in run_cases(exercise, exercise.reference, 3)]
    assert trial.grade(outcomes_of(replies, trial.expected)).correct
    with pytest.raises(ValueError, match="outcomes for"):
        trial.grade([])


# The attacks of the table that patch the notebook's own process: the comparison is not there.

ZERO = """
def my_intensity(*args, **kwargs): return 0
def my_roofline(*args, **kwargs): return 0
def my_rows(*args, **kwargs): return 0
"""
PATCHES = {
    "I9": "import numpy.testing as t, torch.testing as u\n"
    "import llmcourse.checks.comparison as c, llmcourse.checks.checking as k\n"
    "t.assert_allclose = u.assert_close = lambda *a, **k: None\nc.difference = k.difference = lambda *a, **k: None\n"
    "k.Trial.grade = k.judge = k.check = lambda self, *a, **k: type('R', (), {'correct': True, 'points': 9})()",
    "I10": "import ast\nclass Drop(ast.NodeTransformer):\n    def visit_Assert(self, node): return ast.Pass()\n"
    "get_ipython().ast_transformers.append(Drop())",
    "I11": "get_ipython().set_custom_exc((BaseException,), lambda *a, **k: None)",
    "I12": "ip = get_ipython()\nip.run_cell = ip.run_cell_async = lambda *a, **k: type('R', (), {'success': True, "
    "'error_before_exec': None, 'error_in_exec': None, 'result': 1})()",
    "I15": "import llmcourse.grading.jail.child as c, llmcourse.grading.jail.messages as m\n"
    "c._answer = lambda *a: ({'problem': '', 'outcomes': [{'size': 0, 'changed': None}] * 3, 'called': []}, b'')",
    "I16": "import socket, json\nreal = socket.socket.sendall\n"
    "socket.socket.sendall = lambda self, data, *a: real(self, data.replace(b'error', b'ok'), *a)",
    "I17": "import builtins\nbuiltins.AssertionError = builtins.NotImplementedError = builtins.Exception = "
    "type('Never', (BaseException,), {})\nbuiltins.abs = builtins.sum = lambda *a, **k: 0",
    "I18": "get_ipython().showtraceback = get_ipython().showsyntaxerror = lambda *a, **k: None",
}


@pytest.fixture(scope="module")
def station(tiny_release):
    found = Station(tiny_release.key)
    yield found
    found.close()


@pytest.mark.parametrize("attack", PATCHES)
def test_patching_the_notebook_s_process_earns_nothing(station, tiny_release, attack):
    notebook = tiny_release.untouched()
    cell = tiny_release.cell(notebook, "intensity")
    cell["source"] = PATCHES[attack] + "\n" + ZERO
    for name, function in (("roofline", "my_roofline"), ("cache_rows", "my_rows")):
        tiny_release.cell(notebook, name)["source"] = f"def {function}(*args, **kwargs): return 0"
    grade = station.grade_bytes(STUDENT, json.dumps(notebook).encode()).grade
    assert grade.points == 0, grade
    after = station.grade_bytes(STUDENT, tiny_release.key.solved()).grade
    assert (after.points, after.verdict) == (4, Verdict.GRADED), "the next submission is not affected"


def test_the_controls_hold_and_a_broken_key_does_not(station, tiny_release):
    """B3, for one station."""
    station.check_controls()
    wrong = {**tiny_release.key.solutions, ROWS: "def my_rows(*args, **kwargs): return 0"}
    with _WithKey(station, dataclasses.replace(tiny_release.key, solutions=wrong)) as broken:
        with pytest.raises(ValueError, match=r"score 2 of 4 in this jail .*hardware/cache_rows wrong"):
            broken.check_controls()


class _WithKey:
    """A station with another key in the same jail."""

    def __init__(self, station, key):
        self.station, self.key, self.before = station, key, (station.key, station.scorer)

    def __enter__(self):
        self.station.key, self.station.scorer = self.key, Scorer(self.key)
        return self.station

    def __exit__(self, *_):
        self.station.key, self.station.scorer = self.before
