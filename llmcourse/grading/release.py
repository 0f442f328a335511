"""Release: from a lab's source to the notebook for students, a public manifest, and the key to grade with.

Nothing is written before every lab has been proved: the model solutions score the maximum, the untouched notebook
scores nothing, and no known wrong answer passes, in the same jail in which submissions will run.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcourse.checks.checking import one_thread
from llmcourse.checks.exercise import Exercise, exercises
from llmcourse.grading.dependencies import ANSWER, LAB, Plan, Source, Wanted, plan
from llmcourse.grading.handout import (
    Question,
    answers,
    hand_out,
    make_questions,
    model_solutions,
    read_questions,
)
from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import (
    VARIANTS,
    AssignmentKey,
    CellRecord,
    Key,
    Manifest,
    ManualQuestion,
    derive,
    source_digest,
)
from llmcourse.grading.references import choose_seeds, run_solutions, watched_functions
from llmcourse.grading.statements import split
from llmcourse.labs.repository import Lab, require_repository, select_labs
from llmcourse.labs.results import write_atomically

if TYPE_CHECKING:
    from nbformat import NotebookNode

PRELOAD = ("torch", "numpy")


def release(
    labs: str | Iterable[str] | None,
    out: Path,
    *,
    points: Mapping[str, float] | None = None,
    questions: Path | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    repository: Path | None = None,
    solutions: bool = False,
    replace: bool = False,
    variants: int = VARIANTS,
    seed: int | None = None,
    trust: bool = False,
) -> list[Manifest]:
    """Write `out/student/NN_slug.ipynb`, `out/manifests/NN_slug.json` and the key `out/key/`.

    Args:
        labs: numbers, slugs or names; empty for all.
        out: folder; a key that is there already is used on.
        points: of exercises ("peft/lora_forward") that shall differ from the lab's own.
        questions: to be graded by a person: a YAML file {lab: [{id, after, text, points}]}, or such data.
        limits: what a submission may use.
        repository: the checkout with the labs; by default the one around.
        solutions: leave the model solutions in the students' notebook.
        replace: release a lab anew, whose earlier notebooks can then no longer be graded with this key.
        variants: number of different inputs that each exercise has.
        seed: makes the secret and the release's name follow from a number, for tests.
        trust: prove the solutions without walls, on a machine where no jail can be built.

    Returns:
        The manifests.

    Raises:
        ValueError: a lab cannot be graded, its model solutions do not score the maximum, the untouched notebook scores,
            a wrong answer passes, or a question or points name something unknown; nothing is written then.
    """
    chosen = select_labs(labs, require_repository(repository))
    if not chosen:
        raise ValueError("no lab to release: the repository has none")
    if variants < 1:
        raise ValueError(f"variants={variants} must be at least 1")
    asked = (
        read_questions(questions)
        if isinstance(questions, Path)
        else make_questions(questions or {}, "questions")
    )
    _refuse_unknown(chosen, points or {}, asked)
    key = _key(Path(out) / "key", seed)
    for lab in chosen:
        if lab.name in key.assignments and not replace:
            raise ValueError(
                f"{lab.name} is already released in {out}: notebooks of that release would no longer be graded; "
                "choose another folder, or say that it shall be replaced"
            )
    made = []
    for lab in chosen:
        assignment = prepare(
            lab,
            key.secret,
            points=points or {},
            questions=_questions_of(lab, asked),
            limits=limits or Limits(),
            solutions=solutions,
            variants=variants,
            seed=seed,
            trust=trust,
        )
        prove(assignment, trust=trust)
        made.append(assignment)
    _write(made, Path(out), key.secret)
    return [assignment.manifest for assignment in made]


def prepare(
    lab: Lab,
    secret: bytes,
    *,
    points: Mapping[str, float],
    questions: Sequence[Question],
    limits: Limits,
    solutions: bool,
    variants: int,
    seed: int | None,
    trust: bool,
) -> AssignmentKey:
    """The key of a lab's release; see `release` for the arguments.

    Raises:
        ValueError: the lab cannot be graded; the message says what its source lacks.
    """
    from llmcourse.labs.source import build

    notebook = build(lab)
    records = {f"{lab.slug}/{one.id}": one for one in exercises(lab.slug)}
    names = answers(notebook, lab)
    texts = model_solutions(notebook, lab)
    worth = {name: points.get(name, records[name].points) for name in names}
    hand_out(notebook, lab, points=worth, questions=questions, solutions=solutions)
    made = _needed(notebook, texts, names)
    number = (
        secrets.token_hex(8) if seed is None else f"{derive(secret, 'release', lab.name, str(seed)):016x}"
    )
    notebook.metadata["llmcourse"] = {"assignment": lab.name, "release": number}
    skeleton = json.loads(json.dumps(notebook))
    manifest = Manifest(
        release=number,
        assignment=lab.name,
        slug=lab.slug,
        title=_title(notebook) or lab.name,
        points=worth,
        titles={name: records[name].title for name in names},
        manual=tuple(_manual(notebook, lab, questions)),
        limits=limits,
        cells=tuple(_record(cell, made) for cell in notebook.cells),
        files={},
    )
    proven = {identifier: tuple(numbers) for identifier, numbers in made.used.items()}
    key = AssignmentKey(
        manifest=manifest,
        skeleton=skeleton,
        solutions=texts,
        answers=names,
        watched={},
        variants={name: (0,) for name in names},
        proven=proven,
        preload=_preload(made, lab.slug),
        secret=secret,
    )
    if experiments := _experiments(notebook, made):  # the course's own code, and yet it may train for minutes
        try:
            prove(key, trust=trust)
        except ValueError as error:
            raise ValueError(
                f"labs/src/{lab.source.name}: its model solutions need `{experiments[0]}`, which does not run within "
                f"a submission's limits: {error}"
            ) from None
    return _with_references(key, made, {name: records[name] for name in names}, variants)


def prove(assignment: AssignmentKey, *, trust: bool = False) -> None:
    """Show in the jail that the model solutions score the maximum, and the untouched notebook nothing.

    Raises:
        ValueError: one of them does not, or there is no jail and `trust` is not given.
    """
    from llmcourse.grading.station import Station

    station = Station(assignment, trust=trust)
    try:
        station.check_controls()
    finally:
        station.close()


def _refuse_unknown(chosen: list[Lab], points: Mapping[str, float], asked: Mapping[str, Any]) -> None:
    known = [f"{lab.slug}/{one.id}" for lab in chosen for one in exercises(lab.slug)]
    for name, value in points.items():
        if name not in known:
            raise ValueError(f"points for {name!r}: choose from {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"points for {name!r}: {value!r} must be a number above 0")
    for name in asked:
        if not any(name in _names(lab) for lab in chosen):
            labs = ", ".join(lab.name for lab in chosen)
            raise ValueError(f"questions for {name!r}: no such lab is released here; choose from {labs}")


def _questions_of(lab: Lab, asked: Mapping[str, list[Question]]) -> list[Question]:
    return [question for name, items in asked.items() if name in _names(lab) for question in items]


def _names(lab: Lab) -> tuple[str, str, str]:
    return lab.number, lab.slug, lab.name


def _key(folder: Path, seed: int | None) -> Key:
    """The key of a folder, or one that is not written yet."""
    if folder.exists():
        return Key.load(folder)
    secret = secrets.token_bytes(32) if seed is None else hashlib.sha256(f"seed {seed}".encode()).digest()
    return Key(folder, secret)


def _write(made: list[AssignmentKey], out: Path, secret: bytes) -> None:
    """The key first: a notebook that nobody can grade must not be there."""
    key = Key.create(out / "key", secret)
    for assignment in made:
        key.save(assignment)
    for assignment in made:
        write_atomically(
            out / "manifests" / f"{assignment.name}.json", key.manifest_text(assignment.manifest)
        )
        text = json.dumps(assignment.skeleton, indent=1, ensure_ascii=False)
        write_atomically(out / "student" / f"{assignment.name}.ipynb", text + "\n")


def _needed(notebook: NotebookNode, texts: Mapping[str, str], names: Mapping[str, str]) -> Plan:
    """What the model solutions need of the lab's cells."""
    sources: list[Source] = []
    wanted: dict[str, Wanted] = {}
    for cell in notebook.cells:
        metadata = cell.metadata.get("nbgrader", {})
        if cell.cell_type != "code" or metadata.get("grade"):
            continue
        if metadata.get("solution"):
            name = metadata["grade_id"].replace("-", "/", 1)
            wanted[name] = Wanted(names[name], (len(sources),))
            sources.append(Source(cell.id, texts[name], ANSWER))
        else:
            sources.append(Source(cell.id, cell.source, LAB))
    return plan(sources, wanted)


