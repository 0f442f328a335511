"""Run `llmcourse ARGUMENTS` in this process, as the program does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from llmcourse import cli


class Output(NamedTuple):
    """What a command came to."""

    code: int
    out: str
    err: str


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """A function of the arguments that runs the program and gives its output."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Output:
        monkeypatch.setattr(sys, "argv", ["llmcourse", *map(str, arguments)])
        monkeypatch.setattr(cli.app, "registered_commands", list(cli.app.registered_commands))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Output(ended.value.code or 0, *capsys.readouterr())

    return run
