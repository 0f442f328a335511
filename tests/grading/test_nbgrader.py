"""The labs as handed out are notebooks that nbgrader itself accepts (`pip install llmcourse[nbgrader]`)."""

from __future__ import annotations

import json

import pytest

from llmcourse.checks.exercise import exercises
from llmcourse.grading.handout import Question, answers, hand_out
from llmcourse.labs import build, list_labs

nbgraderformat = pytest.importorskip(
    "nbgrader.nbgraderformat", reason="nbgrader is not installed: pip install 'llmcourse[nbgrader]'"
)


def handed_out(lab):
    """A lab as students get it, with a question that a person grades."""
    notebook = build(lab)
    points = {f"{lab.slug}/{one.id}": one.points for one in exercises(lab.slug)}
    question = Question("why", next(iter(answers(notebook, lab))).replace("/", "-"), "Why?", 1.5)
    hand_out(notebook, lab, points=points, questions=[question])
    return notebook, points


@pytest.mark.parametrize("lab", list_labs(), ids=lambda lab: lab.name)
def test_nbgrader_accepts_the_metadata_of_every_lab(lab):
    notebook, _ = handed_out(lab)
    nbgraderformat.MetadataValidator().validate_nb(notebook)


@pytest.mark.parametrize("lab", list_labs()[:1], ids=lambda lab: lab.name)
def test_nbgrader_sees_the_exercises_their_points_and_the_question(lab):
    from nbgrader import utils
    from nbgrader.preprocessors import CheckCellMetadata, ComputeChecksums

    notebook, points = handed_out(lab)
    cells = notebook.cells
    answered = [cell for cell in cells if utils.is_solution(cell) and not utils.is_grade(cell)]
    graded = [cell for cell in cells if utils.is_grade(cell) and not utils.is_solution(cell)]
    manual = [cell for cell in cells if utils.is_grade(cell) and utils.is_solution(cell)]
    assert len(answered) == len(graded) == len(answers(notebook, lab)) > 0
    assert sum(cell.metadata.nbgrader.points for cell in graded) == sum(
        points[name] for name in answers(notebook, lab)
    )
    assert [cell.metadata.nbgrader.grade_id for cell in manual] == [f"{lab.slug}-why"]
    assert all(utils.is_locked(cell) for cell in graded)
    for preprocessor in (CheckCellMetadata(), ComputeChecksums()):
        notebook, _ = preprocessor.preprocess(notebook, {})
    assert all(
        len(cell.metadata.nbgrader.checksum) == 32 for cell in notebook.cells if "nbgrader" in cell.metadata
    )


def test_what_nbgrader_adds_is_not_reported_as_a_change(tiny_release):
    import nbformat
    from nbgrader.preprocessors import ClearOutput, ComputeChecksums, LockCells

    from llmcourse.grading.skeleton import rebuild

    notebook = nbformat.from_dict(tiny_release.solved())
    for preprocessor in (LockCells(), ClearOutput(), ComputeChecksums()):
        notebook, _ = preprocessor.preprocess(notebook, {})
    assert rebuild(json.dumps(notebook).encode(), tiny_release.key).findings == ()


def test_nbgrader_refuses_what_our_own_check_refuses(tiny_release):
    import nbformat

    notebook = nbformat.from_dict(tiny_release.solved())
    tiny_release.cell(notebook, "intensity", check=True)["metadata"]["nbgrader"]["points"] = -1
    with pytest.raises(nbgraderformat.ValidationError):
        nbgraderformat.MetadataValidator().validate_nb(notebook)
