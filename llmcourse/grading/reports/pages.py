"""Pages for the class and for each student, of one file each, that no student's text can take part in.

Everything is escaped by the template; scripts, frames and anything from another server are forbidden by the pages' own
policy. Of stored outputs only plain text and PNG figures are shown, the figures decoded and encoded anew.
"""

from __future__ import annotations

import base64
import functools
import io
import statistics
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.grading.manual import AUTOMATIC
from llmcourse.grading.reports.results import Result
from llmcourse.grading.reports.text import clean, number, one_line
from llmcourse.labs.results import write_atomically

if TYPE_CHECKING:
    from jinja2 import Environment

    from llmcourse.grading.manifest import AssignmentKey

MAX_FIGURES, MAX_FIGURE_BYTES, MAX_PIXELS = 40, 2 << 20, 4_000_000
MAX_OUTPUTS = 200
MAX_PARAGRAPH = 20_000
BARS = 11
# Findings that a student can act on; the others are the instructor's.
FOR_STUDENTS = frozenset(
    {"LOCKED_EDITED", "CELL_MISSING", "DUPLICATE", "TYPE_CHANGED", "META_CHANGED", "ORDER_CHANGED"}
    | {"MATCHED_BY_SIMILARITY", "ENCODING", "FORMAT_CONVERTED", "FILE_IGNORED", "NEEDS_EXPERIMENT"}
    | {"STATEMENT_SKIPPED", "ANSWER_ELSEWHERE", "IDENTITY_MISSING"}
)
# Findings that need no look: they say what every untidy but honest notebook shows.
HARMLESS = frozenset(
    {"META_CHANGED", "ENCODING", "FORMAT_CONVERTED", "MATCHED_BY_SIMILARITY", "SIMILAR_TO"}
    | {"ANSWER_ELSEWHERE", "IDENTITY_MISSING"}
)


@functools.cache
def environment() -> Environment:
    """The templates, with everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["forms"] = ""
    found.filters |= {"points": number, "shown": shown, "prose": prose, "whole": whole}
    found.filters["page_address"] = page_address
    found.finalize = _finalize
    return found


class _Shown(str):
    """Text that is clean already; it is still escaped."""

    __slots__ = ()


def shown(text: str) -> str:
    """Code and output: what is endless is cut."""
    return _Shown(clean(text))


def prose(text: str) -> str:
    """What a person wrote for a person: a paragraph of Markdown is one line, and may be long."""
    return _Shown(clean(text, max_line=MAX_PARAGRAPH))


def whole(text: str) -> str:
    """Text for a field that will be stored again: nothing is cut, nothing added."""
    return _Shown(text)


def _finalize(value: Any) -> Any:
    """Every text of a page in one clean form; what is safe or multi-line already stays."""
    return clean(value) if type(value) is str else value


def page_address(student: str) -> str:
    """The address of a student's page, as seen from the class page."""
    return f"students/{urllib.parse.quote(student, safe='')}.html"


def student_page(
    key: AssignmentKey,
    result: Result,
    answers: Mapping[str, str],
    written: Mapping[str, str],
    outputs: Mapping[str, Iterable[Any]] | None = None,
) -> str:
    """The page of one student.

    Args:
        key: the assignment.
        result: points, messages, marks.
        answers: exercise -> the student's source.
        written: grade_id -> the student's text.
        outputs: stored in the notebook as handed in, by cell, as nbformat has them.
    """
    ending = "" if str(result.grade.verdict) == "graded" else one_line(result.grade.note)
    remarks = [
        one_line(finding.text) + (f" ({one_line(finding.cell, 60)})" if finding.cell else "")
        for finding in result.grade.findings
        if finding.kind in FOR_STUDENTS
    ]
    questions = [
        {"mark": mark, "text": written.get(mark.question, "")}
        for mark in result.marks
        if mark.question != AUTOMATIC
    ]
    titles = [(title, answers[name]) for name, title in key.manifest.titles.items() if answers.get(name)]
    return (
        environment()
        .get_template("student.html.jinja")
        .render(
            title=key.manifest.title,
            result=result,
            ending=ending,
            remarks=remarks,
            questions=questions,
            answers=titles,
            outputs=shown_outputs(outputs or {}),
        )
    )


def shown_outputs(outputs: Mapping[str, Iterable[Any]]) -> list[dict[str, str]]:
    """What may be shown of stored outputs: plain text, and PNG figures encoded anew; the rest is dropped."""
    found: list[dict[str, str]] = []
    figures = 0
    for where, output in ((where, output) for where, several in outputs.items() for output in several):
        if len(found) >= MAX_OUTPUTS:
            break
        if not isinstance(output, Mapping):
            continue
        data = output.get("data")
        data = data if isinstance(data, Mapping) else {}
        if "image/png" in data and figures < MAX_FIGURES:
            image = reencoded(_text(data["image/png"]))
            figures += 1
            if image:
                found.append({"cell": where, "image": image, "text": ""})
                continue
        text = _text(output.get("text", "")) or _text(data.get("text/plain", ""))
        if output.get("output_type") == "error":
            text = f"{_text(output.get('ename', ''))}: {_text(output.get('evalue', ''))}"
        if text:
            found.append({"cell": where, "image": "", "text": text})
    return found


