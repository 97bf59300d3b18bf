"""Steps that must not count: a loss or gradient norm that jumps, or that is no number. What is done then, and what is
left on disk for people.

    guard = Guard(config.spikes, state)               # its statistics live in the loop's state, so a resumed run
                                                      # decides as the one that was killed
    stats = engine.step(micro_batches, lr, guard.admit)     # asked on every rank between backward and update
    reason = guard.after(stats)

A value is a spike if it lies `sigma` robust deviations above the median of the last `window` applied steps: median and
1.4826 x median absolute deviation (Hampel, 1974), of the loss and of the logarithm of the gradient norm. OLMo's
SkipStepOptimizer compares with mean and standard deviation over the same 128 steps and 6 sigma; a median does not move
with the spikes themselves. Fewer than half a window of steps decide nothing.

Rolling back is what PaLM did (Chowdhery et al., 2022, section 5.1): the newest checkpoint before the spike, and on with
other data than those that led to it. The rows of all steps since that checkpoint, the spike's among them, are left out:
which rows a step reads stays a function of (seed, step, list of skipped rows).
"""

import json
import math
import statistics

from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.terminal import show
from pipeline.core.tracking import plain
from pipeline.train.config import Spikes

FLOOR = 1e-3  # of the median: a deviation of nothing (all losses equal) would make a spike of anything
TOLD = 3  # steps in a row whose rows are written out; a run that has gone to NaN would fill the disk


class Guard:
    """Decides on each step, from the loop's state alone, so equally on every rank and after every resume."""

    def __init__(self, config: Spikes, state: dict):
        self.config = config
        self.state = state.setdefault(
            "spikes", {"loss": [], "log_norm": [], "in_a_row": 0, "count": 0, "rollbacks": 0, "skipped_rows": []}
        )
        self.admit = self._admit if config.policy != "off" else None
        self.reason: str | None = None

    def _admit(self, loss: float, norm: float) -> bool:
        """Whether an update with this loss and gradient norm may be made. Both are finite."""
        self.reason = self._judge("loss", loss, lambda x: x) or self._judge(
            "log_norm", math.log(max(norm, 1e-30)), math.exp
        )
        return self.reason is None

    def _judge(self, name: str, value: float, shown) -> str | None:
        history = self.state[name]
        if len(history) < max(2, self.config.window // 2):
            return None
        median = statistics.median(history)
        deviation = max(1.4826 * statistics.median(abs(x - median) for x in history), FLOOR * max(1.0, abs(median)))
        sigma = (value - median) / deviation
        if sigma <= self.config.sigma:
            return None
        what = {"loss": "loss", "log_norm": "gradient norm"}[name]
        return (
            f"its {what} of {shown(value):.4g} is {sigma:.1f} deviations above the median of the last {len(history)}"
            f" steps, {shown(median):.4g}"
        )

    def after(self, stats: dict, updates: list[tuple[float, float]] | None = None) -> str | None:
        """Count a step that was made; updates: (loss, gradient norm) of each of its updates, by default one. Returns
        why it was not applied, in words, or None."""
        self.reason = self.reason if stats.get("refused") else None
        if stats["applied"]:
            self.state["in_a_row"] = 0
            if self.admit:
                for loss, norm in updates or [(stats["loss"], stats["grad_norm"])]:
                    self.state["loss"] = [*self.state["loss"], loss][-self.config.window :]
                    self.state["log_norm"] = [*self.state["log_norm"], math.log(max(norm, 1e-30))][
                        -self.config.window :
                    ]
            return None
        if stats["weight"] == 0:
            return "it had no labels"
        self.state["in_a_row"] += 1
        if not stats.get("refused"):
            return "its loss or gradient norm is not finite"
        self.state["count"] += 1
        return self.reason or "another rank refused it"

    def _remember(self, name: str, value: float) -> None:
        self.state[name] = [*self.state[name], value][-self.config.window :]

    @property
    def worth_telling(self) -> bool:
        return 0 < self.state["in_a_row"] <= TOLD

    def verdict(self, stats: dict) -> str:
        """What to do about a step that was not applied: go on, stop, or rollback."""
        if self.state["in_a_row"] >= self.config.in_a_row:
            return "stop"
        if not stats.get("refused") or self.config.policy == "skip":
            return "go on"
        if self.config.policy == "rollback" and self.state["rollbacks"] < self.config.rollbacks:
            return "rollback"
        return "stop"

    def row(self, step: int, batch_size: int) -> int:
        """The first global row that step `step` (from 0) reads: step * batch_size, unless rows were skipped before
        it."""
        row = step * batch_size
        for start, end in self.state["skipped_rows"]:
            if row >= start:
                row += end - start
        return row

    def position(self, step: int, batch_size: int) -> int:
        """Which batch of the data step `step` reads."""
        return -(-self.row(step, batch_size) // batch_size)

    def rolled_back(self, saved: dict, checkpoint: int, step: int, batch_size: int) -> dict:
        """The state to go on with from a checkpoint whose state is `saved`: all rows from there to the batch of
        `step` (from 0) are skipped."""
        start, end = self.row(checkpoint, batch_size), self.row(step, batch_size) + batch_size
        # later ones lie inside the new one
        ranges = [found for found in self.state["skipped_rows"] if found[0] < start] + [[start, end]]
        return {
            **saved,
            "spikes": {
                **saved["spikes"],
                "count": self.state["count"],
                "rollbacks": self.state["rollbacks"] + 1,
                "skipped_rows": ranges,
            },
        }

    def forget(self) -> None:
        """Take back what `after` counted of a step that is to be made again."""
        self.state["in_a_row"] -= 1
        self.state["count"] -= self.reason is not None

    def farewell(self, output: Output, step: int, reason: str, saved: bool = True) -> str:
        told = (
            ""
            if self.reason is None
            else f"; spikes.policy is {self.config.policy}"
            + (f", and {self.config.rollbacks} rollbacks were made" if self.config.policy == "rollback" else "")
        )
        row = (
            f" with {self.config.in_a_row - 1} before it"
            if self.state["in_a_row"] + 1 >= self.config.in_a_row > 1
            else ""
        )
        kept = "The state before it is saved" if saved else "The newest checkpoint is from before it"
        rows = f"; its rows are in {output.path}/logs/spikes. Look at them, then" if saved else "; "
        return (
            f"stage {output.stage}: step {step} was not applied{row}: {reason}{told}. {kept}{rows}"
            " change the recipe (spikes, optimizer.lr, the data) and go on with --fork"
        )


def inherited(saved: dict) -> dict:
    """What a branch takes over of the state of its parent: the statistics, and the skipped rows, without which it
    would read others than its parent does."""
    return {"spikes": {**saved["spikes"], "in_a_row": 0, "count": 0, "rollbacks": 0}} if "spikes" in saved else {}


def tell(output: Output, step: int, reason: str, stats: dict, rows: list[dict]) -> None:
    """Say that a step was not applied, and write its rows to logs/spikes/step-000123.jsonl: first the step, then
    every row of the global batch."""
    if not output.is_main:
        return
    show(f"{output.stage}: step {step} was skipped: {reason}")
    if rows:
        lines = [{"step": step, "reason": reason, **{key: stats[key] for key in ("loss", "grad_norm", "lr")}}, *rows]
        write_atomic(
            output.path / "logs" / "spikes" / f"step-{step:06d}.jsonl",
            "".join(json.dumps(plain(line), ensure_ascii=False) + "\n" for line in lines),
        )
