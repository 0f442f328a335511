"""A whole class at once: several workers, a journal, the same results after an interruption.

A report folder belongs to one grader at a time. Each finished submission is in the journal before the next result is
taken, under a key made of everything that its grade depends on, so the same command goes on where a kill left it and
grades again only what changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.durable import canonical_json, file_digest, text_digest
from llmcourse.grading.grades import Grade, Summary
from llmcourse.grading.journal import Journal
from llmcourse.grading.locking import locked
from llmcourse.grading.station import Graded, Station, Submission
from llmcourse.grading.verdicts import Verdict

if TYPE_CHECKING:
    from llmcourse.grading.file_evaluation import Evaluation
    from llmcourse.grading.manifest import AssignmentKey

INDEX = "submissions.json"
JOURNAL = "journal.jsonl"
MAX_FAILURES = 8
"""submissions in a row that the machine could not run before a batch stops"""


def grade_batch(
    submissions: Path,
    key: Path,
    report: Path,
    *,
    assignment: str | None = None,
    workers: int | None = None,
    resume: bool = True,
    scheduler: str | None = None,
    evaluation: Evaluation | None = None,
    trust: bool = False,
    progress: bool = True,
) -> Summary:
    """Grade every submission of a folder.

    Args:
        submissions: folder that `collect` wrote: `<student>/<assignment>.ipynb` and `submissions.json`.
        key: folder of the instructor's key.
        report: folder for the results; an earlier run's is gone on with.
        assignment: which one, where the key has several; by default the one that was collected.
        workers: jails at once; by default one a CPU core.
        resume: use the results of an earlier run for what has not changed.
        scheduler: address of a Dask scheduler, to grade on a cluster.
        evaluation: grades the files beside the notebooks as well; not on a cluster.
        trust: run the notebooks even where this machine can build no jail.
        progress: show a bar.

    Returns:
        What it came to; `grades.csv` and `grades.json` are in the report folder.

    Raises:
        ValueError: the folders do not fit, another grader is at work, or the controls fail.
    """
    if scheduler and evaluation:
        raise ValueError("submitted files are evaluated on this machine: leave out --scheduler")
    chosen = find_assignment(key, submissions, assignment)
    found = read_submissions(submissions, chosen.name)
    if not trust:
        require_hidden({"the key": key, "the submissions": submissions, "the report": report})
    report.mkdir(parents=True, exist_ok=True)
    busy = f"another grader is at work in {report}: wait until it is done, or give another --out folder"
    with locked(report / ".lock", 0, busy):
        if not resume:
            (report / JOURNAL).unlink(missing_ok=True)
        with Journal(report / JOURNAL) as journal:
            keys = {one.student: record_key(one, chosen, evaluation) for one in found}
            pending = [one for one in found if _unfinished(journal.records.get(keys[one.student]))]
            summary = Summary(chosen.name, resumed=len(found) - len(pending), report=str(report))
            with _bar(len(found), len(found) - len(pending), progress) as advance:

                def done(one: Submission, graded: Graded) -> None:
                    journal.add(keys[one.student], graded.to_json())
                    summary.graded += 1
                    advance()

                if pending and scheduler:
                    from llmcourse.grading.cluster import grade_on_cluster

                    started = time.monotonic()
                    summary.layers = grade_on_cluster(scheduler, chosen, pending, done, trust=trust)
                    summary.seconds = time.monotonic() - started
                elif pending:
                    summary.layers, summary.seconds = grade_here(
                        chosen, pending, done, workers=workers, trust=trust, evaluation=evaluation
                    )
            graded = [Graded.from_json(journal.records[keys[one.student]]) for one in found]
        grades = write_results(submissions, chosen, report, graded)
        summary.counts = dict(Counter(str(grade.verdict) for grade in grades))
    return summary


def require_hidden(folders: Mapping[str, Path]) -> None:
    """Refuse folders that the inside of a jail would see.

    Raises:
        ValueError: one of them lies below a folder of Python, of this package or of the system.
    """
    from llmcourse.grading.jail.client import visible_to_jails

    visible = [path.resolve() for path in visible_to_jails()]
    for name, folder in folders.items():
        around = [path for path in visible if folder.resolve().is_relative_to(path)]
        if around:
            raise ValueError(
                f"{name} would be visible to the submissions, since {folder} lies in {around[0]}: move it elsewhere"
            )


def write_results(
    submissions: Path, key: AssignmentKey, report: Path, graded: Sequence[Graded]
) -> list[Grade]:
    """Write the tables of a batch: what the students wrote, and their points with the marks given so far."""
    from llmcourse.grading.manual import files_to_decide, load_marks, open_marks
    from llmcourse.grading.reports.exports import write_answers, write_grades
    from llmcourse.grading.reports.results import assemble

    grades = finish(key, graded)
    written = {one.grade.student: one.written for one in graded}
    write_answers(report, {one.grade.student: (one.answers, one.written) for one in graded})
    files = files_to_decide(submissions, key.name, grades)
    marks = load_marks(report, open_marks(key, grades, written, files))
    write_grades(report, key, assemble(grades, read_index(submissions), marks))
    return grades


def find_assignment(key: Path, submissions: Path, name: str | None = None) -> AssignmentKey:
    """The assignment to grade.

    Args:
        key: the instructor's key folder.
        submissions: folder that `collect` wrote, which names its assignment.
        name: to choose another.

    Raises:
        ValueError: there is no such key or assignment, or several and nothing says which.
    """
    from llmcourse.grading.manifest import Key

    opened = Key.load(key)
    name = name or read_index(submissions).get("assignment")
    if not name:
        if len(opened.assignments) != 1:
            raise ValueError(
                f"which assignment? give --assignment, one of {', '.join(opened.assignments) or 'none (release first)'}"
            )
        name = opened.assignments[0]
    return opened.assignment(name)


def read_index(submissions: Path) -> dict[str, Any]:
    """`submissions.json` of a folder, empty where there is none.

    Raises:
        ValueError: there is no folder, or the file is no such index.
    """
    if not submissions.is_dir():
        raise ValueError(f"no folder {submissions}: run `llmcourse collect` first")
    path = submissions / INDEX
    if not path.exists():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    if not isinstance(index, dict) or not isinstance(index.get("students", {}), dict):
        raise ValueError(f"{path} is damaged: run `llmcourse collect` again")
    return index


def read_submissions(folder: Path, assignment: str) -> list[Submission]:
    """Everyone who handed in, or is listed, sorted by id.

    Args:
        folder: as `collect` wrote it; without `submissions.json`, each folder is a student.
        assignment: name of the notebooks.

    Raises:
        ValueError: there is no folder, or nobody in it.
    """
    listed = read_index(folder).get("students", {})
    names = set(listed) | {path.name for path in folder.iterdir() if path.is_dir() and not path.is_symlink()}
    for student in listed:
        if not _is_file_name(student):
            raise ValueError(
                f"{folder / INDEX} lists {student[:60]!r}, which is no student id: collect again"
            )
    found = []
    for student in sorted(name for name in names if not name.startswith(".")):
        record = listed.get(student, {})
        path, extra = folder / student / f"{assignment}.ipynb", folder / student / f"{assignment}.files"
        files = sorted(one.relative_to(extra).as_posix() for one in extra.rglob("*") if not one.is_dir())
        problem, notebook = record.get("problem", ""), path if os.path.lexists(path) else None
        if notebook is not None and (path.is_symlink() or not path.is_file()):
            problem, notebook = f"{path.name} is no regular file", None
        ignored = tuple((str(one["file"]), str(one["reason"])) for one in record.get("ignored", ()))
        found.append(Submission(student, notebook, tuple(files), problem, ignored, extra))
    if not found:
        raise ValueError(f"no submissions in {folder}: run `llmcourse collect` first")
    return found


def _is_file_name(name: str) -> bool:
    return Path(name).name == name and name.isprintable() and not name.startswith(".") and "\\" not in name


def record_key(submission: Submission, key: AssignmentKey, evaluation: Evaluation | None = None) -> str:
    """The journal's key: a digest of all that a grade depends on."""
    parts = [submission.digest(), key.manifest.release, key.manifest.to_json()["limits"], grader_version()]
    if evaluation is not None:
        parts += [evaluation.digest(), [_digest_of(submission.folder / name) for name in submission.files]]
    return text_digest(canonical_json(parts))


