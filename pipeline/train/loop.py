"""The training loop of every stage that updates weights: resume, step, log, evaluate, save, stop when asked.

`fit` trains one engine on batches. `run` is the same loop over anything that has the methods of `Updates`, such as the
iterations of PPO (rl/iteration.py).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.core import faults
from pipeline.core.checkpoint_folder import loop_state
from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.core.tracking import Progress, Tracker, plain
from pipeline.train import checkpoints, distributed, phases
from pipeline.train.config import TrainConfig
from pipeline.train.engine import Engine
from pipeline.train.metrics import Meters, Text
from pipeline.train.spikes import Guard, inherited, tell
from pipeline.train.stop import StopSignal, saved_step, stop
from pipeline.train.train_length import CALIBRATION, Horizon


def share(config: TrainConfig, engine: Engine, step: int) -> list[range]:
    """Global row indices of this process's micro-batches of a step: rows step*batch_size to (step+1)*batch_size, cut
    among data ranks in order."""
    rows = config.batch_size // engine.data_world
    micro = config.micro_batch or rows
    first = step * config.batch_size + engine.data_rank * rows
    return [range(start, start + micro) for start in range(first, first + rows, micro)]


def seed_step(config: TrainConfig, step: int, data_rank: int) -> None:
    """Everything random inside a step (dropout) is a function of (seed, step, data rank), so that nothing of it has
    to be saved."""
    torch.manual_seed(derive(config.seed or 0, "step", step, data_rank))


class Updates:
    """Steps that are one engine update each. The loop below needs exactly these attributes and methods.

    engines: what a checkpoint holds. atomic: whether a step that was not applied leaves all weights as they were.
    """

    atomic = True

    def __init__(self, engine: Engine, batches: Callable[[int], list[dict]]):
        self.engine, self.batches = engine, batches
        self.engines = [engine]

    @property
    def step_count(self) -> int:
        """Steps made so far, over all processes that worked on this run."""
        return self.engine.step_count

    def load(self, path: Path) -> str:
        """Load a checkpoint. Returns what changed in the layout, in words. Collective."""
        return self.engine.load(path)

    def begin(self, state: dict) -> None:
        """Called once, when `state` is that of the checkpoint or new, before the first evaluation and step."""

    def step(self, batch: int, lr: float, admit: Callable[[float, float], bool] | None) -> dict:
        """Make the next step from global batch number `batch`. Returns its numbers, with `loss`, `grad_norm`,
        `applied` and `weight` among them. Collective."""
        return self.engine.step(self.batches(batch), lr, admit)

    def take_back(self) -> None:
        """Uncount the last step, which was not applied."""
        self.engine.step_count -= 1

    def guarded(self, stats: dict) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update of the last step that was applied: what the next ones are compared
        with."""
        return [(stats["loss"], stats["grad_norm"])]

    def shown(self, stats: dict) -> dict | None:
        """Numbers for the terminal's line; None for loss and speed."""
        return None

    def objective(self, evaluation: dict) -> float | None:
        """What save.keep_best minimises."""
        return evaluation.get("loss")


@dataclass
class Hooks:
    """What a stage adds to the loop.

    evaluate(): numbers on held-out data, equal on all processes. sample(step, last): called after each step, its
    checkpoint and its evaluation, and again for the checkpoint that a run resumes from. describe(batch): the rows of a
    global batch, for people who look at a spike.
    """

    evaluate: Callable[[], dict] | None = None
    sample: Callable[[int, bool], None] | None = None
    describe: Callable[[int], list[dict]] | None = None


def fit(
    engine: Engine,
    config: TrainConfig,
    output: Output,
    batches: Callable[[int], list[dict]],
    *,
    evaluate: Callable[[], dict] | None = None,
    unit: str = "tok",
    text: Text | None = None,
    branch: Path | None = None,
    sample: Callable[[int, bool], None] | None = None,
    describe: Callable[[int], list[dict]] | None = None,
) -> dict:
    """Train an engine. batches(number) gives this process's micro-batches of a global batch: that of step `number`,
    unless a rollback skipped some (train/spikes.py). The rest is `run`'s and `Hooks`'."""
    hooks = Hooks(evaluate, sample, describe)
    return run(Updates(engine, batches), config, output, hooks, unit=unit, text=text, branch=branch)


def run(
    updates: Updates,
    config: TrainConfig,
    output: Output,
    hooks: Hooks,
    *,
    unit: str = "tok",
    text: Text | None = None,
    branch: Path | None = None,
) -> dict:
    """Train from the newest checkpoint, or else from `branch` (a checkpoint of another run), or from the start, to the
    end of the horizon. Collective.

    `unit` names what a step's weight counts; `text` is for the meters. Returns before and after (evaluations, or
    None), first and last (what the first and last step returned), weight (summed over all steps), skipped (steps that
    were not applied), and rate (weight per second of this process's training, without saving and evaluating).
    """
    loop = Loop(updates, config, output, hooks, unit, text)
    loop.resume(branch)
    loop.measure_at_start()
    try:
        loop.train()
    finally:
        loop.tracker.close()
    return {**loop.state, "rate": loop.meters.rate}


