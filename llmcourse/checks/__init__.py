"""Learner exercises: `check` compares an answer with the package's, `claim` states what a lab measured.

`llmcourse/checks/<slug>.py` holds a chapter's exercises as `EXERCISES: list[Exercise]`, in the order of its lab.
"""

from __future__ import annotations

from llmcourse.checks.checking import (
    CheckResult,
    Failure,
    Outcome,
    Trial,
    check,
    judge,
    run_cases,
    verify,
    verify_chapter,
    with_gradients,
)
from llmcourse.checks.claims import ClaimError, claim
from llmcourse.checks.comparison import difference
from llmcourse.checks.exercise import Case, Exercise, Mutant, exercises, find_exercise, slugs

__all__ = [
    "Case",
    "CheckResult",
    "ClaimError",
    "Exercise",
    "Failure",
    "Mutant",
    "Outcome",
    "Trial",
    "check",
    "claim",
    "difference",
    "exercises",
    "find_exercise",
    "judge",
    "run_cases",
    "slugs",
    "verify",
    "verify_chapter",
    "with_gradients",
]
