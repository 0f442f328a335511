"""Exercises of chapter 03 on tokens: a merge of byte-pair encoding, mixture weights, packing; `data.py` lists them."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.data.mixture_plan import temperature_weights
from llmcourse.data.streaming import StreamedBatches
from llmcourse.tokenization.bpe import Pair, count_pairs, merge_pair

# --- byte-pair encoding: one merge ------------------------------------------------------------------------------

Words = dict[tuple[int, ...], int]


def merge_step(words: Words, new_id: int) -> tuple[Pair, Words]:
    """The most frequent pair (ties: the smallest pair) and the words after joining it."""
    pairs = count_pairs(words)
    best = min(pairs, key=lambda pair: (-pairs[pair], pair))
    return best, {merge_pair(word, best, new_id): frequency for word, frequency in words.items()}


def _bpe_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    many = {tuple(numbers.randrange(3, 7) for _ in range(numbers.randrange(2, 8))): 0 for _ in range(11)}
    random_words = {word: numbers.randrange(1, 9) for word in many}
    return [
        Case(({(5, 6, 7): 9, (8, 9, 3): 1, (8, 9, 4): 1, (8, 9): 1}, 40), name="a frequent word"),
        Case(({(7, 8): 2, (3, 9): 2, (3, 4): 2, (2, 1): 1}, 30), name="a tie"),
        Case(({(4, 4, 4): 3, (4, 4, 4, 4): 1, (4, 5): 2}, 20), name="a run of equal ids"),
        Case(({(2, 3, 9, 2, 3): 5, (9, 9): 1}, 60), name="a pair twice in a word"),
        Case((random_words, 50), name="random words"),
    ]


def _merge_with(
    count: Callable[[Words], Counter[Pair]] = count_pairs,
    key: Callable[[Counter[Pair], Pair], object] = lambda pairs, pair: (-pairs[pair], pair),
    merge: Callable[[Sequence[int], Pair, int], tuple[int, ...]] = merge_pair,
) -> Callable[[Words, int], tuple[Pair, Words]]:
    def step(words: Words, new_id: int) -> tuple[Pair, Words]:
        pairs = count(words)
        best = min(pairs, key=lambda pair: key(pairs, pair))
        return best, {merge(word, best, new_id): frequency for word, frequency in words.items()}

    return step


def _merge_from_right(word: Sequence[int], pair: Pair, joined: int) -> tuple[int, ...]:
    return merge_pair(tuple(reversed(word)), (pair[1], pair[0]), joined)[::-1]


def _merge_once(word: Sequence[int], pair: Pair, joined: int) -> tuple[int, ...]:
    for at, found in enumerate(pairwise(word)):
        if found == pair:
            return (*word[:at], joined, *word[at + 2 :])
    return tuple(word)


def _step(answer: Callable[[Words, int], tuple[Pair, Words]], case: Case) -> dict[str, object]:
    """The pair, and the words in the order of the input with their frequencies."""
    pair, words = answer(*case.args)
    return {"pair": list(pair), "words": [[list(word), count] for word, count in words.items()]}


BPE_STEP = Exercise(
    id="merge_step",
    title="One merge of byte-pair encoding",
    points=2,
    reference=merge_step,
    cases=_bpe_cases,
    run=_step,
    mutants=[
        Mutant(
            "frequencies ignored",
            _merge_with(count=lambda words: count_pairs(dict.fromkeys(words, 1))),
            "You seem to count each word once. A word that occurs nine times brings its pairs nine times.",
        ),
        Mutant(
            "tie to the largest",
            _merge_with(key=lambda pairs, pair: (-pairs[pair], -pair[0], -pair[1])),
            "In a tie you seem to take the largest pair. Take the smallest, left id first, so that the result does not "
            "depend on the order of the texts.",
        ),
        Mutant(
            "tie to the first seen",
            _merge_with(key=lambda pairs, pair: -pairs[pair]),
            "In a tie you seem to take the pair that was seen first: the same corpus in another order would give "
            "another tokenizer. Take the smallest pair.",
        ),
        Mutant(
            "least frequent",
            _merge_with(key=lambda pairs, pair: (pairs[pair], pair)),
            "You seem to join the least frequent pair.",
        ),
        Mutant(
            "joined from the right",
            _merge_with(merge=_merge_from_right),
            "You seem to join from right to left. In a run of equal ids the leftmost pair is joined first.",
        ),
        Mutant(
            "only the first place",
            _merge_with(merge=_merge_once),
            "You seem to join a pair once in each word. Every place of the word where it occurs is joined.",
        ),
    ],
    hints=("Count with frequencies, choose by (-count, pair), then rewrite every word from left to right.",),
)


# --- mixture weights --------------------------------------------------------------------------------------------


def _mixture_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    sizes = {name: numbers.randrange(10, 9_000) * 1_000 for name in ("web", "books", "code")}
    return [
        Case(({"web": 900, "code": 100}, 2.0), name="9 to 1 at temperature 2"),
        Case((sizes, 1.0), name="temperature 1"),
        Case((sizes | {"law": 31}, 3.3), name="four sources, one tiny"),
    ]


def _softmax(logits: dict[str, float]) -> dict[str, float]:
    top = max(logits.values())
    weights = {name: math.exp(value - top) for name, value in logits.items()}
    return {name: value / sum(weights.values()) for name, value in weights.items()}


def _mixture_with(power: Callable[[float], float], normalize: bool = True) -> Callable[..., dict[str, float]]:
    def weights(tokens: dict[str, int], temperature: float = 1.0) -> dict[str, float]:
        largest = max(tokens.values())
        raw = {name: (n / largest) ** power(temperature) for name, n in tokens.items()}
        return {name: value / (sum(raw.values()) if normalize else 1.0) for name, value in raw.items()}

    return weights


MIXTURE = Exercise(
    id="mixture",
    title="Temperature mixture",
    points=1,
    reference=temperature_weights,
    cases=_mixture_cases,
    mutants=[
        Mutant(
            "power t",
            _mixture_with(lambda t: t),
            "You seem to raise to the power t, which makes large sources larger still. The exponent is 1/t.",
        ),
        Mutant(
            "proportional",
            _mixture_with(lambda t: 1.0),
            "You seem to ignore the temperature: these are the natural proportions.",
        ),
        Mutant(
            "uniform",
            _mixture_with(lambda t: 0.0),
            "Your weights are equal. That is the limit of an infinite temperature.",
        ),
        Mutant(
            "softmax of sizes",
            lambda tokens, temperature=1.0: _softmax({name: n / temperature for name, n in tokens.items()}),
            "You seem to take a softmax of the token counts. The softmax is over their logarithms: exp(ln(n) / t) = "
            "n ** (1/t).",
        ),
        Mutant(
            "not normalized",
            _mixture_with(lambda t: 1 / t, normalize=False),
            "Your weights do not sum to 1.",
        ),
    ],
    hints=("weights = n ** (1 / t), divided by their sum.",),
)


# --- packing ----------------------------------------------------------------------------------------------------


class _Listed:
    """Documents that are ids already, as the source and the encoder that `StreamedBatches` asks for; read in order."""

    def __init__(self, documents: list[list[int]], eos_id: int) -> None:
        self.documents, self.eos_id, self.vocab_size, self.place = documents, eos_id, 1 << 16, 0

    epoch = 0.0

    def next(self) -> str:
        self.place += 1
        return str((self.place - 1) % len(self.documents))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.documents[int(text)] for text in texts]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def pack(documents: list[list[int]], context_length: int, eos_id: int) -> dict[str, list[list[int]]]:
    """All full rows of a list of documents, by the package's `StreamedBatches`.

    Args:
        documents: ids of each document, without end of text.
        context_length: tokens of a row, T.
        eos_id: ends each document; the input before the first token.
    """
    n_rows = sum(len(ids) + 1 for ids in documents) // context_length
    source = _Listed(documents, eos_id)
    batch = StreamedBatches(source, source, batch_size=n_rows, context_length=context_length).next()
    return {name: values.tolist() for name, values in batch.items()}


def _pack_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    lengths = [numbers.randrange(1, 12) for _ in range(9)] + [23, 5]
    return [
        Case(
            ([[11, 12, 13], [21, 22, 23, 24], [31, 32]], 4, 0),
            name="documents of 3, 4 and 2 tokens in rows of 4",
        ),
        Case(([[numbers.randrange(2, 99) for _ in range(n)] for n in lengths], 7, 1), name="rows of 7"),
    ]


def _pack_with(
    *, eos: bool = True, shift: bool = True, owner: str = "target", restart: bool = False, cut: str = "go on"
) -> Callable[[list[list[int]], int, int], dict[str, list[list[int]]]]:
    def answer(documents: list[list[int]], context_length: int, eos_id: int) -> dict[str, list[list[int]]]:
        pieces = [(i, [*ids, eos_id] if eos else list(ids)) for i, ids in enumerate(documents)]
        flat: list[tuple[int, int]] = []  # (document, token)
        for i, ids in pieces:
            room = context_length - len(flat) % context_length
            kept = ids[:room] if cut == "drop the rest" else ids
            flat += [(i, token) for token in kept]
        n = len(flat) // context_length * context_length
        targets, owners = [token for _, token in flat[:n]], [i for i, _ in flat[:n]]
        tokens = [eos_id, *targets[:-1]] if shift else targets[:]
        if restart:
            tokens = [eos_id if place % context_length == 0 else token for place, token in enumerate(tokens)]
        if owner == "input":
            owners = [0, *owners[:-1]]
        columns = {"tokens": tokens, "targets": targets, "documents": owners}
        return {
            name: [values[i : i + context_length] for i in range(0, n, context_length)]
            for name, values in columns.items()
        }

    return answer


PACKING = Exercise(
    id="packing",
    title="Packing with document borders",
    points=2,
    reference=pack,
    cases=_pack_cases,
    run=lambda answer, case: {name: np.asarray(rows).tolist() for name, rows in answer(*case.args).items()},
    mutants=[
        Mutant(
            "no end of text",
            _pack_with(eos=False),
            "Your documents have no end: without an end-of-text token after each, the model never learns to stop.",
        ),
        Mutant(
            "no shift",
            _pack_with(shift=False),
            "Your targets are the inputs. The input at each place is the token before the target.",
        ),
        Mutant(
            "border at the input",
            _pack_with(owner="input"),
            "You seem to number documents by the input token. The number belongs to the target: the end of text that "
            "predicts a document's first token counts with that document.",
        ),
        Mutant(
            "rows start anew",
            _pack_with(restart=True),
            "Every row of yours begins with end of text. A row goes on where the last one ended: its first input is "
            "the last target of the row before.",
        ),
        Mutant(
            "rest dropped",
            _pack_with(cut="drop the rest"),
            "You seem to drop what does not fit into a row. The document goes on in the next row; only the last "
            "incomplete row is left out.",
        ),
    ],
    hints=(
        "Make one list of all tokens with an end of text after each document; shift it by one; cut every T.",
    ),
)
