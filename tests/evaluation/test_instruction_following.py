"""The post-training harness: answers of a model that is known by heart, counted right; refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcourse.data.tinytown import Town
from llmcourse.data.town_instructions import TASKS, TownInstructions
from llmcourse.evaluation import instruction_following
from llmcourse.evaluation.instruction_following import answer_chats, instruction_report, share_right
from llmcourse.inference.sampling import SamplingParams
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def instructions() -> TownInstructions:
    return TownInstructions(Town(0))


@pytest.fixture(scope="module")
def tokenizer(instructions: TownInstructions) -> Tokenizer:
    return Tokenizer.train((d.text for d in instructions.town.documents(200)), 400)


class Parrot(Transformer):
    """After `<|assistant|>` it says "yes" and ends its turn, whatever was asked."""

    def __init__(self, tokenizer: Tokenizer, context_length: int = 320) -> None:
        sizes = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "d_ff": 8}
        super().__init__(ModelConfig(vocab_size=tokenizer.vocab_size, context_length=context_length, **sizes))
        script = [
            tokenizer.special_id("<|assistant|>"),
            *tokenizer.encode("yes"),
            tokenizer.special_id("<|end|>"),
        ]
        self.next = dict(zip(script, script[1:], strict=False))

    def hidden_states(self, tokens: Tensor, cache: Any = None) -> Tensor:
        if cache is not None:
            cache.advance(tokens.shape[1])
        return tokens[..., None].float()

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        raise AssertionError("generation goes through hidden_states and head")


class Script(torch.nn.Module):
    """A head that looks the next token up."""

    def __init__(self, following: dict[int, int], vocab_size: int) -> None:
        super().__init__()
        self.following, self.vocab_size = following, vocab_size

    def forward(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(*hidden.shape[:-1], self.vocab_size)
        for b, token in enumerate(hidden[..., 0].flatten().tolist()):
            logits.view(-1, self.vocab_size)[b, self.following.get(int(token), 0)] = 1.0
        return logits


@pytest.fixture
def parrot(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Parrot:
    model = Parrot(tokenizer)
    model.head = Script(model.next, tokenizer.vocab_size)
    monkeypatch.setattr("llmcourse.inference.generation.can_fuse", lambda model: False)
    return model


def test_the_model_is_asked_in_the_chat_format_and_stops_at_the_end_of_its_turn(
    parrot: Parrot, tokenizer: Tokenizer, instructions: TownInstructions
):
    chats = [one.messages for one in instructions.training(5)]
    assert answer_chats(parrot, tokenizer, chats, batch_size=2) == ["yes"] * 5
    cut = SamplingParams(temperature=0.0, max_new_tokens=1)
    first = tokenizer.decode(tokenizer.encode("yes")[:1])
    assert answer_chats(parrot, tokenizer, chats[:1], cut) == [first]
    assert answer_chats(parrot, tokenizer, []) == []
    with pytest.raises(ValueError, match="batch_size=0"):
        answer_chats(parrot, tokenizer, chats, batch_size=0)


def test_a_question_that_fills_the_context_gets_the_empty_answer(parrot: Parrot, tokenizer: Tokenizer):
    short, long = ([{"role": "user", "content": "now " * n}] for n in (2, 900))
    assert answer_chats(parrot, tokenizer, [long, short]) == ["", "yes"]


def test_right_answers_are_counted(
    parrot: Parrot,
    tokenizer: Tokenizer,
    instructions: TownInstructions,
    monkeypatch: pytest.MonkeyPatch,
):
    assert share_right(parrot, tokenizer, instructions.held_out("facts", 4)).value == 0
    pool = {
        repr(one.messages): one.answer
        for task in TASKS
        for one in instructions.held_out(task, 12, 5, reworded=True)
    }

    def three_of_four(model: Any, tokenizer: Any, chats: Sequence[Any], **options: Any) -> list[str]:
        return [pool[repr(chat)] if i % 4 else "no" for i, chat in enumerate(chats)]

    monkeypatch.setattr(instruction_following, "answer_chats", three_of_four)
    report = instruction_report(parrot, tokenizer, instructions, n=12, seed=5, reworded=True)
    assert list(report) == list(TASKS)
    for estimate in report.values():
        assert (estimate["value"], estimate["n"]) == (0.75, 12) and estimate["low"] < 0.75 < estimate["high"]
    with pytest.raises(ValueError, match="no requests"):
        share_right(parrot, tokenizer, [])
