"""The kernel that executes a lab: its peak memory, and its own progress bars passed on to the terminal."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from typing import Any

import psutil

# What tqdm writes: "pretraining:  53%|#####  | 10/20 [00:12<00:11, 1.2s/it]"
BAR = re.compile(
    r"(?P<what>[^\r\n|]*?)\s*(?P<percent>\d+)%\|[^\r\n|]*\|[^\r\n\[]*\[[^\r\n<]*<(?P<left>[\d:?]+)"
)


class KernelMemory:
    """Context manager: the peak resident memory of the kernels started inside it, in `.bytes`.

    A kernel's own subprocesses count with it, each by its proportional share of the pages that it shares with others.
    Where the system keeps a process's high-water mark (Linux), a kernel's peak between two samples is not missed.
    """

    def __init__(self, interval: float = 0.1) -> None:
        self.interval, self.bytes = interval, 0
        self._stop = threading.Event()

    def sample(self) -> None:
        """Read the memory now."""
        for child in psutil.Process().children():
            # A process that was forked and has not become a kernel yet still shows this process's memory.
            with contextlib.suppress(psutil.Error, OSError, ValueError):
                if child.pid not in self._before and "ipykernel" in " ".join(child.cmdline()):
                    total = child.memory_info().rss + sum(
                        _share(one) for one in child.children(recursive=True)
                    )
                    self.bytes = max(self.bytes, total, _high_water_mark(child.pid))

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.sample()
            self._stop.wait(self.interval)

    def __enter__(self) -> KernelMemory:
        self._before = {child.pid for child in psutil.Process().children()}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _share(process: psutil.Process) -> int:
    """A subprocess's share of memory in bytes; none in its first moments, when it may be its parent's image still."""
    with contextlib.suppress(psutil.Error):
        if time.time() - process.create_time() > 0.3:
            memory = process.memory_full_info()
            return getattr(memory, "pss", memory.uss)
    return 0


def _high_water_mark(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as file:
            line = next((line for line in file if line.startswith("VmHWM")), "VmHWM: 0 kB")
    except OSError:
        return 0
    return int(line.split()[1]) * 1024


class ProgressRelay:
    """A file that shows the last progress bar written to it beside the bar of cells."""

    def __init__(self, bar: Any) -> None:
        self.bar, self.shown = bar, 0.0

    def write(self, text: str) -> int:
        """Take what the kernel wrote to stderr."""
        for match in list(BAR.finditer(text))[-1:]:
            what = match["what"].strip(" :") or "cell"
            note = "" if match["percent"] == "100" else f"{what} {match['percent']}%, {match['left']} left"
            self.bar.set_postfix_str(note, refresh=False)
            if time.monotonic() - self.shown >= self.bar.mininterval:
                self.shown = time.monotonic()
                self.bar.refresh()
        return len(text)

    def flush(self) -> None:
        """Nothing is held back."""


def engine() -> str:
    """Name of the papermill engine that passes the kernel's progress on; registered at the first call."""
    from papermill.engines import NBClientEngine, papermill_engines

    class LabEngine(NBClientEngine):
        """Papermill's own engine, with the lab's stderr read for progress bars."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            """Execute, and pass progress on when there is a bar to show it in."""
            if nb_man.pbar is not None:
                options["stderr_file"] = ProgressRelay(nb_man.pbar)
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("lab", LabEngine)
    return "lab"
