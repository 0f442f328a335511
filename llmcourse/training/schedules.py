"""Learning-rate schedules as pure functions of the step. Each returns a factor in [0, 1] of the peak learning rate."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "linear", "wsd")


def warm_up(step: int, warmup_steps: int) -> float:
    """Linear rise: (step + 1) / warmup_steps up to 1, so that the first update is not wasted on a rate of zero."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def progress_after_warmup(step: int, steps: int, warmup_steps: int) -> float:
    """Fraction of the steps after warm-up that lie behind `step`: 0 at the first of them, 1 at step `steps`."""
    return min(1.0, max(0, step - warmup_steps) / max(1, steps - warmup_steps))


def cosine(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.1) -> float:
    """Warm-up, then half a cosine from 1 to `final_fraction` (Loshchilov and Hutter, 2017, eq. 5, one period)."""
    fraction = progress_after_warmup(step, steps, warmup_steps)
    decay = final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * fraction))
    return warm_up(step, warmup_steps) * decay


def linear(step: int, *, steps: int, warmup_steps: int, final_fraction: float = 0.0) -> float:
    """Warm-up, then a straight line from 1 to `final_fraction`."""
    fraction = progress_after_warmup(step, steps, warmup_steps)
    return warm_up(step, warmup_steps) * (1 - (1 - final_fraction) * fraction)


def warmup_stable_decay(
    step: int, *, steps: int, warmup_steps: int, decay_fraction: float = 0.2, final_fraction: float = 0.0
) -> float:
    """Warm-up, a plateau at 1, then a line to `final_fraction` over the last `decay_fraction` of all steps.

    The plateau does not know how long training will be, so one run serves every length (Hu et al., 2024, section 4).
    """
    decay_steps = max(1, round(decay_fraction * steps))
    behind = max(0, step - (steps - decay_steps))
    return warm_up(step, warmup_steps) * (1 - (1 - final_fraction) * min(1.0, behind / decay_steps))


def factor(
    name: str,
    step: int,
    *,
    steps: int,
    warmup_steps: int,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.0,
) -> float:
    """The factor of the schedule of that name.

    Raises:
        ValueError: an unknown name.
    """
    if name == "constant":
        return warm_up(step, warmup_steps)
    if name == "cosine":
        return cosine(step, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)
    if name == "linear":
        return linear(step, steps=steps, warmup_steps=warmup_steps, final_fraction=final_fraction)
    if name == "wsd":
        return warmup_stable_decay(
            step,
            steps=steps,
            warmup_steps=warmup_steps,
            decay_fraction=decay_fraction,
            final_fraction=final_fraction,
        )
    raise ValueError(f"schedule={name!r}: choose one of {', '.join(SCHEDULES)}")
