"""Command line of the labs: `python -m llmcourse.labs status|build|execute|check`."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from llmcourse.labs.execution import LabError, execute, save
from llmcourse.labs.report import labs_table
from llmcourse.labs.repository import REPOSITORY_VARIABLE, Lab, select_labs
from llmcourse.labs.source import build as build_notebook
from llmcourse.labs.staleness import changed_cells, refresh, stale

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Build, execute and check the course's labs."
)
Chosen = Annotated[str, typer.Option("--labs", help='Numbers or slugs, such as "01 04"; all when empty.')]
Repository = Annotated[Path | None, typer.Option(help="The checkout; by default the one around this folder.")]


@app.command()
def status(labs: Chosen = "", repository: Repository = None) -> None:
    """Show each lab's state, cost and claims."""
    _print_table(select_labs(labs, repository))


@app.command()
def build(labs: Chosen = "", repository: Repository = None) -> None:
    """Write notebooks from their sources, keeping outputs where no code cell changed."""
    for lab in select_labs(labs, repository):
        print(f"{lab.name}: {_build(lab)}")


@app.command("execute")
def execute_labs(
    labs: Chosen = "",
    force: Annotated[bool, typer.Option("--force", help="Execute current labs as well.")] = False,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="PRESET=gpu and the like; such runs are written to labs/runs and store no results."
        ),
    ] = None,
    cell_timeout: Annotated[int, typer.Option(help="Seconds that one cell may take.")] = 900,
    repository: Repository = None,
) -> None:
    """Execute the labs that are stale and print what they cost; exit with 1 if one fails."""
    chosen, failures, start = select_labs(labs, repository), {}, time.perf_counter()
    parameters = dict(_assignment(text) for text in assign or [])
    for lab in chosen:
        reason = "asked for" if force or parameters else stale(lab)
        if reason is None:
            if changed_cells(lab):
                print(f"{lab.name}: {_build(lab)}")
            continue
        print(f"{lab.name}: executing ({reason})", flush=True)
        try:
            execute(lab, parameters, cell_timeout=cell_timeout)
        except LabError as error:
            failures[lab.name] = str(error)
            print(error, file=sys.stderr)
    _print_table(chosen, failures)
    print(
        f"{len(chosen) - len(failures)} of {len(chosen)} labs are in order; {time.perf_counter() - start:.0f} s."
    )
    if failures:
        raise typer.Exit(1)


@app.command()
def check(
    labs: Chosen = "",
    cell_timeout: Annotated[int, typer.Option(help="Seconds that one cell may take.")] = 900,
    repository: Repository = None,
) -> None:
    """Run the stored notebooks under nbval: no cell fails, and every claim prints what it printed."""
    chosen = select_labs(labs, repository)
    for lab in chosen:
        if not lab.notebook.is_file():
            raise ValueError(f"lab {lab.name} has no notebook: run `make labs LABS={lab.number}` first")
    code = run_nbval(chosen, cell_timeout)
    if code:
        raise typer.Exit(code)


def run_nbval(labs: Sequence[Lab], cell_timeout: int = 900) -> int:
    """Exit status of `pytest --nbval-lax` over copies of the notebooks in an empty folder; 0 when all claims held."""
    if not labs:
        return 0
    environment = {name: value for name, value in os.environ.items() if name != REPOSITORY_VARIABLE}
    with tempfile.TemporaryDirectory(prefix="nbval-") as folder:
        copies = [shutil.copy(lab.notebook, folder) for lab in labs]
        Path(folder, "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        options = [
            "--nbval-lax",
            "--nbval-current-env",
            f"--nbval-cell-timeout={cell_timeout}",
            "-p",
            "no:cacheprovider",
        ]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *options,
            "--rootdir",
            folder,
            "-c",
            f"{folder}/pytest.ini",
            *copies,
        ]
        # nbval waits forever for a kernel that died: the whole run has a limit too.
        limit = cell_timeout * 4 * len(labs)
        try:
            return subprocess.run(command, cwd=folder, env=environment, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"nbval has not finished after {limit} s: a kernel has probably died", file=sys.stderr)
            return 1


def _print_table(labs: Sequence[Lab], failures: dict[str, str] | None = None) -> None:
    # A log has no width of its own: do not squeeze the columns there.
    Console(width=None if sys.stdout.isatty() else 110).print(labs_table(labs, failures))


def _build(lab: Lab) -> str:
    refreshed = refresh(lab) if lab.notebook.is_file() else None
    save(refreshed or build_notebook(lab), lab.notebook)
    return "text taken over, outputs kept" if refreshed else "built, not executed"


def _assignment(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"--set {text!r}: write NAME=VALUE")
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on stderr and exit status 2."""
    try:
        app(args=arguments, prog_name="python -m llmcourse.labs")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
