"""Rollouts: the batches of reinforcement learning, which the policy in training writes itself.

Shapes: B rows of a micro-batch, T positions, V vocab_size. Rows are padded on the right, where a causal model does not
look.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcourse import runtime
from llmcourse.alignment.log_probs import response_log_probs, trim
from llmcourse.alignment.policy_losses import constant_groups, group_advantages
from llmcourse.alignment.rewards import Scorer, checked
from llmcourse.alignment.shared_prompt import group_log_probs
from llmcourse.data.packing import IGNORE
from llmcourse.data.streaming import check_identity
from llmcourse.inference.generation import TextCodec, generate
from llmcourse.inference.sampling import SamplingParams
from llmcourse.inference.test_time import room_for
from llmcourse.training.state import unwrap

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How to write and use the rollouts of one round.

    Raises:
        ValueError: a value outside its range, or micro-batches that do not divide the round.
    """

    prompts: int = 16
    """prompts of a round on one process"""
    group_size: int = 8
    """responses to each prompt"""
    max_new_tokens: int = 48
    """longest response; a longer one is cut and never sees its end"""
    temperature: float = 1.0
    """of sampling, and of the log-probs that are trained, so that both speak of the same policy"""
    epochs: int = 1
    """times that each rollout is used before new ones are written, mu of Shao et al. (2024), algorithm 1"""
    micro_batch: int = 128
    """rows of one micro-batch of training"""
    generation_batch: int = 256
    """rows that are generated together"""
    chunk_size: int | None = None
    """positions that go through the output head at a time in training; see `response_log_probs`"""
    share_prompt: bool = False
    """send each prompt through the model once for its whole group in training, see `group_log_probs`: the same numbers,
    fewer positions; good for responses that are not much longer than their prompts"""
    drop_cut: bool = False
    """leave responses out of the loss that were cut at max_new_tokens (Yu et al., 2025, section 3.4)"""
    seed: int = 0
    """of the order of the prompts and of sampling"""

    def __post_init__(self) -> None:
        least = {"prompts": 1, "group_size": 2, "max_new_tokens": 1, "epochs": 1, "micro_batch": 1}
        for name, value in (least | {"generation_batch": 1}).items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)}: give at least {value}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size}: give at least 1, or None")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: greedy responses are all the same, give more than 0"
            )
        if self.rows % self.micro_batch:
            raise ValueError(
                f"micro_batch={self.micro_batch} does not divide the {self.rows} rows of a round, "
                f"{self.prompts} prompts x {self.group_size}"
            )
        if self.share_prompt and self.micro_batch % self.group_size:
            raise ValueError(
                f"micro_batch={self.micro_batch} cuts groups of {self.group_size}: share_prompt needs whole groups"
            )

    @property
    def shared(self) -> int:
        """Rows of a micro-batch that stand together and read one prompt."""
        return self.group_size if self.share_prompt else 1

    @property
    def rows(self) -> int:
        """Responses of a round on one process."""
        return self.prompts * self.group_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a round, all epochs together."""
        return self.epochs * self.rows // self.micro_batch


class RolloutSource:
    """A source of batches for `fit` that writes its data with the model in training.

    Each round takes the next prompts of a shuffled list, lets the model answer each `group_size` times, has the answers
    scored, and hands out the rows in micro-batches:

    * "tokens" and "targets" (B, T) int64: prompt and response; targets are the response's tokens, the stop token
      included where the response has one, and -100 elsewhere
    * "advantages" and "rewards" (B,) float32
    * "old_log_probs" (B, T) float32 at `temperature`, 0 where there is no target: only if a round lasts for more than
      one optimizer step, since in the first the policy is still the one that wrote
    * "ref_log_probs" (B, T) float32: only with a reference

    Within one step the rows are sorted by length, which saves padding; over several they are shuffled. With
    `share_prompt`, groups are, and their rows stay together.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: TextCodec,
        prompts: Sequence[Sequence[int]],
        scorer: Scorer,
        settings: RolloutSettings,
        *,
        stop_id: int | None = None,
        scale: str = "group",
        reference: nn.Module | None = None,
        micro_steps: int = 1,
        precision: str = "fp32",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make the source, at its first round.

        Args:
            model: the policy, the very object that is trained.
            tokenizer: turns responses into text for the scorer.
            prompts: token ids.
            scorer: rewards of responses; see `rewards.by_rule`.
            settings: of the rounds.
            stop_id: token that ends a response; the tokenizer's end of text by default.
            scale: what advantages are divided by; see `group_advantages`.
            reference: the policy to stay close to; its log-probs come with the batches.
            micro_steps: micro-batches of one optimizer step, as in `FitSettings`.
            precision: of the log-probs, as in `FitSettings`: the ratio of two precisions would not be 1.
            rank: number of this process.
            world_size: processes; each takes other prompts.

        Raises:
            ValueError: fewer prompts than a round of all processes takes, a prompt that is empty or fills the context,
                a round that does not divide into optimizer steps, or a reference that is the policy itself.
        """
        context = unwrap(model).config.context_length
        for number, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens: give 1 to {context - 1}, the context holds {context}"
                )
        if len(prompts) < settings.prompts * world_size:
            raise ValueError(
                f"{len(prompts)} prompts for rounds of {settings.prompts * world_size}: give more, or smaller rounds"
            )
        if settings.micro_batches % micro_steps:
            raise ValueError(
                f"a round has {settings.micro_batches} micro-batches, a step {micro_steps}: make rounds of whole steps"
            )
        if reference is not None and (reference is model or reference is unwrap(model)):
            raise ValueError("the reference is the policy itself and would move with it: pass a copy")
        self.model, self.tokenizer, self.prompts, self.scorer = model, tokenizer, prompts, scorer
        self.settings, self.scale, self.reference, self.precision = settings, scale, reference, precision
        self.stop_id = tokenizer.eos_id if stop_id is None else stop_id
        self.rank, self.world_size = rank, world_size
        self.is_on_policy = settings.micro_batches == micro_steps
        self.rounds: list[dict[str, float]] = []
        """per round: reward, constant_groups, groups, length, cut, tokens, seconds (of generating and scoring)"""
        self._used = settings.micro_batches  # of the current round
        self._rows: Batch = {}
        self._warned = False

    def next(self) -> Batch:
        """The next micro-batch; writes a new round when the last one is used up."""
        if self._used == self.settings.micro_batches:
            self._rows, self._used = self._new_round(), 0
        size = self.settings.micro_batch
        epoch, place = divmod(self._used * size, self.settings.rows)
        chosen = self._order(epoch)[place : place + size]
        self._used += 1
        return _trim({name: values[chosen] for name, values in self._rows.items()})

    def state_dict(self) -> dict[str, Any]:
        """The rounds so far, how much of the last is used, and its rows while they are needed, as plain data."""
        is_spent = self._used == self.settings.micro_batches
        rows = {} if is_spent else {name: values.tolist() for name, values in self._rows.items()}
        rounds = [dict(one) for one in self.rounds]
        return {"identity": self._identity(), "used": self._used, "rounds": rounds, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position, with the rows that were in use there.

        Raises:
            ValueError: it is of other prompts or settings, or, with several processes, in the middle of a round: the
                state holds the rows of one process.
        """
        check_identity("rollouts", state["identity"], self._identity())
        if state["rows"] and self.world_size > 1:
            raise ValueError(
                "the saved run of several processes was in the middle of a round, and only one process's rows were "
                "saved: resume from a checkpoint at the end of a round (checkpoint_every a multiple of its steps)"
            )
        device = next(self.model.parameters()).device
        self._used, self.rounds = state["used"], [dict(one) for one in state["rounds"]]
        self._rows = {name: torch.tensor(values, device=device) for name, values in state["rows"].items()}

    def _identity(self) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([list(map(int, prompt)) for prompt in self.prompts]).encode())
        sizes = {
            name: getattr(self.settings, name) for name in ("prompts", "group_size", "micro_batch", "epochs")
        }
        own = {
            "seed": self.settings.seed,
            "world_size": self.world_size,
            "prompt_list": digest.hexdigest()[:16],
        }
        return own | sizes

    def _order(self, epoch: int) -> Tensor:
        """Rows of the round in the order of an epoch, (rows,)."""
        size = self.settings.shared
        if self.is_on_policy:
            ends = (self._rows["targets"] != IGNORE).cumsum(dim=1).argmax(dim=1)
            order = ends.view(-1, size).sum(dim=1).argsort(stable=True)
        else:
            generator = torch.Generator().manual_seed(self._seed("order", epoch))
            order = torch.randperm(self.settings.rows // size, generator=generator)
        rows = order[:, None] * size + torch.arange(size, device=order.device)
        return rows.flatten().to(self._rows["tokens"].device)

    def _seed(self, *what: object) -> int:
        """A seed for this round's choices, the same after a resume."""
        key = (self.settings.seed, len(self.rounds), self.rank, *what)
        return random.Random("/".join(map(str, key))).getrandbits(31)

    def _next_prompts(self) -> list[int]:
        """Numbers of this round's prompts: a stretch of an endless row of shuffled lists, none shared by processes."""
        n, size = len(self.prompts), self.settings.prompts
        first = (len(self.rounds) * self.world_size + self.rank) * size
        shuffled: dict[int, list[int]] = {}
        for epoch in {first // n, (first + size - 1) // n}:
            shuffled[epoch] = random.Random(f"{self.settings.seed}/{epoch}").sample(range(n), n)
        return [shuffled[q // n][q % n] for q in range(first, first + size)]

    def _new_round(self) -> Batch:
        """Write, score and compare the responses of a round; returns its rows."""
        began = time.perf_counter()
        numbers = [i for i in self._next_prompts() for _ in range(self.settings.group_size)]
        prompts = [list(self.prompts[i]) for i in numbers]
        was_training = self.model.training
        self.model.eval()
        try:
            responses = self._write(prompts)
            texts = [self.tokenizer.decode(ids) for ids in responses]
            rewards = torch.tensor(checked(self.scorer(numbers, texts), texts))  # (rows,)
            is_cut = [ids[-1:] != [self.stop_id] for ids in responses]
            skip = [cut and self.settings.drop_cut for cut in is_cut]
            advantages = group_advantages(rewards, self.settings.group_size, scale=self.scale)
            rows = _pad(prompts, responses, skip) | {"rewards": rewards, "advantages": advantages}
            device = next(self.model.parameters()).device
            rows = {name: values.to(device) for name, values in rows.items()}
            rows |= self._log_probs(rows)
        finally:
            self.model.train(was_training)
        self._record(rewards, responses, is_cut, time.perf_counter() - began)
        return rows

    def _write(self, prompts: list[list[int]]) -> list[list[int]]:
        """A response to each prompt, the stop token included unless it was cut."""
        s, model = self.settings, unwrap(self.model)
        responses: list[list[int]] = []
        for start in range(0, len(prompts), s.generation_batch):
            part = prompts[start : start + s.generation_batch]
            seed = self._seed("write", start)
            params = SamplingParams(temperature=s.temperature, max_new_tokens=s.max_new_tokens, seed=seed)
            for prompt, ids in zip(
                part, generate(model, part, params, stop_ids=(self.stop_id,)), strict=True
            ):
                stopped = len(ids) < room_for(model, prompt, params)
                responses.append(ids + [self.stop_id] * stopped)
        return responses

    @torch.no_grad()
    def _log_probs(self, rows: Batch) -> Batch:
        """The log-probs that these rows need from the policy as it is now and from the reference."""
        models = {} if self.is_on_policy else {"old_log_probs": self.model}
        if self.reference is not None:
            models["ref_log_probs"] = self.reference.eval()
        device = rows["tokens"].device
        dtype = runtime.precision_dtype(self.precision, device)
        found = {}
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            for name, model in models.items():
                parts = zip(
                    rows["tokens"].split(self.settings.micro_batch),
                    rows["targets"].split(self.settings.micro_batch),
                    strict=True,
                )
                options = {"temperature": self.settings.temperature, "group_size": self.settings.shared}
                log_probs = [sampled_log_probs(model, *part, **options) for part in parts]
                found[name] = torch.cat(log_probs)
        return found

    def _record(
        self, rewards: Tensor, responses: list[list[int]], is_cut: list[bool], seconds: float
    ) -> None:
        groups = rewards.view(-1, self.settings.group_size)
        constant = int(constant_groups(groups).sum())
        tokens = sum(map(len, responses))
        self.rounds.append(
            {
                "reward": float(rewards.mean()),
                "constant_groups": constant,
                "groups": len(groups),
                "length": tokens / len(responses),
                "cut": sum(is_cut) / len(responses),
                "tokens": tokens,
                "seconds": seconds,
            }
        )
        if constant == len(groups) and not self._warned:
            self._warned = True
            warnings.warn(
                f"round {len(self.rounds) - 1}: the rewards of each of the {constant} groups are equal, so there is "
                "no gradient: take prompts that the model sometimes solves, more responses, or a finer reward",
                stacklevel=2,
            )


def sampled_log_probs(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    chunk_size: int | None = None,
    group_size: int = 1,
) -> Tensor:
    """Log-probs of the policy that samples at a temperature, from logits divided by it, (B, T) float32.

    See `response_log_probs`; with a group size above 1, `group_log_probs`.
    """
    options = {"temperature": temperature, "chunk_size": chunk_size}
    if group_size > 1:
        return group_log_probs(model, tokens, targets, group_size, **options)
    return response_log_probs(model, tokens, targets, **options)


def _pad(prompts: list[list[int]], responses: list[list[int]], skip: list[bool]) -> Batch:
    """Tokens and targets (B, T) of prompts with their responses; a row to skip has no target."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(map(len, rows)) - 1
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full((len(rows), longest), IGNORE)
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[i, : len(row) - 1] = torch.tensor(row[:-1])
        if not skip[i]:
            targets[i, len(prompt) - 1 : len(row) - 1] = torch.tensor(row[len(prompt) :])
    return {"tokens": tokens, "targets": targets}


def _trim(batch: Batch) -> Batch:
    """Cut the columns behind the last target; one column stays when there is none."""
    length = trim(batch["tokens"], batch["targets"])[0].shape[1]
    return {name: values[:, :length] if values.ndim == 2 else values for name, values in batch.items()}
