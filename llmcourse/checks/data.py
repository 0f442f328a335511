"""Exercises of chapter 03, data preparation: addresses, extraction, rules, masking, duplicates, tokens, mixtures.

References are the package's functions, or thin compositions of them where a learner writes one step of several.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np

from llmcourse.checks.data_tokens import BPE_STEP, MIXTURE, PACKING
from llmcourse.checks.exercise import Case, Exercise, Mutant
from llmcourse.data.calibration import reliability
from llmcourse.data.canonical_urls import canonical_url
from llmcourse.data.decontamination import ContaminationSettings, Decontaminator, ngram_words
from llmcourse.data.extraction import score_extraction
from llmcourse.data.filter_rules import ParsedText, top_ngram_characters
from llmcourse.data.lsh import choose_bands, probability
from llmcourse.data.minhash import minhash, permutations
from llmcourse.data.privacy import MARKERS, mask

_WORDS = (
    "anna baker cello forest garden harbor jane kettle lamp market night oslo piano river snake tower under "
    "violin window yellow zebra"
).split()


def _text(numbers: random.Random, n: int, words: Sequence[str] = _WORDS) -> str:
    return " ".join(numbers.choice(words) for _ in range(n))


# --- canonical addresses ----------------------------------------------------------------------------------------


def _url_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    page, year = numbers.choice(_WORDS).capitalize(), numbers.randrange(1990, 2030)
    return [
        Case(("HTTPS://Gazette.Example:443/News/3.html#top",), name="letter case, port and fragment"),
        Case(("http://gazette.example?b=2&utm_source=mail&a=1",), name="parameters and no path"),
        Case(("http://notes.example:8080/a/../b/./c.html?fbclid=9",), name="dot segments"),
        Case((f"http://Board.example:80/{page}.html?year={year}&gclid=7&page=2#{page}",), name="all at once"),
    ]


_TRACKING = ("gclid", "fbclid")


def _canonical_with(
    *,
    fold: str = "host",
    port: str = "default",
    fragment: bool = False,
    query: str = "sorted",
    dots: bool = True,
) -> Callable[[str], str]:
    def answer(url: str) -> str:
        parts = urlsplit(url)
        default = {"http": 80, "https": 443}[parts.scheme]
        show = parts.port is not None and (parts.port != default if port == "default" else port == "kept")
        host = f"{parts.hostname}:{parts.port}" if show else parts.hostname
        path = urlsplit(urljoin(url, parts.path or "/")).path if dots else parts.path or "/"
        given = [part for part in parts.query.split("&") if part]
        kept = [part for part in given if not part.startswith(("utm_", *_TRACKING))]
        chosen = {"sorted": sorted(kept), "as given": kept, "with tracking": sorted(given), "dropped": []}[
            query
        ]
        found = f"{parts.scheme}://{host}{path}" + (f"?{'&'.join(chosen)}" if chosen else "")
        found += f"#{parts.fragment}" if fragment and parts.fragment else ""
        return found.lower() if fold == "everything" else found

    return answer


CANONICAL_URL = Exercise(
    id="canonical_url",
    title="Canonical address",
    points=2,
    reference=canonical_url,
    cases=_url_cases,
    mutants=[
        Mutant(
            "all in lower case",
            _canonical_with(fold="everything"),
            "You seem to write everything in lower case. Only scheme and host ignore case; /News and /news may be "
            "different pages.",
        ),
        Mutant(
            "fragment kept",
            _canonical_with(fragment=True),
            "You seem to keep the fragment. It names a place inside the page and is never sent to the server.",
        ),
        Mutant(
            "query dropped",
            _canonical_with(query="dropped"),
            "You seem to drop all parameters: page=2 is another page than page=1. Drop those that track visitors.",
        ),
        Mutant(
            "tracking kept",
            _canonical_with(query="with tracking"),
            "You seem to keep utm_*, gclid or fbclid. They say who follows a link, not where it leads.",
        ),
        Mutant(
            "not sorted",
            _canonical_with(query="as given"),
            "You seem to leave the parameters in their order: a=1&b=2 and b=2&a=1 would be fetched twice.",
        ),
        Mutant(
            "port dropped",
            _canonical_with(port="dropped"),
            "You seem to drop every port. Only the default one (80 for http, 443 for https) says nothing.",
        ),
        Mutant(
            "port kept",
            _canonical_with(port="kept"),
            "You seem to keep the default port: https://a:443/ is https://a/.",
        ),
        Mutant(
            "dots left",
            _canonical_with(dots=False),
            "You seem to leave `.` and `..` in the path: /a/../b is /b.",
        ),
    ],
    hints=("urlsplit takes the address apart; its .hostname is in lower case and its .port a number.",),
)


# --- the multiset F1 of an extraction ---------------------------------------------------------------------------


def word_scores(extracted: str, truth: str) -> dict[str, float]:
    """Precision, recall and F1 of the words of an extracted text, as multisets, by the package's `score_extraction`."""
    words = score_extraction(extracted, truth).words
    return {"precision": words.precision, "recall": words.recall, "f1": words.f1}


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _extraction_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    truth = _text(numbers, 40, _WORDS[:9])
    words = truth.split()
    menu = "home news about " + _text(numbers, 5, _WORDS[9:])
    doubled = " ".join(words[:25] + words[:10])
    return [
        Case((f"{menu} {truth}", truth), name="the menu was kept"),
        Case((" ".join(words[:23]), truth), name="the end was lost"),
        Case((f"{menu} {doubled}", truth), name="a part twice, a part lost"),
    ]


