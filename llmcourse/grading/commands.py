"""The grading commands of `llmcourse`: `release`, `collect`, `grade`, `report`, `mark`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmcourse.grading.manifest import AssignmentKey
    from llmcourse.grading.manual import Mark
    from llmcourse.grading.reports.results import Result

KEY = Path("release/key")
KeyFolder = Annotated[Path, typer.Option(help="the instructor's key folder, as release wrote it")]
Trust = Annotated[
    bool, typer.Option("--i-trust-these-notebooks", help="run notebooks even where no jail can be built")
]
Submissions = Annotated[Path, typer.Argument(help="folder of submissions, as collect wrote it")]
ReportFolder = Annotated[Path, typer.Option("--out", "--report", help="folder of the results")]
Assignment = Annotated[str | None, typer.Option(help="which one, where the key has several: 11_peft")]
Bar = Annotated[bool, typer.Option(help="show a progress bar")]


def add_commands(app: typer.Typer, wrap: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Add the grading commands to a program.

    Args:
        app: the program.
        wrap: turns a command's errors into one line.
    """
    for command in (release, collect, grade, report, mark):
        app.command()(wrap(command))


def release(
    labs: Annotated[
        list[str] | None, typer.Argument(help="labs to hand out: numbers, slugs or names; none: all of them")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for student/, manifests/ and key/")] = Path("release"),
    questions: Annotated[
        Path | None,
        typer.Option(help="YAML file of questions that a person grades: {lab: [{id, after, text, points}]}"),
    ] = None,
    points: Annotated[
        list[str] | None, typer.Option(help="other points for an exercise, peft/merge=3; may be repeated")
    ] = None,
    wall_seconds: Annotated[
        float | None, typer.Option(help="seconds that a submission may run; default 60")
    ] = None,
    memory_mb: Annotated[
        int | None, typer.Option(help="MiB that a submission may hold; default 2048")
    ] = None,
    solutions: Annotated[
        bool, typer.Option(help="leave the model solutions in the students' notebook")
    ] = False,
    replace: Annotated[
        bool, typer.Option(help="release again, which ends the earlier release of these labs")
    ] = False,
    i_trust_these_notebooks: Trust = False,
) -> None:
    """Make the notebooks that students get, and the key that grades them; nothing is written before all is proved."""
    from llmcourse.grading.limits import Limits
    from llmcourse.grading.release import release as make

    given = {"wall_seconds": wall_seconds, "memory_mb": memory_mb}
    limits = Limits(**{name: value for name, value in given.items() if value is not None})
    made = make(
        labs,
        out,
        points=dict(_points(text) for text in points or ()),
        questions=questions,
        limits=limits,
        solutions=solutions,
        replace=replace,
        trust=i_trust_these_notebooks,
    )
    for manifest in made:
        worth = f"exercises: {len(manifest.points)}, questions: {len(manifest.manual)}, points: {manifest.max_points:g}"
        print(f"{manifest.assignment}: {worth}")
    print(f"for the students: {out / 'student'}\nfor yourself alone: {out / 'key'}")


def _points(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ValueError(f"--points {text}: write it as peft/merge=3") from None


def collect(
    source: Annotated[
        Path, typer.Argument(help="folder or zip file from Canvas, Moodle, Gradescope, or a folder")
    ],
    submissions: Annotated[Path, typer.Option(help="folder to write the submissions to")] = Path(
        "submissions"
    ),
    key: KeyFolder = KEY,
    assignment: Assignment = None,
    layout: Annotated[str, typer.Option(help="auto, flat, canvas, moodle or gradescope")] = "auto",
) -> None:
    """Sort what a learning platform gives out into one folder a student."""
    from llmcourse.grading.collect import collect as gather

    for line in gather(source, submissions, key, assignment=assignment, layout=layout).lines():
        print(line)


def grade(
    submissions: Submissions = Path("submissions"),
    key: KeyFolder = KEY,
    report: ReportFolder = Path("report"),
    assignment: Assignment = None,
    workers: Annotated[int | None, typer.Option(help="jails at once; default: one a CPU core")] = None,
    resume: Annotated[bool, typer.Option(help="use what an earlier run graded already")] = True,
    scheduler: Annotated[
        str | None, typer.Option(help="grade on the Dask cluster at this address, tls://10.0.0.5:8786")
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(help="grade the files beside the notebooks by module:function or file.py:function"),
    ] = None,
    files_points: Annotated[float, typer.Option(help="what these files are worth")] = 10,
    i_trust_these_notebooks: Trust = False,
    progress: Bar = True,
) -> None:
    """Run the submissions in a jail and write grades.csv; after an interruption the same command goes on."""
    from llmcourse.grading.batch import grade_batch
    from llmcourse.grading.file_evaluation import Evaluation

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: give at least 1")
    if files_points <= 0:
        raise ValueError(f"--files-points {files_points:g}: give more than 0")
    summary = grade_batch(
        submissions,
        key,
        report,
        assignment=assignment,
        workers=workers,
        resume=resume,
        scheduler=scheduler,
        evaluation=Evaluation(evaluate, files_points) if evaluate else None,
        trust=i_trust_these_notebooks,
        progress=progress and sys.stderr.isatty(),
    )
    for line in summary.lines():
        print(line)
    if summary.unfinished:
        print(f"{summary.unfinished} were not graded for want of a machine: run the same command again")
        raise typer.Exit(1)


def report(
    submissions: Submissions = Path("submissions"),
    key: KeyFolder = KEY,
    report: ReportFolder = Path("report"),
    assignment: Assignment = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="csv, canvas, moodle, gradescope or nbgrader; may be repeated"),
    ] = None,
    canvas_column: Annotated[str, typer.Option(help="the column's heading in Canvas: 'Lab 11 (12345)'")] = "",
    pages: Annotated[bool, typer.Option(help="write a page for the class and one for each student")] = True,
) -> None:
    """Write the pages, and tables for a learning platform, from what `grade` and `mark` stored."""
    from llmcourse.grading.reports.exports import FORMATS, export
    from llmcourse.grading.reports.folder import load_results, write_pages

    for form in formats or ():
        if form not in FORMATS:
            raise ValueError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    chosen, results = load_results(submissions, key, report, assignment)
    for form in dict.fromkeys(["csv", *(formats or ())]):
        print(f"{form}: {export(report, chosen, results, form, canvas_column)}")
    if pages:
        print(f"pages: {write_pages(submissions, chosen, report, results)}")
    waiting = [result for result in results if result.total is None]
    if waiting:
        print(f"{len(waiting)} of {len(results)} results are open, and empty in the tables: `llmcourse mark`")


