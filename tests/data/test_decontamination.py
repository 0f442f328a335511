"""Decontamination: planted evaluation items are found word for word; what n-grams cannot see is shown to be missed."""

from __future__ import annotations

import random
import re
from functools import cache

import pytest

from llmcourse.data.decontamination import (
    Contamination,
    ContaminationSettings,
    Decontaminator,
    cut,
    ngram_words,
)
from llmcourse.data.tinytown import Town

SHORT = ContaminationSettings(n=4, min_words=2)


@cache
def town() -> Town:
    return Town(0)


@cache
def clean_documents() -> tuple[str, ...]:
    return tuple(document.text for document in town().documents(3000, kinds=("record", "story", "dialogue")))


def naive(items: list[str], texts: list[str], settings: ContaminationSettings) -> set[tuple[int, str]]:
    """Documents and n-grams by comparing sets of tuples, without hashes."""
    grams: dict[int, set[tuple[str, ...]]] = {}
    for item in items:
        n = min(settings.n, len(ngram_words(item)))
        grams.setdefault(n, set()).update(windows_of(item, n))
    return {
        (number, " ".join(gram))
        for number, text in enumerate(texts)
        for n, wanted in grams.items()
        for gram in windows_of(text, n) & wanted
    }


def windows_of(text: str, n: int) -> set[tuple[str, ...]]:
    parts = ngram_words(text)
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


def test_by_hand():
    text = 'She said: "Tom Day has a pet cat!" And Tom Day has a pet CAT.'
    found = Decontaminator(["Nobody saw the cup", "Tom Day has a pet cat"]).find(["nothing here", text])
    assert found == [
        Contamination(1, 1, "tom day has a pet cat", 11, 32),
        Contamination(1, 1, "tom day has a pet cat", 39, 60),
    ]
    assert [text[one.start : one.end] for one in found] == ["Tom Day has a pet cat", "Tom Day has a pet CAT"]


def test_words_keep_what_a_sum_says():
    assert ngram_words("13-6=7, then 57.") == ["13", "-", "6", "=", "7", "then", "57"]
    assert ngram_words("5 + 0 = 5") != ngram_words("5 - 0 = 5")
    found = Decontaminator(["37 + 48 = 85"]).find(
        ["37 + 48 = 850", "137 + 48 = 85", "37+48=85", "x 37 + 48 = 85 y"]
    )
    assert [one.document for one in found] == [2, 3]


def test_a_long_item_is_found_by_any_of_its_n_grams():
    item = "a b c d e f g h"
    decontaminator = Decontaminator([item], SHORT)
    found = decontaminator.find(["x a b c d y", "x e f g h", "a b c x e f g", "b c d e f"])
    assert [(one.document, one.ngram) for one in found] == [
        (0, "a b c d"), (1, "e f g h"), (3, "b c d e"), (3, "c d e f"),
    ]  # fmt: skip


def test_n_follows_the_length_of_the_item():
    decontaminator = Decontaminator(["one two", "three four five", "six seven eight nine ten"], SHORT)
    found = decontaminator.find(["one two three four five six seven eight nine"])
    assert [(one.item, one.ngram) for one in found] == [
        (0, "one two"), (1, "three four five"), (2, "six seven eight nine"),
    ]  # fmt: skip


def test_no_match_across_documents():
    decontaminator = Decontaminator(["one two three four"])
    assert decontaminator.find(["one two", "three four", "", "one two three", "four"]) == []
    assert decontaminator.find([]) == []


@pytest.mark.parametrize("n", [5, 8, 13])
def test_equals_a_search_without_hashes(n):
    probes = town().story_probes(40) + town().fact_probes(40) + town().sum_probes(40, held_out=False)
    items = [probe.prompt + probe.answer for probe in probes]
    texts = [document.text for document in town().documents(700, seed=4)]
    settings = ContaminationSettings(n=n)
    found = Decontaminator(items, settings).find(iter(texts))
    assert {(one.document, one.ngram) for one in found} == naive(items, texts, settings)
    assert len(found) > 2
    assert all(ngram_words(texts[one.document][one.start : one.end]) == one.ngram.split() for one in found)


def test_places_where_lower_case_is_longer():
    text = "\u0130\u0130 \u0130stanbul one TWO three four \u0130."
    (found,) = Decontaminator(["one two three four"]).find([text])
    assert text[found.start : found.end] == "one TWO three four"


