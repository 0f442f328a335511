"""What the web adds to good text: personal data, other languages, spam, editing, broken encodings. All invented.

Personal data uses only what is reserved for examples, so none of it can belong to anybody: e-mail domains of
RFC 2606 (1999), addresses of RFC 5737 (2010), and the North American numbers 555-0100 to 555-0199.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from llmcourse.data import town_words as words

T = TypeVar("T")

# Slots are filled from the lists behind them; every sentence is right in its language.
_LANGUAGES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "de": (
        (
            "Am {day} war der Markt geöffnet, und viele Leute kauften {thing}.",
            "Die Straße zum Bahnhof bleibt wegen Regens bis {day} gesperrt.",
            "Unsere Nachbarin verkauft {thing} für fünf Euro.",
            "Der Bürgermeister spricht am {day} über die neue Brücke.",
            "Früher gab es hier nur {thing} und eine kleine Kirche.",
        ),
        {
            "day": ("Montag", "Mittwoch", "Freitag", "Sonntag"),
            "thing": ("Äpfel", "Brötchen", "Kartoffeln", "Bücher", "Käse"),
        },
    ),
    "fr": (
        (
            "Le marché était ouvert {day}, et on y vendait {thing}.",
            "La route de la gare est fermée jusqu'à {day} à cause de la pluie.",
            "Notre voisine vend {thing} pour cinq euros.",
            "Le maire parlera du nouveau théâtre {day} à la mairie.",
            "Il n'y avait ici, autrefois, que {thing} et une petite église.",
        ),
        {
            "day": ("lundi", "mercredi", "vendredi", "dimanche"),
            "thing": ("des pommes", "du fromage", "des pêches", "des livres", "de la crème"),
        },
    ),
    "es": (
        (
            "El mercado abrió el {day} y mucha gente compró {thing}.",
            "La carretera de la estación está cerrada hasta el {day} por la lluvia.",
            "Nuestra vecina vende {thing} por cinco euros.",
            "El alcalde hablará del puente nuevo el {day} por la mañana.",
            "Aquí antes solo había {thing} y una iglesia pequeña.",
        ),
        {
            "day": ("lunes", "miércoles", "viernes", "domingo"),
            "thing": ("manzanas", "piñas", "queso", "libros", "jamón"),
        },
    ),
}
FOREIGN_LANGUAGES: tuple[str, ...] = tuple(_LANGUAGES)
_SPAM_OFFERS = ("cheap watches", "easy loans", "miracle pills", "free coins", "luxury bags", "casino bonus")
_SPAM_CALLS = (
    "CLICK HERE NOW", "Buy today and save 90 %", "Limited offer", "100 % guaranteed", "No questions asked",
    "Act fast", "You will not believe the price",
)  # fmt: skip
# Good sentences with letters and signs outside ASCII: the places where a wrong decoding shows.
TYPOGRAPHIC_SENTENCES: tuple[str, ...] = (
    "The café’s new menu — three soups and a pie — starts at £4.",
    "“It’s a fine day,” wrote the reporter, “for a naïve plan.”",
    "The façade of the old hall was painted again – it took 3½ weeks.",
    "Señor Núñez and Frau Müller came to visit; they stayed until August…",
    "At noon it was 21 °C in the park, and the crêpe stand was sold out.",
)
_ADDED_SENTENCES = (
    "Shared with the readers of our page.",
    "Thanks to everybody who sent this in.",
    "We found this in the town paper.",
)


def pick(rng: random.Random, pool: Sequence[T]) -> T:
    """One of the pool, each equally likely."""
    return pool[int(rng.random() * len(pool))]


def foreign_text(rng: random.Random, language: str, sentences: int) -> str:
    """Sentences in German ("de"), French ("fr") or Spanish ("es")."""
    templates, slots = _LANGUAGES[language]
    said = []
    for _ in range(sentences):
        template = pick(rng, templates)
        said.append(template.format(**{slot: pick(rng, options) for slot, options in slots.items()}))
    return " ".join(said)


def spam_text(rng: random.Random, lines: int) -> str:
    """Lines of an advertisement that repeats itself."""
    offer = pick(rng, _SPAM_OFFERS)
    return "\n".join(
        f"{offer} {offer.upper()}!!! {pick(rng, _SPAM_CALLS)} >>> {pick(rng, _SPAM_OFFERS)} {offer} !!!"
        for _ in range(lines)
    )


def personal_data(rng: random.Random, name: str) -> tuple[str, str, str]:
    """A sentence with a piece of personal data.

    Args:
        rng: source of randomness.
        name: full name of whose data it is, for example "Anna Miller".

    Returns:
        Its type ("email", "phone" or "ipv4"), its value, and the sentence that holds the value.
    """
    kind = pick(rng, ("email", "phone", "ipv4"))
    if kind == "email":
        mark = pick(rng, (".", "_", ""))
        value = f"{mark.join(name.lower().split())}@example.{pick(rng, ('org', 'com', 'net'))}"
        sentence = pick(rng, (f"For more write to {value} at any time.", f"Contact: {name}, {value}."))
    elif kind == "phone":
        area, line = 200 + int(rng.random() * 800), 100 + int(rng.random() * 100)
        value = pick(rng, (f"({area}) 555-0{line}", f"+1 {area} 555 0{line}", f"{area}-555-0{line}"))
        sentence = pick(rng, (f"Call {name} at {value} after six.", f"Phone: {value}."))
    else:
        network = pick(rng, ("192.0.2", "198.51.100", "203.0.113"))
        value = f"{network}.{1 + int(rng.random() * 254)}"
        sentence = pick(rng, (f"Posted by {name} from {value}.", f"Last login from {value}."))
    return kind, value, sentence


def near_copy(rng: random.Random, text: str) -> tuple[str, list[str]]:
    """Edit a text in one to three places, as copying sites do.

    Returns:
        The edited text and the names of the edits, in order.
    """
    edits = {"drop": _drop_sentence, "add": _add_sentence, "swap": _swap_word}
    names = [pick(rng, list(edits)) for _ in range(1 + int(rng.random() * 3))]
    edited = text
    for name in names:
        edited = edits[name](rng, edited)
    if edited == text:  # nothing to drop or swap, or two edits that undo each other
        edited, names = _add_sentence(rng, text), [*names, "add"]
    return edited, names


def _drop_sentence(rng: random.Random, text: str) -> str:
    sentences = text.split(". ")
    if len(sentences) < 3:
        return text
    del sentences[1 + int(rng.random() * (len(sentences) - 2))]
    return ". ".join(sentences)


def _add_sentence(rng: random.Random, text: str) -> str:
    return f"{text}\n{pick(rng, _ADDED_SENTENCES)}"


def _swap_word(rng: random.Random, text: str) -> str:
    """Replace one object or place by another throughout."""
    pools: tuple[tuple[str, ...], ...] = (words.OBJECTS, words.PLACES, words.DAYS)
    found = [(word, pool) for pool in pools for word in pool if f" {word}" in text]
    if not found:
        return text
    word, pool = pick(rng, found)
    other = pick(rng, [candidate for candidate in pool if candidate != word])
    return text.replace(f" {word}", f" {other}")


def mojibake(text: str) -> str:
    """What UTF-8 looks like when its bytes are read as Windows-1252, the commonest broken encoding of the web.

    The five bytes that Windows-1252 leaves undefined become control characters, as browsers do.
    """
    read = (bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode("utf-8"))
    return "".join(read)


def shingle_jaccard(a: str, b: str, size: int = 5) -> float:
    """Jaccard similarity of two texts' sets of word n-grams (Broder 1997): 1 if equal sets, 0 if disjoint.

    Args:
        a: a text.
        b: another.
        size: words of an n-gram; a shorter text is one n-gram by itself.
    """

    def shingles(text: str) -> set[tuple[str, ...]]:
        parts = text.split()
        return {tuple(parts[i : i + size]) for i in range(max(1, len(parts) - size + 1))}

    ours, theirs = shingles(a), shingles(b)
    return len(ours & theirs) / len(ours | theirs)