def _experiments(notebook: NotebookNode, made: Plan) -> list[str]:
    """First lines of the lab's own statements that the model solutions need and that are not cheap."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and not cell.metadata.get("nbgrader"):
            statements = split(cell.source)
            numbers = made.used.get(cell.id, [])
            found += [statements[i].text.splitlines()[0] for i in numbers if not statements[i].cheap]
    return found


def _with_references(
    key: AssignmentKey, made: Plan, records: Mapping[str, Exercise], variants: int
) -> AssignmentKey:
    with one_thread():
        functions = run_solutions(made.cells, key.answers)
        seeds = {
            name: choose_seeds(record, name, functions[name], key.secret, variants)
            for name, record in records.items()
        }
        watched = {name: watched_functions(record, functions[name]) for name, record in records.items()}
    return dataclasses.replace(key, variants=seeds, watched=watched)


def _record(cell: Any, made: Plan) -> CellRecord:
    metadata = cell.metadata.get("nbgrader", {})
    if metadata.get("grade"):
        role = "manual" if metadata["solution"] else "check"
    elif metadata.get("solution"):
        role = "solution"
    else:
        role = "setup" if {"setup", "parameters"} & set(cell.metadata.get("tags", [])) else "other"
    return CellRecord(
        grade_id=metadata.get("grade_id"),
        cell_id=cell.id,
        type=cell.cell_type,
        role=role,
        sha256=source_digest(cell.source),
        points=metadata.get("points", 0),
        run=cell.id in made.used,
    )


def _manual(notebook: NotebookNode, lab: Lab, questions: Iterable[Question]) -> Iterable[ManualQuestion]:
    """The inserted questions in the order of the notebook."""
    by_id = {f"{lab.slug}-{question.id}": question for question in questions}
    for cell in notebook.cells:
        grade_id = cell.metadata.get("nbgrader", {}).get("grade_id")
        if grade_id in by_id:
            question = by_id[grade_id]
            yield ManualQuestion(grade_id=grade_id, title=question.title, points=question.points)


def _title(notebook: NotebookNode) -> str:
    heading = re.search(r"^# +(.*)$", notebook.cells[0].source, re.M) if notebook.cells else None
    return heading[1].strip() if heading else ""


def _preload(made: Plan, slug: str) -> tuple[str, ...]:
    """Modules that the jail imports once: the exercises', and what the needed cells import."""
    found = {f"llmcourse.checks.{slug}"}
    for _, source in made.cells:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module)
    return (*PRELOAD, *sorted(found - set(PRELOAD)))
