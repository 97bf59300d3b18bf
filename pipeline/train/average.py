"""The average of a run's last checkpoints as the published model, if it is better than the last one: the key `average`
of the finetuning stages.

Averaging along a run damps what the last batches happened to be, as a lower learning rate at the end does (Izmailov et
al., 2018; Kaddour, 2022, LAWA). It is made from checkpoints after the last step, and so is not part of the run's state:
a run that is killed while it averages does it again.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.output import Output

if TYPE_CHECKING:
    from pipeline.train.engine import Engine


class Average(Strict):
    """Publish the average of the weights of the run's last checkpoints, if its held-out loss is lower than that of the
    last one."""

    every_steps: int = Field(ge=1)
    """Steps between these checkpoints, counted back from the last step. They are kept until the run ends."""
    last: int = Field(5, ge=2)
    """How many are averaged."""
    decay: float | None = Field(None, gt=0, lt=1)
    """Weight of a checkpoint relative to the next newer one (an exponential moving average); none: all count alike."""

    def steps(self, total: int) -> list[int]:
        """The steps of the checkpoints of a run of `total` steps, oldest first."""
        return [total - back * self.every_steps for back in reversed(range(self.last))]

    def weights(self) -> list[float]:
        """Of the checkpoints, oldest first; their sum is 1."""
        relative = [(self.decay or 1.0) ** back for back in reversed(range(self.last))]
        return [weight / sum(relative) for weight in relative]

    def check(self, total: int, stage: str) -> None:
        """Raise UserError if a run of `total` steps has too few."""
        if self.steps(total)[0] < 1:
            raise UserError(
                f"{stage}: average: {self.last} checkpoints with {self.every_steps} steps between them need more than"
                f" {(self.last - 1) * self.every_steps} steps, and the run has {total}; use fewer (last) or a smaller"
                " every_steps"
            )


def paths_of(options: Average, output: Output, total: int) -> list[Path]:
    """The checkpoints of a run that has ended, oldest first. Raises UserError if one is missing or damaged.
    Collective."""
    from pipeline.train import checkpoints

    name = f"stage {output.stage}: average"
    return [checkpoints.of_step(output.path, step, name) for step in options.steps(total)]


def load_average(engine: "Engine", paths: list[Path], weights: list[float]) -> None:
    """Give an engine the weighted sum of the weights in checkpoints. Each process adds up the elements that it holds,
    in fp32 and in the order of the checkpoints, so that the result does not depend on the layout. Moments and the
    number of steps are those of the last one. Collective."""
    import torch

    sums: list[torch.Tensor] = []
    for path, weight in zip(paths, weights, strict=True):
        engine.load(path)
        values = engine.weight_views()
        if not sums:
            sums = [torch.zeros_like(view) for view in values]
        for total, view in zip(sums, values, strict=True):
            total.add_(view, alpha=weight)
    engine.set_weights(sums)
