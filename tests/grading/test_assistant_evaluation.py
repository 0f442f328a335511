"""The course's evaluation of handed-in assistants: what it measures, and folders that are no such thing."""

import json
import shutil
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions
from llmcourse.evaluation.instruction_following import instruction_report
from llmcourse.grading import assistant_evaluation
from llmcourse.grading.assistant_evaluation import assistant, open_submitted
from llmcourse.grading.file_evaluation import Evaluation, evaluate_files
from llmcourse.grading.limits import Limits
from llmcourse.grading.submitted_files import read_artifacts
from llmcourse.grading.verdicts import Verdict
from llmcourse.models.config import ModelConfig
from llmcourse.models.pretrained import save_pretrained
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer

NAME = "llmcourse.grading.assistant_evaluation:assistant"
SEED = 2**63 + 11
ANSWER = "106"
"""of three of the sums that this seed draws, and of no token twice"""


@pytest.fixture(scope="module")
def parrot() -> tuple[Transformer, Tokenizer]:
    """A model that says the same and ends its turn, whatever was asked, which is right now and then."""
    tokenizer = Tokenizer.train((document.text for document in Town(0).documents(200)), 400)
    script = [
        tokenizer.special_id("<|assistant|>"),
        *tokenizer.encode(ANSWER),
        tokenizer.special_id("<|end|>"),
    ]
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        context_length=320,
        d_model=8,
        n_layers=1,
        n_heads=2,
        n_kv_heads=1,
        d_ff=8,
        tie_embeddings=False,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        for i, (now, then) in enumerate(zip(script, script[1:], strict=False)):
            model.embedding.weight[now, i] = 1.0
            model.head.weight[then, i] = 1.0
    return model, tokenizer


@pytest.fixture
def folder(parrot, tmp_path):
    """A hand-in of it, in a folder among the files."""
    save_pretrained(parrot[0], tmp_path / "hand-in" / "model", parrot[1])
    (tmp_path / "hand-in" / "notes.json").write_text("{}")
    return tmp_path / "hand-in"


def test_the_share_is_the_mean_of_exact_match_over_the_tasks(folder, parrot):
    found = assistant(read_artifacts(folder), SEED)
    expected = instruction_report(
        *parrot,
        TownInstructions(Town(0)),
        n=assistant_evaluation.REQUESTS,
        seed=SEED % 2**32,
    )
    assert found.share == fmean(one["value"] for one in expected.values()) > 0
    assert all(f"{task} {one['value']:.0%}" in found.message for task, one in expected.items())


def test_it_runs_as_the_evaluation_of_a_batch(folder):
    limits = Limits(wall_seconds=60, memory_mb=1024)
    found = evaluate_files(folder, Evaluation(NAME, 20), SEED, limits)
    assert found.ended == Verdict.GRADED and 0 < found.item.points < 20
    assert found.item.message.startswith("Held-out requests answered right: facts ")
    assert [one.text for one in found.findings] == [
        "model/tokenizer_config.json: its chat_template is not used",
    ]


def test_a_template_of_the_submitter_is_not_run(folder, parrot):
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"chat_template": "{{ messages.__class__.__mro__ }}"})
    )
    (folder / "model" / "chat_template.jinja").write_text("{{ 1 / 0 }}")
    _, tokenizer = open_submitted(read_artifacts(folder))
    assert tokenizer.chat_template == parrot[1].chat_template


def change(path, **entries):
    """Set entries of a JSON file; `None` takes one away."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


BREAKS = {
    "no model*.safetensors": lambda model: (model / "model.safetensors").unlink(),
    "models in 2 folders": lambda model: shutil.copytree(model, model.parent / "second"),
    "config.json missing": lambda model: (model / "config.json").unlink(),
    "tokenizer.json missing": lambda model: (model / "tokenizer.json").write_text("[]"),
    "tokenizer_config.json missing": lambda model: (model / "tokenizer_config.json").write_text("no JSON"),
    "model_type='gpt2'": lambda model: change(model / "config.json", model_type="gpt2"),
    "config.json lacks hidden_size": lambda model: change(model / "config.json", hidden_size=None),
    "tensor model.embed_tokens.weight is of shape": lambda model: change(
        model / "config.json", vocab_size=401
    ),
    "names no eos_token": lambda model: change(model / "tokenizer_config.json", eos_token=None),
    "is no tokenizer": lambda model: (model / "tokenizer.json").write_text("{}"),
    "config.json: ": lambda model: change(model / "config.json", hidden_size="large"),
}


@pytest.mark.parametrize("message", BREAKS)
def test_a_folder_that_is_no_model_scores_nothing_and_says_why(folder, message):
    BREAKS[message](folder / "model")
    found = assistant(read_artifacts(folder), SEED)
    assert found.share == 0 and message in found.message and "\n" not in found.message
    assert str(folder) not in found.message and "/tmp" not in found.message


def test_more_ids_than_the_model_has(folder):
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, path)
    change(folder / "model" / "config.json", vocab_size=300)
    assert "the tokenizer has 400 ids, the model 300" in assistant(read_artifacts(folder), SEED).message
