"""The engine: requests come in at any time, each step computes what the scheduler chose, tokens go out.

    engine = Engine(model, EngineSettings(), tokenizer=tokenizer)
    sequence = engine.add(tokenizer.encode("Jane Day works as a"), SamplingParams(temperature=0))
    while engine.has_work:
        for output in engine.step(): ...

Greedy results do not depend on the company, on chunks, on preemption or on shared prefixes, up to ties that rounding
decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcourse.inference.block_manager import BlockManager
from llmcourse.inference.constraint import TokenConstraint
from llmcourse.inference.generation import TextCodec, check_prompt, holds_stop
from llmcourse.inference.model_runner import ModelRunner
from llmcourse.inference.paged_cache import CACHE_DTYPES, SHORT, PagedCache, Row
from llmcourse.inference.sampling import SamplingParams, sample
from llmcourse.inference.scheduler import Schedule, Scheduler, SchedulerSettings
from llmcourse.inference.sequence import FinishReason, Sequence, Status
from llmcourse.models.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Memory and limits of an engine.

    Raises:
        ValueError: the cache has no room for a single block, or an unknown type of cache.
    """

    n_blocks: int = 512
    """blocks of the cache, for all sequences together"""
    block_size: int = 16
    """tokens of a block"""
    cache_dtype: str = "model"
    """model: keys and values as the model computes them; int8: quantized, see `PagedCache`"""
    share_prefixes: bool = True
    """hold the blocks of equal beginnings once, and keep them after the end for whoever comes next"""
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    """limits of a step"""
    fused: bool = True
    """use `FusedTransformer` where the model allows it"""
    seed: int | None = None
    """of requests without a seed of their own; `None` draws from torch's global generator"""

    def __post_init__(self) -> None:
        for name in ("n_blocks", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give at least 1")
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype={self.cache_dtype!r}: choose {' or '.join(CACHE_DTYPES)}")


@dataclass(frozen=True)
class Output:
    """What a step did for a sequence."""

    sequence: Sequence
    token: int | None
    """the new token; `None` where the sequence ended without one"""
    reason: FinishReason | None
    """why it ended; `None` while it goes on"""


class Engine:
    """A model that serves many requests at once.

    It does not follow later changes of the model's weights.
    """

    def __init__(
        self,
        model: Transformer,
        settings: EngineSettings | None = None,
        *,
        tokenizer: TextCodec | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.settings = settings or EngineSettings()
        self.runner, self.tokenizer, self.clock = (
            ModelRunner(model, fused=self.settings.fused),
            tokenizer,
            clock,
        )
        self.cache = PagedCache(
            model.config, self.settings.n_blocks, self.settings.block_size,
            quantized=self.settings.cache_dtype == "int8", device=self.runner.device, dtype=self.runner.dtype,
        )  # fmt: skip
        self.manager = BlockManager(
            self.settings.n_blocks, self.settings.block_size, share_prefixes=self.settings.share_prefixes
        )
        self.scheduler = Scheduler(self.manager, self.settings.scheduler)
        self.sequences: dict[int, Sequence] = {}
        """that have not ended, by number"""
        self.steps = 0
        self.computed_tokens = 0
        """tokens that went through the model"""
        self._generator = self._new_generator(self.settings.seed)
        self._next_number = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not ended."""
        return bool(self.sequences)

    def add(
        self,
        prompt: Several[int],
        params: SamplingParams | None = None,
        *,
        stop_ids: Several[int] = (),
        constraint: TokenConstraint | None = None,
        arrival: float | None = None,
    ) -> Sequence:
        """Queue a prompt (token ids) and return its sequence, which fills up as steps are made.

        `arrival` is when the request came, on the engine's clock; by default now.

        Raises:
            ValueError: an empty prompt, one that leaves no room in the context or never fits the cache, an id that the
                model does not know, or stop strings without a tokenizer. Nothing is queued then.
        """
        params = params or SamplingParams()
        prompt = [int(token) for token in prompt]
        config = self.runner.config
        check_prompt(prompt, config.context_length)
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise ValueError(
                f"the prompt holds ids outside of 0 to {config.vocab_size - 1}: is it another tokenizer's?"
            )
        longest = min(len(prompt) + params.max_new_tokens, config.context_length)
        if self.manager.blocks_for(longest) > self.settings.n_blocks:
            raise ValueError(
                f"prompt and answer may have {longest} tokens and the whole cache holds "
                f"{self.settings.n_blocks * self.settings.block_size}: raise n_blocks or lower max_new_tokens"
            )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop={params.stop!r} needs a tokenizer to see the text: pass tokenizer= to the engine"
            )
        sequence = Sequence(
            self._next_number, prompt, params, frozenset(stop_ids), constraint,
            state=constraint.start if constraint else 0, generator=self._new_generator(params.seed),
            arrival=self.clock() if arrival is None else arrival,
        )  # fmt: skip
        self._next_number += 1
        self.sequences[sequence.number] = sequence
        self.scheduler.add(sequence)
        return sequence

    def cancel(self, number: int) -> None:
        """End a sequence now and free its blocks; one that has ended already is left alone.

        Raises:
            ValueError: no sequence ever had this number.
        """
        if not 0 <= number < self._next_number:
            raise ValueError(f"sequence {number}: the last one that was added is {self._next_number - 1}")
        if number in self.sequences:
            self._finish(self.sequences[number], FinishReason.CANCELLED)

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Compute one step and return what it wrote, in the order of arrival."""
        schedule = self.scheduler.schedule()
        if not schedule:
            return []
        self.steps += 1
        try:
            return self._compute(schedule)
        except BaseException:
            # Rows that were computed and got no token compute their last one again: none is left without its logits.
            for sequence in self.scheduler.running:
                sequence.n_computed -= sequence.n_pending == 0
            raise

    def _compute(self, schedule: Schedule) -> list[Output]:
        chosen: dict[int, tuple[Sequence, int]] = {}
        for rows in self._passes(schedule):
            logits = self._forward(rows)
            ready = [i for i, (sequence, _) in enumerate(rows) if sequence.n_pending == 0]
            if ready:
                writers = [rows[i][0] for i in ready]
                for sequence, token in zip(writers, self._choose(writers, logits[ready]), strict=True):
                    chosen[sequence.number] = (sequence, token)
        now = self.clock()
        return [self._accept(sequence, token, now) for _, (sequence, token) in sorted(chosen.items())]

    def run(self) -> Iterator[Output]:
        """Make steps until nothing is left, and yield what they write."""
        while self.has_work:
            yield from self.step()

    def generate(
        self,
        prompts: Several[Several[int]],
        params: SamplingParams | Several[SamplingParams] | None = None,
        *,
        stop_ids: Several[int] = (),
    ) -> list[list[int]]:
        """New ids for each prompt; `params` may differ from prompt to prompt.

        Each prompt draws with a generator of its own: equal prompts with equal seeds get equal answers, whatever else
        is computed beside them. Greedy answers are those of `inference.generate`.

        Raises:
            ValueError: a prompt that `add` refuses (then none is computed), or a number of params that is not the one
                of the prompts.
        """
        each = (
            [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else list(params)
        )
        if len(each) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts and {len(each)} params: give one for all or one for each"
            )
        added: list[Sequence] = []
        try:
            for prompt, one in zip(prompts, each, strict=True):
                added.append(self.add(prompt, one, stop_ids=stop_ids))
        except ValueError:
            for sequence in added:
                self.cancel(sequence.number)
            raise
        while any(sequence.status is not Status.FINISHED for sequence in added):
            self.step()
        return [sequence.new_ids for sequence in added]

    def statistics(self) -> Mapping[str, float]:
        """Steps, tokens computed, sequences that run and wait, and the share of blocks in use."""
        return {
            "steps": self.steps,
            "computed_tokens": self.computed_tokens,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks_in_use": 1 - self.manager.n_free / self.manager.n_blocks,
        }

    def _forward(self, rows: list[tuple[Sequence, int]]) -> Tensor:
        """Compute the next tokens of each row; logits (B, V) after the last of them."""
        new = [sequence.ids(sequence.n_computed, sequence.n_computed + n) for sequence, n in rows]
        places = [Row(sequence.blocks, sequence.n_computed, n) for sequence, n in rows]
        device = self.runner.device
        if self.runner.takes_flat_rows:
            flat = torch.tensor([token for ids in new for token in ids], device=device)
            logits = self.runner.flat_logits(flat, self.cache.flat_view(places))
        else:
            longest = max(len(ids) for ids in new)
            tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=device)
            view = self.cache.view(places)
            logits = self.runner.logits(tokens, view, view.last)
        for sequence, n in rows:
            sequence.n_computed += n
            self.computed_tokens += n
            self.manager.publish(sequence)
        return logits

    def _passes(self, schedule: Schedule) -> list[list[tuple[Sequence, int]]]:
        """The forward passes of a step: one, if the model takes flat rows, short ones first; otherwise one for the
        chunks of prompts and one for the sequences that decode, since short rows are filled up to the longest."""
        decodes = [(sequence, 1) for sequence in schedule.decodes]
        if self.runner.takes_flat_rows:
            return [sorted(decodes + schedule.prefills, key=_shorter_first)]
        return [rows for rows in (schedule.prefills, decodes) if rows]

    def _choose(self, sequences: list[Sequence], logits: Tensor) -> list[int]:
        """The next token of each sequence from logits (B, V); rows with equal settings are drawn together."""
        for i, sequence in enumerate(sequences):
            if sequence.constraint is not None:
                logits[i] += sequence.constraint.mask(sequence.state, logits.shape[1], logits.device)
        groups: dict[object, list[int]] = {}
        for i, sequence in enumerate(sequences):
            alone = sequence.generator is not None and not sequence.params.greedy
            key = i if alone else "greedy" if sequence.params.greedy else sequence.params
            groups.setdefault(key, []).append(i)
        chosen = [0] * len(sequences)
        for rows in groups.values():
            first = sequences[rows[0]]
            some = logits if len(rows) == len(sequences) else logits[rows]
            found = sample(some, first.params, first.generator or self._generator)
            for i, token in zip(rows, found.tolist(), strict=True):
                chosen[i] = token
        return chosen

    def _accept(self, sequence: Sequence, token: int, now: float) -> Output:
        """Write a token, and end the sequence where it has to end."""
        if token in sequence.stop_ids or (sequence.constraint and token in sequence.constraint.stop_ids):
            sequence.token_times.append(now)
            self._finish(sequence, FinishReason.STOP)
            return Output(sequence, None, sequence.reason)
        sequence.new_ids.append(token)
        sequence.token_times.append(now)
        params = sequence.params
        if sequence.constraint:
            sequence.state = sequence.constraint.advance(sequence.state, token)
            if sequence.constraint.must_end(sequence.state):
                self._finish(sequence, FinishReason.STOP)
        if sequence.reason is None and params.stop and holds_stop(sequence.new_ids, params, self.tokenizer):
            self._finish(sequence, FinishReason.STOP)
        is_full = sequence.n_tokens == self.runner.config.context_length
        if sequence.reason is None and (is_full or len(sequence.new_ids) == params.max_new_tokens):
            self._finish(sequence, FinishReason.LENGTH)
        return Output(sequence, token, sequence.reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.remove(sequence)
        sequence.reason = reason
        del self.sequences[sequence.number]

    def _new_generator(self, seed: int | None) -> torch.Generator | None:
        return None if seed is None else torch.Generator(self.runner.device).manual_seed(seed)


def _shorter_first(row: tuple[Sequence, int]) -> tuple[bool, int]:
    """Sorts rows as `FlatView` wants them: long chunks of prompts last, texts of like lengths together."""
    sequence, n_new = row
    return n_new > SHORT, sequence.n_computed + n_new
