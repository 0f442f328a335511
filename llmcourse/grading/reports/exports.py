"""Results as tables: grades.csv and grades.json, and what Canvas, Moodle, Gradescope and nbgrader read.

A total that is still open is left empty, with the reason beside it where the format has a place for it: an empty cell
changes nothing in a learning platform, a 0 would.
"""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.grading.grades import Grade
from llmcourse.grading.manual import AUTOMATIC
from llmcourse.grading.reports.results import Result
from llmcourse.grading.reports.text import MAX_CELL, cell, clean, number, one_line
from llmcourse.labs.results import write_atomically

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey

CSV_FILE, JSON_FILE, ANSWERS_FILE = "grades.csv", "grades.json", "answers.json"
FORMATS = ("csv", "canvas", "moodle", "gradescope", "nbgrader")


def write_grades(report: Path, key: AssignmentKey, results: Sequence[Result]) -> None:
    """Write `grades.csv` and `grades.json`: sorted, without times, the same for the same submissions and marks."""
    write_atomically(report / CSV_FILE, grades_csv(key, results))
    data = {
        "assignment": key.name,
        "release": key.manifest.release,
        "grades": [result.grade.to_json() for result in sorted(results, key=lambda one: one.student)],
    }
    write_atomically(report / JSON_FILE, json.dumps(data, indent=1, ensure_ascii=True) + "\n")


def read_grades(report: Path) -> tuple[str, list[Grade]]:
    """Release and grades of a report folder.

    Raises:
        ValueError: there is no `grades.json`, or it is damaged.
    """
    path = report / JSON_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["release"], [Grade.from_json(grade) for grade in data["grades"]]
    except FileNotFoundError:
        raise ValueError(f"no {path}: run `llmcourse grade` first") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `llmcourse grade` again") from None


def write_answers(report: Path, answers: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]]) -> None:
    """Write what the students wrote to `answers.json`: student -> exercise sources, replies to manual questions."""
    data = {
        name: {"answers": dict(own), "written": dict(replies)} for name, (own, replies) in answers.items()
    }
    text = json.dumps(data, indent=1, ensure_ascii=True, sort_keys=True)  # the same after a resumed run
    write_atomically(report / ANSWERS_FILE, text + "\n")


def read_answers(report: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What `write_answers` wrote.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    path = report / ANSWERS_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(f"no {path}: run `llmcourse grade` first") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): run `llmcourse grade` again") from None


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV that no spreadsheet takes for formulas."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([cell(value) for value in row] for row in rows)
    return out.getvalue()


def grades_csv(key: AssignmentKey, results: Iterable[Result]) -> str:
    """One line a student: verdict, points, each exercise, findings."""
    results = list(results)
    others = {item.exercise for result in results for item in result.grade.items} - set(key.manifest.points)
    exercises = [*key.manifest.points, *sorted(others)]
    rows: list[list[object]] = [
        ["student", "name", "verdict", "points", "max_points", "manual", "total", "total_max", "open"]
        + [*exercises, "findings", "note"]
    ]
    for result in sorted(results, key=lambda one: one.student):
        grade = result.grade
        earned = {item.exercise: item for item in grade.items}
        points = [number(earned[name].points) if _counts(grade, name) else "" for name in exercises]
        kinds = sorted({finding.kind for finding in grade.findings})
        rows.append(
            [grade.student, result.name, str(grade.verdict), number(result.automatic)]
            + [number(grade.max_points), number(result.manual), number(result.total)]
            + [number(result.max_points), result.open, *points, " ".join(kinds), grade.note]
        )
    return table(rows)


def _counts(grade: Grade, exercise: str) -> bool:
    return grade.decided and any(item.exercise == exercise for item in grade.items)


def canvas_csv(key: AssignmentKey, results: Iterable[Result], column: str = "") -> str:
    """A gradebook to import into Canvas.

    Args:
        key: the assignment.
        results: of the class.
        column: heading of the column in Canvas, "Lab 11 (12345)"; by default the assignment's title, which makes Canvas
            ask where it belongs.
    """
    results = list(results)
    most = max((result.max_points for result in results), default=key.manifest.max_points)
    rows: list[list[object]] = [
        ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", column or key.manifest.title]
    ]
    rows.append(["    Points Possible", "", "", "", "", number(most)])
    for result in results:
        ids = result.ids
        login = ids.get("login", "") if ids.get("canvas") else ids.get("login", result.student)
        identity = [result.name or result.student, ids.get("canvas", ""), ids.get("sis", ""), login]
        rows.append([*identity, ids.get("section", ""), number(result.total)])
    return table(rows)


