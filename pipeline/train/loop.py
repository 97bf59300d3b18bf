"""The training loop of every stage that updates weights: resume, step, log, evaluate, save, stop when asked.

`fit` trains one engine on batches. `run` is the same loop over anything that has the methods of `Updates`, such as the
iterations of PPO (rl/iteration.py).
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.core import checkpoint_folder, distributed, faults
from pipeline.core.checkpoint_folder import loop_state, step_of
from pipeline.core.errors import UserError
from pipeline.core.output import Output
from pipeline.core.pace import Pace
from pipeline.core.seeds import derive
from pipeline.core.stop import StopSignal, saved_step, stop
from pipeline.core.terminal import show
from pipeline.core.trackers import TrackedRun
from pipeline.core.tracking import Progress, Tracker, plain
from pipeline.train import average, checkpoints, phases
from pipeline.train.average import Average
from pipeline.train.best import Selection
from pipeline.train.config import TrainConfig
from pipeline.train.engine import Accept, Engine
from pipeline.train.metrics import Expected, Meters
from pipeline.train.spikes import Guard, inherited, report
from pipeline.train.train_length import CALIBRATION, TrainingLength


def share(config: TrainConfig, engine: Engine, step: int) -> list[range]:
    """Global row indices of this process's micro-batches of a step: rows step*batch_size to (step+1)*batch_size,
    divided among the data ranks in order."""
    rows = config.batch_size // engine.data_world
    micro = config.micro_batch or rows
    first = step * config.batch_size + engine.data_rank * rows
    return [range(start, start + micro) for start in range(first, first + rows, micro)]


def seed_step(config: TrainConfig, step: int, data_rank: int) -> None:
    """Everything random inside a step (dropout) is a function of (seed, step, data rank), so none of it has to be
    saved."""
    torch.manual_seed(derive(config.seed or 0, "step", step, data_rank))


def alarms_of(stats: dict) -> dict:
    """The numbers of a step for which it raised alarms."""
    return {key.removeprefix("alarm/"): value for key, value in stats.items() if key.startswith("alarm/")}


class Updates:
    """Steps that are one engine update each. The loop below uses exactly these attributes and methods.

    engines: what a checkpoint contains. atomic: whether a step that was not applied leaves all weights as they were.
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
        """Load a checkpoint. Returns what differs in the layout, in words. Collective."""
        return self.engine.load(path)

    def begin(self, state: dict, run: str) -> None:
        """Called before the first evaluation and step, and after each rollback, with the state of the checkpoint or a
        new one. run: fingerprint of this run; under --fork the checkpoint is from another one."""

    def carry(self, before: dict, state: dict) -> None:
        """Put what a rollback does not undo into the checkpoint's state. before: the state before the rollback."""

    def step(self, batch: int, lr: float, accept: Accept | None) -> dict:
        """Make the next step from global batch number `batch`. Returns its numbers, with `loss`, `grad_norm`,
        `applied` and `weight` among them. Collective."""
        return self.engine.step(self.batches(batch), lr, accept)

    def uncount_step(self) -> None:
        """Uncount the last step, which was not applied."""
        self.engine.step_count -= 1

    def applied_updates(self, stats: dict) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update of the last step that was applied: what later ones are compared with."""
        return [(stats["loss"], stats["grad_norm"])]

    def alarm(self) -> tuple[str, str] | None:
        """("rollback" or "stop", why) if the last step, which was made, asks for it."""
        return None

    def progress_numbers(self, stats: dict) -> dict | None:
        """Numbers for the terminal's line; None for loss and speed."""
        return None

    def objective(self, evaluation: dict) -> float | None:
        """What save.keep_best minimises."""
        return evaluation.get("loss")


@dataclass
class Hooks:
    """What a stage adds to the loop.

    evaluate(): numbers on held-out data, equal on all processes; the entry `rows`, if there is one, is not logged: a
    list of what was measured on each held-out row, for the interval of a difference. sample(step, last): called after
    each step, after its checkpoint and evaluation, and again for the checkpoint from which a run resumes.
    describe(batch): the rows of a global batch, for the report of a spike. selection: which checkpoint the run ends
    with, and whether it stops early. average: of which checkpoints it is instead.
    """

    evaluate: Callable[[], dict] | None = None
    sample: Callable[[int, bool], None] | None = None
    describe: Callable[[int], list[dict]] | None = None
    selection: Selection | None = None
    average: Average | None = None


