"""Probes: prompts whose one right completion is known from the town, its arithmetic or its stories."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from llmcourse.data.town_choices import Sampler
from llmcourse.data.town_records import HELD_OUT_TEMPLATES, Records, Resident
from llmcourse.data.town_stories import Stories
from llmcourse.data.town_sums import OPERATIONS, Sum, Sums


@dataclass(frozen=True)
class Probe:
    """A prompt and its right completion.

    The prompt ends before a space and the answer begins with it, so that a byte-pair encoding cuts the two
    apart exactly where it cuts the whole text.
    """

    prompt: str
    answer: str
    kind: str
    """Document kind: "record", "sum" or "story"."""
    template: str
    """What is asked: an attribute with the wording, an operation with its form, or a kind of closing."""

    def matches(self, completion: str) -> bool:
        """Whether a completion begins with the answer, which must not go on as a longer word or number."""
        rest = completion[len(self.answer) :]
        return completion.startswith(self.answer) and not (rest[:1].isalnum() or rest[:1] == "'")


def _sample(rng: random.Random, pool: list, n: int | None) -> list:  # type: ignore[type-arg]
    """Return n of the pool in random order without repetition, or the whole pool."""
    if n is None:
        return pool
    if not 0 <= n <= len(pool):
        raise ValueError(f"n={n}: there are {len(pool)} probes of this kind, ask for 0 to {len(pool)}")
    ranks = [(rng.random(), i) for i in range(len(pool))]
    return [pool[i] for _, i in sorted(ranks)[:n]]


def fact_probes(
    records: Records, residents: list[Resident], n: int | None, rng: random.Random, held_out_template: bool
) -> list[Probe]:
    """Facts by completion, from the wordings whose value comes last (but for "Street")."""
    pool = []
    for resident in residents:
        for attribute, wordings in records.templates.items():
            for wording in [HELD_OUT_TEMPLATES[attribute]] if held_out_template else wordings:
                before, _, after = wording.partition(" {v}")
                if after.removeprefix(" Street") != ".":
                    continue
                prompt = before.format(S=resident.name, P=f"{resident.name}'s")
                answer = f" {resident.facts[attribute]}{after.removesuffix('.')}"
                pool.append(Probe(prompt, answer, "record", f"{attribute}: {wording}"))
    return _sample(rng, pool, n)


def sum_probes(sums: Sums, n: int | None, rng: random.Random, held_out: bool, worked: bool) -> list[Probe]:
    """Sums by completion, as many of each operation as drawing without repetition gives."""
    source = sums.held_out if held_out else sums.trained
    pool = [_sum_probe(one, worked) for operation in OPERATIONS for one in source[operation]]
    return _sample(rng, pool, n)


def _sum_probe(one: Sum, worked: bool) -> Probe:
    text, mark = (one.worked, ":") if worked else (one.plain, " =")
    prompt, _, answer = text.partition(mark)
    return Probe(prompt + mark, answer, "sum", f"{one.operation} {'worked' if worked else 'plain'}")


def story_probes(stories: Stories, n: int, rng: random.Random) -> list[Probe]:
    """Fresh stories, each cut in its closing sentence where the rest follows from the story."""
    return [probe for probe, _ in zip(_story_probes(stories, rng), range(n), strict=False)]


def _story_probes(stories: Stories, rng: random.Random) -> Iterator[Probe]:
    choose = Sampler(rng)
    while True:
        text, _ = stories.write(choose)
        opening, _, closing = text.rpartition("In the end, ")
        for verb, template in ((" was", "place or holder"), (" felt", "mood")):
            subject, found, answer = closing.partition(verb)
            if found:
                yield Probe(
                    f"{opening}In the end, {subject}{verb}", answer.removesuffix("."), "story", template
                )
