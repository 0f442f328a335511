"""One worker of a batch: a jail, and the scorer beside it, for one submission after the other.

The worker reads a submission as bytes, rebuilds it on the released notebook, has it run in the jail and compares what
comes back. Nothing a submission does may raise here: it comes to a verdict.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.grading.grades import Grade
from llmcourse.grading.jail.client import LAYERS, Jail, Job
from llmcourse.grading.manifest import derive
from llmcourse.grading.scoring import Scorer
from llmcourse.grading.skeleton import Malformed, rebuild
from llmcourse.grading.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from llmcourse.grading.file_evaluation import Evaluation
    from llmcourse.grading.manifest import AssignmentKey

ATTEMPTS = 3
MAX_NOTEBOOK = 20 << 20
MAX_TEXT = 20_000
"""characters kept of one answer"""
CONTROL = "control"
"""a student's name that no learning platform gives out: the controls of a batch are graded under it"""


@dataclass(frozen=True)
class Submission:
    """What a student handed in.

    Attributes:
        student: id.
        notebook: its file, or `None` when there is none.
        files: names of the other files, which are not read.
        problem: why what was sent could not be collected, in one line.
        ignored: what collecting left out: (file, reason).
        folder: where the other files lie.
        data: the notebook's bytes, when they were read already to be graded on another machine.
    """

    student: str
    notebook: Path | None
    files: tuple[str, ...] = ()
    problem: str = ""
    ignored: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None
    data: bytes | None = None

    def loaded(self) -> Submission:
        """The submission with its bytes, for a machine that does not have the file; as it is if it cannot be read."""
        try:
            return self if self.notebook is None else replace(self, data=read_notebook(self.notebook))
        except OSError:
            return self

    def digest(self) -> str:
        """SHA-256 of all that the grade depends on, in hexadecimal."""
        digest = hashlib.sha256()
        for part in (
            self.student,
            self.problem,
            *self.files,
            *(text for pair in self.ignored for text in pair),
        ):
            digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
        if self.notebook is not None:
            try:
                digest.update(read_notebook(self.notebook))
            except OSError:  # grading says so
                digest.update(b"unreadable")
        return digest.hexdigest()


