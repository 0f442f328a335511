"""Which statements of a notebook an answer needs: the lab's experiments train for minutes and are not run for it.

From the name of each answer, the statements that bind it, those that bind what these read, and so on. A statement of
the lab runs only if the model solutions were shown to need it, or if it is cheap; a student's own statement runs if an
answer needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llmcourse.grading.statements import ALWAYS_THERE, Statement, drop, keep, split, unsplit

LAB, ANSWER, OWN = "lab", "answer", "own"
MAX_STATEMENTS = 40_000
"""in all cells together; the cells beyond are not split"""
MAX_OWN = 300_000
"""characters of a student's cells that are looked at; the cells beyond are not split"""


@dataclass(frozen=True)
class Source:
    """A code cell as a place to look for names.

    Attributes:
        id: of the cell.
        text: its source.
        kind: "lab" (the released text), "answer" (a solution cell), "own" (a student's other text).
        allowed: numbers of the statements that may run though they are not cheap; `None`: all of them.
    """

    id: str
    text: str
    kind: str
    allowed: frozenset[int] | None = None


@dataclass(frozen=True)
class Wanted:
    """An exercise's answer: its name in the notebook, and the positions of its solution cells (none: not found)."""

    name: str
    cells: tuple[int, ...]


@dataclass
class Plan:
    """What to run.

    Attributes:
        cells: (id, source) of the cells to run, in order, each cut down to what is needed.
        after: id of the last cell that an exercise's answer needs.
        used: numbers of the statements that run, by cell id.
        withheld: names that an exercise's answer reads and that only an experiment of the lab would bind.
        elsewhere: exercises whose answer was taken from another cell than its own, with that cell's id.
        skipped: ids of solution cells of which a statement was left out, with its first line.
    """

    cells: list[tuple[str, str]] = field(default_factory=list)
    after: dict[str, str] = field(default_factory=dict)
    used: dict[str, list[int]] = field(default_factory=dict)
    withheld: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=dict)


Unit = tuple[int, int]  # a cell's position, and the number of a statement in it


class Notebook:
    """The statements of all cells of a notebook, and who binds what."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.statements: list[tuple[Statement, ...]] = []
        room, free = MAX_OWN, {source.text for source in sources if source.kind == LAB}
        total = 0
        for source in sources:
            fits = total < MAX_STATEMENTS and (source.text in free or len(source.text) <= room)
            room -= len(source.text) if fits and source.text not in free else 0
            free |= {source.text} if fits else set()  # a copy is split once: only its statements count again
            self.statements.append(split(source.text) if fits else unsplit(source.text))
            total += len(self.statements[-1])
        self.binders: dict[str, list[Unit]] = {}
        self.changers: dict[str, list[Unit]] = {}
        self.stars: list[Unit] = []
        for unit, statement in self.units():
            for name in statement.binds:
                self.binders.setdefault(name, []).append(unit)
            for name in statement.changes:
                self.changers.setdefault(name, []).append(unit)
            if statement.star:
                self.stars.append(unit)

    def units(self) -> Iterable[tuple[Unit, Statement]]:
        """All statements in order."""
        for position, statements in enumerate(self.statements):
            for number, statement in enumerate(statements):
                yield (position, number), statement

    def statement(self, unit: Unit) -> Statement:
        """The statement of a unit."""
        return self.statements[unit[0]][unit[1]]

    def may_run(self, unit: Unit) -> bool:
        """Whether a statement is the student's own, was needed by the model solutions, or is cheap."""
        source = self.sources[unit[0]]
        return source.allowed is None or unit[1] in source.allowed or self.statement(unit).cheap


def plan(sources: Sequence[Source], wanted: Mapping[str, Wanted], stubs: Iterable[int] = ()) -> Plan:
    """What has to run for the wanted answers.

    Args:
        sources: the code cells in the order in which they run.
        wanted: for each exercise, the answer.
        stubs: positions of solution cells that were not written in: they give way to the same name elsewhere.
    """
    return _Planner(Notebook(sources), wanted, frozenset(stubs)).plan()


