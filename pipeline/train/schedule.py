"""Learning rate as a pure function of the step, so that there is no scheduler state to save."""

import math

from pipeline.train.config import Schedule


def learning_rate(schedule: Schedule, peak: float, step: int, steps: int, hold: int = 0) -> float:
    """Learning rate of update number `step` (from 0) of `steps`.

    Warmup is linear, and the first update has peak / warmup_steps, not 0, which would be wasted. Decay follows: cosine
    is Loshchilov & Hutter (2017) without restarts, wsd is Hu et al. (2024) with a linear decay. There is no decay
    before step `hold`."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    begin = max(schedule.warmup_steps, hold)
    if schedule.kind == "wsd":
        begin = max(begin, steps - (schedule.decay_steps or round(schedule.decay_ratio * steps)))
    if step < begin:
        return peak
    progress = min(1.0, (step - begin) / max(1, steps - begin))
    share = 1 - progress
    if schedule.kind == "cosine":
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * share)