def mark(
    submissions: Submissions = Path("submissions"),
    key: KeyFolder = KEY,
    report: ReportFolder = Path("report"),
    assignment: Assignment = None,
    sheet: Annotated[Path | None, typer.Option(help="write a table to fill to this file, and end")] = None,
    merge: Annotated[Path | None, typer.Option(help="take over a filled table, and end")] = None,
    port: Annotated[int, typer.Option(help="of the page on this machine; 0 takes a free one")] = 0,
    browser: Annotated[bool, typer.Option(help="open the page in the browser")] = True,
) -> None:
    """Mark the questions that a person grades: on a page of this machine, or in a table."""
    from llmcourse.grading import manual
    from llmcourse.grading.reports.folder import load_results

    chosen, results = load_results(submissions, key, report, assignment)
    marks = [mark for result in results for mark in result.marks]
    if sheet is not None:
        manual.write_sheet(sheet, marks)
        print(f"{len(marks)} rows: fill the column points of {sheet}, then `llmcourse mark --merge {sheet}`")
    elif merge is not None:
        print(f"{manual.merge(report, marks, manual.read_sheet(merge))} marks taken over")
    elif not marks:
        print("there is nothing to mark")
    else:
        _serve(submissions, chosen, report, results, port, browser)


def _serve(
    submissions: Path, key: AssignmentKey, report: Path, results: list[Result], port: int, browser: bool
) -> None:
    from llmcourse.grading.marking_page import MarkingServer
    from llmcourse.grading.reports.exports import read_answers
    from llmcourse.grading.reports.folder import stored_outputs

    def outputs(mark: Mark) -> dict[str, Any]:
        return stored_outputs(submissions, key, mark.student)

    written = {name: texts["written"] for name, texts in read_answers(report).items()}
    marks = [mark for result in results for mark in result.marks]
    with MarkingServer(key.manifest.title, report, marks, written, outputs, port=port) as server:
        print(
            f"marking page: {server.address}\nCtrl-C ends it; every mark is stored when it is given",
            flush=True,
        )
        with _opened(server.address) if browser else contextlib.nullcontext():
            server.serve()


@contextlib.contextmanager
def _opened(address: str) -> Iterator[None]:
    """A page open in the browser, by way of a file: other users of a machine can read the arguments of programs."""
    import tempfile
    import webbrowser

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "marking.html")
        page.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        webbrowser.open(page.as_uri())
        yield
