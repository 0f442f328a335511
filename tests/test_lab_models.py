"""The labs of post-training run from end to end on a model from outside, in sizes that only show that they run."""

from __future__ import annotations

import warnings
from pathlib import Path

import papermill
import pytest

from llmcourse.labs import list_labs
from llmcourse.labs.repository import REPOSITORY_VARIABLE
from tests.outside_models import write_smollm2

ROOT = Path(__file__).resolve().parents[1]
LABS = [lab for lab in list_labs(ROOT) if "\nMODEL = " in lab.source.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


def test_every_lab_of_post_training_takes_a_model():
    assert [lab.number for lab in LABS] == ["08", "10", "11", "14", "15", "18", "19"]


@pytest.mark.slow
@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_a_lab_runs_on_a_model_from_outside(lab, smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(REPOSITORY_VARIABLE, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        executed = papermill.execute_notebook(
            str(lab.notebook),
            None,
            {"PRESET": "smoke", "MODEL": str(smollm2)},
            kernel_name="python3",
            cwd=str(tmp_path),
            progress_bar=False,
        )
    printed = "".join(
        output.get("text", "")
        for cell in executed.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "[holds] " in printed and "[fails] " not in printed
    if "chat_format(" in lab.source.read_text(encoding="utf-8"):
        assert "its chat template does not mark what the assistant writes" in printed
    assert not list((tmp_path / "home").glob("base-*")), (
        "the course's own base model was trained all the same"
    )
