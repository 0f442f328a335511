"""What one submission may use."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one submission may use; the defaults suit a lab whose answers train nothing for long.

    Attributes:
        wall_seconds: seconds from the first cell to the last answer.
        cpu_seconds: processor seconds of any one process.
        memory_mb: MiB that all processes may hold beside what the jail had loaded before.
        output_kb: KiB of printed output of all cells together.
        processes: processes and threads at once.
        file_mb: MiB of files in the work folder and the folder for temporary files together, beside the support files.
        answer_mb: MiB of all answers together, as plain data.
    """

    wall_seconds: float = 60.0
    cpu_seconds: int = 60
    memory_mb: int = 2048
    output_kb: int = 256
    processes: int = 64
    file_mb: int = 64
    answer_mb: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = (int, float) if field.name == "wall_seconds" else int
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
                what = "a number" if field.name == "wall_seconds" else "a whole number"
                raise ValueError(f"limits: {field.name}={value!r} must be {what} above 0")
