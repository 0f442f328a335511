"""Quality filters by rule: which texts to drop, with every threshold named, and what each rule dropped.

The rules are measurements (`llmcourse.data.filter_rules`) with a bound. A text is dropped if any measurement is
outside its bound; all violated rules are reported, not only the first, so that the effect of each can be seen.
The presets hold the published thresholds. They were chosen on long web pages and say so by what they drop here:
`tinytown` shows what choosing one's own looks like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace

from llmcourse.data import filter_rules as rules
from llmcourse.data.filter_rules import ParsedText

POLICY_PHRASES = (
    "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
)  # fmt: skip
"""phrases by which C4 tells lines of legal notice"""
_C4_LINE_ENDS = (".", "?", "!", '"')


@dataclass(frozen=True, kw_only=True)
class LineSettings:
    """Which lines of a text stay (C4: Raffel et al., 2020, section 2.2, and its published code).

    Raises:
        ValueError: a number is below 1.
    """

    terminal_punctuation: bool = True
    """drop lines that do not end in one of . ? ! " or that end in an ellipsis"""
    min_words: int = 5
    """words below which a line is dropped. An earlier version of the paper had 3 words here and 5 sentences a page;
    that is what datatrove's filter of the same name has."""
    max_word_length: int = 1000
    """characters above which a word condemns its line"""
    javascript: bool = True
    """drop lines with the word "javascript": pages that ask to switch it on"""
    policy: bool = True
    """drop lines with one of `POLICY_PHRASES`"""

    def __post_init__(self) -> None:
        for name in ("min_words", "max_word_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: use 1 or more")


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """Bounds of the measurements. None switches a rule off; a value at the bound passes.

    Bounds named min_ are least values, those named max_ largest. Except where a unit is given they are fractions.

    Raises:
        ValueError: a bound is negative, or a maximum is below its minimum.
    """

    lines: LineSettings | None = None
    """judge what is left after lines are dropped; None leaves the text as it is"""
    # Gopher, section A.1.1
    min_words: float | None = None
    """words of the text"""
    max_words: float | None = None
    """words of the text"""
    min_mean_word_length: float | None = None
    """characters"""
    max_mean_word_length: float | None = None
    """characters"""
    max_hash_ratio: float | None = None
    """number signs a word"""
    max_ellipsis_ratio: float | None = None
    """ellipses a word"""
    max_bullet_lines: float | None = None
    max_ellipsis_lines: float | None = None
    min_alphabetic_words: float | None = None
    min_stop_words: float | None = None
    """different stop words"""
    # Gopher, table A1
    max_duplicate_lines: float | None = None
    max_duplicate_paragraphs: float | None = None
    max_duplicate_line_characters: float | None = None
    max_duplicate_paragraph_characters: float | None = None
    max_top_2gram_characters: float | None = None
    max_top_3gram_characters: float | None = None
    max_top_4gram_characters: float | None = None
    max_duplicate_5gram_characters: float | None = None
    max_duplicate_6gram_characters: float | None = None
    max_duplicate_7gram_characters: float | None = None
    max_duplicate_8gram_characters: float | None = None
    max_duplicate_9gram_characters: float | None = None
    max_duplicate_10gram_characters: float | None = None
    # C4
    min_sentences: float | None = None
    """sentences of the text"""
    max_lorem_ipsum: float | None = None
    """occurrences"""
    max_curly_brackets: float | None = None
    """occurrences"""
    # FineWeb
    min_punctuated_lines: float | None = None
    max_short_lines: float | None = None
    """fraction of lines with at most 30 characters"""
    max_line_breaks: float | None = None
    """line breaks a word"""

    def __post_init__(self) -> None:
        for bound in bounds(self):
            if not bound.limit >= 0:
                raise ValueError(f"{bound.name}={bound.limit}: use 0 or more, or None to switch the rule off")
        for name in ("words", "mean_word_length"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{name}={low} is above max_{name}={high}: no text can pass")


def gopher() -> FilterSettings:
    """The rules for MassiveWeb: Rae et al. (2021), section A.1.1 and table A1."""
    return FilterSettings(
        min_words=50, max_words=100_000, min_mean_word_length=3, max_mean_word_length=10,
        max_hash_ratio=0.1, max_ellipsis_ratio=0.1, max_bullet_lines=0.9, max_ellipsis_lines=0.3,
        min_alphabetic_words=0.8, min_stop_words=2,
        max_duplicate_lines=0.30, max_duplicate_paragraphs=0.30,
        max_duplicate_line_characters=0.20, max_duplicate_paragraph_characters=0.20,
        max_top_2gram_characters=0.20, max_top_3gram_characters=0.18, max_top_4gram_characters=0.16,
        max_duplicate_5gram_characters=0.15, max_duplicate_6gram_characters=0.14,
        max_duplicate_7gram_characters=0.13, max_duplicate_8gram_characters=0.12,
        max_duplicate_9gram_characters=0.11, max_duplicate_10gram_characters=0.10,
    )  # fmt: skip


def c4() -> FilterSettings:
    """The rules of C4: Raffel et al. (2020), section 2.2; without its list of words that no page may hold."""
    return FilterSettings(lines=LineSettings(), min_sentences=3, max_lorem_ipsum=0, max_curly_brackets=0)


def fineweb() -> FilterSettings:
    """The rules that FineWeb adds to Gopher's and C4's: Penedo et al. (2024), section 3.6.

    The published code differs from the paper: datatrove's filter drops from 0.01 of characters in duplicated lines
    on where the paper has 0.1, and has a fourth rule, at most 0.3 line breaks a word. These are the paper's three.
    """
    return FilterSettings(min_punctuated_lines=0.12, max_duplicate_line_characters=0.1, max_short_lines=0.67)


def tinytown() -> FilterSettings:
    """Rules for the web dump around Tinytown, whose good pages are short, repetitive, or all sums.

    Three lines of sums are good text here: no bound on words, letters, stop words, short lines or line ends. A
    page of two short stories names its park in every sentence: no bound on the most frequent 2- to 4-gram. What
    is left of table A1 and tells advertisements from stories is the repetition of 6-grams. On three dumps of 3 000
    pages each, other towns included, its bound of 0.15 (Gopher: 0.14) dropped every page of spam and at most 2
    others; any one of 0.14 to 0.16 would have done.
    """
    return FilterSettings(max_duplicate_6gram_characters=0.15, max_lorem_ipsum=0, max_curly_brackets=0)


# Applying -----------------------------------------------------------------------------------------------------

Measure = Callable[[ParsedText], float]


@dataclass(frozen=True)
class Bound:
    """A rule in force: a measurement that must not be below (or above) a limit.

    Attributes:
        name: the field of `FilterSettings`, which begins with "min_" or "max_".
        limit: the limit; it passes itself.
        measure: the function of `llmcourse.data.filter_rules`.
    """

    name: str
    limit: float
    measure: Measure

    def violated(self, parsed: ParsedText) -> bool:
        """Whether a text is on the wrong side of the limit."""
        value = self.measure(parsed)
        return value < self.limit if self.name.startswith("min_") else value > self.limit


def measure(name: str) -> Measure:
    """The measurement behind a field of `FilterSettings`: "max_short_lines" -> `filter_rules.short_lines`.

    Raises:
        ValueError: there is none of that name.
    """
    what = name.removeprefix("min_").removeprefix("max_")
    for kind in ("top", "duplicate"):
        middle = what.removeprefix(f"{kind}_").removesuffix("gram_characters")
        if what == f"{kind}_{middle}gram_characters" and middle.isdigit():
            function = getattr(rules, f"{kind}_ngram_characters")
            return lambda parsed: function(parsed, int(middle))
    named = {"words": "word_count", "sentences": "sentence_count"}.get(what, what)
    if not callable(getattr(rules, named, None)):
        raise ValueError(f"rule {name!r}: no measurement of that name in filter_rules")
    return getattr(rules, named)


def bounds(settings: FilterSettings) -> list[Bound]:
    """The rules that a setting puts in force, in the order of its fields."""
    limits = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name != "lines"}
    return [Bound(name, limit, measure(name)) for name, limit in limits.items() if limit is not None]


