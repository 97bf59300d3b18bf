"""Which checkpoint of a run is published, and when a run stops early: the key `best` of sft, reward and dpo.

At every `every_steps` steps the model is saved, then evaluated, and the checkpoint with the best metric so far is kept.
What has been measured is part of the loop's state, and a checkpoint is written before its evaluation: a run that is
resumed from it repeats that evaluation, and so decides as one that was not killed.
"""

import math

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError


class Best(Strict):
    """Publish the checkpoint with the best held-out metric, instead of the last one."""

    metric: str = "loss"
    """A metric of the evaluation: loss, or what the stage measures, such as accuracy, margin, eos_rate or rule. Losses
    are best when lowest, all others when highest."""
    every_steps: int = Field(ge=1)
    """Steps between evaluations whose checkpoint may be the best one, in addition to `evaluate_every`."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many such evaluations in a row without an improvement; none: do not stop early."""
    min_delta: float = Field(0.0, ge=0)
    """An improvement is a change of more than this. The checkpoint with the best value is published in any case."""


class Selection:
    """The best checkpoint of a run so far. `state`: the loop's state, whose entry `best` has step, numbers and rows of
    the best evaluation, `compared` (what the next ones must improve on), and `waited` (evaluations since then)."""

    def __init__(self, options: Best, kind: str):
        self.options, self.kind = options, kind

    def is_due(self, step: int) -> bool:
        return step % self.options.every_steps == 0

    def cost(self, numbers: dict) -> float:
        """The metric of an evaluation, so that the smallest one is the best."""
        value = numbers[self.options.metric]
        if not math.isfinite(value):
            return math.inf
        return value if self._is_loss else -value

    @property
    def _is_loss(self) -> bool:
        return self.options.metric.partition("/")[0].endswith("loss")

    def check(self, numbers: dict) -> None:
        """Raise UserError if the first evaluation of a run has no such metric."""
        if self.options.metric not in numbers:
            names = sorted(set(numbers) - {"weight", "answered", "checked"})
            raise UserError(
                f"stage {self.kind}: best.metric: {self.options.metric!r} is not measured; expected one of"
                f" {', '.join(names)}"
            )

    def note(self, state: dict, step: int, numbers: dict, rows: list | None) -> bool:
        """Compare the evaluation at `step` with those before. Returns whether the run should stop."""
        cost, best = self.cost(numbers), state.get("best")
        if best is None:
            if math.isfinite(cost):
                state["best"] = {"step": step, "numbers": numbers, "rows": rows, "compared": cost, "waited": 0}
            return False
        if cost < self.cost(best["numbers"]):
            best |= {"step": step, "numbers": numbers, "rows": rows}
        if cost < best["compared"] - self.options.min_delta:
            best |= {"compared": cost, "waited": 0}
        else:
            best["waited"] += 1
        return self.options.patience is not None and best["waited"] >= self.options.patience
