"""Prompts read once: equal to every row read alone, in values, gradients and training; the last block likewise."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from llmcourse.alignment.grpo import GRPOSettings, train_grpo
from llmcourse.alignment.log_probs import hidden_at, response_log_probs
from llmcourse.alignment.rollouts import RolloutSettings, RolloutSource, sampled_log_probs
from llmcourse.alignment.shared_prompt import SharedPrompt, group_log_probs
from llmcourse.data.packing import IGNORE
from llmcourse.models.adapters import add_adapters
from llmcourse.models.config import ModelConfig
from llmcourse.models.lora import LoRASettings, add_lora
from llmcourse.models.transformer import Transformer
from llmcourse.training.fit import FitSettings

V, CONTEXT, N = 17, 16, 3
CONFIG = ModelConfig(
    vocab_size=V, context_length=CONTEXT, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24
)
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


def make(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.embedding.weight.mul_(0.3)  # tied to the head: no token is hopeless
    return model


def rows(lengths: Sequence[Sequence[int]] = ((4, 1, 6), (2, 5, 3), (1, 1, 1))) -> tuple[Tensor, Tensor]:
    """Groups of N responses of these lengths, group n to prompt n; a length of 0 is a row without target."""
    rng = random.Random(0)
    width = max(len(p) + max(group) for p, group in zip(PROMPTS, lengths, strict=False))
    tokens, targets = [], []
    for prompt, group in zip(PROMPTS, lengths, strict=False):
        for length in group:
            response = [rng.randrange(V) for _ in range(length)]
            row = (prompt + response)[: len(prompt) + max(length - 1, 0)]
            tokens.append(row + [0] * (width - len(row)))
            wanted = [IGNORE] * (len(prompt) - 1) + response
            targets.append(wanted + [IGNORE] * (width - len(wanted)))
    return torch.tensor(tokens), torch.tensor(targets)


def gradients(model: nn.Module, values: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, values.numel()).view(values.shape)
    return list(torch.autograd.grad((values * weights).sum(), list(model.parameters())))


@pytest.mark.parametrize("lengths", [((4, 1, 6), (2, 5, 3), (1, 1, 1)), ((4, 0, 6), (0, 0, 0), (2, 2, 0))])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 0.7, "chunk_size": 4}])
def test_groups_give_the_log_probs_and_gradients_of_their_rows(lengths, options):
    model = make()
    tokens, targets = rows(lengths)
    alone = response_log_probs(model, tokens, targets, temperature=options.get("temperature", 1.0))
    together = group_log_probs(model, tokens, targets, N, **options)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients(model, together), gradients(model, alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    sampled = sampled_log_probs(model, tokens, targets, group_size=N)
    assert torch.equal(sampled, group_log_probs(model, tokens, targets, N))


def test_a_prompt_goes_through_the_model_once():
    class Counted(Transformer):
        slots = 0

        def hidden_states(self, tokens: Tensor, cache: SharedPrompt | None = None) -> Tensor:
            self.slots += int((cache.segments >= 0).sum())
            return super().hidden_states(tokens, cache)

    torch.manual_seed(0)
    model = Counted(CONFIG)
    model.blocks[-1].register_forward_hook(lambda *_: None)  # watched: the whole model runs
    group_log_probs(model, *rows(((4, 1, 6), (2, 5, 3))), N)
    # the last token of the prompt stands before each response, the last of a response is only a target
    assert model.slots == (2 + 4 + 1 + 6) + (0 + 2 + 5 + 3)


def test_wrong_groups_are_refused():
    model = make()
    tokens, targets = rows()
    with pytest.raises(ValueError, match="8 rows do not divide into groups of 3"):
        group_log_probs(model, tokens[:8], targets[:8], N)
    with pytest.raises(ValueError, match="group 0 has several prompts"):
        group_log_probs(model, tokens[1:7], targets[1:7], N)
    tokens[1, 0] += 1
    with pytest.raises(ValueError, match="group 0 has several prompts"):
        group_log_probs(model, tokens, targets, N)


# Rollouts -----------------------------------------------------------------------------------------------------


class Letters:
    """A codec of one character a token; id 0 ends a text."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) - 96 for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i + 96) for i in ids if i)


