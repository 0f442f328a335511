"""Answers that are alike: among students, and with the course's own source. A hint for a person, never a verdict.

An answer becomes its sequence of tokens without comments, strings and layout, all names that are neither called nor an
attribute made equal, so that renaming and reformatting hide nothing. Runs of `SHINGLE` tokens that many students share
(an idiom, the stub, the model solution) say nothing and do not count. What remains is compared by the share of common
runs (Jaccard), candidates being found by MinHash.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import keyword
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from llmcourse.grading.verdicts import Finding

SHINGLE = 5
ALIKE = 0.75
MIN_OWN_SHINGLES = 12
"""answers with fewer runs of their own are too short for a likeness to mean anything"""
COMMON_SHARE, COMMON_LEAST = 0.25, 8
"""a run in more than this share of the answers, and in more than so many, is an idiom"""
COPIED, COPIED_LEAST = 0.9, 30
MAX_SOURCE = 20_000
PERMUTATIONS = 128
IGNORED = frozenset(
    {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
)


def tokens_of(source: str, *, names: bool = False) -> list[str]:
    """The tokens of Python source that a copyist would have to change to change the program.

    Args:
        source: any text: of what is no Python, the tokens up to the first error are taken.
        names: keep variable names as they are, in place of one name for all.
    """
    found: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source[:MAX_SOURCE]).readline):
            if token.type in IGNORED:
                continue
            if token.type == tokenize.STRING:
                found.append("'text'")
            else:
                found.append(token.string)
    except (tokenize.TokenError, SyntaxError, ValueError):
        pass  # what was read so far counts
    return found if names else _without_names(found)


def _without_names(tokens: list[str]) -> list[str]:
    plain = []
    for before, token, after in zip(["", *tokens], tokens, [*tokens[1:], ""], strict=False):
        own = token.isidentifier() and not keyword.iskeyword(token)
        free = before in ("def", "class") or (before != "." and after != "(")
        plain.append("name" if own and free else token)
    return plain


def shingles(tokens: list[str]) -> frozenset[str]:
    """All runs of `SHINGLE` tokens."""
    return frozenset(" ".join(tokens[i : i + SHINGLE]) for i in range(len(tokens) - SHINGLE + 1))


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """The share of common members: |A and B| / |A or B|, 0 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 0.0


def similar_answers(answers: Mapping[str, str], known: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """Groups of students whose answers to one exercise are alike beyond what all have in common.

    Args:
        answers: student -> source.
        known: sources that every student has: the stub, the model solution.

    Returns:
        Groups of at least two students, sorted; no student is in two of them.
    """
    sets = {student: shingles(tokens_of(source)) for student, source in answers.items()}
    counts = Counter(shingle for members in sets.values() for shingle in members)
    most = max(COMMON_LEAST, COMMON_SHARE * len(sets))
    common = {shingle for shingle, count in counts.items() if count > most}
    common.update(*(shingles(tokens_of(source)) for source in known))
    own = {student: members - common for student, members in sets.items()}
    own = {student: members for student, members in own.items() if len(members) >= MIN_OWN_SHINGLES}
    leaders = {student: student for student in own}

    def leader(student: str) -> str:
        while leaders[student] != student:
            student = leaders[student]
        return student

    for one, other in _candidates(own):
        if jaccard(own[one], own[other]) >= ALIKE:
            leaders[max(leader(one), leader(other))] = min(leader(one), leader(other))
    groups: dict[str, list[str]] = {}
    for student in sorted(own):
        groups.setdefault(leader(student), []).append(student)
    return sorted(tuple(group) for group in groups.values() if len(group) > 1)


def _candidates(sets: Mapping[str, frozenset[str]]) -> Iterator[tuple[str, str]]:
    """Pairs that MinHash takes for alike; a little below the bound, since it estimates."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=ALIKE - 0.15, num_perm=PERMUTATIONS)
    for student, members in sorted(sets.items()):
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in members])
        for other in sorted(index.query(sketch)):
            yield other, student
        index.insert(student, sketch)


def copied_from(answer: str, sources: Mapping[str, str]) -> str | None:
    """Which source of the course an answer repeats word for word, its names included, or `None`.

    Args:
        answer: the student's source.
        sources: name -> source, such as the package's functions that do the same.
    """
    mine = shingles(tokens_of(answer, names=True))
    if len(mine) < COPIED_LEAST:
        return None
    for name, source in sources.items():
        theirs = shingles(tokens_of(source, names=True))
        if theirs and len(mine & theirs) / len(mine) >= COPIED:
            return name
    return None


def package_sources(functions: Iterable[str]) -> dict[str, str]:
    """The source of functions of this package given as "module:qualname"; nothing of them is run.

    Functions that are not there are left out.
    """
    found = {}
    for name in functions:
        module, _, qualname = name.partition(":")
        spec = importlib.util.find_spec(module) if module.split(".")[0] == "llmcourse" else None
        if spec is None or not spec.origin:
            continue
        text = Path(spec.origin).read_text(encoding="utf-8")
        node: ast.AST | None = ast.parse(text)
        for part in qualname.split("."):
            node = next((one for one in getattr(node, "body", ()) if getattr(one, "name", "") == part), None)
        if node is not None:
            found[name] = ast.get_source_segment(text, node) or ""
    return found


def class_findings(
    answers: Mapping[str, Mapping[str, str]],
    stubs: Mapping[str, str],
    solutions: Mapping[str, str],
    watched: Mapping[str, Iterable[str]],
) -> dict[str, tuple[Finding, ...]]:
    """What comparing all answers of an assignment brings out.

    Args:
        answers: student -> exercise -> source.
        stubs, solutions: exercise -> source.
        watched: exercise -> functions of the package that do the same.

    Returns:
        student -> findings, for the students with any.
    """
    found: dict[str, list[Finding]] = {}
    for exercise in sorted(solutions):
        mine = {student: own[exercise] for student, own in answers.items() if own.get(exercise)}
        known = [stubs.get(exercise, ""), solutions[exercise]]
        for group in similar_answers(mine, known):
            more = f" and {len(group) - 8} more" if len(group) > 8 else ""
            text = f"alike: {', '.join(group[:8])}{more}"
            for student in group:
                found.setdefault(student, []).append(Finding("SIMILAR_TO", text, exercise))
        sources = package_sources(watched.get(exercise, ()))
        for student, source in sorted(mine.items()):
            if (name := copied_from(source, sources)) is not None:
                text = f"the answer repeats {name} of the package word for word"
                found.setdefault(student, []).append(Finding("COPIED_FROM_PACKAGE", text, exercise))
    return {student: tuple(findings) for student, findings in found.items()}
