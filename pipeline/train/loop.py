"""The training loop of stages whose steps are all alike: resume, step, log, evaluate, save, and stop when asked."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline import faults
from pipeline.errors import UserError
from pipeline.output import Output
from pipeline.seeds import derive
from pipeline.tracking import Progress, Tracker, plain
from pipeline.train import checkpoints, distributed, phases
from pipeline.train.config import TrainConfig
from pipeline.train.engine import Engine
from pipeline.train.horizon import CALIBRATION, Horizon
from pipeline.train.meters import Meters, Text
from pipeline.train.spikes import Guard, inherited, tell
from pipeline.train.stop import StopSignal, saved_step, stop


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
    """Train from the newest checkpoint, or else from `branch` (a checkpoint of another run), or from the start, to the
    end of the horizon. Collective.

    batches(number) gives this process's micro-batches of a global batch: that of step `number`, unless a rollback
    skipped some (train/spikes.py), and describe(number) tells of its rows, for people; evaluate() the numbers on
    held-out data, equal on all processes; `text` is for the meters. sample(step, last) is called after each step, its
    checkpoint and its evaluation, and again for the checkpoint that a run goes on from. Returns before and after
    (evaluations, or None), first and last (what the first and last step returned), weight (summed over all steps),
    skipped (updates that were not applied), and rate (weight per second of this process's training, without saving and
    evaluating).
    """
    state: dict = {"before": None, "after": None, "first": None, "last": None, "weight": 0.0, "skipped": 0}
    tracker = Tracker(
        output.path,
        output.is_main,
        config.log.wandb,
        output.stage,
        {"stage": output.stage, **config.model_dump(mode="json")},
    )
    if output.is_main:
        (output.folder / "requeue.json").unlink(missing_ok=True)
    saver = checkpoints.Saver(output, [engine], config.save)
    found = checkpoints.newest(output)
    if found or branch:
        path, saved = found or (branch, inherited(checkpoints.state_of(branch)))
        changed = engine.load(path)
        state.update(saved)
        if output.is_main:
            other = (
                f", {changed}" + (": the rows are the same, the last bits are not" if found else "") if changed else ""
            )
            print(f"{output.stage}: goes on from {path.name if found else path}{other}", flush=True)
    horizon = Horizon(config, output, engine.step_count)
    saver.check_room(horizon.steps)

    def due(step: int) -> bool:
        return evaluate is not None and (
            step == horizon.steps or (config.evaluate_every is not None and step % config.evaluate_every == 0)
        )

    def measure(step: int, key: str) -> None:
        phases.enter("evaluate")
        begun = time.perf_counter()
        state[key] = evaluate()
        if key == "before":
            state["evaluation_seconds"] = time.perf_counter() - begun
        tracker.log(step, **{f"heldout_{name}": value for name, value in state[key].items()})
        saver.note_loss(step, state[key].get("loss"))

    def keep_the_state_before(guard: Guard) -> None:
        """A checkpoint of the step before the spike, whose update was not applied."""
        engine.step_count -= 1
        guard.forget()
        saver.finish()
        if distributed.from_main(saved_step(output)) != engine.step_count:
            saver.save(engine.step_count, state, wait=True)

    def roll_back(step: int, guard: Guard) -> None:
        """To the newest checkpoint; the rows of the steps since then will be left out."""
        phases.enter("load")  # may take long: all files are read, and hashed before
        saver.finish()
        faults.point("rollback")
        newest = checkpoints.newest(output)
        if newest is None:
            raise UserError(
                f"stage {output.stage}: step {step} is to be rolled back, and no checkpoint in"
                f" {output.path / 'checkpoints'} is whole; start again with --restart, on a disk that keeps what it is"
                " given"
            )
        path, saved = newest
        engine.load(path)
        rolled = guard.rolled_back(saved, engine.step_count, step - 1, config.batch_size)
        state.clear()
        state.update(rolled)
        tracker.rewind(engine.step_count)
        if sample:
            sample(engine.step_count, False)

    # A checkpoint is written before its evaluation, which may have been lost.
    again = found is not None and due(engine.step_count)
    tracker.rewind(engine.step_count if found else -1, evaluated=not again)
    if evaluate and state["before"] is None:
        measure(engine.step_count, "before")
    elif again:
        measure(engine.step_count, "after")
    if found and sample:
        sample(engine.step_count, engine.step_count == horizon.steps)
    meters, guard, note = Meters(config, state, unit, text, engine.device), Guard(config.spikes, state), {}
    if config.spikes.policy == "rollback" and not found:
        saver.save(engine.step_count, state, wait=True)  # there is always something to go back to
    try:
        with (
            StopSignal() as signals,
            Progress(output.stage, horizon.steps or CALIBRATION, "step", engine.step_count, output.is_main) as bar,
            saver,
        ):
            while horizon.steps is None or engine.step_count < horizon.steps:
                begun = time.perf_counter()
                phases.enter("data", engine.step_count + 1)
                seed_step(config, engine.step_count, engine.data_rank)
                batch = guard.position(engine.step_count, config.batch_size)
                stats = engine.step(batches(batch), horizon.learning_rate(engine.step_count), guard.admit)
                phases.enter("log")
                step = engine.step_count
                reason = guard.after(stats)
                if reason:
                    tell(
                        output, step, reason, plain(stats), describe(batch) if describe and guard.worth_telling else []
                    )
                    verdict = guard.verdict(stats)
                    if verdict == "stop":
                        keep_the_state_before(guard)
                        raise UserError(guard.farewell(output, step, reason))
                    if verdict == "rollback":
                        roll_back(step, guard)
                        bar.update(engine.step_count + 1 - step)
                        meters, guard = Meters(config, state, unit, text, engine.device), Guard(config.spikes, state)
                        note = {"rollbacks": guard.state["rollbacks"], "skipped_rows": guard.state["skipped_rows"]}
                        if output.is_main:
                            rows = " and ".join(f"{a} to {b - 1}" for a, b in note["skipped_rows"])
                            back = f"back to step {engine.step_count}"
                            print(f"{output.stage}: {back}; rows {rows} are skipped from here on", flush=True)
                        faults.point("rollback")
                        continue
                stats = plain(meters.step(stats, time.perf_counter() - begun))
                settled = horizon.settle(step, meters.step_seconds, state.get("evaluation_seconds", 0.0))
                if settled:
                    bar.retarget(horizon.steps)
                if output.is_main and (told := settled or meters.calibrated(step, horizon.steps)):
                    print(told, flush=True)
                state["weight"] += stats["weight"]
                state["skipped"] += not stats["applied"]
                state["first"], state["last"] = state["first"] or stats, stats
                last = step == horizon.steps
                if step % config.log.every_steps == 0 or last or step == 1 or not stats["applied"] or note:
                    tracker.log(step, **stats, **meters.line(step, horizon.steps), **engine.measured(), **note)
                    note = {}
                bar.update(1, **meters.shown(stats))
                faults.point("work")
                number, *flags = distributed.all_reduce_max([signals.number, *saver.flags()])
                saver.settle(*flags)
                if last or number or step % config.save.every_steps == 0:
                    phases.enter("save")
                    saver.save(step, state, wait=bool(number))
                if number and not last:
                    stop(output, step, int(number))
                if due(step):
                    measure(step, "after")
                if sample:
                    phases.enter("sample")
                    sample(step, last)
    finally:
        tracker.close()
    return {**state, "rate": meters.rate}
