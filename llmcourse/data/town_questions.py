"""The wordings of requests to an assistant of Tinytown; the last wording of each is kept out of training.

Fields: S subject and P possessive (a name, or a pronoun in a follow-up question), v value, c character, o object, p
place, m mood, sum such as "37 + 48", n a number word with s for its plural, a the name of an attribute.
"""

from __future__ import annotations

FACTS: dict[str, tuple[str, ...]] = {
    "occupation": (
        "What does {S} do for a living?", "What is {P} job?", "What does {S} work as?",
        "How does {S} make money?",
    ),
    "street": (
        "Which street does {S} live on?", "On which street is {P} home?", "What is {P} street?",
        "Where can {S} be found?",
    ),
    "birthplace": (
        "Where was {S} born?", "What is {P} place of birth?", "Where did {S} grow up?",
        "Which town is {S} a native of?",
    ),
    "pet": (
        "What pet does {S} have?", "What is {P} pet?", "What does {S} keep at home?",
        "Which animal does {S} own?",
    ),
    "food": (
        "What does {S} like to eat?", "What is {P} favorite food?", "What does {S} eat every week?",
        "Which food does {S} love?",
    ),
    "instrument": (
        "Which instrument does {S} play?", "What is {P} instrument?", "What does {S} practice every day?",
        "What does {S} perform on?",
    ),
}  # fmt: skip
READING: dict[str, tuple[str, ...]] = {
    "place": ("Where is {c} in the end?", "Where was {c} in the end?", "At the end, where is {c}?"),
    "mood": ("How does {c} feel in the end?", "How did {c} feel in the end?", "At the end, how does {c} feel?"),
    "object_place": ("Where is the {o} in the end?", "Where was the {o} in the end?", "At the end, where is the {o}?"),
    "object_holder": ("Where is the {o} in the end?", "Where was the {o} in the end?", "At the end, where is the {o}?"),
}  # fmt: skip
SUMS: tuple[str, ...] = ("What is {sum}?", "Calculate {sum}.", "How much is {sum}?")
STEPS: tuple[str, ...] = (
    "What is {sum}? Show the steps.", "Calculate {sum} step by step.", "How much is {sum}? Write the steps.",
)  # fmt: skip
WRITING: tuple[str, ...] = (
    "Write exactly {n} sentence{s} about {S}.", "Tell me about {S} in {n} sentence{s}.",
    "Use {n} sentence{s} to tell me about {S}.",
)  # fmt: skip
EXCLUDING: tuple[str, ...] = (
    "Write exactly {n} sentence{s} about {S}, but nothing about the {a}.",
    "Tell me about {S} in {n} sentence{s}, without the {a}.",
    "Use {n} sentence{s} to tell me about {S}, and leave out the {a}.",
)
STORIES: tuple[str, ...] = (
    "Tell a story with {c} and the {o}.", "Write a story about {c} and the {o}.",
    "Use {c} and the {o} in a story.",
)  # fmt: skip
