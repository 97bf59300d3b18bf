"""Detects spikes of loss and gradient norm (and NaN or inf), decides whether to skip, roll back or stop, and leaves a
report on disk.

    guard = Guard(config.spikes, state)                      # its statistics are part of the loop's state, so a resumed
                                                             # run decides like one that was not killed
    stats = engine.step(micro_batches, lr, guard.accept)     # called on every rank between backward pass and update
    reason = guard.after(stats)

A value is a spike if it is `sigma` robust deviations above the median of the last `window` applied steps: median and
1.4826 x median absolute deviation (Hampel, 1974), of the loss and of the logarithm of the gradient norm. OLMo's
SkipStepOptimizer compares with mean and standard deviation over the same 128 steps and 6 sigma; a median does not move
with the spikes themselves. With fewer than half a window of steps, nothing is a spike.

Rolling back is what PaLM did (Chowdhery et al., 2022, section 5.1): return to the newest checkpoint before the spike
and continue with other data than those that led to it. The rows of all steps since that checkpoint, the spike's
included, are skipped: which rows a step reads remains a function of (seed, step, list of skipped rows)."""

import json
import math
import statistics

from pipeline.core.files import write_atomic
from pipeline.core.output import Output
from pipeline.core.terminal import show
from pipeline.core.tracking import plain
from pipeline.train.config import Spikes

FLOOR = 1e-3  # of the median: with a deviation of zero (all losses equal) everything would be a spike
REPORTED = 3  # steps in a row whose rows are written; a run that has gone to NaN would fill the disk