class _Planner:
    def __init__(self, notebook: Notebook, wanted: Mapping[str, Wanted], stubs: frozenset[int]) -> None:
        self.notebook, self.wanted, self.stubs = notebook, wanted, stubs
        self.result = Plan()
        self.chosen: dict[str, list[Unit]] = {}  # the statements that make an answer, by its name
        self.dropped: set[int] = set()
        for exercise, answer in wanted.items():
            self.chosen[answer.name] = self.choose(exercise, answer)

    def choose(self, exercise: str, answer: Wanted) -> list[Unit]:
        """The statements that bind an answer: in its own cells; in another of the student's when these do not."""
        binders = self.notebook.binders.get(answer.name, [])
        own = [unit for unit in binders if unit[0] in answer.cells and unit[0] not in self.stubs]
        if own:
            self.dropped |= set(answer.cells) & self.stubs  # an untouched copy beside the answer
            return own
        other = [unit for unit in binders if self.notebook.sources[unit[0]].kind == OWN]
        if other:
            self.result.elsewhere[exercise] = self.notebook.sources[other[-1][0]].id
            self.dropped |= set(answer.cells) & self.stubs
            return other
        return [unit for unit in binders if unit[0] in answer.cells]

    def plan(self) -> Plan:
        selected: set[Unit] = set()
        for exercise, answer in self.wanted.items():
            units, withheld = self.closure(answer)
            selected |= units
            if withheld:
                self.result.withheld[exercise] = sorted(withheld)
            places = [position for position, _ in units] + [
                at for at in answer.cells if at not in self.dropped
            ]
            last = max(places, default=None)
            if last is not None:
                self.result.after[exercise] = self.notebook.sources[last].id
        answers = {position for answer in self.wanted.values() for position in answer.cells} - self.dropped
        kept = {position: self.rest_of_cell(position, selected) for position in sorted(answers)}
        self.write(selected, kept)
        return self.result

    def closure(self, answer: Wanted) -> tuple[set[Unit], set[str]]:
        """The statements that an answer needs, and the names that only statements that may not run would bind."""
        at = max(answer.cells, default=len(self.notebook.sources))
        found: set[Unit] = set()
        withheld: set[str] = set()
        pending, seen = [answer.name], set()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            units, refused = self.resolve(name, at)
            if refused:
                withheld.add(name)
            for unit in units - found:
                found.add(unit)
                pending.extend(self.notebook.statement(unit).needs)
        if any(self.notebook.sources[position].kind != LAB for position, _ in found):
            found |= {unit for unit in self.notebook.stars if self.notebook.may_run(unit)}
        return found, withheld

    def resolve(self, name: str, at: int) -> tuple[set[Unit], bool]:
        """The statements that make a name's value, as it is where the answer stands; and whether all are withheld."""
        if name in self.chosen:
            binders = self.chosen[name]
        else:
            every = [unit for unit in self.notebook.binders.get(name, []) if unit[0] not in self.dropped]
            # What stands below the answer is used only if nothing above it has the name: helpers defined later.
            binders = [unit for unit in every if unit[0] <= at] or every
        allowed = {unit for unit in binders if self.notebook.may_run(unit)}
        if allowed and not all(self.notebook.statement(unit).imports for unit in allowed):
            changers = self.notebook.changers.get(name, [])
            allowed |= {unit for unit in changers if unit[0] <= at and self.notebook.may_run(unit)}
        return allowed, bool(binders) and not allowed

    def rest_of_cell(self, position: int, selected: set[Unit]) -> list[int]:
        """Numbers of a solution cell's statements that cannot run: they read what only an experiment would bind.

        A student's `print(batch.shape)` above the answer must not keep the answer from being defined. What such
        statements need of the lab's cheap statements is selected; a student's other cells are not run for them.
        """
        unable = []
        bound: set[str] = set()
        for number, statement in enumerate(self.notebook.statements[position]):
            extra: set[Unit] = set()
            if (position, number) in selected:
                bound |= statement.binds
            elif self.available(statement.needs - bound, position, selected, extra, set()):
                selected |= extra
                bound |= statement.binds
            else:
                unable.append(number)
        return unable

    def available(
        self, names: Iterable[str], at: int, selected: set[Unit], extra: set[Unit], seen: set[str]
    ) -> bool:
        """Whether selected statements above `at` bind all names, or cheap ones of the lab, which go to `extra`."""
        for name in set(names) - ALWAYS_THERE - seen:
            seen.add(name)
            binders = [unit for unit in self.notebook.binders.get(name, []) if unit[0] < at]
            if any(unit in selected or unit in extra for unit in binders):
                continue
            sources = self.notebook.sources
            usable = [u for u in binders if sources[u[0]].kind != OWN and self.notebook.may_run(u)]
            if not usable:
                return False
            extra |= set(usable)
            needs = [self.notebook.statement(unit).needs for unit in usable]
            if not all(self.available(one, at, selected, extra, seen) for one in needs):
                return False
        return True

    def write(self, selected: set[Unit], unable: Mapping[int, list[int]]) -> None:
        numbers_of: dict[int, list[int]] = {}
        for where, number in sorted(selected):
            numbers_of.setdefault(where, []).append(number)
        for position, source in enumerate(self.notebook.sources):
            statements = self.notebook.statements[position]
            if position in unable:
                left_out = [statements[number] for number in unable[position]]
                text = drop(source.text, left_out)
                numbers = sorted(set(range(len(statements))) - set(unable[position]))
                if left_out:
                    self.result.skipped[source.id] = [one.text.splitlines()[0] for one in left_out]
            else:
                numbers = numbers_of.get(position, [])
                text = keep(source.text, [statements[number] for number in numbers])
            if numbers or position in unable:
                self.result.cells.append((source.id, text))
                self.result.used[source.id] = numbers