def moodle_csv(results: Iterable[Result]) -> str:
    """A grading worksheet to upload into a Moodle assignment.

    Raises:
        ValueError: no submission came from Moodle, whose participant numbers the worksheet needs.
    """
    results = [result for result in results if result.ids.get("moodle")]
    if not results:
        raise ValueError(
            "no submission has a Moodle participant number: collect from the folder or zip that Moodle's 'Download all "
            "submissions' gives"
        )
    rows: list[list[object]] = [["Identifier", "Full name", "Grade", "Maximum Grade", "Feedback comments"]]
    for result in results:
        identifier = result.ids["moodle"]
        identifier = f"Participant {identifier}" if identifier.isdigit() else identifier
        comments = "<br>".join(
            html.escape(line) for line in feedback_lines(result)
        )  # Moodle reads it as HTML
        grade, most = number(result.total), number(result.max_points)
        rows.append([identifier, result.name or result.student, grade, most, comments])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    # comments may be long, so they are not cut as cells are; every line of them begins with a letter
    writer.writerows([*map(cell, row[:-1]), row[-1]] for row in rows)
    return out.getvalue()


def feedback_lines(result: Result) -> list[str]:
    """What a student is told, as lines of plain text: each exercise, each marked question, what is open."""
    lines = [
        f"{one_line(item.title)}: {number(item.points)} of {number(item.max_points)}. {item.message}"
        for item in (result.grade.items if result.grade.decided else ())
    ]
    for mark in result.marks:
        if mark.points is not None:
            comment = f" {one_line(mark.comment, MAX_CELL)}" if mark.comment else ""
            title = "Exercises" if mark.question == AUTOMATIC else one_line(mark.title)
            lines.append(f"{title}: {number(mark.points)} of {number(mark.max_points)}.{comment}")
    return lines + ([f"Open: {result.open}."] if result.open else [])


def gradescope_json(result: Result) -> dict[str, Any]:
    """The `results.json` of one submission for Gradescope's autograder.

    While anything is open there is no score, so that Gradescope shows the submission as not graded.
    """
    tests: list[dict[str, Any]] = [
        {
            "name": one_line(item.title),
            "score": item.points,
            "max_score": item.max_points,
            "status": "passed" if item.status == "correct" else "failed",
            "output": item.message,
            "output_format": "text",
            "visibility": "after_published",
        }
        for item in (result.grade.items if result.grade.decided else ())
    ]
    tests += [
        {
            "name": "Exercises" if mark.question == AUTOMATIC else one_line(mark.title),
            "score": mark.points,
            "max_score": mark.max_points,
            "output": clean(mark.comment),
            "output_format": "text",
            "visibility": "after_published",
        }
        for mark in result.marks
        if mark.points is not None
    ]
    data: dict[str, Any] = {
        "visibility": "after_published",
        "stdout_visibility": "hidden",
        "output": result.open,
        "output_format": "text",
        "tests": tests,
        "extra_data": {
            "verdict": str(result.grade.verdict),
            "findings": [finding.kind for finding in result.grade.findings],
        },
    }
    return data | ({"score": result.total} if result.total is not None else {})


def export(report: Path, key: AssignmentKey, results: Sequence[Result], form: str, column: str = "") -> Path:
    """Write the results in one of `FORMATS` into the report folder.

    Args:
        report: the folder.
        key: the assignment.
        results: of the class.
        form: which.
        column: heading for Canvas.

    Returns:
        The file, or the folder of files.

    Raises:
        ValueError: there is no such format, or the results lack what it needs.
    """
    if form == "csv":
        write_grades(report, key, results)
        return report / CSV_FILE
    if form == "canvas":
        write_atomically(report / "canvas.csv", canvas_csv(key, results, column))
        return report / "canvas.csv"
    if form == "moodle":
        write_atomically(report / "moodle.csv", moodle_csv(results))
        return report / "moodle.csv"
    if form == "gradescope":
        for result in results:
            path = report / "gradescope" / result.student / "results.json"
            write_atomically(path, json.dumps(gradescope_json(result), indent=1) + "\n")
        return report / "gradescope"
    if form == "nbgrader":
        from llmcourse.grading.reports.gradebook import write_gradebook

        return write_gradebook(report / "gradebook.db", key, results)
    raise ValueError(f"format {form!r}: choose one of {', '.join(FORMATS)}")