@dataclass(frozen=True)
class Filtered:
    """What the rules say of a text.

    Attributes:
        text: the text without the lines that were dropped.
        violations: names of the violated rules, in the order of the settings; empty if the text stays. A text of
            which no word is left violates "empty", whatever the settings.
        dropped_lines: lines dropped, by reason.
    """

    text: str
    violations: list[str]
    dropped_lines: Counter[str] = field(default_factory=Counter)


class RuleFilter:
    """The rules of a setting, ready to be applied to many texts.

    Args:
        settings: which rules, with their bounds.
    """

    def __init__(self, settings: FilterSettings) -> None:
        self.settings = settings
        self.bounds = bounds(settings)

    def __call__(self, text: str) -> Filtered:
        """Drop lines, if the settings say so, and judge what is left."""
        dropped: Counter[str] = Counter()
        if self.settings.lines is not None:
            text, dropped = clean_lines(text, self.settings.lines)
        parsed = ParsedText(text)
        violations = [] if parsed.words else ["empty"]
        violations += [bound.name for bound in self.bounds if bound.violated(parsed)]
        return Filtered(text, violations, dropped)


def apply_rules(text: str, settings: FilterSettings) -> list[str]:
    """Names of the rules that a text violates: fields of the settings, and "empty" for a text without a word."""
    return RuleFilter(settings)(text).violations


