"""Verifiable rewards: what they read in a text, right and wrong answers, the breakable ones broken, bad rewards."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmcourse.alignment import rewards as module
from llmcourse.alignment.rewards import by_parts, by_rule, checked, constraint_parts, keeps_constraint
from llmcourse.data.town_instructions import Constraint, TownInstruction
from llmcourse.data.town_sums import Sum

ADD, SUBTRACT = Sum("+", 37, 48), Sum("-", 85, 48)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("7+8=15, 3+4+1=8, 85", [7, 8, 15, 3, 4, 1, 8, 85]),
        ("15-8=7", [15, 8, 7]),
        ("It is -7, not 12 - -3.", [-7, 12, -3]),
        ("3.14", [3]),
        ("The sum.85", [85]),
        ("none", []),
    ],
)
def test_numbers(text: str, found: list[int]):
    assert module.numbers(text) == found


@pytest.mark.parametrize("one", [ADD, SUBTRACT, Sum("+", 3, 4), Sum("-", 5, 5), Sum("+", 99, 99)])
def test_the_towns_own_answers_earn_everything(one: Sum):
    for text in (one.worked, one.plain, one.worked.partition(":")[2]):
        assert module.right_answer(text, one.result) == 1
        assert module.right_answer(text, one.result + 1) == 0
    assert module.right_steps(one.worked, one) == 1
    assert module.well_formed(one.worked, one) == module.well_formed(one.worked.partition(":")[2], one) == 1
    assert all(is_true for _, is_true in module.steps(one.worked))


@pytest.mark.parametrize(
    ("text", "answer", "steps", "form"),
    [
        ("7+8=15, 3+4+1=8, 86", 0, 1, 1),
        ("7+8=15, 3+4=7, 85", 1, 0.5, 1),
        ("3+4+1=8, 7+8=15, 85", 1, 0, 1),  # true, but in the wrong order
        ("7+8=15, 85", 1, 0.5, 0),
        ("85", 1, 0, 0),
        ("85 and more", 0, 0, 0),
        ("It is 85.", 1, 0, 0),
        ("185", 0, 0, 0),
        ("", 0, 0, 0),
        ("1+1=2, 1+1=2, 2", 0, 0, 1),
    ],
)
def test_parts_of_a_sum_are_scored_apart(text: str, answer: float, steps: float, form: float):
    found = (module.right_answer(text, 85), module.right_steps(text, ADD), module.well_formed(text, ADD))
    assert found == (answer, steps, form)


def test_steps_know_true_equations_from_false():
    assert module.steps("7+8=15, 7+8=16, 15-8=7, 2+=4") == [
        ("7+8=15", True),
        ("7+8=16", False),
        ("15-8=7", True),
    ]


def test_the_breakable_rewards_pay_for_nonsense():
    nonsense = ", ".join(["1+1=2"] * 10)
    assert (
        module.true_steps_anywhere(nonsense, ADD) == 2.5 > module.true_steps_anywhere(ADD.worked, ADD) == 0.5
    )
    assert module.right_steps(nonsense, ADD) == 0
    everything = " ".join(map(str, range(200)))
    assert module.mentions_answer(everything, 85) == 1 and module.right_answer(everything, 85) == 0
    assert module.mentions_answer("84 86", 85) == 0


def test_constraints_by_hand():
    constraint = Constraint(sentences=2, required=("Jane", "mill"), forbidden=("street",))
    right = "Jane Day works as a baker. She owns a mill."
    assert constraint_parts(right, constraint) == dict.fromkeys(
        ("complete", "sentences", "required", "forbidden"), True
    )
    assert keeps_constraint(right, constraint) == 1 and constraint.holds(right)
    one = "Jane Day works in the mill of this street."
    assert keeps_constraint(one, constraint) == 2 / 4  # complete, required
    assert keeps_constraint("Jane Day owns a mill. She", constraint) == 0  # breaks off
    assert constraint_parts(one, Constraint(forbidden=("mill",))) == {"complete": True, "forbidden": False}


@pytest.mark.parametrize("field", [{"sentences": 1}, {"required": ("red",)}, {"forbidden": ("blue",)}])
def test_every_demand_of_a_constraint_can_be_met_and_missed(field: dict[str, Any]):
    met, missed = "The door is red.", "The door is blue. It is open."
    assert keeps_constraint(met, Constraint(**field)) == 1
    assert keeps_constraint(missed, Constraint(**field)) == 1 / 2


def test_tasks_that_know_their_answers_are_scored_by_them():
    ask = ({"role": "user", "content": "What is 37 + 48?"},)
    task = TownInstruction(task="sums", variety="+", messages=ask, answer=ADD.plain)
    assert by_rule(module.solved, [task])([0, 0], [ADD.worked, "86"]) == [1, 0]


def test_scorers_find_the_task_of_each_response():
    scorer = by_rule(module.right_answer, [85, 37])
    assert scorer([0, 1, 1], ["85", "85", "37"]) == [1, 0, 1]
    parts = {
        "answer": (1.0, lambda text, one: module.right_answer(text, one.result)),
        "form": (0.1, module.well_formed),
    }
    both = by_parts(parts, [ADD, SUBTRACT])
    texts = [ADD.worked.partition(": ")[2], "37", "1+1=2, 1+1=2, 2"]
    assert both([0, 1, 1], texts) == pytest.approx([1.1, 1.0, 0.1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: by_rule(lambda text, task: math.nan, [0])([0], ["what"]),
            "reward nan for the response 'what'",
        ),
        (lambda: checked([1.0, math.inf], ["a", "b"]), "reward inf for the response 'b'"),
        (lambda: checked([1.0], ["a", "b"]), "1 rewards for 2 responses"),
        (lambda: by_parts({}, [0]), "at least one part"),
        (lambda: by_parts({"a": (math.nan, module.right_answer)}, [0]), "weight of 'a' is nan"),
    ],
)
def test_refusals(call: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