def _digest_of(path: Path) -> str:
    return "" if path.is_symlink() or not path.is_file() else file_digest(path)


@functools.cache
def grader_version() -> str:
    """Digest of the source that decides on points: of the whole package, where the answers of exercises lie too."""
    package, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if "reports" not in path.parts:
            digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def grade_here(
    key: AssignmentKey,
    pending: Sequence[Submission],
    done: Callable[[Submission, Graded], None],
    *,
    workers: int | None = None,
    trust: bool = False,
    evaluation: Evaluation | None = None,
) -> tuple[tuple[str, ...], float]:
    """Grade on this machine, `workers` at a time; `done` is called for each, never twice at once.

    Returns:
        The walls of the jail that stand, and the seconds that the grading itself took.

    Raises:
        ValueError: the jail or the controls fail, or nothing can be run any more.
    """
    first = Station(key, trust=trust, evaluation=evaluation)
    stations = [first]
    try:
        layers = first.prove()
        count = max(1, min(workers or os.cpu_count() or 1, len(pending)))
        for _ in range(count - 1):
            more = Station(key, scorer=first.scorer, trust=trust, evaluation=evaluation, layers=first.layers)
            stations.append(more)
        started = time.monotonic()
        _work_through(stations, pending, done)
        return layers, time.monotonic() - started
    finally:
        for station in stations:
            station.close()