def _text(value: Any) -> str:
    """Notebook text: a string, or a list of lines."""
    if isinstance(value, list):
        return "".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


def reencoded(encoded: str) -> str:
    """A PNG in base64, decoded and encoded anew; nothing when it is no PNG, or too large."""
    from PIL import Image

    if len(encoded) > 2 * MAX_FIGURE_BYTES:
        return ""
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            if len(data) > MAX_FIGURE_BYTES or image.width * image.height > MAX_PIXELS:
                return ""
            out = io.BytesIO()
            image.convert("RGBA" if "A" in image.getbands() else "RGB").save(out, "PNG")
    except Exception:  # the bytes are a stranger's, and decoders raise many things
        return ""
    return base64.b64encode(out.getvalue()).decode("ascii")


def class_page(key: AssignmentKey, results: Sequence[Result]) -> str:
    """The instructor's page about all students.

    Args:
        key: the assignment.
        results: of the class.
    """
    totals = [result.total for result in results if result.total is not None]
    most = max((result.max_points for result in results), default=key.manifest.max_points)
    return (
        environment()
        .get_template("class.html.jinja")
        .render(
            title=key.manifest.title,
            results=sorted(results, key=lambda result: result.student),
            verdicts=sorted(Counter(str(result.grade.verdict) for result in results).items()),
            totals=len(totals),
            mean=statistics.fmean(totals) if totals else None,
            median=statistics.median(totals) if totals else None,
            most=most,
            bars=histogram(totals, most),
            exercises=exercise_rows(key, results),
            alike=alike_groups(results),
            reviews=review_rows(results),
        )
    )


def histogram(totals: Sequence[float], most: float) -> list[dict[str, Any]]:
    """The bars of the distribution: equal steps from 0 to the maximum, the last bar closed at both ends."""
    if not totals or most <= 0:
        return []
    counts = [0] * BARS
    for total in totals:
        counts[min(BARS - 1, max(0, int(total / most * (BARS - 1) + 1e-9)))] += 1
    width, height = 640 / BARS, 140
    return [
        {
            "x": round(i * width + 4, 1),
            "y": round(20 + height * (1 - count / max(counts)), 1),
            "width": round(width - 8, 1),
            "height": round(height * count / max(counts), 1),
            "count": count,
            "label": number(round(most * i / (BARS - 1), 1)),
        }
        for i, count in enumerate(counts)
    ]


def exercise_rows(key: AssignmentKey, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Each exercise with how many got it right, the hardest first."""
    rows = []
    for name in key.manifest.points:
        items = [
            item for one in results if one.grade.decided for item in one.grade.items if item.exercise == name
        ]
        rows.append(
            {
                "title": key.manifest.titles[name],
                "answers": len(items),
                "correct": sum(item.status == "correct" for item in items),
                "unanswered": sum(item.status == "not answered" for item in items),
                "mutants": Counter(item.mutant for item in items if item.mutant).most_common(5),
            }
        )
    return sorted(rows, key=lambda row: row["correct"] / max(1, row["answers"]))


def alike_groups(results: Sequence[Result]) -> list[dict[str, str]]:
    """The groups of answers that are alike; all members of a group carry the same finding."""
    groups = {
        (finding.cell, finding.text)
        for result in results
        for finding in result.grade.findings
        if finding.kind == "SIMILAR_TO"
    }
    return [{"exercise": exercise, "text": one_line(text)} for exercise, text in sorted(groups)]


def review_rows(results: Sequence[Result]) -> list[dict[str, str]]:
    """What a person should look at: results that are not decided, and findings that are not harmless."""
    rows = []
    for result in sorted(results, key=lambda one: one.student):
        grade = result.grade
        if not grade.decided:
            rows.append({"kind": str(grade.verdict), "cell": "", "text": one_line(grade.note)})
            rows[-1]["student"] = grade.student
        for finding in grade.findings:
            if finding.kind not in HARMLESS:
                row = {
                    "kind": finding.kind,
                    "cell": one_line(finding.cell, 80),
                    "text": one_line(finding.text),
                }
                rows.append(row | {"student": grade.student})
    return rows


def write_page(path: Path, text: str) -> None:
    """Write a page; lone surrogates, which no file can hold, are replaced."""
    write_atomically(path, text.encode("utf-8", "replace").decode("utf-8"))
