"""A handed-in notebook rebuilt on the released one: locked cells and order from the key, answers from the student.

What was changed beyond the answers is reported and changes nothing: a copied, split, moved, renamed or retyped cell
costs an honest student no points and gains a dishonest one none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.dependencies import ANSWER, LAB, OWN, Plan, Source, Wanted, plan
from llmcourse.grading.jail.client import Cell
from llmcourse.grading.manifest import AssignmentKey, CellRecord, source_digest
from llmcourse.grading.matching import Match, match
from llmcourse.grading.notebook_file import Malformed, StudentCell, Submitted, read_notebook
from llmcourse.grading.statements import split
from llmcourse.grading.verdicts import Finding

__all__ = ["Malformed", "Rebuilt", "rebuild"]


@dataclass(frozen=True)
class Rebuilt:
    """What grading runs and shows of a submission.

    Attributes:
        cells: to run, in this order.
        findings: what was odd.
        exercises: the source of the student's answer to each exercise, "" when there is none.
        written: the reply to each question that a person grades, by grade_id; "" when it was not answered.
        outputs: outputs stored in the file, by grade_id or cell id: for people, unverified.
        after: id of the cell after which an exercise's answer is there.
    """

    cells: tuple[Cell, ...]
    findings: tuple[Finding, ...]
    exercises: Mapping[str, str]
    written: Mapping[str, str]
    outputs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    after: Mapping[str, str] = field(default_factory=dict)


def rebuild(data: bytes, assignment: AssignmentKey) -> Rebuilt:
    """The runnable part of a submission, on the trusted skeleton.

    Args:
        data: the handed-in file.
        assignment: its key.

    Raises:
        Malformed: the file is no notebook, or that of another assignment or release.
    """
    return _Rebuilder(read_notebook(data), assignment).rebuild()


class _Rebuilder:
    def __init__(self, submitted: Submitted, key: AssignmentKey) -> None:
        self.submitted, self.key = submitted, key
        self.records = key.manifest.cells
        self.released = [text_of(cell) for cell in key.skeleton["cells"]]
        self.exercises = {name.replace("/", "-"): name for name in key.answers}
        self.sources: list[Source] = []
        self.stubs: set[int] = set()
        self.answers: dict[str, list[int]] = {name: [] for name in key.answers}
        self.edited: dict[
            str, str
        ] = {}  # id of a source -> label of the lab's cell of which it is another version

    def rebuild(self) -> Rebuilt:
        names = {grade_id: self.key.answers[name] for grade_id, name in self.exercises.items()}
        found = match(self.submitted.cells, self.records, self.released, names)
        identity = self.identity(found)
        self.collect_sources(found)
        wanted = {name: Wanted(self.key.answers[name], tuple(at)) for name, at in self.answers.items()}
        made = plan(self.sources, wanted, self.stubs)
        findings = [*self.submitted.findings, *identity, *found.findings]
        findings += [*self.extra_findings(found), *self.plan_findings(made)]
        return Rebuilt(
            cells=tuple(Cell(identifier, text) for identifier, text in made.cells),
            findings=tuple(findings),
            exercises={name: self.answer_source(name, made) for name in self.answers},
            written=dict(self.written(found)),
            outputs=dict(self.outputs(found)),
            after=made.after,
        )

    def identity(self, found: Match) -> list[Finding]:
        """Refuse another assignment's notebook; note one whose entry in the metadata is lost."""
        manifest, course = self.key.manifest, self.submitted.course
        stated = course if isinstance(course, dict) else {}
        name, release = stated.get("assignment"), stated.get("release")
        if isinstance(name, str) and name != manifest.assignment:
            raise Malformed(f"this is the notebook of {name[:40]!r}, not of {manifest.assignment!r}")
        if isinstance(release, str) and release != manifest.release:
            raise Malformed(
                f"this notebook of {manifest.assignment!r} is from another release ({release[:16]!r}, not "
                f"{manifest.release[:16]!r}): grade it with that release's key"
            )
        if isinstance(name, str) and isinstance(release, str):
            return []
        pairs = zip(self.records, found.cells, strict=True)
        if not any(numbers for record, numbers in pairs if record.role == "solution"):
            raise Malformed(
                f"this is not the notebook of {manifest.assignment!r}: it has none of its exercises"
            )
        return [
            Finding("IDENTITY_MISSING", "the notebook no longer says which assignment it is; its cells do")
        ]

    def collect_sources(self, found: Match) -> None:
        """The code cells in the released order, each extra cell behind the cell that it stood behind."""
        place = {number: at for at, numbers in enumerate(found.cells) for number in numbers}
        behind: dict[int, list[int]] = {}
        last = -1
        for number in range(len(self.submitted.cells)):
            if number in place:
                last = place[number]
            else:
                behind.setdefault(last, []).append(number)
        self.add_extras(behind.get(-1, []))
        for at, record in enumerate(self.records):
            self.add_released(at, record, [self.submitted.cells[number] for number in found.cells[at]])
            self.add_extras(behind.get(at, []))

    def add_extras(self, numbers: list[int]) -> None:
        for number in numbers:
            cell = self.submitted.cells[number]
            if cell.type == "code":
                self.sources.append(Source(f"extra-{number + 1}", cell.source, OWN))

    def add_released(self, at: int, record: CellRecord, cells: list[StudentCell]) -> None:
        """A cell of the lab as it was released, and what the student made of it."""
        if record.role == "solution":
            self.add_answer(at, record, [cell.source for cell in cells])
        elif record.type == "code" and record.role in ("setup", "other"):
            proven = frozenset(self.key.proven.get(record.cell_id, ()))
            self.sources.append(Source(record.cell_id, self.released[at], LAB, proven))
            for count, cell in enumerate(cells, 1):
                if cell.type == "code" and source_digest(cell.source) != record.sha256:
                    self.add_edited(at, record, cell, count)

    def add_answer(self, at: int, record: CellRecord, texts: list[str]) -> None:
        exercise = self.exercises[record.grade_id or ""]
        for count, text in enumerate(texts or [self.released[at]], 1):
            if source_digest(text) == record.sha256:
                self.stubs.add(len(self.sources))
            self.answers[exercise].append(len(self.sources))
            identifier = record.cell_id if count == 1 else f"{record.cell_id}:{count}"
            self.sources.append(Source(identifier, text, ANSWER))

    def add_edited(self, at: int, record: CellRecord, cell: StudentCell, count: int) -> None:
        """A student's version of a lab's cell: what it shares with the released one may run as far as that may."""
        proven = self.key.proven.get(record.cell_id, ())
        withheld = {one.text for number, one in enumerate(split(self.released[at])) if number not in proven}
        statements = split(cell.source)
        allowed = frozenset(number for number, one in enumerate(statements) if one.text not in withheld)
        identifier = f"{record.cell_id}:edited" + (f":{count}" if count > 1 else "")
        self.edited[identifier] = record.grade_id or record.cell_id
        self.sources.append(Source(identifier, cell.source, OWN, allowed))

    def extra_findings(self, found: Match) -> Iterator[Finding]:
        for number in found.extras:
            metadata = self.submitted.cells[number].nbgrader
            if isinstance(metadata, dict) and (metadata.get("grade") or metadata.get("locked")):
                text = "a cell that was not released says that it is a test; it is not run as one"
                yield Finding("EXTRA_TEST_LIKE", text, f"extra-{number + 1}")

    def plan_findings(self, made: Plan) -> Iterator[Finding]:
        for identifier, label in self.edited.items():
            if made.used.get(identifier):
                yield Finding(
                    "CELL_EDITED", "an answer uses what the student wrote into a cell of the lab", label
                )
        for exercise, identifier in made.elsewhere.items():
            text = f"the answer was taken from the cell {identifier!r}: its own cell does not define it"
            yield Finding("ANSWER_ELSEWHERE", text, exercise)
        for exercise, names in made.withheld.items():
            text = f"the answer reads {', '.join(names)}, which an experiment of the lab makes: not run for grading"
            yield Finding("NEEDS_EXPERIMENT", text[:200], exercise)
        for identifier, lines in made.skipped.items():
            text = f"left out of the cell, since it reads what only an experiment makes: {lines[0].strip()}"
            yield Finding("STATEMENT_SKIPPED", text[:200], identifier)

    def answer_source(self, exercise: str, made: Plan) -> str:
        """What the student wrote for an exercise, for people and for comparing submissions."""
        if exercise in made.elsewhere:
            return next(one.text for one in self.sources if one.id == made.elsewhere[exercise])
        texts = [self.sources[at].text for at in self.answers[exercise] if at not in self.stubs]
        return "\n\n".join(texts)

    def written(self, found: Match) -> Iterator[tuple[str, str]]:
        for record, numbers in zip(self.records, found.cells, strict=True):
            if record.role == "manual":
                texts = [self.submitted.cells[number].source for number in numbers]
                kept = [text for text in texts if source_digest(text) != record.sha256]
                yield record.grade_id or "", "\n\n".join(kept)

    def outputs(self, found: Match) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for record, numbers in zip(self.records, found.cells, strict=True):
            outputs = tuple(one for number in numbers for one in self.submitted.cells[number].outputs)
            if outputs:
                yield record.grade_id or record.cell_id, outputs


def text_of(cell: Mapping[str, Any]) -> str:
    """The source of a released cell, which JSON holds as text or as lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)
