"""Which functions of the package ran below a submission's own code."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from types import CodeType, FrameType, FunctionType
from typing import Any

CELL_FILE = "<ipython-input-"
"""how the file names of cells begin"""


class Watch:
    """Context manager that notes calls of the watched functions below a frame of a submission's cells.

    What an exercise calls by itself is not noted. Python's profiling hook is on inside, if anything is watched.

    Attributes:
        found: names of those that were called.
    """

    def __init__(self, names: Sequence[str], namespace: Mapping[str, Any]) -> None:
        """Look up what is to be watched.

        Args:
            names: "module:qualname" of functions and classes.
            namespace: the globals of the submission's cells.
        """
        self.namespace, self.found = namespace, set[str]()
        # By identity, since hashing a code object means hashing its bytes; kept, so that no number is used again.
        self._codes: dict[int, tuple[str, CodeType]] = {}
        self._objects: list[tuple[str, Any]] = []
        for name in names:
            watched = _resolve(name)
            self._objects.append((name, watched))
            members = list(vars(watched).values()) if isinstance(watched, type) else [watched]
            for code in filter(None, map(_code, members)):
                self._codes[id(code)] = (name, code)

    def names_of(self, answer: Any) -> set[str]:
        """The watched object, or any other function or class of the package, that the answer itself is."""
        while isinstance(answer, functools.partial):
            answer = answer.func
        code = _code(answer)
        names = {name for name, watched in self._objects if watched is answer}
        if code is not None and id(code) in self._codes:
            names.add(self._codes[id(code)][0])
        if not names and isinstance(answer, type | FunctionType):
            module = str(answer.__module__)
            if module.startswith("llmcourse."):
                names.add(f"{module}:{answer.__qualname__}")
        return names

    def __enter__(self) -> Watch:
        if self._codes:
            sys.setprofile(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _hook(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (entry := self._codes.get(id(frame.f_code))) and entry[0] not in self.found:
            if self._is_below_cell(frame.f_back):
                self.found.add(entry[0])

    def _is_below_cell(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_globals is self.namespace or frame.f_code.co_filename.startswith(CELL_FILE):
                return True
            frame = frame.f_back
        return False


def _resolve(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = inspect.getattr_static(found, part)
    return found


def _code(value: Any) -> CodeType | None:
    if isinstance(value, property):
        value = value.fget
    value = getattr(value, "__func__", value)  # of static, class and bound methods
    try:
        value = inspect.unwrap(value)
    except (ValueError, AttributeError, TypeError):
        return None
    code = getattr(value, "__code__", None)
    return code if isinstance(code, CodeType) else None