def _word_scores_with(
    count: Callable[[str], Counter[str]] = lambda text: Counter(text.split()),
    mean: Callable[[float, float], float] = _f1,
    swap: bool = False,
) -> Callable[[str, str], dict[str, float]]:
    def scores(extracted: str, truth: str) -> dict[str, float]:
        found, wanted = count(extracted), count(truth)
        shared = (found & wanted).total()
        precision, recall = shared / found.total(), shared / wanted.total()
        value = mean(precision, recall)
        precision, recall = (recall, precision) if swap else (precision, recall)
        return {"precision": precision, "recall": recall, "f1": value}

    return scores


def _positions(extracted: str, truth: str) -> dict[str, float]:
    found, wanted = extracted.split(), truth.split()
    shared = sum(a == b for a, b in zip(found, wanted, strict=False))
    precision, recall = shared / len(found), shared / len(wanted)
    return {"precision": precision, "recall": recall, "f1": _f1(precision, recall)}


WORD_SCORES = Exercise(
    id="word_scores",
    title="Precision and recall of an extraction",
    points=2,
    reference=word_scores,
    cases=_extraction_cases,
    mutants=[
        Mutant(
            "sets",
            _word_scores_with(count=lambda text: Counter(set(text.split()))),
            "You seem to compare sets of words. A word that occurs five times and is extracted once has a recall of "
            "1/5: count occurrences.",
        ),
        Mutant(
            "swapped",
            _word_scores_with(swap=True),
            "You seem to swap the two: precision divides by what was extracted, recall by what should have been.",
        ),
        Mutant(
            "arithmetic mean",
            _word_scores_with(mean=lambda p, r: (p + r) / 2),
            "Your F1 is the arithmetic mean. The harmonic mean 2PR/(P+R) is asked for; it is near 0 when either one "
            "is.",
        ),
        Mutant(
            "positions",
            _positions,
            "You seem to compare word by word at equal positions: one menu word at the start would make everything "
            "wrong.",
        ),
    ],
    hints=("`Counter(a) & Counter(b)` keeps the smaller count of each word; `.total()` adds the counts up.",),
)


# --- the calibration error --------------------------------------------------------------------------------------


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> float:
    """Expected calibration error over bins of equal width, by the package's `reliability`: (M,), (M,) bool ->
    number."""
    return reliability(probabilities, labels, n_bins).error


def _calibration_cases(seed: int) -> list[Case]:
    g = np.random.default_rng(seed)
    sure = np.concatenate([g.uniform(0.9, 1.0, 40), g.uniform(0.0, 0.3, 11)])
    spread = g.beta(0.6, 0.9, 230)
    return [
        Case((sure, g.random(51) < 0.6 * sure), {"n_bins": 10}, name="too sure of itself"),
        Case((spread, g.random(230) < spread**2), {"n_bins": 5}, name="spread out, 5 bins"),
        Case((np.array([1.0, 0.0, 1.0]), np.array([True, False, False])), {"n_bins": 10}, name="0 and 1"),
    ]