def clean_lines(text: str, settings: LineSettings) -> tuple[str, Counter[str]]:
    """Drop the lines that a setting does not want.

    Args:
        text: a text.
        settings: which lines to drop.

    Returns:
        The other lines, without white space around them, and how many were dropped for which reason:
        "word_length", "terminal_punctuation", "min_words", "javascript" or "policy", the first that applies.
        Blank lines between lines that stay are kept; they are not counted.
    """
    kept: list[str] = []
    dropped: Counter[str] = Counter()
    for line in map(str.strip, text.split("\n")):
        reason = _fault(line, settings) if line else None
        if reason is not None:
            dropped[reason] += 1
        elif line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip(), dropped


def _fault(line: str, settings: LineSettings) -> str | None:
    """Why a line is to be dropped, or None."""
    words = line.split()
    if max(map(len, words)) > settings.max_word_length:
        return "word_length"
    if settings.terminal_punctuation and (not line.endswith(_C4_LINE_ENDS) or line.endswith("...")):
        return "terminal_punctuation"
    if len(words) < settings.min_words:
        return "min_words"
    lowered = line.lower()
    if settings.javascript and "javascript" in lowered:
        return "javascript"
    if settings.policy and any(phrase in lowered for phrase in POLICY_PHRASES):
        return "policy"
    return None


@dataclass(frozen=True)
class FilterReport:
    """What the rules did to a corpus.

    Attributes:
        results: one for each text, in order.
        violations: texts that violate a rule, by rule; a text that violates several counts for each.
        alone: texts that violate this rule and no other: what would stay if the rule were switched off.
        dropped_lines: lines dropped, by reason.
    """

    results: list[Filtered]
    violations: Counter[str]
    alone: Counter[str]
    dropped_lines: Counter[str]

    @property
    def dropped(self) -> list[bool]:
        """For each text, whether it goes: what `detection.score` compares with labels."""
        return [bool(result.violations) for result in self.results]

    @property
    def kept(self) -> list[str]:
        """The texts that stay, without their dropped lines."""
        return [result.text for result in self.results if not result.violations]


def filter_texts(texts: Iterable[str], settings: FilterSettings) -> FilterReport:
    """Apply the rules to a corpus and count what each of them does."""
    judge = RuleFilter(settings)
    report = FilterReport([], Counter(), Counter(), Counter())
    for text in texts:
        result = judge(text)
        report.results.append(result)
        report.violations.update(result.violations)
        report.dropped_lines.update(result.dropped_lines)
        if len(result.violations) == 1:
            report.alone.update(result.violations)
    return report


def combine(first: FilterSettings, second: FilterSettings) -> FilterSettings:
    """Both settings' rules: the second's bound where both have one. FineWeb is Gopher, C4 and its own rules."""
    given = {f.name: value for f in fields(second) if (value := getattr(second, f.name)) is not None}
    return replace(first, **given)
