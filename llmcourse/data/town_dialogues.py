"""Dialogues and notices of Tinytown: two residents agree to meet, a shop closes for a day, a pet is lost.

The last sentence repeats what was agreed or announced, and a lost pet and its owner's street are facts of the
town: these words carry no information, so a model has to copy or to know them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from llmcourse.data import town_words as words
from llmcourse.data.town_choices import Choose
from llmcourse.data.town_records import Resident
from llmcourse.data.town_settings import TownSettings

FORMS = ("meeting", "closing", "lost")
# x asks y; p, d, h are place, day and hour as proposed; p2, d2, h2 what y proposes instead.
ASKS = (
    '"Shall we meet in the {p} on {d} at {h}?" {x} asked {y}.',
    '{x} asked {y}: "Can you come to the {p} on {d} at {h}?"',
)
REPLIES = {
    "": ('"Yes, I will be there," {y} said.', '"I would love to," {y} said.'),
    "p": (
        '"The {p} is too far, but the {p2} is fine," {y} said.',
        '"I do not like the {p}, but the {p2} is nice," {y} said.',
    ),
    "d": (
        '"On {d} I must work, but on {d2} I can," {y} said.',
        '"I am busy on {d}, but I am free on {d2}," {y} said.',
    ),
    "h": (
        '"At {h} I must work, but at {h2} I can," {y} said.',
        '"I am busy at {h}, but I am free at {h2}," {y} said.',
    ),
}
CONFIRMATIONS = (
    '"Good, then we meet in the {p} on {d} at {h}," {x} said.',
    '"Fine, I will see you in the {p} on {d} at {h}," {x} said.',
)
CLOSING = (
    "Notice: the {s} on {a} Street is closed on {d}. It opens again on {d2} at {h}. "
    "Until then please go to the {s2} on {a2} Street. The {s} will see you on {d2} at {h}."
)
LOST = (
    "Lost: {f} {l} of {a} Street is looking for a {e}. The {e} was last seen in the {p} on {d}. "
    "Please tell {f} {l} if you see the {e}."
)
CLASSES = {
    "x": "first", "y": "first", "f": "first", "l": "last", "p": "place", "p2": "place", "d": "day",
    "d2": "day", "h": "hour", "h2": "hour", "s": "shop", "s2": "shop", "a": "street", "a2": "street",
    "e": "pet",
}  # fmt: skip
_LABELS = {
    "x": "asks", "y": "answers", "p": "place", "d": "day", "h": "hour", "s": "shop", "a": "street",
    "e": "pet",
}  # fmt: skip


def _meetings(paraphrases: int) -> Iterator[list[tuple[str, str]]]:
    """For each way to reply: the wordings of the dialogue, each with the field that the reply changes."""
    for changed, replies in REPLIES.items():
        wordings = []
        for ask in ASKS[:paraphrases]:
            for reply in replies[:paraphrases]:
                for confirmation in CONFIRMATIONS[:paraphrases]:
                    if changed:
                        confirmation = confirmation.replace(f"{{{changed}}}", f"{{{changed}2}}")
                    wordings.append((f"{ask} {reply} {confirmation}", changed))
        yield wordings


class Dialogues:
    """The grammar of dialogues and notices. `residents` are those that documents speak of."""

    def __init__(self, residents: list[Resident], settings: TownSettings) -> None:
        self.residents = residents
        self._by_name = {resident.name: resident for resident in residents}
        self._pools: dict[str, tuple[str, ...]] = {
            "first": words.FIRST_NAMES[: settings.first_names],
            "last": words.LAST_NAMES[: settings.last_names],
            "place": words.PLACES[: settings.places],
            "day": words.DAYS[: settings.days],
            "hour": words.HOURS[: settings.hours],
            "shop": words.SHOPS[: settings.shops],
            "street": words.ATTRIBUTES["street"][: settings.values],
            "pet": words.ATTRIBUTES["pet"][: settings.values],
        }
        self._classes = words.WordClasses(self._pools)
        self._meetings = [wording for wordings in _meetings(settings.paraphrases) for wording in wordings]
        forms = [("meeting", *wording) for wording in self._meetings] + [
            ("closing", CLOSING, ""),
            ("lost", LOST, ""),
        ]
        self._by_skeleton: dict[str, tuple[str, list[str], str]] = {}
        for form, template, changed in forms:
            skeleton, fields = words.template_skeleton(template, CLASSES)
            self._by_skeleton[skeleton] = (form, fields, changed)

    def write(self, choose: Choose) -> tuple[str, dict[str, Any]]:
        """Write a dialogue or notice; return its text and its `form` and what is agreed or announced."""
        form = FORMS[choose(len(FORMS))]
        values: dict[str, str] = {}
        if form == "meeting":
            template, changed = self._meetings[choose(len(self._meetings))]
            self._pick(choose, values, "x", "y", "p", "d", "h", *([f"{changed}2"] if changed else []))
        elif form == "closing":
            template, changed = CLOSING, ""
            self._pick(choose, values, "s", "a", "d", "d2", "h", "s2", "a2")
        else:
            template, changed = LOST, ""
            values |= self._owner(self.residents[choose(len(self.residents))])
            self._pick(choose, values, "p", "d")
        return template.format(**values), self._facts(form, values, changed)

    def _pick(self, choose: Choose, values: dict[str, str], *fields: str) -> None:
        """Draw the fields in order; y differs from x, and the second of a kind differs from the first."""
        for name in fields:
            pool = self._pools[CLASSES[name]]
            first = values.get("x" if name == "y" else name.removesuffix("2"))
            if first is None:
                values[name] = pool[choose(len(pool))]
            else:
                values[name] = [word for word in pool if word != first][choose(len(pool) - 1)]

    @staticmethod
    def _owner(resident: Resident) -> dict[str, str]:
        facts = resident.facts
        return {"f": resident.first_name, "l": resident.last_name, "a": facts["street"], "e": facts["pet"]}

    @staticmethod
    def _facts(form: str, values: dict[str, str], changed: str) -> dict[str, Any]:
        facts: dict[str, Any] = {"form": form}
        if form == "lost":
            facts["resident"] = f"{values['f']} {values['l']}"
        for name, label in _LABELS.items():
            if name in values:
                facts[label] = values[f"{name}2" if name == changed else name]
        if form == "closing":
            facts |= {"opens": values["d2"], "other_shop": values["s2"], "other_street": values["a2"]}
        return facts

    def is_grammatical(self, text: str) -> bool:
        """Whether a dialogue or notice has these words, consistent or not."""
        return self._classes.skeleton(text)[0] in self._by_skeleton

    def read(self, text: str) -> tuple[float, dict[str, Any]]:
        """Recover the information in bits and the facts of a dialogue or notice from its text alone.

        Raises:
            ValueError: if the grammar cannot write this text.
        """
        skeleton, found = self._classes.skeleton(text)
        if skeleton not in self._by_skeleton:
            raise ValueError(f"not a dialogue or notice: {text[:60]!r}")
        form, fields, changed = self._by_skeleton[skeleton]
        values: dict[str, str] = {}
        for name, word in zip(fields, found, strict=True):
            if values.setdefault(name, word) != word:
                raise ValueError(f"not a dialogue or notice: it says {values[name]!r}, then {word!r}")
        for name in values:
            first = "x" if name == "y" else name.removesuffix("2")
            if first != name and values[name] == values[first]:
                raise ValueError(f"not a dialogue or notice: {values[name]!r} cannot stand twice")
        return math.log2(len(FORMS)) + self._bits(form, values), self._facts(form, values, changed)

    def _bits(self, form: str, values: dict[str, str]) -> float:
        bits = math.log2(len(self._meetings)) if form == "meeting" else 0.0
        for name in values:
            size = len(self._pools[CLASSES[name]])
            if form != "lost" or name in ("p", "d"):
                bits += math.log2(size - 1 if name == "y" or name.endswith("2") else size)
        if form == "lost":
            resident = self._by_name.get(f"{values['f']} {values['l']}")
            if resident is None or self._owner(resident).items() - values.items():
                raise ValueError(
                    f"not a notice: {values['f']} {values['l']} of {values['a']} Street has no {values['e']}"
                )
            bits += math.log2(len(self.residents))
        return bits