def _calibration_with(
    *,
    weight: str = "count",
    power: int = 1,
    center: bool = False,
    confidence: bool = False,
    signed: bool = False,
) -> Callable[..., float]:
    def error(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> float:
        p, y = np.asarray(probabilities, float), np.asarray(labels, float)
        if confidence:
            y, p = ((p >= 0.5) == (y > 0.5)).astype(float), np.maximum(p, 1 - p)
        bins = np.minimum((p * n_bins).astype(int), n_bins - 1)
        total, used = 0.0, 0
        for b in np.unique(bins):
            inside = bins == b
            stated = (b + 0.5) / n_bins if center else p[inside].mean()
            gap = y[inside].mean() - stated
            gap = gap if signed else abs(gap) ** power
            total += gap * (inside.sum() if weight == "count" else 1)
            used += inside.sum() if weight == "count" else 1
        return float(total / used)

    return error


CALIBRATION = Exercise(
    id="calibration",
    title="Expected calibration error",
    points=2,
    reference=calibration_error,
    cases=_calibration_cases,
    mutants=[
        Mutant(
            "bins count alike",
            _calibration_with(weight="bin"),
            "You seem to average over bins. A bin of three pages must count less than one of three hundred: weight "
            "each bin by its number of pages.",
        ),
        Mutant(
            "bin centers",
            _calibration_with(center=True),
            "You seem to compare with the center of the bin. Compare with the mean of the probabilities in it.",
        ),
        Mutant(
            "squares",
            _calibration_with(power=2),
            "You seem to square the gaps. The expected calibration error averages their absolute values.",
        ),
        Mutant(
            "signed",
            _calibration_with(signed=True),
            "Your gaps have signs, so bins that are too sure and bins that are too modest cancel.",
        ),
        Mutant(
            "confidence",
            _calibration_with(confidence=True),
            "You seem to bin the confidence max(p, 1 - p) and to compare it with accuracy. Here the probability of the "
            "positive class is binned and compared with the share of positives.",
        ),
    ],
    hints=("bins = min(int(p * n_bins), n_bins - 1); weight |mean label - mean p| of each by its size.",),
)


# --- MinHash signatures -----------------------------------------------------------------------------------------


def signature(keys: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The MinHash signature of one document, by the package's `minhash`: (N,), (P,), (P,) uint32 -> (P,) uint32."""
    return minhash(keys, np.array([0, len(keys)]), a, b)[0]


def _signature_cases(seed: int) -> list[Case]:
    g = np.random.default_rng(seed)
    cases = []
    for n_keys, n_permutations in ((1, 3), (23, 7), (140, 12)):
        keys = g.integers(1, 2**32, n_keys, dtype=np.uint32)
        cases.append(Case((keys, *permutations(n_permutations, seed + n_keys)), name=f"{n_keys} shingles"))
    return cases


def _numbers(answer: Callable[..., np.ndarray], case: Case) -> list[int]:
    """A signature as plain integers, whatever its dtype."""
    return [int(value) for value in np.asarray(answer(*case.args)).tolist()]


def _signature_with(
    *, reduce: Callable[..., np.ndarray] = np.min, axis: int = 0, modulo: int = 2**32, add: bool = True
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]:
    def answer(keys: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, factor, addend = (
            np.asarray(value, object) for value in (keys, a, b)
        )  # Python's integers never overflow
        values = (x[:, None] * factor + addend * add) % modulo  # (N, P)
        return reduce(values, axis=axis)

    return answer


SIGNATURE = Exercise(
    id="signature",
    title="MinHash signature",
    points=2,
    reference=signature,
    cases=_signature_cases,
    run=_numbers,
    mutants=[
        Mutant(
            "largest",
            _signature_with(reduce=np.max),
            "You seem to keep the largest values. That works as well, but the signatures would not match others; keep "
            "the smallest.",
        ),
        Mutant(
            "over permutations",
            _signature_with(axis=1),
            "You seem to take the minimum over permutations: one number for each shingle. It is taken over shingles: "
            "one number for each permutation.",
        ),
        Mutant(
            "no modulus",
            _signature_with(modulo=2**80),
            "Your products do not wrap around at 2^32. Without the modulus a x + b keeps the order of x, and every "
            "permutation picks the same shingle.",
        ),
        Mutant(
            "smallest key first",
            lambda keys, a, b: (int(keys.min()) * a.astype(object) + b) % 2**32,
            "You seem to take the smallest key and permute that. Permute all keys, then take the smallest value: each "
            "permutation may pick another shingle.",
        ),
        Mutant(
            "b left out",
            _signature_with(add=False),
            "You seem to leave out b.",
        ),
    ],
    hints=("uint32 arithmetic in NumPy wraps around by itself: (keys[:, None] * a + b).min(axis=0).",),
)


# --- bands and rows ---------------------------------------------------------------------------------------------


def _bands_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    return [
        Case((112, 0.75), name="112 values, threshold 0.75"),
        Case((64, 0.5), name="64 values, threshold 0.5"),
        Case((numbers.randrange(40, 60), numbers.choice((0.6, 0.65, 0.8))), name="another length"),
    ]


def _areas(
    n_permutations: int, threshold: float, curve: Callable[..., np.ndarray]
) -> dict[tuple[int, int], Any]:
    """Area under the curve below the threshold and above it beyond, for every choice of bands and rows."""
    middle = (np.arange(1000) + 0.5) / 1000
    below, above = middle * threshold, threshold + middle * (1 - threshold)
    return {
        (b, r): (threshold * curve(below, b, r).mean(), (1 - threshold) * (1 - curve(above, b, r)).mean())
        for b in range(1, n_permutations + 1)
        for r in range(1, n_permutations // b + 1)
    }


def _bands_with(
    fp_weight: float = 1.0, fn_weight: float = 1.0, curve: Callable[..., np.ndarray] = probability
) -> Callable[[int, float], tuple[int, int]]:
    def choose(n_permutations: int, threshold: float) -> tuple[int, int]:
        areas = _areas(n_permutations, threshold, curve)
        return min(areas, key=lambda choice: fp_weight * areas[choice][0] + fn_weight * areas[choice][1])

    return choose


def _bands_by_inflection(n_permutations: int, threshold: float) -> tuple[int, int]:
    choices = [(b, n_permutations // b) for b in range(1, n_permutations + 1)]
    return min(choices, key=lambda choice: abs((1 / choice[0]) ** (1 / choice[1]) - threshold))


BANDS = Exercise(
    id="bands",
    title="Bands from the S-curve",
    points=3,
    reference=choose_bands,
    cases=_bands_cases,
    run=lambda answer, case: [int(number) for number in answer(*case.args)],
    mutants=[
        Mutant(
            "swapped",
            lambda n_permutations, threshold: choose_bands(n_permutations, threshold)[::-1],
            "You seem to return (rows, bands). Bands come first.",
        ),
        Mutant(
            "by the inflection point",
            _bands_by_inflection,
            "You seem to match (1/b)^(1/r) with the threshold. That puts the steep part in the right place and does "
            "not look at how steep it is; minimize the two areas.",
        ),
        Mutant(
            "misses only",
            _bands_with(fp_weight=0.0),
            "You seem to count missed pairs only; then one row in as many bands as possible always wins.",
        ),
        Mutant(
            "false pairs only",
            _bands_with(fn_weight=0.0),
            "You seem to count false pairs only; then a single band of all rows always wins.",
        ),
        Mutant(
            "and before or",
            _bands_with(curve=lambda s, b, r: (1 - (1 - s) ** b) ** r),
            "Your curve is (1 - (1 - s)^b)^r. All rows of a band must agree, and one band is enough: 1 - (1 - s^r)^b.",
        ),
    ],
    hints=(
        "Try every b and r with b r <= n; sum the curve below the threshold and its complement above it.",
    ),
)


# --- repetition -------------------------------------------------------------------------------------------------


def top_ngram_fraction(text: str, n: int) -> float:
    """Gopher's fraction of characters in the most frequent n-gram of words, by the package's rule."""
    return top_ngram_characters(ParsedText(text), n)


def _repetition_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    offer = " ".join(numbers.sample(_WORDS, 3))
    mixed = " ".join(f"{offer} {numbers.choice(_WORDS)} {numbers.choice(_WORDS)}" for _ in range(6))
    return [
        Case(("buy now buy now buy now today only", 2), name="an advertisement"),
        Case((mixed + "\n" + _text(numbers, 12), 3), name="an offer repeated among other words"),
        Case((" ".join(numbers.sample(_WORDS, 9)), 2), name="nothing repeated"),
        Case(("two words", 3), name="shorter than n"),
    ]


def _repetition_with(
    value: Callable[[tuple[str, ...], Counter[tuple[str, ...]], str], float], least: int = 2
) -> Callable[[str, int], float]:
    def answer(text: str, n: int) -> float:
        words = text.split()
        counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if not counts or max(counts.values()) < least:
            return 0.0
        return value(counts.most_common(1)[0][0], counts, text)

    return answer


REPETITION = Exercise(
    id="repetition",
    title="Repetition by Gopher's rule",
    points=2,
    reference=top_ngram_fraction,
    cases=_repetition_cases,
    mutants=[
        Mutant(
            "share of n-grams",
            _repetition_with(lambda top, counts, text: counts[top] / counts.total()),
            "You seem to divide the occurrences by the number of n-grams. The rule counts characters: long repeated "
            "words weigh more than short ones.",
        ),
        Mutant(
            "one occurrence",
            _repetition_with(lambda top, counts, text: len(" ".join(top)) / len(text)),
            "You seem to count the characters of the n-gram once. All its occurrences count.",
        ),
        Mutant(
            "without spaces",
            _repetition_with(lambda top, counts, text: counts[top] * sum(map(len, top)) / len(text)),
            "You seem to leave out the spaces inside the n-gram, while the length of the text has them.",
        ),
        Mutant(
            "single occurrences",
            _repetition_with(lambda top, counts, text: counts[top] * len(" ".join(top)) / len(text), least=1),
            "An n-gram that occurs once is not repeated: return 0 if none occurs twice.",
        ),
        Mutant(
            "all repeated",
            _repetition_with(
                lambda top, counts, text: (
                    sum(count * len(" ".join(ngram)) for ngram, count in counts.items() if count > 1)
                    / len(text)
                )
            ),
            "You seem to add up all repeated n-grams. This rule looks at the most frequent one.",
        ),
    ],
    hints=(
        "Counter of n-grams; count * length of the top one, its spaces included, over len(text); 0 if count < 2.",
    ),
)


# --- masking ----------------------------------------------------------------------------------------------------


def mask_addresses(text: str) -> str:
    """The text with e-mail and IPv4 addresses replaced by their markers, by the package's `mask`."""
    return mask(text, ("email", "ipv4"))[0]


def _mask_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    octets = [numbers.randrange(1, 255) for _ in range(3)]
    name = numbers.choice(_WORDS)
    return [
        Case(
            ("For more write to anna.lee_9@mail.example.org. Or to bob@example.com!",),
            name="two e-mail addresses",
        ),
        Case(
            ("Posted from 192.0.2.17. Last login: 198.51.100.254, then 203.0.113.9",),
            name="three IPv4 addresses",
        ),
        Case(("Python 3.11.4, 300.1.2.3, 10.0.0.1.2 and 62 + 11 = 73.",), name="no address at all"),
        Case(
            (f"{name}+{octets[0]}@example.net came from 203.0.{octets[1]}.{octets[2]}, not 1.2.3.",),
            name="one of each",
        ),
    ]


_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"


def _mask_with(
    *,
    email: str = r"[\w.+%-]*[\w+%-]@[\w-]+(?:\.[\w-]+)+",
    ipv4: str = rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?!\w|\.\w)",
    markers: tuple[str, str] = (MARKERS["email"], MARKERS["ipv4"]),
) -> Callable[[str], str]:
    return lambda text: re.sub(ipv4, markers[1], re.sub(email, markers[0], text))


MASKING = Exercise(
    id="masking",
    title="Mask e-mail and IPv4 addresses",
    points=3,
    reference=mask_addresses,
    cases=_mask_cases,
    mutants=[
        Mutant(
            "octets to 999",
            _mask_with(ipv4=r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w)"),
            "You seem to accept any three digits as an octet. 300.1.2.3 is no address: an octet is at most 255.",
        ),
        Mutant(
            "no borders",
            _mask_with(ipv4=rf"(?:{_OCTET}\.){{3}}{_OCTET}"),
            "You seem to find addresses inside longer things, such as 10.0.0.1.2. Look at what stands before and "
            "after.",
        ),
        Mutant(
            "no full stop after",
            _mask_with(ipv4=rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w.])"),
            "You seem to miss an address at the end of a sentence: a full stop may follow it, a full stop with a digit "
            "may not.",
        ),
        Mutant(
            "full stop swallowed",
            _mask_with(email=r"\S+@\S+"),
            "Your e-mail address takes the punctuation after it along: the sentence loses its end.",
        ),
        Mutant(
            "local part of letters",
            _mask_with(email=r"[A-Za-z]+@[\w-]+(?:\.[\w-]+)+"),
            "You seem to allow only letters before the @: a part of the name stays in the text. Dots, digits, _, + "
            "and - are allowed too.",
        ),
        Mutant(
            "one label after the @",
            _mask_with(email=r"[\w.+%-]*[\w+%-]@[\w-]+\.[\w-]+"),
            "Your domain ends after its second part: of mail.example.org the rest stays in the text.",
        ),
        Mutant(
            "one marker",
            _mask_with(markers=(MARKERS["email"], MARKERS["email"])),
            "You seem to write one marker for both kinds. Later steps count them apart.",
        ),
    ],
    hints=(
        "Look-behind and look-ahead, as in (?<![\\w.]) and (?!\\w|\\.\\w), say what must not stand beside an address.",
    ),
)


# --- contamination ----------------------------------------------------------------------------------------------


def contaminated(documents: list[str], items: list[str], n: int) -> list[int]:
    """Indices of documents that share an n-gram of words with an item (a shorter item: all of it), in order."""
    settings = ContaminationSettings(n=n, min_words=1)
    return sorted({found.document for found in Decontaminator(items, settings).find(documents)})


def _contamination_cases(seed: int) -> list[Case]:
    numbers = random.Random(seed)
    long_item = _text(numbers, 14)
    words = long_item.split()
    part, shuffled = " ".join(words[4:11]), words[:]
    numbers.shuffle(shuffled)
    documents = [
        f"Once again: {part.capitalize()}, said the {numbers.choice(_WORDS)}.",
        " ".join(shuffled),
        f"{long_item} and more",
        "12 - 1 = 11",
        "They wrote 2 - 1 = 1 on the wall.",
        " ".join(words[:4]) + " stop",
    ]
    return [
        Case((documents, [long_item], 5), name="one long item"),
        Case((documents, ["2 - 1 = 1"], 8), name="an item shorter than n"),
        Case((documents, [long_item, "2 - 1 = 1"], 6), name="two items"),
    ]


def _grams(words: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def _contaminated_with(
    *,
    split: Callable[[str], list[str]] = ngram_words,
    length: Callable[[int, int], int] = min,
    match: Callable[[list[str], list[str], int], bool] = lambda d, i, n: bool(_grams(d, n) & _grams(i, n)),
) -> Callable[[list[str], list[str], int], list[int]]:
    def answer(documents: list[str], items: list[str], n: int) -> list[int]:
        asked = [split(item) for item in items]
        return [
            index
            for index, document in enumerate(documents)
            if any(match(split(document), item, length(n, len(item))) for item in asked)
        ]

    return answer


CONTAMINATION = Exercise(
    id="contamination",
    title="Contaminated documents",
    points=2,
    reference=contaminated,
    cases=_contamination_cases,
    run=lambda answer, case: [int(index) for index in answer(*case.args)],
    mutants=[
        Mutant(
            "short items missed",
            _contaminated_with(length=lambda n, words: n),
            "You seem to miss items with fewer than n words. Such an item is looked for as a whole.",
        ),
        Mutant(
            "whole items only",
            _contaminated_with(length=lambda n, words: words),
            "You seem to look for whole items only. A document that holds n words of an item in a row is contaminated.",
        ),
        Mutant(
            "characters",
            _contaminated_with(
                match=lambda d, i, n: any(" ".join(gram) in " ".join(d) for gram in _grams(i, n))
            ),
            "You seem to look for the n-gram as a string: '2 - 1' is found inside '12 - 11'. Compare words.",
        ),
        Mutant(
            "any order",
            _contaminated_with(match=lambda d, i, n: len(set(d) & set(i)) >= n),
            "You seem to count shared words in any order. An n-gram is n words in a row.",
        ),
        Mutant(
            "not normalized",
            _contaminated_with(split=str.split),
            "You seem to compare the text as it is. A capital letter or a comma must not hide a copy: use "
            "`ngram_words`.",
        ),
    ],
    hints=("n = min(n, words of the item); compare sets of tuples of `ngram_words(...)`.",),
)

EXERCISES = [
    CANONICAL_URL,
    WORD_SCORES,
    REPETITION,
    CALIBRATION,
    MASKING,
    SIGNATURE,
    BANDS,
    CONTAMINATION,
    BPE_STEP,
    MIXTURE,
    PACKING,
]
