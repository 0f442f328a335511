"""How the grading of a submission ended, and what was noticed on the way."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How it ended. Every submission gets one, so that points of 0 always have a reason.

    GRADED: everything was asked. PARTIAL: the run ended early, what was answered before counts. TIMEOUT, MEMORY,
    OUTPUT_LIMIT: a limit of the submission was reached. CRASH: its process ended by itself. MALFORMED: the file cannot
    be read as this assignment's notebook. REVIEW: it did something that no honest notebook does; a person decides.
    NOT_SUBMITTED: there is no file. INFRASTRUCTURE: the grader failed, not the submission; it is tried again.
    """

    GRADED = "graded"
    PARTIAL = "partial"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output limit"
    CRASH = "crash"
    MALFORMED = "malformed"
    REVIEW = "review"
    NOT_SUBMITTED = "not submitted"
    INFRASTRUCTURE = "infrastructure"


@dataclass(frozen=True)
class Finding:
    """Something that was noticed; it changes no points.

    Attributes:
        kind: "LOCKED_EDITED", "CELL_MISSING", "DUPLICATE", "TYPE_CHANGED", "META_CHANGED", "ORDER_CHANGED",
            "EXTRA_TEST_LIKE", "CELL_EDITED", "MATCHED_BY_SIMILARITY", "REFERENCE_CALLED", "COPIED_FROM_PACKAGE",
            "SIMILAR_TO", "FILE_IGNORED", "ENCODING", ...
        text: one line for the instructor.
        cell: grade_id or id of the cell, where it is about one.
    """

    kind: str
    text: str
    cell: str = ""