class Failures:
    """Stops a batch when the machine, rather than a submission, is what fails."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def count(self, graded: Graded) -> None:
        """Take note of a result.

        Raises:
            ValueError: it is the last of `MAX_FAILURES` in a row that the machine could not run.
        """
        self._in_a_row = self._in_a_row + 1 if graded.grade.verdict == Verdict.INFRASTRUCTURE else 0
        if self._in_a_row >= MAX_FAILURES:
            raise ValueError(
                f"{MAX_FAILURES} submissions in a row could not be run ({graded.grade.note}): repair the machine; the "
                "same command goes on"
            )


def _work_through(
    stations: Sequence[Station], pending: Iterable[Submission], done: Callable[[Submission, Graded], None]
) -> None:
    """A thread a station, each taking the next submission until there is none."""
    queue, lock, stop = iter(pending), threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    failures = Failures()

    def work(station: Station) -> None:
        try:
            while not stop.is_set():
                with lock:
                    one = next(queue, None)
                if one is None:
                    return
                graded = station.grade(one)
                with lock:
                    if stop.is_set():
                        return
                    done(one, graded)
                    failures.count(graded)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, args=(station,), daemon=True) for station in stations]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()  # a Ctrl-C reaches this thread alone
    if errors:
        raise errors[0]


def finish(key: AssignmentKey, graded: Sequence[Graded]) -> list[Grade]:
    """All grades, with what only shows when all answers lie side by side; it depends on nothing else."""
    from llmcourse.grading.similarity import class_findings

    answers = {one.grade.student: one.answers for one in graded if one.answers}
    found = class_findings(answers, stubs_of(key), key.solutions, key.watched)
    return [one.grade.with_findings(found.get(one.grade.student, ())) for one in graded]


def stubs_of(key: AssignmentKey) -> dict[str, str]:
    """The released text of each exercise's solution cell."""
    found = {}
    for cell in key.skeleton["cells"]:
        source = cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])
        found[cell.get("metadata", {}).get("nbgrader", {}).get("grade_id", "")] = source
    return {name: found.get(name.replace("/", "-"), "") for name in key.solutions}


def _unfinished(record: dict[str, Any] | None) -> bool:
    """Whether there is no result yet, or only that the machine failed."""
    return record is None or record["grade"]["verdict"] == Verdict.INFRASTRUCTURE


@contextlib.contextmanager
def _bar(total: int, before: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr; yields the function that moves it."""
    from tqdm import tqdm

    with tqdm(total=total, initial=before, unit=" submissions", disable=not show) as bar:
        yield lambda: bar.update(1)
