"""The words of Tinytown: every pool that its grammars draw from, and how to find these words in a text.

Pools are disjoint, so a word tells its class. Replacing each pool word by its class turns a sentence into a
*skeleton* ("Anna took the ball from the park." becomes "<name> took the <object> from the <place>."), and a
skeleton tells the template: this is what makes the grammars readable backwards, one derivation a text. All
entries are common words of one piece, so that a byte-pair encoding of about a thousand entries has a token for
nearly each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Women and men alternate, so that a small town, which takes the first few names, has both.
FIRST_NAMES: tuple[str, ...] = (
    "Anna", "Ben", "Emma", "Tom", "Lucy", "Jack", "Mary", "Sam", "Jane", "Max", "Sara", "Paul",
    "Ella", "Mark", "Ruth", "Luke", "Nora", "Adam", "Alice", "Alan", "Clara", "Carl", "Grace", "Dean",
    "Helen", "Eric", "Julia", "Frank", "Laura", "George", "Molly", "Henry", "Susan", "Ivan", "Betty", "James",
    "Carol", "Kevin", "Diana", "Leo", "Fiona", "Oscar", "Irene", "Peter", "Karen", "Simon", "Wendy", "Victor",
)  # fmt: skip
LAST_NAMES: tuple[str, ...] = (
    "Allen", "Bell", "Black", "Brown", "Clark", "Cole", "Cook", "Cox", "Day", "Dunn", "Ford", "Fox",
    "Gray", "Green", "Hall", "Hale", "Hunt", "Jones", "Kerr", "Lane", "Lee", "Long", "Love", "Mann",
    "Miller", "Moss", "Nash", "Page", "Park", "Price", "Ray", "Reed", "Ross", "Rowe", "Ryan", "Shaw",
    "Smith", "Snow", "Stone", "Todd", "Wade", "Ward", "Webb", "West", "White", "Wood", "York", "Young",
)  # fmt: skip
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "occupation": (
        "baker", "teacher", "doctor", "farmer", "painter", "nurse", "pilot", "judge", "lawyer", "sailor",
        "miner", "writer", "singer", "dancer", "driver", "cook",
    ),
    "street": (
        "Maple", "Cedar", "Pine", "Elm", "Oak", "Birch", "Lake", "Hill", "River", "Mill", "King", "Queen",
        "Rose", "Bay", "Fern", "Sand",
    ),
    "birthplace": (
        "Paris", "Rome", "Oslo", "Cairo", "Tokyo", "Lima", "Bonn", "Delhi", "Milan", "Turin", "Dublin",
        "Berlin", "London", "Boston", "Lyon", "Bern",
    ),
    "pet": (
        "cat", "dog", "hen", "pig", "goat", "duck", "frog", "pony", "crow", "toad", "mouse", "snake",
        "lamb", "rat", "fish", "rabbit",
    ),
    "food": (
        "soup", "rice", "bread", "cheese", "salad", "pie", "cake", "honey", "beans", "eggs", "stew",
        "toast", "ham", "corn", "nuts", "pizza",
    ),
    "instrument": (
        "violin", "piano", "guitar", "flute", "cello", "harp", "banjo", "organ", "tuba", "drum", "oboe",
        "lute", "viola", "horn", "gong", "bugle",
    ),
}  # fmt: skip
OBJECTS: tuple[str, ...] = (
    "ball", "book", "lamp", "key", "hat", "cup", "rope", "coin",
    "kite", "map", "box", "basket", "letter", "ring", "umbrella", "clock",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "park", "kitchen", "barn", "garden", "school", "library", "church", "station",
    "museum", "shop", "forest", "cellar", "tower", "hall", "stable", "yard",
)  # fmt: skip
MOODS: tuple[str, ...] = ("happy", "sad", "angry", "tired", "proud", "calm")
DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HOURS: tuple[str, ...] = tuple(str(hour) for hour in range(1, 13))
SHOPS: tuple[str, ...] = ("bakery", "bank", "gym", "cafe", "hotel", "store", "salon", "market")

_WORD = re.compile(r"[A-Za-z]+|[0-9]+")


def is_female(first_name: str) -> bool:
    """Whether the town speaks of a person of this first name as "she"."""
    return FIRST_NAMES.index(first_name) % 2 == 0


class WordClasses:
    """Finds the words of given pools in a text.

    Args:
        pools: class name -> its words. No word may stand in two pools.

    Raises:
        ValueError: if a word stands in two pools.
    """

    def __init__(self, pools: Mapping[str, Iterable[str]]) -> None:
        self._class_of: dict[str, str] = {}
        for name, words in pools.items():
            for word in words:
                if self._class_of.setdefault(word, name) != name:
                    raise ValueError(
                        f"{word!r} stands in the pools {self._class_of[word]!r} and {name!r}: rename one"
                    )

    def skeleton(self, text: str) -> tuple[str, list[str]]:
        """Return the text with each pool word replaced by "<class>", and these words in order of
        appearance."""
        found: list[str] = []

        def replace(match: re.Match[str]) -> str:
            name = self._class_of.get(match.group())
            if name is None:
                return match.group()
            found.append(match.group())
            return f"<{name}>"

        return _WORD.sub(replace, text), found


def template_skeleton(template: str, classes: Mapping[str, str]) -> tuple[str, list[str]]:
    """Skeleton of a `str.format` template, and its field names in order of appearance.

    Args:
        template: text with named fields, for example "{c} took the {o} from the {p}."
        classes: field name -> word class, for example {"c": "name", "o": "object", "p": "place"}
    """
    fields = re.findall(r"{(\w+)}", template)
    return template.format(**{field: f"<{classes[field]}>" for field in fields}), fields


def split_sentences(text: str) -> tuple[list[str], str]:
    """The full sentences of a text, without the spaces between them, and what follows the last full stop."""
    *parts, rest = text.split(".")
    return [f"{part}.".removeprefix(" " if i else "") for i, part in enumerate(parts)], rest
