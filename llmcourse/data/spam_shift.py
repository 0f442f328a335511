"""Spam of another make than the web dump's, to measure filters on what they have not seen.

The dump's advertisements come from a few templates: shouting, repetitive, the same offers on every page. A filter
that was chosen or trained on them may have learned these offers, this shouting, or spam; the dump alone cannot
tell. Two shifts can: a small one, in which some offers are kept out of the training texts, and a large one,
advertisements in quiet prose.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from llmcourse.data.web_text import pick

_GOODS = (
    "sofa",
    "mattress",
    "credit card",
    "phone contract",
    "garden chair",
    "vitamin drink",
    "language course",
)
_SENTENCES = (
    "Dear friend, our shop sells a fine {thing} at a fair price.",
    "Order your {thing} before Sunday and pay nothing for the delivery.",
    "Thousands of happy customers already chose our {thing}.",
    "Visit our store or ask our team about the {thing}.",
    "This week every {thing} costs half of the usual price.",
    "Nobody who tried the {thing} wants to give it back.",
    "Our {thing} comes with a guarantee of ten years.",
    "Tell two neighbors about the {thing} and get yours for less.",
)


def quiet_spam(rng: random.Random, sentences: int = 5) -> str:
    """An advertisement in plain prose: no capitals, no exclamation marks, hardly a repeated phrase.

    Args:
        rng: source of randomness.
        sentences: how many, up to 8; no sentence comes twice.

    Raises:
        ValueError: sentences is not from 1 to 8.
    """
    if not 1 <= sentences <= len(_SENTENCES):
        raise ValueError(f"sentences={sentences}: use 1 to {len(_SENTENCES)}")
    thing = pick(rng, _GOODS)
    return " ".join(template.format(thing=thing) for template in rng.sample(_SENTENCES, sentences))


def without_offers(text: str, offers: Sequence[str]) -> str:
    """The lines of a text that name none of the offers, in any case; "" if none is left."""
    return "\n".join(
        line for line in text.split("\n") if not any(offer.lower() in line.lower() for offer in offers)
    )
