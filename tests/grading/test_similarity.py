"""Likeness of answers: renamed copies are found, what everybody writes is not held against anyone."""

from __future__ import annotations

import random

import pytest

from llmcourse.grading.similarity import (
    class_findings,
    copied_from,
    jaccard,
    package_sources,
    shingles,
    similar_answers,
    tokens_of,
)

ODD = '''
def answer(scores, labels):
    """Area by counting."""
    total = 0.0
    for i, first in enumerate(scores):
        for j in range(len(scores)):
            if labels[i] > labels[j]:
                total += 1.0 if first > scores[j] else 0.5 * (first == scores[j])
    return total / max(1, sum(labels) * (len(labels) - sum(labels)))
'''
RENAMED = """
def answer(a, b):   # my own work
    s = 0.0
    for x, y in enumerate(a):
        for z in range(len(a)):
            if b[x] > b[z]:

                s += 1.0 if y > a[z] else 0.5 * (y == a[z])
    return s / max(1, sum(b) * (len(b) - sum(b)))
"""
USUAL = """
def answer(scores, labels):
    order = scores.argsort()
    ranks = order.argsort() + 1
    positive = labels.sum()
    return (ranks[labels == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive))
"""


def test_tokens_know_neither_names_nor_layout_nor_comments():
    assert tokens_of(ODD)[-20:] == tokens_of(RENAMED)[-20:]
    assert tokens_of("x = torch.exp(y)  # note") == ["name", "=", "name", ".", "exp", "(", "name", ")"]
    assert tokens_of("x = y", names=True) == ["x", "=", "y"]
    assert tokens_of("def f(:\n  '''unfinished") == ["def", "name", "(", ":"]
    assert tokens_of("\x00 £ $") != tokens_of("")


def test_jaccard_by_hand():
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 2 / 4
    assert jaccard(frozenset(), frozenset()) == 0
    assert shingles(list("abcdef")) == {"a b c d e", "b c d e f"}


def test_a_renamed_copy_is_found_among_others():
    answers = {f"s{i:03}": USUAL + f"\nextra{i} = {i}" for i in range(12)} | {"s100": ODD, "s101": RENAMED}
    assert similar_answers(answers) == [("s100", "s101")]


def test_what_is_common_or_given_is_not_held_against_anyone():
    everyone = {f"s{i:03}": USUAL for i in range(9)}
    assert similar_answers(everyone) == []
    two = {"s001": ODD, "s002": RENAMED}
    assert similar_answers(two) == [("s001", "s002")]
    assert similar_answers(two, known=[ODD]) == []
    assert (
        similar_answers({"s001": "def f(x):\n    return x + 1", "s002": "def f(y):\n    return y + 1"}) == []
    )


def test_groups_are_whole_and_sorted():
    answers = {"s3": ODD, "s1": RENAMED, "s2": ODD.replace("total", "t"), "s4": USUAL}
    assert similar_answers(answers) == [("s1", "s2", "s3")]


def test_random_answers_are_not_alike():
    generator = random.Random(0)
    words = [f"{a}{b}" for a in "+-*/%" for b in ("x.sum()", "len(y)", "max(z)", "abs(u)", "w[0]", "3")]
    answers = {
        f"s{i:03}": "def f():\n    return 0 " + " ".join(generator.choices(words, k=40)) for i in range(60)
    }
    assert similar_answers(answers) == []


def test_the_package_s_own_text_is_recognized_and_a_rewrite_is_not():
    sources = package_sources(
        ["llmcourse.grading.similarity:similar_answers", "llmcourse.nowhere:f", "os:getcwd"]
    )
    assert list(sources) == ["llmcourse.grading.similarity:similar_answers"]
    (text,) = sources.values()
    assert copied_from("# mine\n" + text, sources) == "llmcourse.grading.similarity:similar_answers"
    assert copied_from(text.replace("own", "rest").replace("student", "who"), sources) is None
    assert copied_from("def f(x):\n    return x", sources) is None


def test_class_findings_name_the_group_and_the_function():
    exercise = "slug/area"
    (text,) = package_sources(["llmcourse.grading.similarity:similar_answers"]).values()
    answers = {
        "s001": {exercise: ODD},
        "s002": {exercise: RENAMED},
        "s003": {exercise: text},
        "s004": {exercise: ""},
    }
    found = class_findings(
        answers,
        stubs={exercise: "def answer(scores, labels):\n    raise NotImplementedError"},
        solutions={exercise: USUAL},
        watched={exercise: ("llmcourse.grading.similarity:similar_answers",)},
    )
    assert {student: [finding.kind for finding in findings] for student, findings in found.items()} == {
        "s001": ["SIMILAR_TO"],
        "s002": ["SIMILAR_TO"],
        "s003": ["COPIED_FROM_PACKAGE"],
    }
    assert found["s001"] == found["s002"] and found["s001"][0].text == "alike: s001, s002"


@pytest.mark.parametrize(
    "nested", ["(" * 50_000, "[" * 10_000 + "]" * 10_000, "-" * 100_000 + "1", "x." * 50_000]
)
def test_nested_text_costs_nothing(nested):
    assert len(tokens_of(nested)) <= 20_000