@dataclass(frozen=True)
class Graded:
    """A grade, and what the student wrote, which later steps compare and show.

    Attributes:
        grade: points, verdict, findings.
        answers: exercise -> source.
        written: grade_id -> reply to a question that a person marks.
    """

    grade: Grade
    answers: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal."""
        return {
            "grade": self.grade.to_json(),
            "answers": dict(self.answers),
            "written": dict(self.written),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Graded:
        """What `to_json` described.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(Grade.from_json(data["grade"]), dict(data["answers"]), dict(data["written"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a stored grade ({error}): grade again into an empty report folder"
            ) from None


class Station:
    """A jail and a scorer.

    Attributes:
        scorer: shared by the stations of a process.
        jail: this station's own; it is replaced when it fails.
    """

    def __init__(
        self,
        key: AssignmentKey,
        *,
        scorer: Scorer | None = None,
        trust: bool = False,
        evaluation: Evaluation | None = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        """Start a jail.

        Args:
            key: the assignment.
            scorer: one to share; default a new one.
            trust: go on where no wall of the jail can be built.
            evaluation: of the files that are handed in beside the notebook; by default they are not read.
            layers: exactly these walls, which were proved; by default the strongest that can be had.

        Raises:
            ValueError: there is no jail on this machine, and `trust` is not given.
        """
        self.key, self.trust, self._closed = key, trust, False
        self.scorer, self.evaluation, self.layers = scorer or Scorer(key), evaluation, layers
        self.jail = self._new_jail()

    def _new_jail(self) -> Jail:
        layers = "auto" if self.layers is None else self.layers
        return Jail(preload=self.key.preload, layers=layers, trust=self.trust)

    def close(self) -> None:
        """End the jail and everything in it."""
        self._closed = True
        self.jail.close()

    def grade(self, submission: Submission) -> Graded:
        """Grade one submission; whatever happens, it comes to a verdict."""
        student = submission.student
        findings = tuple(Finding("FILE_IGNORED", f"{file}: {reason}") for file, reason in submission.ignored)
        if self.evaluation is None:
            findings += tuple(Finding("FILE_IGNORED", f"{name}: not needed") for name in submission.files)
        if submission.notebook is None:
            verdict = Verdict.MALFORMED if submission.problem else Verdict.NOT_SUBMITTED
            note = submission.problem or "no notebook was handed in"
            return Graded(self.scorer.ungraded(student, verdict, note, findings))
        try:
            data = read_notebook(submission.notebook) if submission.data is None else submission.data
        except OSError as error:
            note = f"{submission.notebook.name} cannot be read: {error.strerror or error}"
            return Graded(self.scorer.ungraded(student, Verdict.INFRASTRUCTURE, note, findings))
        graded = self.grade_bytes(student, data, findings)
        return self._with_files(submission, graded) if self.evaluation and graded.grade.decided else graded

    def _with_files(self, submission: Submission, graded: Graded) -> Graded:
        from llmcourse.grading.file_evaluation import evaluate_files, not_evaluated

        seed, limits = derive(self.key.secret, "held-out", self.key.name), self.key.manifest.limits
        try:
            found = evaluate_files(submission.folder, self.evaluation, seed, limits)
        except Exception as error:  # the machine's: no process, no memory
            found = not_evaluated(self.evaluation, f"{type(error).__name__}: {error}")
        return replace(graded, grade=graded.grade.with_item(found.item, found.ended, found.findings))

    def grade_bytes(self, student: str, data: bytes, findings: tuple[Finding, ...] = ()) -> Graded:
        """Grade a notebook given as bytes.

        Args:
            student: whose it is, which decides on the inputs.
            data: the file.
            findings: what is known about the submission already.
        """
        try:
            rebuilt = rebuild(data, self.key)
        except Malformed as error:
            return Graded(self.scorer.ungraded(student, Verdict.MALFORMED, str(error), findings))
        except Exception as error:  # a notebook that trips the program over: a person should see it
            note = f"the notebook cannot be taken apart ({type(error).__name__}: {error})"
            return Graded(self.scorer.ungraded(student, Verdict.REVIEW, note, findings))
        job = Job(
            cells=rebuilt.cells,
            questions=self.scorer.questions(student, rebuilt),
            limits=self.key.manifest.limits,
            files={},
            watched=self.key.watched,
        )
        note = ""
        for _ in range(ATTEMPTS):
            try:
                result = self.jail.run(job)
                if result.ended != Verdict.INFRASTRUCTURE:
                    grade = self.scorer.grade(student, result, rebuilt).with_findings(findings)
                    return Graded(grade, _cut(rebuilt.exercises), _cut(rebuilt.written))
                note = result.note
            except Exception as error:  # a jail that broke: another one may do
                note = f"{type(error).__name__}: {error}"
            self._restart()
        grade = self.scorer.ungraded(student, Verdict.INFRASTRUCTURE, note, findings)
        return Graded(grade, _cut(rebuilt.exercises), _cut(rebuilt.written))

    def _restart(self) -> None:
        if self._closed:
            raise RuntimeError("the batch was stopped")
        self.jail.close()
        self.jail = self._new_jail()

    def prove(self) -> tuple[str, ...]:
        """Try the jail's walls and the controls before anything is graded.

        Returns:
            The layers of walls that stand, and the one wall that may be missing without namespaces.

        Raises:
            ValueError: a wall does not hold, or the controls do not score what they must.
        """
        from llmcourse.grading.jail.selftest import BEARABLE, self_test

        fallen = [wall for wall in self_test(self.jail) if not wall.stands]
        inside = self.jail.layers.get("namespaces", False)
        grave = [wall for wall in fallen if inside or wall.name not in BEARABLE]
        if grave and not self.trust:
            raise ValueError(
                f"the jail does not hold on this machine ({grave[0].name}: {grave[0].detail}): nothing was graded; "
                "`llmcourse doctor` says which walls can be built"
            )
        self.check_controls()
        self.layers = [name for name in LAYERS if self.jail.layers.get(name)]  # a restart must not be weaker
        standing = tuple(name for name, stands in self.jail.layers.items() if stands)
        return (*standing, *(f"no wall: {wall.name}" for wall in fallen if wall not in grave))

    def check_controls(self) -> None:
        """Grade the model solutions and the untouched notebook.

        Raises:
            ValueError: the first do not score the maximum, or the second scores.
        """
        solved = self.grade_bytes(CONTROL, self.key.solved()).grade
        wrong = [f"{item.exercise} {item.status} ({item.detail})" for item in solved.items if not item.points]
        if solved.verdict != Verdict.GRADED or wrong:
            raise ValueError(
                f"the model solutions of {self.key.name} score {solved.points:g} of {solved.max_points:g} in this jail "
                f"({solved.verdict}{': ' + solved.note if solved.note else ''}; {'; '.join(wrong)[:600]}): "
                "nothing was graded; run `llmcourse doctor`, or release again if the package changed"
            )
        untouched = self.grade_bytes(CONTROL, self.key.untouched()).grade
        if untouched.points or untouched.verdict != Verdict.GRADED:
            raise ValueError(
                f"the untouched notebook of {self.key.name} scores {untouched.points:g} ({untouched.verdict}): "
                "nothing was graded; release again"
            )


def _cut(texts: Mapping[str, str]) -> dict[str, str]:
    return {name: text[:MAX_TEXT] for name, text in texts.items()}


def read_notebook(path: Path) -> bytes:
    """The bytes of a submitted file, at most one more than any notebook may have; links are not followed.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path.name} is no regular file")
        return file.read(min(status.st_size, MAX_NOTEBOOK + 1))
