"""`make course`, once the packages are there: execute the labs that are stale, render the book, say what it took."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from llmcourse import book


def run(labs: str, started: float) -> int:
    """Execute labs, render the book, print a summary.

    Args:
        labs: numbers or slugs of the labs, such as "01 04"; all when empty.
        started: when the whole command began, in seconds since the epoch, so that the set-up counts.

    Returns:
        The exit status: 0 when every lab and every page is in order.
    """
    # A process of its own: what the labs held in memory is gone when the book is built.
    executed = subprocess.run(
        [sys.executable, "-m", "llmcourse.labs", "execute", "--labs", labs], check=False
    )
    if executed.returncode:
        print(
            "error: a lab failed (see above), so the book was not built; after a fix, call make again",
            file=sys.stderr,
        )
        return executed.returncode
    if status := book.main(["build"]):
        return status
    minutes, seconds = divmod(round(time.time() - started), 60)
    print(f"total: {minutes} min {seconds} s. Next: make lab opens the labs in JupyterLab.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line: `python -m llmcourse.course [--labs "01 04"] [--started EPOCH]`. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m llmcourse.course", description="Execute the labs, render the book."
    )
    parser.add_argument("--labs", default="", help='numbers or slugs, such as "01 04"; all when empty')
    parser.add_argument(
        "--started", type=float, default=None, help="seconds since the epoch when the command began"
    )
    options = parser.parse_args(arguments)
    return run(options.labs, time.time() if options.started is None else options.started)


if __name__ == "__main__":
    sys.exit(main())
