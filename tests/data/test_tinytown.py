"""Tinytown: determinism, the exact information of a document, truth of facts, sums and stories, probes, rewards."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
import time
from collections import Counter

import pytest

import llmcourse.data.tinytown as tinytown
from llmcourse.data import town_words as words
from llmcourse.data.tinytown import Town, TownSettings, entropy_per_token
from llmcourse.data.town_records import HELD_OUT_TEMPLATES
from llmcourse.data.town_rewards import TARGET_WORDS, Judgement

SMALL = TownSettings(
    first_names=2, last_names=1, values=2, objects=1, places=2, moods=2, days=2, hours=2, shops=2, paraphrases=2,
    story_characters=(1, 2), story_objects=(1, 1), story_places=(2, 2), story_events=(1, 1),
    record_facts=(1, 2), sums=(1, 2), largest_operand=2, held_out_sums=0.2,
)  # fmt: skip
# Ranges of stories of their own, where a test counts: those of the corpus are a matter of tuning.
LONGER = TownSettings(story_characters=(1, 2), story_objects=(2, 2), story_places=(3, 4), story_events=(3, 7))
STORY = (
    "Anna and Ben lived near the park, the barn and the school. Anna was in the park. Ben stood in the park. "
    "The ball lay in the park. Ben had the key. Anna took the ball from the park. Anna gave the ball to Ben in the "
    "park. Ben walked from the park to the barn. In the end, the ball was with Ben."
)
TAKE, GIVE, WALK = (f"{sentence}." for sentence in STORY[:-1].split(". ")[5:8])


@pytest.fixture(scope="module")
def town() -> Town:
    return Town(0)


@pytest.fixture(scope="module")
def sample(town: Town) -> list[tinytown.Document]:
    return list(town.documents(4000, seed=3))


@pytest.fixture(scope="module")
def records(town: Town) -> list[tinytown.Document]:
    return list(town.documents(2000, seed=3, kinds=["record"]))


@pytest.fixture(scope="module")
def language() -> dict[str, tuple[str, float, float]]:
    """Every text of a small town with its kind, its probability and the bits that the writer claims."""
    small = Town(0, n_residents=2, n_held_out=0, settings=SMALL)
    texts: dict[str, tuple[str, float, float]] = {}
    for document, probability in small.every_document():
        assert document.text not in texts, f"two derivations: {document.text!r}"
        texts[document.text] = (document.kind, probability, document.bits)
    return texts


class TestDeterminism:
    def test_same_seed_same_documents(self, town: Town) -> None:
        first = [document.text for document in town.documents(50, seed=5)]
        assert first == [document.text for document in Town(0).documents(50, seed=5)]
        assert first[:10] == [document.text for document in town.documents(10, seed=5)]
        assert first != [document.text for document in town.documents(50, seed=6)]
        assert first != [document.text for document in Town(1).documents(50, seed=5)]

    def test_frozen_sample(self, town: Town) -> None:
        # Written out, so that a Python version that draws other numbers is noticed.
        assert next(town.documents(1, seed=0)).text == FROZEN
        assert town.residents[0].name == FROZEN_RESIDENT

    def test_kinds_filter(self, town: Town) -> None:
        assert {document.kind for document in town.documents(40, kinds=["sum"])} == {"sum"}
        assert town.sample(random.Random(1), kinds=["record"]).kind == "record"

    def test_mixture_follows_the_weights(self, sample: list[tinytown.Document]) -> None:
        counts = Counter(document.kind for document in sample)
        weights = TownSettings().weights
        for kind, weight in weights.items():
            share = weight / sum(weights.values())
            assert abs(counts[kind] / len(sample) - share) < 4 * math.sqrt(share * (1 - share) / len(sample))

    def test_fast(self, town: Town) -> None:
        start = time.process_time()
        Counter(document.kind for document in town.documents(4000))
        assert 4000 / (time.process_time() - start) > 5000  # documents per second of one core


class TestInformation:
    def test_parse_recovers_derivation_and_bits(self, town: Town, sample: list[tinytown.Document]) -> None:
        for document in sample:
            read = town.parse(document.text)
            assert (read.kind, read.facts) == (document.kind, document.facts)
            assert read.bits == pytest.approx(document.bits, abs=1e-9)

    def test_bits_of_a_sum_by_hand(self) -> None:
        # No pair is held out: 1 kind + log2(4) lengths + per sum 1 bit of operation, log2(100 * 100) pairs, 1 of form
        town = Town(0, settings=TownSettings(
            story_weight=1, record_weight=0, sum_weight=1, dialogue_weight=0, held_out_sums=0.0
        ))  # fmt: skip
        assert town.parse("37 + 48 = 85").bits == pytest.approx(
            1 + 2 + 1 + math.log2(100 * 100) + 1, abs=1e-9
        )
        # Subtraction has 101 * 100 / 2 pairs with a >= b.
        minus = 1 + math.log2(5050) + 1
        two = town.parse("85 - 48: 15-8=7, 7-4=3, 37\n9 - 9 = 0").bits
        assert two == pytest.approx(1 + 2 + 2 * minus, abs=1e-9)

    def test_bits_of_a_record_by_hand(self) -> None:
        town = Town(0, n_residents=64, settings=TownSettings(story_weight=0, sum_weight=0, dialogue_weight=0))
        who = town.residents[7]
        text = (
            f"{who.name} plays the {who.facts['instrument']}. {who.pronouns[0]} has a pet {who.facts['pet']}. "
            f"{who.name}'s place of birth is {who.facts['birthplace']}."
        )
        # 6 bits of resident, log2(4) for 3 to 6 facts, their order, 3 wordings of 4, name or pronoun twice
        assert town.parse(text).bits == pytest.approx(6 + 2 + math.log2(6 * 5 * 4) + 3 * 2 + 2, abs=1e-9)

    def test_bits_of_a_story_by_hand(self) -> None:
        settings = TownSettings(
            first_names=4, places=8, objects=2, moods=3, record_weight=0, sum_weight=0, dialogue_weight=0,
            story_characters=(2, 2), story_objects=(1, 2), story_places=(2, 3), story_events=(1, 4),
        )  # fmt: skip
        text = (
            "Ben and Anna lived near the park, the barn and the school. Ben was in the park. Anna stood in the barn. "
            "Ben had the book. Ben left the park for the barn. Ben gave the book to Anna in the barn. Anna put down "
            "the book in the barn. In the end, the book was in the barn."
        )
        # names, places, each character placed at one of 3 places in 2 wordings
        opening = math.log2(4 * 3) + math.log2(8 * 7 * 6) + 2 * (math.log2(3) + 1)
        thing = math.log2(2) + math.log2(3 + 2) + 1  # which, at 3 places or with 2 characters, wording
        numbers = math.log2(1) + math.log2(2) + math.log2(2) + math.log2(4)
        # Each event: one of 2 actors, the action, its object, the wording. A place restated or left is no choice.
        # Ben can go (to 2 places, 3 wordings), feel, wait or drop; then he meets Anna, so he can go, feel, wait, drop,
        # give (one thing to one person, 2 wordings) or greet; then she can do the same six (drop: one thing).
        events = (1 + math.log2(4) + math.log2(2) + math.log2(3)) + 2 * (1 + math.log2(6) + 0 + 1)
        closing = math.log2(3)  # two characters and an object; no mood is known
        assert Town(0, n_residents=9, settings=settings).parse(text).bits == pytest.approx(
            opening + thing + numbers + events + closing, abs=1e-9
        )

    def test_restated_places_cost_no_bits(self) -> None:
        # With one more place to choose from, its own choice, where each character and object starts and where Ben
        # walks cost more; the place where Anna takes and gives the ball, and the one that Ben leaves, cost nothing.
        town = Town(0, settings=LONGER)
        here = town.parse(STORY)
        more = town.parse(STORY.replace("the barn and the school", "the barn, the school and the yard"))
        choices = math.log2(16 - 3) + 2 * math.log2(4 / 3) + 2 * math.log2(6 / 5) + math.log2(3 / 2)
        assert more.bits == pytest.approx(here.bits + choices, abs=1e-9)

    def test_probabilities_of_a_small_town_sum_to_one(
        self, language: dict[str, tuple[str, float, float]]
    ) -> None:
        assert len(language) > 10_000
        assert {kind for kind, _, _ in language.values()} == set(tinytown.KINDS)
        assert math.fsum(p for _, p, _ in language.values()) == pytest.approx(1.0, abs=1e-9)

    def test_texts_of_a_small_town_are_read_back(self, language: dict[str, tuple[str, float, float]]) -> None:
        small = Town(0, n_residents=2, n_held_out=0, settings=SMALL)
        for text, (kind, probability, bits) in itertools.islice(language.items(), 0, None, 3):  # for time
            read = small.parse(text)
            assert read.kind == kind
            assert read.bits == pytest.approx(-math.log2(probability), abs=1e-9)
            assert bits == pytest.approx(-math.log2(probability), abs=1e-9)

    def test_entropy_of_a_small_town_is_the_mean_of_the_bits(
        self, language: dict[str, tuple[str, float, float]]
    ) -> None:
        exact = -math.fsum(p * math.log2(p) for _, p, _ in language.values())
        small = Town(0, n_residents=2, n_held_out=0, settings=SMALL)
        estimate = small.entropy(20_000, seed=1)
        assert estimate.standard_error < 0.05
        assert abs(estimate.bits - exact) < 4 * estimate.standard_error

    def test_sampler_follows_the_enumerated_probabilities(
        self, language: dict[str, tuple[str, float, float]]
    ) -> None:
        # Frequencies of the most probable texts against their probabilities: an independent count.
        small = Town(0, n_residents=2, n_held_out=0, settings=SMALL)
        n = 20_000
        counts = Counter(document.text for document in small.documents(n, seed=2))
        assert set(counts) <= set(language)
        likely = sorted(language, key=lambda text: -language[text][1])[:40]
        chi_squared = sum(
            (counts[text] - n * language[text][1]) ** 2 / (n * language[text][1]) for text in likely
        )
        assert chi_squared < 90  # 40 cells: mean 40, standard deviation 9

    def test_entropy_has_its_standard_error(self, town: Town, sample: list[tinytown.Document]) -> None:
        estimate = town.entropy(3000, seed=4)
        bits = [document.bits for document in sample]
        error = math.hypot(estimate.standard_error, statistics.stdev(bits) / math.sqrt(len(bits)))
        assert abs(estimate.bits - statistics.fmean(bits)) < 4 * error
        with pytest.raises(ValueError, match="n=1"):
            town.entropy(1)

    def test_entropy_per_token(self, town: Town) -> None:
        class Words:
            def encode(self, text: str) -> list[int]:
                return [0] * len(text.split())

        documents = list(town.documents(10))
        tokens = sum(len(document.text.split()) + 1 for document in documents)
        expected = sum(document.bits for document in documents) / tokens
        assert entropy_per_token(iter(documents), Words()) == pytest.approx(expected, rel=1e-12)
        with pytest.raises(ValueError, match="no documents"):
            entropy_per_token([], Words())

    @pytest.mark.parametrize(
        "text",
        [
            "", "Hello.", "37 + 48 = 86", "37 + 48 = 85\n", "048 + 2 = 50", "3 - 5 = -2", "48 - 37: 8-7=1, 4-3=2, 11",
            STORY + " Anna felt sad.", STORY.replace(" Anna was", "  Anna was"),
            STORY.replace(" Anna was", "Anna was"), STORY[:-1],
            "Nobody Known works as a baker.", "She works as a baker.",
        ],
    )  # fmt: skip
    def test_parse_refuses_what_the_town_cannot_write(self, town: Town, text: str) -> None:
        with pytest.raises(ValueError, match="not a"):
            town.parse(text)

    def test_parse_refuses_numbers_outside_the_ranges(self) -> None:
        town = Town(0, settings=LONGER)
        assert town.parse(STORY).kind == "story"  # 3 events, the fewest
        waits = "Ben waited in the barn. Anna waited in the park. " * 3
        for story, problem in (
            (STORY.replace(f" {WALK}", ""), "2 events, outside 3 to 7"),
            (STORY.replace("In the end", f"{waits}In the end"), "9 events, outside 3 to 7"),
            (STORY.replace(" Ben had the key.", ""), "1 objects, outside 2 to 2"),
            (
                STORY.replace("the park, the barn and the school", "the park and the barn"),
                "2 places, outside 3 to 4",
            ),
            (
                STORY.replace("Anna and Ben", "Anna, Ben and Tom").replace(
                    " The ball lay", " Tom was in the barn. The ball lay"
                ),
                "3 characters, outside 1 to 2",
            ),
        ):
            assert town.score_story(story).consistent
            with pytest.raises(ValueError, match=problem):
                town.parse(story)


class TestResidents:
    def test_names_and_facts(self, town: Town) -> None:
        names = [resident.name for resident in town.residents]
        assert len(set(names)) == len(names) == 288
        assert sum(resident.held_out for resident in town.residents) == 32
        for resident in town.residents:
            assert list(resident.facts) == list(words.ATTRIBUTES)
            assert all(value in words.ATTRIBUTES[attribute] for attribute, value in resident.facts.items())

    def test_facts_are_spread_evenly(self, town: Town) -> None:
        for attribute in words.ATTRIBUTES:
            counts = Counter(resident.facts[attribute] for resident in town.residents)
            assert len(counts) == 16
            chi_squared = sum((count - 18) ** 2 / 18 for count in counts.values())  # 288 / 16 = 18
            assert chi_squared < 45  # 15 degrees of freedom: mean 15, standard deviation 5.5

    def test_held_out_residents_and_wordings_are_in_no_document(
        self, town: Town, sample: list[tinytown.Document], records: list[tinytown.Document]
    ) -> None:
        text = "\n".join(document.text for document in sample + records)
        assert not [
            resident.name for resident in town.residents if resident.held_out and resident.name in text
        ]
        assert all(resident.name in text for resident in town.residents if not resident.held_out)
        fragments = [
            template.partition("{v}")[0].removeprefix("{S}") for template in HELD_OUT_TEMPLATES.values()
        ]
        assert not [fragment for fragment in fragments if fragment in text]

    def test_each_fact_is_seen_tens_of_times_in_five_million_tokens(self, town: Town) -> None:
        documents = list(town.documents(2000, seed=9))
        tokens = sum(
            len(re.findall(r"[A-Za-z']+|\d|[^\sA-Za-z\d]", document.text)) + 1 for document in documents
        )
        facts = sum(len(document.facts) - 1 for document in documents if document.kind == "record")
        assert facts / tokens * 5e6 / (256 * 6) > 50

    def test_pools_are_disjoint_and_pronouns_fit(self) -> None:
        assert words.is_female("Anna") and not words.is_female("Ben")
        with pytest.raises(ValueError, match="'cat' stands in the pools"):
            words.WordClasses({"a": ["cat"], "b": ["dog", "cat"]})


class TestSums:
    def test_sums_are_right(self, sample: list[tinytown.Document]) -> None:
        for document in sample:
            if document.kind == "sum":
                for line in document.text.split("\n"):
                    # An independent check: evaluate every equation, and compare the last number with the first two.
                    a, sign, b = re.match(r"(\d+) (.) (\d+)", line).groups()
                    result = int(a) + int(b) if sign == "+" else int(a) - int(b)
                    assert result >= 0 and re.findall(r"\d+", line)[-1] == str(result)
                    for left, right in re.findall(r"([\d+-]+)=(\d+)", line):
                        assert sum(int(term) for term in re.findall(r"[+-]?\d+", left)) == int(right)

    def test_held_out_pairs(self, town: Town, sample: list[tinytown.Document]) -> None:
        held_out = {one for sums in town.sums.held_out.values() for one in sums}
        seen = {tuple(fact[:3]) for document in sample for fact in document.facts.get("sums", [])}
        assert not seen & held_out
        assert len(town.sums.held_out["-"]) == 505 and len(town.sums.trained["-"]) == 4545
        assert len(town.sums.trained["+"]) + len(town.sums.held_out["+"]) == 10_000
        assert 900 < len(town.sums.held_out["+"]) < 1100
        assert all((sign, b, a) in held_out for sign, a, b in held_out if sign == "+")


class TestStories:
    def test_all_stories_of_the_corpus_are_consistent(
        self, town: Town, sample: list[tinytown.Document]
    ) -> None:
        stories = [document for document in sample if document.kind == "story"]
        assert all(town.score_story(document.text).consistent for document in stories)
        lengths = [len(document.text.split()) for document in stories]
        assert 50 < statistics.fmean(lengths) < 65 and max(lengths) < 120

    def test_carried_objects_move_with_their_holder(self, town: Town) -> None:
        there = STORY.replace(WALK, f"{WALK} Ben left the ball in the barn.")
        assert town.score_story(there).problem == "the closing statement is not true"
        there = there.replace("ball was with Ben", "ball was in the barn")
        assert town.score_story(there).consistent
        wrong = there.replace("left the ball in the barn", "left the ball in the park")
        assert town.score_story(wrong).problem == "Ben is in the barn, not in the park"

    @pytest.mark.parametrize(
        ("old", "new", "sentence", "problem", "grammatical"),
        [
            ("took the ball", "took the key", 5, "the key does not lie in the park, where Anna is", True),
            ("took the ball", "took the cup", 5, "the cup does not belong to this story", True),
            ("Anna took the ball", "Emma took the ball", 5, "Emma does not belong to this story", True),
            (TAKE, "Anna was in the barn.", 5, "no rule of the grammar says", False),
            (TAKE, "Anna took the ball.", 5, "no rule of the grammar says", False),
            (TAKE, "Anna took the ball in the park.", 5, "no rule of the grammar says", False),
            ("ball from the park", "ball from the barn", 5, "Anna is in the park, not in the barn", True),
            ("Anna gave the ball", "Anna gave the key", 6, "Anna does not have the key", True),
            ("to Ben in", "to Anna in", 6, "Anna cannot give the ball to Anna", True),
            ("to Ben in the park", "to Ben in the barn", 6, "Anna is in the park, not in the barn", True),
            ("to Ben in the park", "to Ben", 6, "no rule of the grammar says", False),
            (GIVE, WALK, 7, "Ben is in the barn, not in the park", True),
            (WALK, "Ben walked from the park to the park.", 7, "Ben is in the park already", True),
            (WALK, "Ben walked from the barn to the park.", 7, "Ben is in the park, not in the barn", True),
            (WALK, "Ben walked from the school to the barn.", 7, "Ben is in the park, not in the school", True),
            (WALK, "Ben left the yard for the barn.", 7, "Ben is in the park, not in the yard", True),
            (WALK, "Ben walked from the park to the yard.", 7, "the yard does not belong to this story", True),
            (WALK, "Ben walk from the park to the barn.", 7, "no rule of the grammar says", False),
            (WALK, "Ben walked to the barn.", 7, "no rule of the grammar says", False),
            ("was with Ben", "was with Anna", 8, "the closing statement is not true", True),
            ("In the end, the ball was with Ben.", "", 8, "the closing statement is not", True),
            ("the end, the ball was with Ben.", "", 8, "unfinished sentence ' In'", False),
            ("Ben stood in the park", "Emma stood in the park", 2, "this sentence should put Ben in", False),
            ("Ben stood in the park", "Ben stood in the yard", 2, "this sentence should put Ben in", False),
            ("Ben had the key", "Ben had the ball", 4, "the ball is placed a second time", True),
            ("Ben had the key", "Emma had the key", 4, "Emma does not belong to this story", True),
            ("Anna and Ben lived", "Anna and Anna lived", 0, "a story starts like", False),
            (". Anna was", ".  Anna was", 1, "this sentence should put Anna in", False),
            (". Ben walked", ".Ben walked", 7, "no space before this sentence", False),
        ],
    )  # fmt: skip
    def test_score_names_the_first_wrong_sentence(
        self, town: Town, old: str, new: str, sentence: int, problem: str, grammatical: bool
    ) -> None:
        assert old in STORY
        text = STORY.replace(old, new)
        if problem == "the closing statement is not":  # no closing sentence at all: not grammatical
            problem, grammatical = "the closing sentence is missing", False
        score = town.score_story(text)
        assert (score.grammatical, score.consistent, score.sentence) == (grammatical, False, sentence)
        assert problem in str(score.problem)

    @pytest.mark.parametrize(
        ("event", "problem"),
        [
            ("Ben waited in the barn. Ben waited in the barn.", "Ben has just waited"),
            ("Ben felt sad. Ben was sad.", "Ben is sad already"),
            ("Ben greeted Anna in the barn.", "Anna is not with Ben in the barn"),
            ("Ben greeted Anna in the park.", "Anna is not with Ben in the barn"),
            (
                "Anna left the park for the barn. Ben greeted Anna in the barn. Ben said hello to Anna in the barn.",
                "Ben has greeted Anna already",
            ),
            (
                "Anna left the park for the barn. Ben greeted Anna in the park.",
                "Ben is in the barn, not in the park",
            ),
            (
                "Ben put down the ball in the barn. Anna took the ball from the barn.",
                "the ball does not lie in the park, where Anna is",
            ),
            ("Ben put down the ball in the park.", "Ben is in the barn, not in the park"),
            ("Ben waited in the park.", "Ben is in the barn, not in the park"),
            ("Ben went from the park to the barn.", "Ben is in the barn, not in the park"),
            ("Ben left the park for the school.", "Ben is in the barn, not in the park"),
        ],
    )
    def test_impossible_events(self, town: Town, event: str, problem: str) -> None:
        score = town.score_story(STORY.replace(" In the end", f" {event} In the end"))
        assert score.grammatical and not score.consistent and score.problem == problem

    def test_restated_places_are_where_the_actor_is(self, town: Town) -> None:
        # An independent reading: only openings and walks move people, and every other place told is where they are.
        checked = Counter()
        for text in (document.text for document in town.documents(4_000, seed=5, kinds=["story"])):
            where: dict[str, str] = {}
            for sentence in text.split(". ")[1:-1]:
                actor, verb = sentence.split()[:2]
                places = re.findall(rf"the ({'|'.join(words.PLACES)})\b", sentence)
                if actor == "The" or verb in ("had", "held", "felt") or (verb == "was" and not places):
                    continue  # objects and moods: nobody moves
                if actor not in where:
                    (where[actor],) = places
                elif len(places) == 2:  # a walk
                    assert places[0] == where[actor] != places[1]
                    where[actor] = places[1]
                else:
                    assert places == [where[actor]]
                checked[verb] += 1
        moving = "went walked left waited sat picked took put gave handed greeted said".split()
        assert min(checked[verb] for verb in moving) > 50

    def test_a_wrong_restated_place_is_one_wrong_sentence(
        self, town: Town, sample: list[tinytown.Document]
    ) -> None:
        # What is told happens all the same, where the actor really is: the rest of the story stays right.
        verbs = set()
        for document in [document for document in sample if document.kind == "story"][:150]:
            sentences = document.text.split(". ")
            places = re.findall(r"the (\w+)", sentences[0])
            for i, sentence in enumerate(sentences[:-1]):
                actor, verb = sentence.split()[:2]
                told = re.search(r"(?:from|left|in) the (\w+)(?: (?:for|to) the \w+)?$", sentence)
                if i == 0 or told is None or verb in ("was", "stood") or actor == "The":
                    continue
                start, end = told.span(1)
                other = next(place for place in places if place != told.group(1))
                wrong = f"{sentence[:start]}{other}{sentence[end:]}"
                score = town.score_story(". ".join([*sentences[:i], wrong, *sentences[i + 1 :]]))
                assert (score.grammatical, score.sentence, score.wrong) == (True, i, 1)
                assert score.problem == f"{actor} is in the {told.group(1)}, not in the {other}"
                verbs.add(verb)
        assert verbs == set("went walked left waited sat picked took put gave handed greeted said".split())

    def test_continuation_counts_from_the_prompt(self, town: Town) -> None:
        cut = STORY.index(" Anna gave")
        assert town.score_story(STORY[cut:], prompt=STORY[:cut]).consistent
        assert town.score_story(" Anna sat down in the barn." + STORY[cut:], prompt=STORY[:cut]).sentence == 6

    def test_white_space_at_the_ends_is_free(self, town: Town) -> None:
        assert town.score_story(f"\n {STORY}\n").consistent


class TestProbes:
    def test_facts(self, town: Town) -> None:
        probes = town.fact_probes()
        assert len(probes) == 256 * 6 * 3
        facts = {resident.name: resident.facts for resident in town.residents}
        for probe in probes:
            name = " ".join(probe.prompt.split()[:2]).removesuffix("'s")
            attribute = probe.template.partition(":")[0]
            assert probe.answer.removesuffix(" Street") == f" {facts[name][attribute]}"
            statement = town.records.understand(f"{probe.prompt}{probe.answer}.")
            assert statement is not None and statement.value == facts[name][attribute]

    def test_prompts_occur_in_documents_unless_held_out(
        self, town: Town, sample: list[tinytown.Document], records: list[tinytown.Document]
    ) -> None:
        corpus = "\n".join(document.text for document in sample + records)
        seen = [probe.prompt + probe.answer in corpus for probe in town.fact_probes(100)]
        assert sum(seen) > 50
        new = town.fact_probes(100, held_out_template=True) + town.fact_probes(100, held_out_residents=True)
        assert not [probe for probe in new if probe.prompt in corpus]

    def test_sums(self, town: Town, sample: list[tinytown.Document]) -> None:
        corpus = "\n".join(document.text for document in sample)
        probes = town.sum_probes(200)
        for probe in probes:
            a, sign, b, _ = probe.prompt.split()
            assert int(probe.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
            assert f"\n{probe.prompt}" not in corpus
        worked = town.sum_probes(5, held_out=False, worked=True)
        assert all(town.parse(probe.prompt + probe.answer).kind == "sum" for probe in worked)
        assert {probe.template for probe in town.sum_probes()} == {"+ plain", "- plain"}

    def test_stories(self, town: Town) -> None:
        probes = town.story_probes(60)
        for probe in probes:
            assert town.score_story(f"{probe.prompt}{probe.answer}.").consistent
            assert not probe.prompt.endswith(" ") and probe.answer.startswith(" ")
        assert {probe.template for probe in probes} == {"place or holder", "mood"}

    def test_draws(self, town: Town) -> None:
        assert town.sum_probes(10, seed=1) == town.sum_probes(10, seed=1) != town.sum_probes(10, seed=2)
        assert len({probe.prompt for probe in town.fact_probes(500)}) == 500
        assert town.story_probes(3, seed=1) != town.story_probes(3, seed=2)
        with pytest.raises(ValueError, match="n=100000"):
            town.fact_probes(100_000)

    @pytest.mark.parametrize(
        ("completion", "right"),
        [(" 85", True), (" 85\n3 + 4", True), (" 85.", True), (" 855", False), (" 8", False), ("85", False)],
    )
    def test_matches(self, completion: str, right: bool) -> None:
        assert tinytown.Probe("37 + 48 =", " 85", "sum", "+ plain").matches(completion) is right


class TestRewards:
    def test_documents_of_the_town_have_no_fault(self, town: Town, sample: list[tinytown.Document]) -> None:
        for document in sample[:2000]:
            judged = town.judge(document.text)
            assert (judged.kind, judged.grammatical) == (document.kind, True)
            assert judged.right == judged.statements

    def test_target_lengths_are_those_of_the_corpus(self, sample: list[tinytown.Document]) -> None:
        for kind, target in TARGET_WORDS.items():
            mean = statistics.fmean(len(d.text.split()) for d in sample if d.kind == kind)
            assert mean == pytest.approx(target, rel=0.05)

    def test_reward_by_hand(self) -> None:
        # Grammar 1, three of four statements 1.5, twice the length ln 2.
        judged = Judgement("record", statements=4, right=3, grammatical=True, words=56)
        assert judged.reward == pytest.approx(1 + 1.5 - math.log(2), abs=1e-12)
        assert Judgement("record", 1, 0, False, 0).reward == -3.0

    def test_record_statements(self, town: Town) -> None:
        who = next(resident for resident in town.residents if resident.held_out)
        other = next(v for v in words.ATTRIBUTES["food"] if v != who.facts["food"])
        subject, possessive = who.pronouns
        truth = f"{who.name} owns a {who.facts['pet']}. {subject} was born in {who.facts['birthplace']}."
        assert town.judge(truth).right == 2
        assert town.judge(f"{truth} {possessive} favorite food is {other}.").right == 2  # untrue
        assert town.judge(f"{truth} {subject} has a pet {who.facts['pet']}.").right == 2  # said before
        wrong = "He" if subject == "She" else "She"
        assert town.judge(f"{truth} {wrong} likes to eat {who.facts['food']}.").right == 2  # somebody else
        assert not town.judge(f"{truth} {subject} likes {who.facts['food']}.").grammatical
        assert not town.judge(truth[:-1]).grammatical
        assert not town.judge(f"{subject} owns a {who.facts['pet']}.").grammatical

    def test_sums_and_dialogues(self, town: Town) -> None:
        judged = town.judge("3 + 4 = 7\n3 + 4 = 8\n3 + 4: 3+4=7, 0+0=0, 7\n3 plus 4")
        assert (judged.statements, judged.right, judged.grammatical) == (4, 2, False)
        good = next(town.documents(1, kinds=["dialogue"], seed=8)).text
        assert town.judge(good).right == 1
        assert not town.judge(good[:-1]).grammatical
        notice = (
            "Notice: the bank on Hill Street is closed on Friday. It opens again on Sunday at 2. Until then please go "
            "to the gym on Oak Street. The bank will see you on {} at 2."
        )
        assert town.judge(notice.format("Sunday")).right == 1
        bad = town.judge(notice.format("Monday"))
        assert bad.right == 0 and bad.grammatical

    def test_prompt_and_length(self, town: Town) -> None:
        assert town.true_reward(" 7", prompt="3 + 4 =") > town.true_reward(" 8", prompt="3 + 4 =")
        assert town.true_reward("") == -3.0
        assert town.true_reward(STORY) > town.true_reward(STORY.replace("took the ball", "took the key"))

    def test_annotator_follows_bradley_terry(self, town: Town) -> None:
        rng, n, noise = random.Random(0), 4000, 2.0
        a, b = " 7", " 8"  # true rewards differ by 2
        wins = sum(town.preference("3 + 4 =", a, b, noise, rng).chosen == a for _ in range(n))
        chance = 1 / (1 + math.exp(-2.0 / noise))
        assert abs(wins / n - chance) < 4 * math.sqrt(chance * (1 - chance) / n)
        sure = town.preference("3 + 4 =", b, a, 0.0, rng)
        assert (sure.chosen, sure.rejected, sure.is_mistake) == (a, b, False)
        assert sure.margin == pytest.approx(2.0)
        tie = Counter(town.preference("3 + 4 =", " 7", " 7 ", 0.0, rng).chosen for _ in range(200))
        assert 60 < tie[" 7"] < 140
        with pytest.raises(ValueError, match="noise=-1"):
            town.preference("", a, b, -1.0, rng)


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("first_names", 1), ("values", 17), ("places", 1), ("paraphrases", 0), ("largest_operand", 100),
            ("story_characters", (0, 2)), ("story_places", (1, 3)), ("story_events", (4, 3)), ("record_facts", (3, 7)),
            ("sums", (0, 1)), ("held_out_sums", 1.0), ("story_weight", -1.0),
        ],
    )  # fmt: skip
    def test_bad_values_are_refused(self, name: str, value: object) -> None:
        with pytest.raises(ValueError, match="weights" if "weight" in name else name):
            TownSettings(**{name: value})

    def test_bad_calls_are_refused(self, town: Town) -> None:
        with pytest.raises(ValueError, match="kind 'poem'"):
            town.documents(1, kinds=["poem"])
        with pytest.raises(ValueError, match="kinds is empty"):
            town.documents(1, kinds=[])
        with pytest.raises(ValueError, match="n=-1 documents"):
            town.documents(-1)
        with pytest.raises(ValueError, match="seed -1"):
            town.documents(1, seed=-1)
        with pytest.raises(ValueError, match="n_residents=2300"):
            Town(0, n_residents=2300)
        with pytest.raises(ValueError, match="writes no documents of kind 'sum'"):
            Town(0, settings=TownSettings(sum_weight=0)).parse("1 + 1 = 2")

    @pytest.mark.parametrize(
        "change",
        [
            {"first_names": 20}, {"last_names": 20}, {"values": 4}, {"objects": 5}, {"places": 6}, {"moods": 2},
            {"days": 3}, {"hours": 3}, {"shops": 3}, {"paraphrases": 1}, {"story_characters": (3, 4)},
            {"story_objects": (1, 1)}, {"story_places": (2, 2)}, {"story_events": (1, 1)}, {"record_facts": (1, 1)},
            {"sums": (1, 1)}, {"largest_operand": 9}, {"held_out_sums": 0.5}, {"story_weight": 3.0},
            {"record_weight": 3.0}, {"sum_weight": 3.0}, {"dialogue_weight": 3.0},
        ],
    )  # fmt: skip
    def test_every_setting_changes_the_documents(self, town: Town, change: dict[str, object]) -> None:
        other = Town(0, settings=TownSettings(**change))
        texts = [document.text for document in town.documents(300)]
        assert texts != [document.text for document in other.documents(300)]
        for document in other.documents(300):
            assert other.parse(document.text).bits == pytest.approx(document.bits, abs=1e-9)


def test_examples_of_the_module_are_documents_of_the_town(town: Town) -> None:
    examples = re.findall(r"^(\w+):\n((?:    .+\n)+)", str(tinytown.__doc__), flags=re.MULTILINE)
    assert [name.lower() for name, _ in examples] == list(tinytown.KINDS)
    for name, block in examples:
        joint = "\n" if name == "Sum" else " "
        text = joint.join(line.strip() for line in block.strip().split("\n"))
        assert town.parse(text).kind == name.lower()


FROZEN = (
    "Lost: Irene Cox of Birch Street is looking for a snake. The snake was last seen in the garden on Thursday. "
    "Please tell Irene Cox if you see the snake."
)
FROZEN_RESIDENT = "George White"
