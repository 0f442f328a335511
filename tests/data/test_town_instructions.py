"""Requests of the town: answers are right, wrong ones are not, the two parts never meet, constraints by hand."""

from __future__ import annotations

import doctest
import re

import pytest

from llmcourse.data import town_instructions
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import (
    ASSISTANT,
    TASKS,
    Constraint,
    TownInstruction,
    TownInstructions,
    TownInstructionSettings,
)
from llmcourse.data.town_questions import EXCLUDING, FACTS, READING, STEPS, STORIES, SUMS, WRITING


@pytest.fixture(scope="module")
def instructions() -> TownInstructions:
    return TownInstructions(Town(0))


@pytest.fixture(scope="module")
def training(instructions: TownInstructions) -> list[TownInstruction]:
    return instructions.training(600)


def only(task: str, **settings: float) -> TownInstructions:
    weights = {f"{name}_weight": float(name == task) for name in TASKS}
    return TownInstructions(Town(0), TownInstructionSettings(**(weights | settings)))


def asked(one: TownInstruction) -> str:
    return one.messages[-1]["content"]


def test_docstring_examples_hold():
    assert doctest.testmod(town_instructions).failed == 0


def test_every_answer_is_right_and_another_requests_answer_is_wrong(training: list[TownInstruction]):
    assert all(one.is_right(one.answer) and one.is_right(f" {one.answer}\n") for one in training)
    assert {one.task for one in training} == set(TASKS)
    exact = [one for one in training if one.task in ("facts", "reading")]
    wrong = sum(a.is_right(b.answer) for a, b in zip(exact, exact[1:], strict=False))
    assert wrong < 0.02 * len(exact)
    assert not any(one.is_right("") for one in training)


def test_facts_are_true_and_asked_of_the_part_that_they_belong_to(instructions: TownInstructions):
    by_name = {resident.name: resident for resident in instructions.town.residents}
    for held_out, requests in (
        (False, instructions.training(200, tasks=["facts"])),
        (True, instructions.held_out("facts", 200)),
    ):
        names = {one.name for one in instructions.residents[held_out]}
        for one in requests:
            name = " ".join(one.answer.replace("'s", "").split()[:2])
            attribute = one.variety.removesuffix(" follow-up")
            assert name in names and not by_name[name].held_out
            assert re.search(rf"\b{by_name[name].facts[attribute]}\b", one.answer)
            assert name.split()[0] in one.messages[0]["content"]
            instructions.town.records.understand(one.answer)
            assert instructions.town.judge(one.answer).right == 1
    told_of = [resident for resident in instructions.town.residents if not resident.held_out]
    assert len(instructions.residents[True]) == 64 and len(told_of) == 256
    assert {r.name for r in instructions.residents[True]}.isdisjoint(
        r.name for r in instructions.residents[False]
    )


def test_a_follow_up_speaks_of_the_resident_by_pronoun():
    (one,) = only("facts", follow_up_share=1.0).training(1)
    assert [message["role"] for message in one.messages] == ["user", "assistant", "user"]
    name = one.answer.split()[0]
    assert name not in asked(one) and re.search(r"\b(he|she|his|her)\b", asked(one))
    assert one.variety.endswith("follow-up") and len(one.conversation) == 4
    (one,) = only("facts", follow_up_share=0.0).training(1)
    assert len(one.messages) == 1


def test_reading_asks_what_the_story_says(instructions: TownInstructions):
    for one in instructions.held_out("reading", 40):
        score = instructions.town.score_story(f"{one.story} {one.answer}")
        assert score.consistent and asked(one).startswith(one.story) and one.answer not in asked(one)
        assert instructions.reward(one, one.answer) > 4
    stories = {one.story for one in instructions.training(500, tasks=["reading"])}
    assert stories.isdisjoint(one.story for one in instructions.held_out("reading", 200))


def test_sums_are_of_their_part_and_judged_by_the_last_number(instructions: TownInstructions):
    sums = instructions.town.sums
    for held_out, requests in (
        (True, instructions.held_out("sums", 100)),
        (False, instructions.training(100, tasks=["sums"])),
    ):
        pool = sums.held_out if held_out else sums.trained
        for one in requests:
            assert any(one.answer in (s.plain, s.worked) for s in pool[one.variety[0]])
            assert ("step" in asked(one)) == ("steps" in one.variety) == (":" in one.answer)
    one = instructions.held_out("sums", 1)[0]
    result = one.answer.split()[-1]
    assert one.is_right(result) and one.is_right(f"It is {result}.") and not one.is_right(f"{result} or so")
    assert not one.is_right(f"1{result}") and not one.is_right(f"-{result}")


def test_constraints_by_hand():
    two = Constraint(2, ("Ann", "Day"), ("cat",))
    assert two.holds("Ann Day has a dog. She sings.")
    assert not two.holds("Ann Day has a dog.")  # one sentence
    assert not two.holds("Ann Day has a dog. She sings")  # no end
    assert not two.holds("Ann Days has a dog. She sings.")  # not the word
    assert not two.holds("Ann Day has a cat. She sings.")  # forbidden
    assert not two.holds("Ann Day has a dog..") and not two.holds("")
    assert Constraint(None, ("dog",)).holds("A dog. A dog. A dog.") and not Constraint().holds("")