def planted(paraphrase: bool) -> tuple[list[str], list[str], set[int]]:
    """Held-out probes, the town's documents, and the numbers of those that hold a probe, as it is or paraphrased."""
    facts = town().fact_probes(60, held_out_template=True)
    sums = town().sum_probes(60, held_out=True)
    items = [probe.prompt + probe.answer for probe in facts + sums]
    rng, texts, places = random.Random(0), list(clean_documents()), set()
    for item in items:
        number = rng.choice([n for n in range(len(texts)) if n not in places])
        sentences = texts[number].split(". ")
        sentences.insert(rng.randrange(len(sentences) + 1), reworded(item) if paraphrase else item)
        texts[number] = ". ".join(sentences)
        places.add(number)
    return items, texts, places


def reworded(item: str) -> str:
    """The same fact with two words put in between, or the same sum in words."""
    if "=" in item:
        return re.sub(" = ", " makes ", item.replace("+", "plus").replace(" - ", " minus "))
    first, last, *rest = item.split()
    return " ".join([first, last, "of our town", *rest])


def test_planted_items_are_found_word_for_word():
    items, texts, places = planted(paraphrase=False)
    found = Decontaminator(items).find(texts)
    flagged = {one.document for one in found}
    assert flagged == places  # precision 1, recall 1
    assert {one.item for one in found} == set(range(len(items)))


def test_paraphrases_are_missed():
    """The limit of n-grams, stated as a test: none of the reworded items is seen."""
    items, texts, _ = planted(paraphrase=True)
    assert Decontaminator(items).find(texts) == []


def test_steps_of_worked_sums_contain_held_out_sums():
    """A leak that is really in the town: "16-7=9" inside a worked sum answers the held-out probe "16 - 7 = 9"."""
    items = [probe.prompt + probe.answer for probe in town().sum_probes()]
    found = Decontaminator(items).find(document.text for document in town().documents(2000, kinds=("sum",)))
    assert found and all(len(items[one.item].split()) == 5 for one in found)
    largest = max(max(map(int, re.findall(r"\d+", items[one.item]))) for one in found)
    assert largest < 20  # only sums of single digits, with a carry, appear as steps


def test_common_phrases_can_be_ignored():
    texts = ["the end of the story"] * 5 + ["the rare phrase of mine"]
    items = ["the end of the story", "the rare phrase of mine"]
    limits = [(None, 6), (5, 6), (4, 1)]
    for limit, expected in limits:
        found = Decontaminator(items, ContaminationSettings(max_documents=limit)).find(texts)
        assert len(found) == expected
    twice = ["the end of the story, the end of the story"]  # counted by document, not by place
    assert len(Decontaminator(items, ContaminationSettings(max_documents=1)).find(twice)) == 2


# Cutting ------------------------------------------------------------------------------------------------------


def place(text: str, part: str) -> Contamination:
    start = text.index(part)
    return Contamination(0, 0, part, start, start + len(part))


def test_cut_by_hand():
    text = "before the item here is after"
    hits = [place(text, "the item here")]
    assert cut(text, hits) == ["before", "is after"]
    assert cut(text, hits, margin=2) == ["after"]  # two characters reach "before" and "is", which go whole
    assert cut(text, hits, min_characters=7) == ["is after"]
    assert cut(text, hits, margin=100) == []
    assert cut(text, []) == [text]


def test_cut_overlapping_places():
    text = "one two three four five six"
    assert cut(text, [place(text, "three four"), place(text, "two three")]) == ["one", "five six"]
    assert cut(text, [place(text, "two three four five"), place(text, "three")]) == ["one", "six"]
    assert cut(text, [place(text, text)]) == []


def test_nothing_is_found_after_cutting():
    items, texts, places = planted(paraphrase=False)
    decontaminator = Decontaminator(items)
    found = decontaminator.find(texts)
    for number in sorted(places)[:40]:
        pieces = cut(texts[number], [one for one in found if one.document == number])
        assert decontaminator.find(pieces) == []
        assert sum(map(len, pieces)) < len(texts[number])


# Errors -------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match="items is empty"):
        Decontaminator([])
    with pytest.raises(ValueError, match="item 1, 'two words', has 2 words"):
        Decontaminator(["five words of an item", "two words"])
    with pytest.raises(ValueError, match="NoneType, not text"):
        Decontaminator(["one two three four"]).find(["good", None])
    with pytest.raises(ValueError, match="margin=-1"):
        cut("text", [], margin=-1)
    with pytest.raises(ValueError, match="ends at 30"):
        cut("short", [Contamination(0, 0, "x", 20, 30)])


@pytest.mark.parametrize(
    "wrong, message",
    [({"n": 3}, "n=3"), ({"min_words": 0}, "min_words=0"), ({"max_documents": 0}, "max_documents=0")],
)
def test_settings_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        ContaminationSettings(**wrong)