def fit(
    engine: Engine,
    config: TrainConfig,
    output: Output,
    batches: Callable[[int], list[dict]],
    *,
    evaluate: Callable[[], dict] | None = None,
    unit: str = "tok",
    expected: Expected | None = None,
    branch: Path | None = None,
    sample: Callable[[int, bool], None] | None = None,
    describe: Callable[[int], list[dict]] | None = None,
    selection: Selection | None = None,
    average: Average | None = None,
) -> dict:
    """Train an engine. batches(number) gives this process's micro-batches of a global batch: that of step `number`,
    unless a rollback skipped some (train/spikes.py). For all else see `run` and `Hooks`."""
    hooks = Hooks(evaluate, sample, describe, selection, average)
    return run(Updates(engine, batches), config, output, hooks, unit=unit, expected=expected, branch=branch)


def run(
    updates: Updates,
    config: TrainConfig,
    output: Output,
    hooks: Hooks,
    *,
    unit: str = "tok",
    expected: Expected | None = None,
    branch: Path | None = None,
) -> dict:
    """Train from the newest checkpoint, or else from `branch` (a checkpoint of another run), or from the start, to the
    last step. Collective.

    `unit` names what a step's weight counts; `expected` is for the metrics. Returns before and after (evaluations, or
    None), before_rows and after_rows (their `rows`), first and last (what the first and last step returned), weight
    (sum over all steps), skipped (steps that were not applied), steps (how many were made), rate (weight per second of
    this process's training, without saving and evaluating), and with a selection best (best.py): then the weights and
    `after` are those of the best checkpoint; with an average the same of what is better, it or the last checkpoint.
    """
    loop = Loop(updates, config, output, hooks, unit, expected)
    loop.resume(branch)
    loop.measure_at_start()
    try:
        loop.train()
    finally:
        loop.tracker.close()
    steps = updates.step_count
    loop.load_best()
    loop.try_average()
    return loop.state | {"rate": loop.meters.rate, "steps": steps}


