"""The evaluation of submitted assistants: a model folder is opened from checked files and asked held-out requests.

llmcourse grade ... --evaluate llmcourse.grading.assistant_evaluation:assistant --files-points 20
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from llmcourse.data.chat_formats import training_template
from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TownInstructions
from llmcourse.evaluation.instruction_following import instruction_report
from llmcourse.grading.file_evaluation import FileScore
from llmcourse.grading.submitted_files import Artifacts
from llmcourse.models.pretrained import config_from_hub, model_from_hub
from llmcourse.models.transformer import Transformer
from llmcourse.pipeline import TOWN_SEED
from llmcourse.tokenization.chat_template import CHAT_TEMPLATE
from llmcourse.tokenization.tokenizer import Tokenizer

REQUESTS = 64
"""held-out requests of each task"""
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
HAND_IN = "hand in the folder that save_pretrained(model, folder, tokenizer) wrote"


def assistant(artifacts: Artifacts, seed: int) -> FileScore:
    """Exact match on held-out requests about the town, every task weighing the same.

    An adapter is handed in merged. The chat template is the course's, or the tokenizer family's: a submitted one is
    code and was removed.

    Args:
        artifacts: config.json, model*.safetensors, tokenizer.json and tokenizer_config.json, in one folder.
        seed: chooses the requests.
    """
    try:
        model, tokenizer = open_submitted(artifacts)
    except ValueError as error:
        return FileScore(0.0, f"The model cannot be used: {error}"[:300])
    report = instruction_report(
        model, tokenizer, TownInstructions(Town(TOWN_SEED)), n=REQUESTS, seed=seed % 2**32
    )
    shares = {task: found["value"] for task, found in report.items()}
    parts = ", ".join(f"{task} {share:.0%}" for task, share in shares.items())
    intervals = ", ".join(
        f"{task} [{found['low']:.2f}, {found['high']:.2f}]" for task, found in report.items()
    )
    return FileScore(fmean(shares.values()), f"Held-out requests answered right: {parts}.", intervals)


def open_submitted(artifacts: Artifacts) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of the one model folder among the files.

    Raises:
        ValueError: there is none, or more than one, or its files do not belong together.
    """
    folder = _model_folder(artifacts)
    data = {name: artifacts.data.get(str(folder / name)) for name in NEEDED}
    wrong = [name for name, content in data.items() if not isinstance(content, dict)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} missing or no JSON object; {HAND_IN}")
    tokenizer = _tokenizer(data)
    tensors = {
        name: tensor
        for file, content in artifacts.tensors.items()
        if PurePosixPath(file).parent == folder and PurePosixPath(file).match("model*.safetensors")
        for name, tensor in content.items()
    }
    try:
        model = model_from_hub(config_from_hub(data["config.json"]), tensors)
    except (TypeError, OverflowError, RuntimeError) as error:  # sizes that are none
        if "memory" in str(error):  # the limit's business
            raise
        raise ValueError(f"config.json: {' '.join(str(error).split())[:100]}; {HAND_IN}") from None
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; {HAND_IN}"
        )
    return model, tokenizer


def _model_folder(artifacts: Artifacts) -> PurePosixPath:
    files = [PurePosixPath(name) for name in artifacts.tensors]
    folders = sorted({file.parent for file in files if file.match("model*.safetensors")})
    if len(folders) != 1:
        found = "no model*.safetensors" if not folders else f"models in {len(folders)} folders"
        raise ValueError(f"{found} among the files; {HAND_IN}")
    return folders[0]


def _tokenizer(data: Mapping[str, Any]) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED[1:]:
            Path(folder, name).write_text(json.dumps(data[name]), encoding="utf-8")
        try:
            tokenizer = Tokenizer.load(folder)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/", "")) from None
    of_course = {"<|user|>", "<|assistant|>", "<|end|>"} <= tokenizer.special_ids.keys()
    tokenizer.chat_template = CHAT_TEMPLATE if of_course else training_template(tokenizer)
    return tokenizer