def test_constraint_requests_say_what_their_constraint_asks(instructions: TownInstructions):
    numbers = {"one": 1, "two": 2, "three": 3, "four": 4}
    for one in instructions.training(150, tasks=["constraints"]):
        constraint, words = one.constraint, set(re.findall(r"\w+", asked(one)))
        assert constraint is not None
        if one.variety == "include":
            assert (
                set(constraint.required[:2]) <= words and instructions.town.score_story(one.answer).consistent
            )
            continue
        assert [n for word, n in numbers.items() if word in words] == [constraint.sentences]
        assert set(constraint.required) <= words
        assert bool(constraint.forbidden) == (one.variety == "exclude")
        judged = instructions.town.judge(one.answer)
        assert judged.grammatical and judged.right == judged.statements == constraint.sentences


def test_held_out_wordings_are_in_no_training_request(instructions: TownInstructions):
    wordings = [*FACTS.values(), *READING.values(), SUMS, STEPS, WRITING, EXCLUDING, STORIES]
    beginnings = {re.split(r"{", wording[-1])[0] for wording in wordings}
    for task in TASKS:
        for one in instructions.held_out(task, 30, reworded=True):
            question = asked(one).removeprefix(one.story).strip()
            assert any(question.startswith(beginning) for beginning in beginnings)
        reworded = {asked(one) for one in instructions.held_out(task, 30, reworded=True)}
        plain = {asked(one) for one in instructions.held_out(task, 30)}
        assert reworded.isdisjoint(plain)
    used = {wording for group in wordings for wording in group[:-1]}
    assert used.isdisjoint(group[-1] for group in wordings)


def test_reward_prefers_right_and_true_answers(instructions: TownInstructions):
    (one,) = instructions.held_out("facts", 1)
    other = next(
        a for a in instructions.held_out("facts", 50) if a.variety == one.variety and a.answer != one.answer
    )
    right, true, empty = (instructions.reward(one, text) for text in (one.answer, other.answer, " "))
    assert right == pytest.approx(true + 2) and empty == -3 < true < right <= 5


def test_draws_are_reproducible_and_differ_by_seed(instructions: TownInstructions):
    assert instructions.training(20, 1) == TownInstructions(Town(0)).training(20, 1)
    assert instructions.training(20, 1) != instructions.training(20, 2)
    first, second = instructions.held_out("facts", 50), instructions.held_out("facts", 50, 1)
    assert first == instructions.held_out("facts", 50) and first != second
    assert len({repr(one.messages) for one in first}) == 50


def test_weights_decide_the_tasks():
    counts = [one.task for one in only("sums", steps_share=1.0).training(30)]
    assert set(counts) == {"sums"}
    assert all("steps" in one.variety for one in only("sums", steps_share=1.0).training(30))
    apart = TownInstructions(Town(0), TownInstructionSettings(held_out_share=0.5)).residents[True]
    assert len(apart) == 128


def test_some_plain_sums_are_answered_with_steps_where_the_settings_say_so_and_only_in_training():
    sums = only("sums", unasked_steps_share=0.25)
    plain = [one for one in sums.training(2000) if "steps" not in one.variety]
    unasked = [one for one in plain if ":" in one.answer]
    assert 0.2 < len(unasked) / len(plain) < 0.3
    assert all(one.is_right(one.answer) and "step" not in one.messages[-1]["content"] for one in unasked)
    held_out = [one for one in sums.held_out("sums", 200) if "steps" not in one.variety]
    assert held_out and not any(":" in one.answer for one in held_out)
    assert sums.held_out("sums", 200) == only("sums").held_out("sums", 200)
    assert 0 < ASSISTANT.unasked_steps_share < 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps_share": 1.5}, "steps_share=1.5"),
        ({"unasked_steps_share": -0.1}, "unasked_steps_share=-0.1"),
        ({"follow_up_share": -0.1}, "follow_up_share=-0.1"),
        ({"held_out_share": 1.0}, "held_out_share=1.0"),
        ({"facts_weight": -1.0}, "weights"),
        ({f"{task}_weight": 0.0 for task in TASKS}, "weights"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        TownInstructionSettings(**changes)


def test_bad_requests_are_refused(instructions: TownInstructions):
    for call in (
        lambda: instructions.training(1, tasks=["poems"]),
        lambda: instructions.held_out("poems", 1),
    ):
        with pytest.raises(ValueError, match="task 'poems': choose one of facts, reading, sums, constraints"):
            call()
    with pytest.raises(ValueError, match="n=-1"):
        instructions.training(-1)
    with pytest.raises(ValueError, match="n=-1"):
        instructions.held_out("sums", -1)
    with pytest.raises(ValueError, match="they have weight zero"):
        only("sums").training(1, tasks=["facts"])
    tiny = TownInstructions(
        Town(0, n_residents=2, n_held_out=0), TownInstructionSettings(follow_up_share=0.0)
    )
    with pytest.raises(ValueError, match="only 18 held-out requests of 'facts'"):
        tiny.held_out("facts", 30)
    with pytest.raises(ValueError, match="1 residents cannot be parted"):
        TownInstructions(Town(0, n_residents=1, n_held_out=0))