class Loop:
    """One run of the loop in this process. `state` is what checkpoints contain in addition to weights and moments
    (JSON); its `run` is the fingerprint of the run that saved it."""

    def __init__(
        self, updates: Updates, config: TrainConfig, output: Output, hooks: Hooks, unit: str, expected: Expected | None
    ):
        self.updates, self.config, self.output, self.hooks = updates, config, output, hooks
        self.unit, self.expected = unit, expected
        self.state: dict = {"before": None, "after": None, "first": None, "last": None, "weight": 0.0, "skipped": 0}
        self.rollback_note: dict = {}  # for the next line of metrics.jsonl
        self.went_back: tuple[int, dict] | None = None  # to which step, and the state from there on
        self.resumed = False
        logged_config = {"stage": output.stage} | config.model_dump(mode="json")
        project = config.log.wandb or config.log.project or output.folder.parent.name  # the recipe's name
        run = TrackedRun(output.path, project, output.stage, logged_config)
        self.tracker = Tracker(output.path, output.is_main, config.log.trackers, run)
        keep_best = config.save.keep_best or hooks.selection is not None
        self.saver = checkpoints.Saver(output, updates.engines, config.save, keep_best)
        self.pace = Pace(output)

    # ---- before the first step ---------------------------------------------------------------------------------------

    def resume(self, branch: Path | None) -> None:
        """Load the newest checkpoint, or `branch`, and prepare what depends on the step that was reached."""
        if self.output.is_main:
            (self.output.folder / "requeue.json").unlink(missing_ok=True)
        newest = checkpoints.newest(self.output)
        self.resumed = newest is not None
        if newest:
            path, saved_state = newest
            difference = self.updates.load(path)
            self._print_resumed(path.name, difference, "same rows, results equal up to rounding")
            self.state.update(saved_state)
            if saved_state.get("run", self.output.fingerprint) != self.output.fingerprint:  # a fork
                self.state.update(inherited(saved_state))
        elif branch:
            difference = self.updates.load(branch)
            self._print_resumed(str(branch), difference, "")
            self.state.update(inherited(loop_state(branch)))
        self._begin()
        self.length = TrainingLength(self.config, self.output, self.updates.step_count)
        if self.hooks.average is not None:
            self.saver.kept_steps = set(self.hooks.average.steps(self.length.steps))
        self.saver.check_room(self.length.steps)
        self.tracker.started(self.updates.step_count)
        self._start_counting()

    def _begin(self) -> None:
        """Use the current state, which may be that of the run that was forked, and note whose it is from now on."""
        self.updates.begin(self.state, self.output.fingerprint)
        self.state["run"] = self.output.fingerprint

    def _print_resumed(self, path: str, difference: str, consequence: str) -> None:
        if not self.output.is_main:
            return
        details = f" ({difference})" if difference else ""
        if difference and consequence:
            details += f": {consequence}"
        show(f"{self.output.stage}: resuming from {path}{details}")

    def _start_counting(self) -> None:
        """New meters and a new guard for the current state."""
        self.meters = Meters(self.config, self.state, self.unit, self.expected, self.updates.engines[0].device)
        self.guard = Guard(self.config.spikes, self.state)

    def measure_at_start(self) -> None:
        """The evaluation before the first step, or the one that was lost after the checkpoint was written."""
        step = self.updates.step_count
        # A checkpoint is written before its evaluation, which may have been lost.
        is_lost = self.resumed and self.evaluation_is_due(step)
        is_measured = not is_lost and self.state["before"] is not None
        self.tracker.rewind(step if self.resumed else -1, evaluated=is_measured)
        if self.hooks.evaluate and self.state["before"] is None:
            self.evaluate(step, "before")
        elif is_lost:
            self.evaluate(step, "after")
        if self.resumed and self.hooks.sample:
            self.hooks.sample(step, step == self.length.steps)
        if self.config.rolls_back() and not self.resumed:
            self.saver.save(step, self.state, wait=True)  # so that there is always a checkpoint to go back to

    def evaluation_is_due(self, step: int) -> bool:
        every = self.config.evaluate_every
        if self.hooks.evaluate is None:
            return False
        return self.selection_is_due(step) or (every is not None and step % every == 0) or step == self.length.steps

    def selection_is_due(self, step: int) -> bool:
        """Whether the checkpoint of a step may be the best one of the run."""
        selection = self.hooks.selection
        return selection is not None and (selection.is_due(step) or step == self.length.steps)

    def evaluate(self, step: int, key: str) -> None:
        """Evaluate and keep the numbers as state[key]: `before` or `after`."""
        phases.enter("evaluate")
        start = time.perf_counter()
        numbers = self.hooks.evaluate()
        self.state[f"{key}_rows"] = numbers.pop("rows", None)
        self.state[key] = numbers
        if key == "before":
            self.state["evaluation_seconds"] = time.perf_counter() - start
        self.tracker.log(step, **{f"heldout_{name}": value for name, value in self.state[key].items()})
        if self.hooks.selection is None:
            self.saver.note_loss(step, self.updates.objective(self.state[key]))
        elif key == "before":
            self.hooks.selection.check(numbers)
        elif self.selection_is_due(step):
            self.select(step)

    def select(self, step: int) -> None:
        """Compare the evaluation of a step with those before; end the run if it no longer improves."""
        selection = self.hooks.selection
        self.saver.note_loss(step, selection.cost(self.state["after"]))
        stops = selection.note(self.state, step, self.state["after"], self.state["after_rows"])
        if stops and step != self.length.steps:
            self.length.steps = step
            if self.output.is_main:
                metric, best = selection.options.metric, self.state["best"]
                show(
                    f"{self.output.stage}: stopped at step {step}: {metric} has not improved in"
                    f" {best['waited']} evaluations; the best is {best['numbers'][metric]:.4g}, of step {best['step']}"
                )

    def load_best(self) -> None:
        """With a selection: use the weights and the evaluation of the best checkpoint."""
        best = self.state.get("best")
        if best is None:
            return
        self.state["after"], self.state["after_rows"] = best["numbers"], best["rows"]
        if best["step"] != self.updates.step_count:
            phases.enter("load")
            subject = f"stage {self.output.stage}: best: step {best['step']}"
            self.updates.load(checkpoints.of_step(self.output.path, best["step"], subject))

    def try_average(self) -> None:
        """Use the average of the last checkpoints, and its evaluation, if its held-out loss is the lower one. Of the
        adapters of a model the two matrices are averaged, not their product."""
        options = self.hooks.average
        if options is None:
            return
        phases.enter("load")
        paths = average.paths_of(options, self.output, self.length.steps)
        for engine in self.updates.engines:
            average.load_average(engine, paths, options.weights())
        phases.enter("evaluate")
        numbers = self.hooks.evaluate()
        rows, last = numbers.pop("rows", None), self.state["after"]["loss"]
        is_better = numbers["loss"] < last
        self.state["average"] = {
            "steps": options.steps(self.length.steps),
            "loss": numbers["loss"],
            "last_loss": last,
            "published": is_better,
        }
        if self.output.is_main:
            published = "the average" if is_better else "the last one"
            show(
                f"{self.output.stage}: average of the checkpoints of steps"
                f" {', '.join(map(str, self.state['average']['steps']))}: held-out loss {numbers['loss']:.4f}, that of"
                f" the last one is {last:.4f}; {published} is published"
            )
        if is_better:
            self.state["after"], self.state["after_rows"] = numbers, rows
        else:
            self.updates.load(paths[-1])

    # ---- steps -------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        total, done = self.length.steps or CALIBRATION, self.updates.step_count
        with (
            StopSignal() as signals,
            Progress(self.output.stage, total, "step", done, self.output.is_main) as bar,
            self.saver,
        ):
            while self.length.steps is None or self.updates.step_count < self.length.steps:
                stats, seconds = self.step(bar)
                if stats is None:  # rolled back
                    continue
                self.log(stats, seconds, bar)
                alarm = self.updates.alarm()
                if alarm is not None:
                    self.obey(*alarm, stats, bar)
                    continue
                faults.point("work")
                self.save(signals)
                step = self.updates.step_count
                if self.evaluation_is_due(step):
                    self.evaluate(step, "after")
                if self.hooks.sample:
                    phases.enter("sample")
                    self.hooks.sample(step, step == self.length.steps)

    def step(self, bar: Progress) -> tuple[dict | None, float]:
        """Make the next step. Returns its numbers and seconds, or None instead of the numbers if the run was rolled
        back. Raises UserError if the spike policy ends the run."""
        start, done = time.perf_counter(), self.updates.step_count
        phases.enter("data", done + 1)
        seed_step(self.config, done, self.updates.engines[0].data_rank)
        batch = self.guard.batch_of(done, self.config.batch_size)
        stats = self.updates.step(batch, self.length.learning_rate(done), self.guard.accept)
        phases.enter("log")
        reason = self.guard.after(stats, self.updates.applied_updates(stats))
        if reason:
            rows = []
            if self.hooks.describe and self.guard.rows_are_reported:
                rows = self.hooks.describe(batch)
            report(self.output, done + 1, reason, plain(stats), rows)
            action = self.guard.action(stats)
            if action == "stop":
                self.save_state_before()
                raise UserError(self.guard.error_message(self.output, done + 1, reason, self.updates.atomic))
            if action == "rollback":
                self.roll_back(done + 1, done, bar)
                return None, 0.0
        return stats, time.perf_counter() - start

    def log(self, stats: dict, seconds: float, bar: Progress) -> None:
        """Count a step, and write it to metrics.jsonl, the tracker and the terminal if it is due."""
        step = self.updates.step_count
        stats = plain(self.meters.step(stats, seconds))
        settled = self.length.settle(step, self.meters.step_seconds, self.state.get("evaluation_seconds", 0.0))
        if settled:
            bar.retarget(self.length.steps)
        message = settled or self.meters.calibrated(step, self.length.steps)
        if message and self.output.is_main:
            show(message)
        self.state["weight"] += stats["weight"]
        self.state["skipped"] += not stats["applied"]
        self.state["first"] = self.state["first"] or stats
        self.state["last"] = stats
        is_last = step == self.length.steps
        is_due = step % self.config.log.every_steps == 0 or step == 1 or is_last
        if is_due or not stats["applied"] or self.rollback_note or alarms_of(stats):
            numbers = stats | self.meters.line(step, self.length.steps)
            for engine in self.updates.engines:
                numbers |= engine.measured()
            self.tracker.log(step, **(numbers | self.rollback_note))
            self.rollback_note = {}
        bar.update(1, **(self.updates.progress_numbers(stats) or self.meters.progress_numbers(stats)))

    def save(self, signals: StopSignal) -> None:
        """Write a checkpoint if it is due; raise Stopped if a signal has reached any process."""
        step = self.updates.step_count
        is_last = step == self.length.steps
        number, *flags = distributed.all_reduce_max([signals.number, *self.saver.flags()])
        self.saver.settle(*flags)
        self.pace.look(self.saver.seconds)
        is_due = step % self.config.save.every_steps == 0 or step in self.saver.kept_steps
        if number and not is_last and self.saver.is_worth_more_than_a_new_one(step):
            phases.enter("save")
            step = self.saver.step
            self.saver.finish()
        elif is_last or number or self.selection_is_due(step) or is_due:
            phases.enter("save")
            self.saver.save(step, self.state, wait=bool(number))
        if number and not is_last:
            stop(self.output, step, int(number))

    # ---- spikes ------------------------------------------------------------------------------------------------------

    def save_state_before(self) -> None:
        """Save the state before the last step, which was not applied. If part of that step may have been applied, the
        newest checkpoint is all there is."""
        self.finish_saving()
        if not self.updates.atomic:
            return
        self.updates.uncount_step()
        self.guard.forget()
        step = self.updates.step_count
        if distributed.from_main(saved_step(self.output)) != step:
            self.saver.save(step, self.state, wait=True)

    def finish_saving(self) -> None:
        """Before the run ends with an error. If it has written no checkpoint since it went back to one, that one gets
        to know which rows are skipped from there on: a fork of it must not read them."""
        self.saver.finish()
        if self.went_back is None or not self.output.is_main:
            return
        step, state = self.went_back
        path = checkpoint_folder.path_of(self.output.path, step)
        if checkpoint_folder.complete_checkpoints(self.output.path)[-1:] == [path]:
            checkpoint_folder.replace_loop_state(path, state)

    def obey(self, action: str, reason: str, stats: dict, bar: Progress) -> None:
        """Roll back after a step that raised an alarm. Raises UserError if the run is to stop."""
        step = self.updates.step_count
        if action == "rollback" and self.guard.may_roll_back():
            if self.output.is_main:
                show(f"{self.output.stage}: step {step}: {reason}")
            self.roll_back(step, step, bar)
            self.rollback_note["rollback_alarms"] = plain(alarms_of(stats))  # their own line has been dropped
            return
        self.finish_saving()
        text = f"stage {self.output.stage}: step {step}: {reason}"
        if action == "rollback":
            text += f", and {self.config.spikes.rollbacks} rollbacks were made"
        raise UserError(
            f"{text}. Checkpoints are from before it; look at the samples and curves, change the recipe (alarms,"
            " optimizer.lr, kl_coef, weights of rewards) and resume with --fork, or start again with --restart"
        )

    def roll_back(self, step: int, shown: int, bar: Progress) -> None:
        """Return to the newest checkpoint; the rows of the steps up to `step` since then are skipped from now on.
        shown: the step at which the bar is."""
        phases.enter("load")  # may take long: all files are hashed and read
        self.saver.finish()
        faults.point("rollback")
        newest = checkpoints.newest(self.output)
        if newest is None:
            raise UserError(
                f"stage {self.output.stage}: step {step} is to be rolled back, and no checkpoint in"
                f" {self.output.path / 'checkpoints'} is complete; start again with --restart, on a disk that keeps"
                " what"
                " is written to it"
            )
        path, saved_state = newest
        self.updates.load(path)
        checkpoint_step = step_of(path)
        state = self.guard.rolled_back(saved_state, checkpoint_step, step - 1, self.config.batch_size)
        before = dict(self.state)
        self.state.clear()
        self.state.update(state)
        self._begin()
        self.updates.carry(before, self.state)
        self.went_back = checkpoint_step, copy.deepcopy(self.state)
        self.tracker.rewind(checkpoint_step)
        if self.selection_is_due(checkpoint_step):  # its evaluation is not in its state
            self.evaluate(checkpoint_step, "after")
        if self.hooks.sample:
            self.hooks.sample(checkpoint_step, False)
        bar.update(checkpoint_step - shown)
        self._start_counting()
        spikes = self.guard.state
        self.rollback_note = {"rollbacks": spikes["rollbacks"], "skipped_rows": spikes["skipped_rows"]}
        if self.output.is_main:
            rows = " and ".join(f"{first} to {end - 1}" for first, end in spikes["skipped_rows"])
            show(f"{self.output.stage}: back to step {checkpoint_step}; rows {rows} are skipped from now on")
        faults.point("rollback")
