"""What a submission came to: points, verdict, findings; plain data that the journal and the reports share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llmcourse.grading.verdicts import Finding, Verdict

UNDECIDED = frozenset({Verdict.MALFORMED, Verdict.REVIEW, Verdict.NOT_SUBMITTED, Verdict.INFRASTRUCTURE})
"""verdicts whose points no program should send anywhere: a person decides (or the batch runs again)"""


@dataclass(frozen=True)
class Item:
    """One exercise of a submission.

    Attributes:
        exercise: "slug/id".
        title: what was asked for.
        points, max_points: all or nothing.
        status: "correct", "wrong", "error", "not answered" or "not reached" (the run ended before it).
        message: what the student is told; it never holds a hidden input.
        mutant: the known wrong answer that this one behaves like, if any.
        detail: the full line of the check, inputs and values included: for the instructor alone.
    """

    exercise: str
    title: str
    points: float
    max_points: float
    status: str
    message: str
    mutant: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Grade:
    """What a student's submission of an assignment came to.

    Attributes:
        student, assignment: who, and for what.
        verdict: how the grading ended.
        points, max_points: sums over the items; manual questions are added by the reports.
        items: one an exercise, in the order of the lab.
        findings: what is worth a look; none of them changes the points.
        note: one line about the verdict, for the instructor.
    """

    student: str
    assignment: str
    verdict: Verdict
    points: float
    max_points: float
    items: tuple[Item, ...] = ()
    findings: tuple[Finding, ...] = ()
    note: str = ""

    @property
    def decided(self) -> bool:
        """Whether the points stand, rather than wait for a person or another run."""
        return self.verdict not in UNDECIDED

    def with_findings(self, more: tuple[Finding, ...]) -> Grade:
        """The grade with findings that came out later, such as a likeness to other answers."""
        return replace(self, findings=self.findings + more)

    def with_item(self, item: Item, ended: Verdict, findings: tuple[Finding, ...]) -> Grade:
        """The grade with an item that was graded by other means.

        Where that ended at a limit the grade is partial; where it needs a person or another run, so does the grade.
        """
        open_ = ended in UNDECIDED and self.decided
        undone = open_ or (ended != Verdict.GRADED and self.verdict == Verdict.GRADED)
        early = ended if open_ else Verdict.PARTIAL
        return replace(
            self,
            verdict=early if undone else self.verdict,
            points=self.points + item.points,
            max_points=self.max_points + item.max_points,
            items=(*self.items, item),
            findings=self.findings + findings,
            note=f"{item.exercise}: {ended}" if undone else self.note,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data for the journal and grades.json."""
        return asdict(self) | {"verdict": str(self.verdict)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grade:
        """The grade that `to_json` described.

        Raises:
            ValueError: a field is missing, unknown, or no such verdict exists.
        """
        try:
            fields = dict(data)
            fields["verdict"] = Verdict(fields["verdict"])
            fields["items"] = tuple(Item(**item) for item in fields["items"])
            fields["findings"] = tuple(Finding(**finding) for finding in fields["findings"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"not a stored grade ({error}): grade again into an empty report folder"
            ) from None


@dataclass
class Summary:
    """What a batch came to.

    Attributes:
        assignment: what was graded.
        counts: verdict -> submissions.
        graded, resumed: graded in this run, and found in the journal.
        seconds: wall clock of this run, without the self-test.
        layers: walls of the jail that stand.
        report: where the results are.
    """

    assignment: str
    counts: dict[str, int] = field(default_factory=dict)
    graded: int = 0
    resumed: int = 0
    seconds: float = 0.0
    layers: tuple[str, ...] = ()
    report: str = ""

    @property
    def unfinished(self) -> int:
        """Submissions that the machine, not the student, left without a verdict."""
        return self.counts.get(str(Verdict.INFRASTRUCTURE), 0)

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(self.counts.items()))
        rate = f", {60 * self.graded / self.seconds:.0f} a minute" if self.graded and self.seconds else ""
        return [
            f"{self.assignment}: {counts or 'no submissions'}",
            f"graded {self.graded} in {self.seconds:.1f} s{rate}; {self.resumed} were graded before",
            f"jail: {', '.join(self.layers) or 'none'}",
            f"results: {self.report}",
        ]
