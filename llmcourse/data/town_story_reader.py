"""Reading a story with the world at hand: what is wrong with it, and what it cost to write in bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from llmcourse.data.town_choices import order_bits
from llmcourse.data.town_story_language import StoryLanguage
from llmcourse.data.town_words import split_sentences
from llmcourse.data.town_world import World, why_impossible


@dataclass(frozen=True)
class StoryScore:
    """Verdict on a story by the rules that generated the corpus."""

    grammatical: bool
    """Every sentence is one that the grammar can say, in an allowed order, up to a closing sentence."""
    consistent: bool
    """Grammatical, every event was possible when it was told, and the closing statement is true."""
    problem: str | None
    """What is wrong with the first wrong sentence; None for a good story."""
    sentence: int | None
    """Number of the first wrong sentence from 0; the number of sentences if the closing one is missing."""
    sentences: int
    """Full sentences of the text."""
    wrong: int
    """Sentences that are impossible, untrue, not understood or missing."""


@dataclass(frozen=True)
class Problem:
    """A sentence that is wrong."""

    sentence: int
    what: str
    is_grammar: bool
    """Whether no story can say this here; otherwise only the state of the world forbids it."""


class StoryReading:
    """One pass over a text. Reading goes on after a problem, so that each sentence gets its verdict.

    `bits` is meaningful when there is no problem; it leaves out the choices of the four numbers (characters,
    places, objects, events), which depend on their allowed ranges.
    """

    def __init__(self, language: StoryLanguage, text: str) -> None:
        self.language = language
        self.problems: list[Problem] = []
        self.bits = 0.0
        self.events = 0
        self.world = World([], [])
        self.sentences, rest = split_sentences(text)
        found = language.understand_introduction(self.sentences[0]) if self.sentences else None
        if found is None:
            start = "a story starts like 'Anna and Ben lived near the park and the barn.'"
            self._wrong(0, f"{start}, not like {text[:60]!r}", is_grammar=True)
            return
        for i, part in enumerate(text.split(".")[1:-1], start=1):
            if not part.startswith(" "):
                self._wrong(i, "there is no space before this sentence", is_grammar=True)
        self.world = World(*found)
        self.bits += order_bits(len(language.names), len(self.world.names))
        self.bits += order_bits(len(language.places), len(self.world.places))
        self._read_characters()
        position = self._read_objects(1 + len(self.world.names))
        closed = self._read_events(position)
        if rest:
            self._wrong(len(self.sentences), f"unfinished sentence {rest[:60]!r}", is_grammar=True)
        elif not closed:
            self._wrong(len(self.sentences), "the closing sentence is missing", is_grammar=True)

    @property
    def score(self) -> StoryScore:
        """The verdict."""
        if not self.problems:
            return StoryScore(True, True, None, None, len(self.sentences), 0)
        first = min(self.problems, key=lambda problem: problem.sentence)
        grammatical = not any(problem.is_grammar for problem in self.problems)
        wrong = len({problem.sentence for problem in self.problems})
        return StoryScore(grammatical, False, first.what, first.sentence, len(self.sentences), wrong)

    def _wrong(self, sentence: int, what: str, *, is_grammar: bool) -> None:
        self.problems.append(Problem(sentence, what, is_grammar))

    def _read_characters(self) -> None:
        """Each character is put in a place, in the order of the introduction."""
        world = self.world
        for i, name in enumerate(world.names, start=1):
            sentence = self.sentences[i] if i < len(self.sentences) else ""
            what, values = self.language.understand(sentence, "opening") or ("", {})
            if what == "stand" and values["c"] == name and values["p"] in world.places:
                world.place_of[name] = values["p"]
                self.bits += log2(len(world.places)) + log2(len(self.language.openings["stand"]))
            else:
                world.place_of[name] = world.places[0]  # a guess, so that reading can go on
                if i < len(self.sentences):
                    self._wrong(
                        i, f"this sentence should put {name} in a place of the story", is_grammar=True
                    )

    def _read_objects(self, position: int) -> int:
        """Objects are placed until a sentence does something else; return the number of that sentence."""
        world = self.world
        while position < len(self.sentences):
            what, values = self.language.understand(self.sentences[position], "opening") or ("", {})
            if what not in ("lie", "hold"):
                break
            thing = values["o"]
            place, holder = values.get("p"), values.get("c")
            if thing in world.lies_in or thing in world.holder_of:
                self._wrong(position, f"the {thing} is placed a second time", is_grammar=False)
            elif place in world.places:
                world.lies_in[thing] = place
            elif holder in world.names:
                world.holder_of[thing] = holder
            else:
                self._wrong(position, f"{place or holder} does not belong to this story", is_grammar=False)
            self.bits += log2(len(world.places) + len(world.names)) + log2(len(self.language.openings[what]))
            position += 1
        self.bits += order_bits(len(self.language.objects), len(world.lies_in) + len(world.holder_of))
        return position

    def _read_events(self, position: int) -> bool:
        """Read to the last sentence; return whether there was a closing one."""
        for i in range(position, len(self.sentences)):
            if closing := self.language.understand(self.sentences[i], "closing"):
                self._check_closing(i, closing)
                if i + 1 < len(self.sentences):
                    self._wrong(i + 1, "a sentence after the closing one", is_grammar=True)
                return True
            if event := self.language.understand(self.sentences[i], "action"):
                self._follow_event(i, *event)
            else:
                self._wrong(i, f"no rule of the grammar says {self.sentences[i][:60]!r}", is_grammar=True)
        return False

    def _follow_event(self, position: int, action: str, event: dict[str, str]) -> None:
        world, actor = self.world, event["c"]
        self.events += 1
        if actor not in world.names:
            self._wrong(position, f"{actor} does not belong to this story", is_grammar=False)
            return
        options = world.options(actor, self.language.moods)
        # Every wording says every field, the restated place too, so a sentence is one of the options or impossible.
        if event in options.get(action, []):
            for choices in (world.names, options, options[action], self.language.actions[action]):
                self.bits += log2(len(choices))
        else:
            self._wrong(position, why_impossible(world, action, event), is_grammar=False)
        world.happen(action, event)

    def _check_closing(self, position: int, closing: tuple[str, dict[str, str]]) -> None:
        closings = self.world.closings()
        self.bits += log2(len(closings))
        if closing not in closings:
            self._wrong(position, "the closing statement is not true", is_grammar=False)
