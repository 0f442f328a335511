"""The learner checks: every chapter's records keep their word, and `check` says the right thing about an answer."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from llmcourse.checks import (
    Case,
    ClaimError,
    Exercise,
    Mutant,
    check,
    claim,
    difference,
    exercises,
    find_exercise,
    judge,
    slugs,
    verify,
    verify_chapter,
    with_gradients,
)
from llmcourse.runtime import set_seed


def scores(q, k):
    """The reference of the exercise under test: softmax(q k^T / sqrt(C))."""
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)


def unscaled(q, k):
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1)


def wrong_axis(q, k):
    return torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-2)


def not_transposed(q, k):
    return q @ k


def cases(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 5, 7), (1, 2, 4, 3), (3, 1, 1, 6)]
    return [
        (torch.randn(b, h, t, c, generator=generator), torch.randn(b, h, t + 4, c, generator=generator))
        for b, h, t, c in shapes
    ]


MUTANTS = [
    Mutant("unscaled", unscaled, "You seem to leave out the division by sqrt(C)."),
    Mutant("axis", wrong_axis, "You seem to normalize over the queries (dim=-2)."),
    Mutant("transpose", not_transposed, "You seem to multiply by k without transposing it."),
]
SCORES = Exercise(
    id="scores",
    title="Attention weights",
    points=2,
    reference=scores,
    cases=cases,
    mutants=MUTANTS,
    hints=["The weights of one query sum to 1."],
)


def make(**changes):
    fields = {name: getattr(SCORES, name) for name in Exercise.__dataclass_fields__}
    return Exercise(**{**fields, **changes})


def line_of(answer, capsys, exercise=SCORES, **options):
    result = check(exercise, answer, **options)
    printed = capsys.readouterr()
    assert printed.err == "", "anything on stderr costs a cell its points in a stock nbgrader"
    lines = [line for line in printed.out.splitlines() if line.startswith(exercise.title)]
    assert lines == [result.message] and "\n" not in result.message
    return result


def test_there_are_chapters_with_checks():
    assert slugs()


@pytest.mark.parametrize("slug", slugs())
def test_reference_gets_full_points_the_stub_none_and_each_mutant_its_diagnosis(slug):
    assert verify_chapter(slug) == []
    assert all(len(exercise.mutants) >= 3 for exercise in exercises(slug))
    assert all(find_exercise(f"{slug}/{exercise.id}") is exercise for exercise in exercises(slug))


def test_correct_answer_written_differently_is_accepted(capsys):
    def answer(q, k):
        logits = torch.einsum("bhtc,bhsc->bhts", q, k) * q.shape[-1] ** -0.5
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        return exponentials / exponentials.sum(-1, keepdim=True)

    for seed in range(3):
        result = line_of(answer, capsys, seed=seed)
        assert result.correct and result.points == 2 and result.case is None


@pytest.mark.parametrize("seed", range(40))
def test_the_lookup_may_be_scaled_anywhere(seed):
    def scaled_queries(q, k, v):
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1) @ v

    exercise = find_exercise("attention/lookup")
    assert judge(exercise, scaled_queries, seed=seed).correct


def test_stub_is_not_answered_yet_and_does_not_raise(capsys):
    def answer(q, k):
        raise NotImplementedError

    result = line_of(answer, capsys)
    assert result.status == "not answered" and result.points == 0 and "not answered yet" in result.message


def test_a_missing_torch_kernel_is_an_error_and_not_a_stub(capsys):
    def answer(q, k):
        return torch.empty(2, 2, device="meta").nonzero()

    with pytest.raises(NotImplementedError):
        answer(None, None)
    assert line_of(answer, capsys).status == "error"


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_mutant_gets_its_own_diagnosis(mutant, capsys):
    result = line_of(mutant.function, capsys)
    assert not result.correct and result.mutant == mutant.name and mutant.diagnosis in result.message


def test_a_mutant_that_raises_is_recognized_by_its_exception(capsys):
    result = line_of(lambda q, k: torch.matmul(q, k), capsys)
    assert result.mutant == "transpose" and result.status == "error"


def test_unknown_mistake_gets_the_hint_and_the_first_difference(capsys):
    result = line_of(lambda q, k: scores(q, k) * 1.01, capsys)
    assert (
        result.mutant is None
        and result.case == 1
        and "Hint: The weights of one query sum to 1." in result.message
    )
    assert "result at [0, 0, 0, 0] is" in result.message and "(270 of 270 values differ)" in result.message


def test_only_the_failing_case_is_named(capsys):
    def answer(q, k):
        return scores(q, k) if q.shape[2] > 1 else scores(q, k) + 1

    result = line_of(answer, capsys)
    assert result.case == 3 and "Case 3 of 3 ((3, 1, 1, 6) float32, (3, 1, 5, 6) float32)" in result.message


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (lambda q, k: None, "is None: is a return statement missing?"),
        (lambda q, k: scores(q, k)[0], "has shape (3, 5, 9), expected (2, 3, 5, 9)"),
        (lambda q, k: scores(q, k).double(), "has dtype float64, expected float32"),
        (lambda q, k: scores(q, k) * float("nan"), "holds NaN in 270 of 270 places"),
        (lambda q, k: scores(q, k).tolist(), "result is a list"),
        (
            lambda q, k: scores(q.mul_(2), k) if False else scores(q.add_(0.5), k),
            "writes into its input (argument 1)",
        ),
        (lambda q: q, "TypeError"),
        (None, "pass the function itself"),
        (torch.ones(3), "pass the function itself"),
    ],
)
def test_own_message_for_each_kind_of_failure(answer, expected, capsys):
    result = line_of(answer, capsys)
    assert expected in result.message and result.points == 0


def test_exception_is_reported_with_the_learner_s_line(capsys):
    def answer(q, k):
        return q.reshape(7, 7)

    result = line_of(answer, capsys)
    assert result.status == "error" and "RuntimeError: shape '[7, 7]' is invalid" in result.message
    assert "return q.reshape(7, 7))" in result.message


def test_exit_is_caught_and_interrupt_is_not(capsys):
    assert line_of(lambda q, k: exit(3), capsys).status == "error"

    def interrupted(q, k):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(SCORES, interrupted)


def test_what_the_answer_prints_goes_to_stdout(capsys):
    def answer(q, k):
        print("q is", tuple(q.shape))
        print("progress", file=sys.stderr)
        return scores(q, k)

    result = check(SCORES, answer)
    printed = capsys.readouterr()
    assert result.correct and printed.err == ""
    assert printed.out.count("q is (") == 3 and printed.out.count("progress") == 3


def test_detached_result_is_told_from_a_correct_one(capsys):
    exercise = make(
        run=with_gradients, mutants=[Mutant("detach", lambda q, k: scores(q, k).detach(), "You detach.")]
    )
    assert verify(exercise) == []
    half = line_of(lambda q, k: scores(q, k.detach()), capsys, exercise)
    assert half.mutant is None and "['gradients'][1]" in half.message


def test_inputs_are_fresh_for_each_call_and_what_they_share_stays_shared():
    model = nn.Linear(2, 3)

    def step(model, parameters):
        for parameter in parameters:
            parameter.data.add_(1)
        return sum(parameter.sum() for parameter in model.parameters()).detach()

    exercise = make(
        reference=step,
        cases=lambda seed: [Case((model, list(model.parameters())), name="a layer")] * 2,
        mutants=[
            Mutant("nothing", lambda model, p: sum(x.sum() for x in model.parameters()).detach(), "No step.")
        ],
        may_change_inputs=True,
    )
    before = [parameter.clone() for parameter in model.parameters()]
    assert verify(exercise) == []
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    strict = make(reference=step, cases=exercise.cases, mutants=exercise.mutants)
    assert "writes into its input" in judge(strict, step).message


def test_random_answers_see_the_same_randomness_and_leave_the_global_state_alone():
    def noisy(q, k):
        return q + torch.randn_like(q) + random.random() + np.random.rand()

    threads = torch.get_num_threads()
    exercise = make(reference=noisy, mutants=[Mutant("quiet", lambda q, k: q, "No noise.")])
    set_seed(7)
    drawn = (torch.rand(1).item(), random.random(), np.random.rand())
    set_seed(7)
    assert verify(exercise) == []
    assert torch.get_num_threads() == threads
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())


def test_classes_and_values_are_checked_through_run(capsys):
    class Counter:
        def __init__(self, start):
            self.value = start

        def add(self, amount):
            self.value += amount

    class Forgetful(Counter):
        def add(self, amount):
            self.value = amount

    def run(answer, case):
        counter, values = answer(case.kwargs["start"]), []
        for amount in case.args[0]:
            counter.add(amount)
            values.append(counter.value)
        return values

    exercise = make(
        reference=Counter,
        run=run,
        cases=lambda seed: [Case(([1, 2, 3],), {"start": seed + 5})],
        mutants=[Mutant("forgets", Forgetful, "You overwrite.")],
    )
    assert verify(exercise) == []
    value = make(
        reference=0.25,
        run=lambda answer, case: answer() if callable(answer) else answer,
        cases=lambda seed: [Case()],
        mutants=[Mutant("odds", 1 / 3, "These are odds.")],
    )
    assert verify(value) == [] and line_of(torch.tensor(0.25), capsys, value).correct
    assert line_of(1 / 3, capsys, value).mutant == "odds"


def test_builders_make_inputs_that_cannot_be_copied():
    class Uncopyable:
        def __init__(self):
            self.value = 3

        def __deepcopy__(self, memo):
            return Uncopyable()

    exercise = make(
        reference=lambda box, x: x * box.value,
        cases=lambda seed: [lambda: Case((Uncopyable(), torch.ones(2, 3) * (seed + 1)))],
        mutants=[Mutant("ignores", lambda box, x: x, "You ignore the box.")],
    )
    assert verify(exercise) == []


def test_verify_finds_records_that_are_not_worth_trusting():
    accepted = make(mutants=[Mutant("right", scores, "This is right.")])
    assert any("'right' is accepted" in problem for problem in verify(accepted))
    twins = make(mutants=[*MUTANTS, Mutant("twin", lambda q, k: wrong_axis(q, k), "The same mistake again.")])
    assert any("'twin' is taken for 'axis'" in problem for problem in verify(twins))
    unstable = make(reference=_Unstable())
    assert any("the reference is rejected" in problem for problem in verify(unstable))


class _Unstable:
    calls = 0

    def __call__(self, q, k):
        self.calls += 1
        return scores(q, k) + self.calls


def test_reference_that_fails_is_the_author_s_error():
    with pytest.raises(ValueError, match="the reference fails on case 1"):
        check(make(reference=not_transposed), scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "two words"}, "exercise id 'two words'"),
        ({"points": 0}, "points=0 must be at least 1"),
        ({"mutants": []}, "at least one mutant"),
        ({"mutants": [MUTANTS[0], MUTANTS[0]]}, "share the name 'unscaled'"),
    ],
)
def test_record_is_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_unknown_names_list_the_choices():
    for name in ("nowhere/scores", "exercise/scores", "not-a-module/x"):
        with pytest.raises(ValueError, match="the chapters with checks are"):
            find_exercise(name)
    with pytest.raises(ValueError, match="no exercise 'zzz': choose one of"):
        find_exercise("zzz")


def test_result_is_the_score_for_nbgrader_and_a_note_for_the_reader(capsys):
    bundle = check(SCORES, scores)._repr_mimebundle_()
    assert float(bundle["text/plain"]) == 2 and bundle["text/html"] == "<small>2 of 2 points</small>"
    assert float(check(SCORES, unscaled)._repr_mimebundle_()["text/plain"]) == 0
    assert repr(check(SCORES, unscaled)) == "<scores: wrong, 0 of 2 points>"


@dataclass
class Pair:
    left: int
    right: float


EQUAL = [
    (1.0, 1.0 + 5e-6),
    (3, 3.0),
    (0.5, torch.tensor(0.5)),
    (torch.tensor(0.5), 0.5),
    ([1, 2], (1, 2)),
    (float("nan"), float("nan")),
    (float("inf"), float("inf")),
    (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])),
    ({"a": [torch.ones(2)]}, {"a": [torch.ones(2)]}),
    (Pair(1, 2.0), Pair(1, 2.0 + 1e-6)),
    (np.ones(3), np.ones(3)),
    (True, torch.tensor(True)),
    (None, None),
]
DIFFERENT = [
    (1.0, 1.0 + 5e-5, "result is 1.00005, expected 1"),
    (3, 4, "result is 4, expected 3"),
    (True, 1, "result is a int"),
    (0.5, torch.tensor([0.5]), "has shape (1,), expected a single number"),
    (torch.tensor(0.5, requires_grad=True), 0.5, "result is a float"),
    (torch.ones(2, requires_grad=True) * 1, torch.ones(2), "cut off from the gradient"),
    ([1, 2], [1], "has 1 elements, expected 2"),
    ([1, 2], [1, 3], "result[1] is 3, expected 2"),
    ({"a": 1}, {"b": 1}, "has the keys ['b'], expected ['a']"),
    ({"a": [1.0]}, {"a": [float("nan")]}, "result['a'][0] is NaN"),
    ("x", "y", "result is 'y', expected 'x'"),
    (Pair(1, 2.0), Pair(1, 3.0), "result.right is 3, expected 2"),
    (torch.tensor([1, 2]), torch.tensor([1, 3]), "result at [1] is 3, expected 2 (1 of 2 values differ)"),
    (torch.tensor([True]), torch.tensor([False]), "result at [0] is False, expected True"),
    (np.ones(3), np.ones(3, dtype=np.float32), "has dtype float32, expected float64"),
    (None, 3, "result is 3, expected None"),
    (nn.Linear(2, 3), 3, "result is a int"),
]


@pytest.mark.parametrize(("expected", "got"), EQUAL)
def test_mathematically_equal_values_agree(expected, got):
    assert difference(expected, got) is None


@pytest.mark.parametrize(("expected", "got", "message"), DIFFERENT)
def test_differences_are_named(expected, got, message):
    assert message in difference(expected, got)


def test_tolerance_is_atol_plus_rtol_times_expected():
    assert difference(100.0, 100.9, rtol=0.009, atol=0.01) is None
    assert difference(100.0, 100.92, rtol=0.009, atol=0.01) is not None
    assert difference(torch.tensor([100.0]), torch.tensor([100.92]), rtol=0.009, atol=0.01) is not None


def test_modules_are_compared_by_state_and_strangers_refused():
    one, two = nn.Linear(2, 3), nn.Linear(2, 3)
    assert "state_dict()['weight']" in difference(one, two)
    two.load_state_dict(one.state_dict())
    assert difference(one, two) is None
    with pytest.raises(ValueError, match="cannot compare a object"):
        difference(object(), object())


def test_claim_prints_or_stops(capsys):
    claim("floor", np.bool_(True), "the loss stays above the floor")
    claim("tensor", torch.tensor(2.0) > 1, "two is more than one")
    assert capsys.readouterr().out.splitlines() == [
        "[holds] floor: the loss stays above the floor",
        "[holds] tensor: two is more than one",
    ]
    with pytest.raises(ClaimError, match=r"\[fails\] floor: below"):
        claim("floor", False, "below")
    with pytest.raises(ValueError, match="claim id 'a b'"):
        claim("a b", True, "text")
    with pytest.raises(ValueError, match="one line"):
        claim("a", True, "two\nlines")