def any_reward(numbers: Sequence[int], texts: Sequence[str]) -> list[float]:
    return [sum(map(ord, text)) % 7 / 7 for text in texts]


ROLLOUTS = RolloutSettings(prompts=4, group_size=3, max_new_tokens=5, micro_batch=6, share_prompt=True)


@pytest.mark.parametrize("options", [{"micro_steps": 2}, {"micro_steps": 1}, {"micro_steps": 1, "epochs": 2}])
def test_groups_stay_together_and_each_row_is_used_once_an_epoch(options):
    settings = dataclasses.replace(ROLLOUTS, epochs=options.get("epochs", 1))
    source = RolloutSource(
        make(), Letters(), PROMPTS, any_reward, settings, micro_steps=options["micro_steps"]
    )
    for _ in range(settings.epochs):
        seen = []
        for _ in range(2):
            batch = source.next()
            assert len(batch["tokens"]) == 6
            for group in range(2):
                part = slice(3 * group, 3 * group + 3)
                starts = (batch["targets"][part] != IGNORE).int().argmax(dim=1).tolist()
                prompts = zip(batch["tokens"][part].tolist(), starts, strict=True)
                heads = {tuple(row[: start + 1]) for row, start in prompts}
                assert len(heads) == 1
                seen.append(list(heads.pop()))
        assert sorted(seen) == sorted(PROMPTS)
    assert len(source.rounds) == 1


@pytest.mark.parametrize("options", [{}, {"epochs": 2}, {"drop_cut": True}, {"temperature": 0.7}])
def test_training_is_the_same(options):
    trained = []
    for share in (False, True):
        rollouts = dataclasses.replace(ROLLOUTS, micro_batch=12, share_prompt=share, **options)
        fit = FitSettings(
            steps=2, lr=1e-2, schedule="constant", weight_decay=0.0, precision="fp32", compile="off"
        )
        model = make()
        settings = GRPOSettings(rollouts=rollouts, fit=fit)
        train_grpo(model, Letters(), PROMPTS, any_reward, settings, progress=False)
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (trained[0] - torch.cat([p.detach().flatten() for p in make().parameters()])).abs().max() > 1e-3
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=2e-4)


def test_micro_batches_of_parts_of_groups_are_refused():
    with pytest.raises(ValueError, match="micro_batch=4 cuts groups of 3"):
        dataclasses.replace(ROLLOUTS, micro_batch=4)
    assert dataclasses.replace(ROLLOUTS, micro_batch=4, share_prompt=False).shared == 1


# The last block -----------------------------------------------------------------------------------------------


def plain(model: Transformer) -> Transformer:
    return model


def with_lora(model: Transformer) -> Transformer:
    add_lora(model, LoRASettings(rank=2))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("up"):
            nn.init.normal_(parameter)
    return model


def with_adapters(model: Transformer) -> Transformer:
    add_adapters(model)
    for name, parameter in model.named_parameters():
        if name.endswith("expand.weight"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("change", [plain, with_lora, with_adapters])
def test_hidden_states_at_targets_are_those_of_the_model(change: Callable[[Transformer], Transformer]):
    model = change(make())
    tokens, targets = rows()
    mask = targets != IGNORE
    torch.testing.assert_close(
        hidden_at(model, tokens, mask), model.hidden_states(tokens)[mask], rtol=1e-5, atol=1e-5
    )
    segments = torch.ones_like(tokens)
    segments[:, :2] = 0
    cache = SharedPrompt(segments, torch.arange(tokens.shape[1]).expand_as(tokens))
    torch.testing.assert_close(
        hidden_at(model, tokens, mask, cache), model.hidden_states(tokens, cache)[mask], rtol=1e-5, atol=1e-5
    )


def test_a_watched_block_runs_whole_and_long_rows_are_refused():
    model, shapes = make(), []
    tokens, targets = rows()
    model.blocks[-1].register_forward_hook(lambda _module, _inputs, output: shapes.append(output.shape))
    hidden_at(model, tokens, targets != IGNORE)
    assert shapes == [(*tokens.shape, CONFIG.d_model)]
    long = torch.zeros(1, CONTEXT + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="17 tokens exceed the context of 16"):
        hidden_at(make(), long, long == 0)