class Loop:
    """One run of the loop in this process. `state` is what checkpoints hold beside weights and moments (JSON)."""

    def __init__(
        self, updates: Updates, config: TrainConfig, output: Output, hooks: Hooks, unit: str, text: Text | None
    ):
        self.updates, self.config, self.output, self.hooks = updates, config, output, hooks
        self.unit, self.text = unit, text
        self.state: dict = {"before": None, "after": None, "first": None, "last": None, "weight": 0.0, "skipped": 0}
        self.note: dict = {}  # what the next line of metrics.jsonl says of a rollback
        self.resumed = False
        self.tracker = Tracker(
            output.path,
            output.is_main,
            config.log.wandb,
            output.stage,
            {"stage": output.stage, **config.model_dump(mode="json")},
        )
        self.saver = checkpoints.Saver(output, updates.engines, config.save)

    # ---- before the first step ---------------------------------------------------------------------------------------

    def resume(self, branch: Path | None) -> None:
        """Load the newest checkpoint, or `branch`, and prepare what depends on where the run stands."""
        if self.output.is_main:
            (self.output.folder / "requeue.json").unlink(missing_ok=True)
        newest = checkpoints.newest(self.output)
        self.resumed = newest is not None
        if newest:
            path, saved = newest
            changed = self.updates.load(path)
            self._say_resumed(path.name, changed, "the rows are the same, the last bits are not")
            self.state.update(saved)
        elif branch:
            changed = self.updates.load(branch)
            self._say_resumed(str(branch), changed, "")
            self.state.update(inherited(loop_state(branch)))
        self.updates.begin(self.state)
        self.horizon = Horizon(self.config, self.output, self.updates.step_count)
        self.saver.check_room(self.horizon.steps)
        self._begin_counting()

    def _say_resumed(self, path: str, changed: str, consequence: str) -> None:
        if not self.output.is_main:
            return
        words = f", {changed}" if changed else ""
        if changed and consequence:
            words += f": {consequence}"
        show(f"{self.output.stage}: resuming from {path}{words}")

    def _begin_counting(self) -> None:
        """New meters and a new guard over the state as it is now."""
        self.meters = Meters(self.config, self.state, self.unit, self.text, self.updates.engines[0].device)
        self.guard = Guard(self.config.spikes, self.state)

    def measure_at_start(self) -> None:
        """The evaluation before the first step, or the one that was lost after the checkpoint was written."""
        step = self.updates.step_count
        # A checkpoint is written before its evaluation, which may have been lost.
        lost = self.resumed and self.evaluation_due(step)
        self.tracker.rewind(step if self.resumed else -1, evaluated=not lost)
        if self.hooks.evaluate and self.state["before"] is None:
            self.evaluate(step, "before")
        elif lost:
            self.evaluate(step, "after")
        if self.resumed and self.hooks.sample:
            self.hooks.sample(step, step == self.horizon.steps)
        if self.config.spikes.policy == "rollback" and not self.resumed:
            self.saver.save(step, self.state, wait=True)  # there is always something to go back to

    def evaluation_due(self, step: int) -> bool:
        every = self.config.evaluate_every
        if self.hooks.evaluate is None:
            return False
        return step == self.horizon.steps or (every is not None and step % every == 0)

    def evaluate(self, step: int, key: str) -> None:
        """Evaluate and keep the numbers as state[key]: `before` or `after`."""
        phases.enter("evaluate")
        begun = time.perf_counter()
        self.state[key] = self.hooks.evaluate()
        if key == "before":
            self.state["evaluation_seconds"] = time.perf_counter() - begun
        self.tracker.log(step, **{f"heldout_{name}": value for name, value in self.state[key].items()})
        self.saver.note_loss(step, self.updates.objective(self.state[key]))

    # ---- steps -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        total, done = self.horizon.steps or CALIBRATION, self.updates.step_count
        with (
            StopSignal() as signals,
            Progress(self.output.stage, total, "step", done, self.output.is_main) as bar,
            self.saver,
        ):
            while self.horizon.steps is None or self.updates.step_count < self.horizon.steps:
                stats, seconds = self.step(bar)
                if stats is None:  # rolled back
                    continue
                self.log(stats, seconds, bar)
                faults.point("work")
                self.save(signals)
                step, last = self.updates.step_count, self.updates.step_count == self.horizon.steps
                if self.evaluation_due(step):
                    self.evaluate(step, "after")
                if self.hooks.sample:
                    phases.enter("sample")
                    self.hooks.sample(step, last)

    def step(self, bar: Progress) -> tuple[dict | None, float]:
        """Make the next step. Returns its numbers and seconds, or None in place of the numbers if the run was rolled
        back. Raises UserError if the spike policy ends the run."""
        begun, done = time.perf_counter(), self.updates.step_count
        phases.enter("data", done + 1)
        seed_step(self.config, done, self.updates.engines[0].data_rank)
        batch = self.guard.position(done, self.config.batch_size)
        stats = self.updates.step(batch, self.horizon.learning_rate(done), self.guard.admit)
        phases.enter("log")
        reason = self.guard.after(stats, self.updates.guarded(stats))
        if reason:
            rows = self.hooks.describe(batch) if self.hooks.describe and self.guard.worth_telling else []
            tell(self.output, done + 1, reason, plain(stats), rows)
            verdict = self.guard.verdict(stats)
            if verdict == "stop":
                self.keep_state_before()
                raise UserError(self.guard.farewell(self.output, done + 1, reason, self.updates.atomic))
            if verdict == "rollback":
                self.roll_back(done + 1, bar)
                return None, 0.0
        return stats, time.perf_counter() - begun

    def log(self, stats: dict, seconds: float, bar: Progress) -> None:
        """Count a step and write it to metrics.jsonl, the tracker and the terminal when its turn comes."""
        step = self.updates.step_count
        stats = plain(self.meters.step(stats, seconds))
        settled = self.horizon.settle(step, self.meters.step_seconds, self.state.get("evaluation_seconds", 0.0))
        if settled:
            bar.retarget(self.horizon.steps)
        message = settled or self.meters.calibrated(step, self.horizon.steps)
        if message and self.output.is_main:
            show(message)
        self.state["weight"] += stats["weight"]
        self.state["skipped"] += not stats["applied"]
        self.state["first"] = self.state["first"] or stats
        self.state["last"] = stats
        last = step == self.horizon.steps
        if step % self.config.log.every_steps == 0 or last or step == 1 or not stats["applied"] or self.note:
            line = self.meters.line(step, self.horizon.steps)
            for engine in self.updates.engines:
                line |= engine.measured()
            self.tracker.log(step, **{**stats, **line, **self.note})
            self.note = {}
        bar.update(1, **(self.updates.shown(stats) or self.meters.shown(stats)))

    def save(self, signals: StopSignal) -> None:
        """Write a checkpoint when its turn comes; raise Stopped if a signal has reached any process."""
        step = self.updates.step_count
        last = step == self.horizon.steps
        number, *flags = distributed.all_reduce_max([signals.number, *self.saver.flags()])
        self.saver.settle(*flags)
        if last or number or step % self.config.save.every_steps == 0:
            phases.enter("save")
            self.saver.save(step, self.state, wait=bool(number))
        if number and not last:
            stop(self.output, step, int(number))

    # ---- spikes ------------------------------------------------------------------------------------------------------

    def keep_state_before(self) -> None:
        """A checkpoint of the state before the last step, which was not applied. Where part of a step may have been
        applied, the newest checkpoint is all there is."""
        self.saver.finish()
        if not self.updates.atomic:
            return
        self.updates.take_back()
        self.guard.forget()
        step = self.updates.step_count
        if distributed.from_main(saved_step(self.output)) != step:
            self.saver.save(step, self.state, wait=True)

    def roll_back(self, step: int, bar: Progress) -> None:
        """Return to the newest checkpoint; the rows of the steps since then are skipped from now on."""
        phases.enter("load")  # may take long: all files are read, and hashed before
        self.saver.finish()
        faults.point("rollback")
        newest = checkpoints.newest(self.output)
        if newest is None:
            raise UserError(
                f"stage {self.output.stage}: step {step} is to be rolled back, and no checkpoint in"
                f" {self.output.path / 'checkpoints'} is whole; start again with --restart, on a disk that keeps what"
                " it is given"
            )
        path, saved = newest
        self.updates.load(path)
        at = int(path.name.removeprefix("step-"))
        rolled = self.guard.rolled_back(saved, at, step - 1, self.config.batch_size)
        self.state.clear()
        self.state.update(rolled)
        self.tracker.rewind(at)
        if self.hooks.sample:
            self.hooks.sample(at, False)
        bar.update(at + 1 - step)
        self._begin_counting()
        spikes = self.guard.state
        self.note = {"rollbacks": spikes["rollbacks"], "skipped_rows": spikes["skipped_rows"]}
        if self.output.is_main:
            rows = " and ".join(f"{first} to {end - 1}" for first, end in spikes["skipped_rows"])
            show(f"{self.output.stage}: back to step {at}; rows {rows} are skipped from here on")
        faults.point("rollback")
