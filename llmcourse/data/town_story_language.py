"""The sentences of Tinytown's stories: their templates, and the tables that find a sentence's template."""

from __future__ import annotations

from llmcourse.data import town_words as words
from llmcourse.data.town_settings import TownSettings

# Fields: c actor, d another character, o object, p place, q place that is left, m mood. Most sentences restate where
# they happen: it costs no bits, and each one asks the reader where the actor is, not only the closing sentence.
CLASSES = {"c": "name", "d": "name", "o": "object", "p": "place", "q": "place", "m": "mood"}
ACTIONS: dict[str, tuple[str, ...]] = {
    "go": (
        "{c} went from the {q} to the {p}.",
        "{c} walked from the {q} to the {p}.",
        "{c} left the {q} for the {p}.",
    ),
    "feel": ("{c} felt {m}.", "{c} was {m}."),
    "wait": ("{c} waited in the {p}.", "{c} sat down in the {p}."),
    "take": ("{c} picked up the {o} in the {p}.", "{c} took the {o} from the {p}."),
    "drop": ("{c} put down the {o} in the {p}.", "{c} left the {o} in the {p}."),
    "give": ("{c} gave the {o} to {d} in the {p}.", "{c} handed {d} the {o} in the {p}."),
    "greet": ("{c} greeted {d} in the {p}.", "{c} said hello to {d} in the {p}."),
}
OPENINGS: dict[str, tuple[str, ...]] = {
    "stand": ("{c} was in the {p}.", "{c} stood in the {p}."),
    "lie": ("The {o} was in the {p}.", "The {o} lay in the {p}."),
    "hold": ("{c} had the {o}.", "{c} held the {o}."),
}
CLOSINGS: dict[str, str] = {
    "place": "In the end, {c} was in the {p}.",
    "mood": "In the end, {c} felt {m}.",
    "object_place": "In the end, the {o} was in the {p}.",
    "object_holder": "In the end, the {o} was with {c}.",
}


def join_names(items: list[str]) -> str:
    """'A', 'A and B', 'A, B and C'."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def introduction(names: list[str], places: list[str]) -> str:
    """The first sentence of a story: its characters and its places, in order."""
    return f"{join_names(names)} lived near {join_names([f'the {place}' for place in places])}."


class StoryLanguage:
    """The pools and templates of a town's stories, as many as its settings ask for."""

    def __init__(self, settings: TownSettings) -> None:
        self.settings = settings
        self.names = words.FIRST_NAMES[: settings.first_names]
        self.objects = words.OBJECTS[: settings.objects]
        self.places = words.PLACES[: settings.places]
        self.moods = words.MOODS[: settings.moods]
        limit = settings.paraphrases
        self.actions = {action: templates[:limit] for action, templates in ACTIONS.items()}
        self.openings = {what: templates[:limit] for what, templates in OPENINGS.items()}
        self._classes = words.WordClasses(
            {"name": self.names, "object": self.objects, "place": self.places, "mood": self.moods}
        )
        self._tables = {
            "action": self._index(self.actions),
            "opening": self._index(self.openings),
            "closing": self._index({what: (template,) for what, template in CLOSINGS.items()}),
        }

    @staticmethod
    def _index(templates: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, list[str]]]:
        index = {}
        for what, wordings in templates.items():
            for wording in wordings:
                skeleton, fields = words.template_skeleton(wording, CLASSES)
                index[skeleton] = (what, fields)
        return index

    def understand(self, sentence: str, part: str) -> tuple[str, dict[str, str]] | None:
        """Read a sentence as an "opening", "action" or "closing".

        Returns:
            A key of OPENINGS, ACTIONS or CLOSINGS with the field values, or None if no template fits.
        """
        skeleton, found = self._classes.skeleton(sentence)
        if skeleton not in self._tables[part]:
            return None
        what, fields = self._tables[part][skeleton]
        return what, dict(zip(fields, found, strict=True))

    def understand_introduction(self, sentence: str) -> tuple[list[str], list[str]] | None:
        """Read an introduction: characters and places, in order; None if the sentence is not one."""
        found = self._classes.skeleton(sentence)[1]
        names = [word for word in found if word in self.names]
        places = [word for word in found if word in self.places]
        if not names or len(places) < 2 or introduction(names, places) != sentence:
            return None
        different = len(set(names)) == len(names) and len(set(places)) == len(places)
        return (names, places) if different else None