class Guard:
    """Decides about each step from the loop's state only, so equally on every rank and after every resume.

    accept(loss, gradient norm), both finite: whether the update may be made; None if no spikes are looked for.
    """

    def __init__(self, config: Spikes, state: dict):
        self.config = config
        initial = {"loss": [], "log_norm": [], "in_a_row": 0, "count": 0, "rollbacks": 0, "skipped_rows": []}
        self.state = state.setdefault("spikes", initial)
        self.accept = self._accept if config.policy != "off" else None
        self.reason: str | None = None  # why `accept` refused the current update

    def _accept(self, loss: float, norm: float) -> bool:
        self.reason = self._spike("loss", "loss", loss) or self._spike(
            "log_norm", "gradient norm", _log(norm), math.exp
        )
        return self.reason is None

    def _spike(self, key: str, name: str, value: float, shown=float) -> str | None:
        """Why a value is a spike, in words, or None. key: of its history; shown: function to the number that is
        displayed."""
        history = self.state[key]
        if len(history) < max(2, self.config.window // 2):
            return None
        median = statistics.median(history)
        deviation = 1.4826 * statistics.median(abs(earlier - median) for earlier in history)
        deviation = max(deviation, FLOOR * max(1.0, abs(median)))
        sigma = (value - median) / deviation
        if sigma <= self.config.sigma:
            return None
        return (
            f"its {name} of {shown(value):.4g} is {sigma:.1f} deviations above the median of the last {len(history)}"
            f" steps, {shown(median):.4g}"
        )

    def after(self, stats: dict, updates: list[tuple[float, float]] | None = None) -> str | None:
        """Count a step. updates: (loss, gradient norm) of each of its updates, by default one. Returns why it was not
        applied, in words, or None."""
        refused = bool(stats.get("refused"))
        if not refused:
            self.reason = None
        if stats["applied"]:
            self.state["in_a_row"] = 0
            if self.accept:
                if updates is None:
                    updates = [(stats["loss"], stats["grad_norm"])]
                for loss, norm in updates:
                    self._remember("loss", loss)
                    self._remember("log_norm", _log(norm))
            return None
        if stats["weight"] == 0:
            return "it had no labels"
        self.state["in_a_row"] += 1
        if not refused:
            return "its loss or gradient norm is not finite"
        self.state["count"] += 1
        return self.reason or "another rank refused it"

    def _remember(self, key: str, value: float) -> None:
        self.state[key] = [*self.state[key], value][-self.config.window :]

    @property
    def rows_are_reported(self) -> bool:
        return 0 < self.state["in_a_row"] <= REPORTED

    def action(self, stats: dict) -> str:
        """What to do about a step that was not applied: continue, stop, or rollback."""
        if self.state["in_a_row"] >= self.config.in_a_row:
            return "stop"
        if not stats.get("refused") or self.config.policy == "skip":
            return "continue"
        if self.config.policy == "rollback" and self.may_roll_back():
            return "rollback"
        return "stop"

    def may_roll_back(self) -> bool:
        return self.state["rollbacks"] < self.config.rollbacks

    # ---- which rows a step reads -------------------------------------------------------------------------------------

    def first_row(self, step: int, batch_size: int) -> int:
        """The first global row that step `step` (from 0) reads: step * batch_size, unless rows before it were
        skipped."""
        row = step * batch_size
        for start, end in self.state["skipped_rows"]:
            if row >= start:
                row += end - start
        return row

    def batch_of(self, step: int, batch_size: int) -> int:
        """Which batch of the data step `step` reads."""
        return -(-self.first_row(step, batch_size) // batch_size)

    def rolled_back(self, saved: dict, checkpoint: int, step: int, batch_size: int) -> dict:
        """The state with which to continue from a checkpoint, whose own state is `saved`: all rows from there up to and
        including the batch of `step` (from 0) are skipped."""
        start = self.first_row(checkpoint, batch_size)
        end = self.first_row(step, batch_size) + batch_size
        earlier = [rows for rows in self.state["skipped_rows"] if rows[0] < start]  # later ones are inside the new one
        spikes = dict(saved["spikes"])
        spikes["count"] = self.state["count"]
        spikes["rollbacks"] = self.state["rollbacks"] + 1
        spikes["skipped_rows"] = [*earlier, [start, end]]
        return saved | {"spikes": spikes}

    def forget(self) -> None:
        """Undo what `after` counted of a step that will be made again."""
        self.state["in_a_row"] -= 1
        self.state["count"] -= self.reason is not None

    # ---- messages ----------------------------------------------------------------------------------------------------

    def error_message(self, output: Output, step: int, reason: str, saved: bool = True) -> str:
        """Why the run ends. saved: whether the state before the step has been saved."""
        text = f"stage {output.stage}: step {step} was not applied"
        if self.state["in_a_row"] + 1 >= self.config.in_a_row > 1:
            text += f" with {self.config.in_a_row - 1} before it"
        text += f": {reason}"
        if self.reason is not None:
            text += f"; spikes.policy is {self.config.policy}"
            if self.config.policy == "rollback":
                text += f", and {self.config.rollbacks} rollbacks were made"
        if saved:
            text += f". The state before it is saved; its rows are in {output.path}/logs/spikes. Look at them, then"
        else:
            text += ". The newest checkpoint is from before it;"
        return f"{text} change the recipe (spikes, optimizer.lr, the data) and resume with --fork"


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def inherited(saved: dict) -> dict:
    """What a branch or a fork inherits from the state of its parent: the statistics, and the skipped rows, without
    which it would read other rows than its parent does. Its counts are its own: a run that has made all its rollbacks
    is continued by --fork with another recipe, which has rollbacks of its own."""
    if "spikes" not in saved:
        return {}
    return {"spikes": saved["spikes"] | {"in_a_row": 0, "count": 0, "rollbacks": 0}}


def report(output: Output, step: int, reason: str, stats: dict, rows: list[dict]) -> None:
    """Print that a step was not applied, and write its rows to logs/spikes/step-000123.jsonl: first the step, then
    every row of the global batch."""
    if not output.is_main:
        return
    show(f"{output.stage}: step {step} was skipped: {reason}")
    if rows:
        header = {"step": step, "reason": reason}
        for key in ("loss", "grad_norm", "lr"):
            header[key] = stats[key]
        lines = [json.dumps(plain(line), ensure_ascii=False) + "\n" for line in [header, *rows]]
        write_atomic(output.path / "logs" / "spikes" / f"step-{step:06d}.jsonl", "".join(lines))
