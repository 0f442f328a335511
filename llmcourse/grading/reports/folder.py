"""A report folder as a whole: its results with their marks, and the pages made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.grading.manual import files_to_decide, load_marks, open_marks
from llmcourse.grading.reports.exports import read_answers, read_grades
from llmcourse.grading.reports.pages import class_page, student_page, write_page
from llmcourse.grading.reports.results import Result, assemble

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey

PAGES = "pages"


def load_results(
    submissions: Path, key: Path, report: Path, assignment: str | None = None
) -> tuple[AssignmentKey, list[Result]]:
    """The results of a report folder, with the marks given so far.

    Args:
        submissions: the folder that was graded.
        key: the instructor's key folder.
        report: the folder of the results.
        assignment: which, where the key has several.

    Raises:
        ValueError: nothing was graded yet, or the results are of another release than the key.
    """
    from llmcourse.grading.batch import find_assignment, read_index

    chosen = find_assignment(key, submissions, assignment)
    release, grades = read_grades(report)
    if release != chosen.manifest.release:
        raise ValueError(
            f"{report} holds results of another release than {key}: grade again, or give the other folder"
        )
    written = {student: texts["written"] for student, texts in read_answers(report).items()}
    files = files_to_decide(submissions, chosen.name, grades)
    marks = load_marks(report, open_marks(chosen, grades, written, files))
    return chosen, assemble(grades, read_index(submissions), marks)


def stored_outputs(submissions: Path, key: AssignmentKey, student: str) -> Mapping[str, tuple[Any, ...]]:
    """The outputs stored in a student's notebook, by cell; none when the file cannot be read."""
    from llmcourse.grading.skeleton import Malformed, rebuild
    from llmcourse.grading.station import read_notebook

    try:
        return rebuild(read_notebook(submissions / student / f"{key.name}.ipynb"), key).outputs
    except (OSError, Malformed):
        return {}


def write_pages(submissions: Path, key: AssignmentKey, report: Path, results: Iterable[Result]) -> Path:
    """Write `pages/class.html` and `pages/students/<id>.html`; pages of students who are gone are removed.

    Args:
        submissions: the folder that was graded, for the outputs stored in the notebooks.
        key: the assignment.
        report: the report folder.
        results: of the class.

    Returns:
        The folder of the pages.
    """
    results, folder, texts = list(results), report / PAGES, read_answers(report)
    current = set()
    for result in results:
        path = folder / "students" / f"{result.student}.html"
        stored = stored_outputs(submissions, key, result.student)
        own = texts.get(result.student, {})
        page = student_page(key, result, own.get("answers", {}), own.get("written", {}), stored)
        write_page(path, page)
        current.add(path)
    for path in (folder / "students").glob("*.html"):
        if path not in current:
            path.unlink()
    write_page(folder / "class.html", class_page(key, results))
    return folder
