"""Training checkpoints: a folder that is complete or is not looked at, written beside the training.

    checkpoints/.step-000100.tmp/      being written, or being removed
    checkpoints/step-000100/           complete.json, written last, holds sizes and sha256 of all other files and the
                                       loop's state
    checkpoints/losses.json            held-out losses of the steps that were evaluated, for save.keep_best

Training stands still while this process's pieces are copied in memory. A thread writes, hashes and syncs the copy; when
all processes have said so, in the all-reduce that follows each step anyway, the main process's thread writes the marker
and renames the folder. Threads make no collective calls. One checkpoint is in flight at a time.
"""

import json
import math
import shutil
import threading
from pathlib import Path

from pipeline.core import checkpoint_folder, faults
from pipeline.core.checkpoint_folder import complete_checkpoints, step_of
from pipeline.core.errors import UserError
from pipeline.core.files import sha256_file, sync_folder, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import byte_size, show
from pipeline.train import distributed, state
from pipeline.train.config import Save

LOSSES = "losses.json"


class Saver:
    """Saves a run's engines. `with Saver(...) as saver:` finishes what is pending, or gives it up if the processes
    cannot be waited for.

    In each step, on all processes: `saver.settle(*distributed.all_reduce_max(saver.flags()))`, in one all-reduce with
    whatever else is agreed on.
    """

    def __init__(self, output: Output, engines: list, options: Save):
        self.output, self.engines, self.options = output, engines, options
        self.folder = checkpoint_folder.folder_of(output.path)
        self.copiers = {engine.name: state.Copier() for engine in engines}
        self.step: int | None = None  # of the checkpoint in flight
        self.loop_state: dict = {}
        self.written: dict | None = None  # {file: {sha256, size}} of this process
        self.publishing = False
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.given_up = threading.Event()
        known = self.folder / LOSSES
        self.losses: dict[str, float] = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}

    def save(self, step: int, loop_state: dict, wait: bool = False) -> None:
        """Begin a checkpoint of `step` steps; with `wait`, or save.asynchronous: false, also end it. Collective.

        `loop_state` must be JSON. Raises UserError if the disk has no room for it; an error of the writing is raised by
        the call that learns of it.
        """
        if self.step is not None:
            if self.output.is_main:
                show(
                    f"{self.output.stage}: the checkpoint of step {self.step} is still being written, that of step"
                    f" {step} waits for it"
                )
            self.finish()
        self._room_for_one(step)
        wait = wait or not self.options.asynchronous
        parts = {engine.name: engine.pieces() for engine in self.engines}
        if not wait:
            parts = {
                name: part._replace(fragments=self.copiers[name].copy(part.fragments)) for name, part in parts.items()
            }
        self.step, self.loop_state, self.publishing = step, json.loads(json.dumps(loop_state)), False
        self._begin(lambda: self._write(parts), wait)
        if wait:
            self.finish()

    def flags(self) -> list[float]:
        """[something is being written here, it failed here]: to be reduced to their maxima over all processes and
        given to `settle`."""
        return [float(self.thread is not None and self.thread.is_alive()), float(self.failure is not None)]

    def settle(self, busy: float, failed: float) -> None:
        """Go on with the checkpoint in flight, now that it is known how all processes stand. Raises UserError if one
        of them could not write."""
        if self.step is None or busy:
            return
        if failed:
            self._fail()
        if self.publishing:
            self.step = None
            return
        parts = distributed.gathered_object(self.written)
        self.publishing = True
        if self.output.is_main:
            files = {name: entry for part in parts for name, entry in part.items()}
            self._begin(lambda: self._publish(files), False)

    def finish(self) -> None:
        """Wait for the checkpoint in flight. Collective."""
        while self.step is not None:
            if self.thread:
                self.thread.join()
            self.settle(*distributed.all_reduce_max(self.flags()))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            self.finish()
            return
        if distributed.world() > 1:
            # the others may be anywhere: nothing can be agreed on, and the folder keeps its hidden name
            self.given_up.set()
            if self.thread:
                self.thread.join()
            return
        try:
            self.finish()
        except (UserError, OSError) as second:
            show(f"{self.output.stage}: {second}")

    def note_loss(self, step: int, loss: float | None) -> None:
        """Remember the held-out loss after `step` steps, for save.keep_best."""
        if not self.output.is_main or loss is None or not math.isfinite(loss):
            return
        there = {str(step_of(path)) for path in complete_checkpoints(self.output.path)} | {str(self.step), str(step)}
        self.losses = {**{key: value for key, value in self.losses.items() if key in there}, str(step): loss}
        if self.options.keep_best:
            write_json(self.folder / LOSSES, self.losses)

    def check_room(self, steps: int | None) -> None:
        """Before the first step: room for all the checkpoints that will stand at a time, and for the model. Raises
        UserError with the numbers. Collective."""
        one, options = self._size(), self.options
        count = options.keep + 1 + options.keep_best
        if steps is not None:  # None: as many as a time allows, which only the first steps will tell
            count = min(
                count + (steps // options.keep_every if options.keep_every else 0), -(-steps // options.every_steps)
            )
        model = 4 * sum(math.prod(shape) for shape in self.engines[0].shapes.values())
        there = (
            sum(file.stat().st_size for path in complete_checkpoints(self.output.path) for file in path.iterdir())
            if self.output.is_main
            else 0
        )
        needed = count * one + model - there
        free = shutil.disk_usage(self.output.path).free if self.output.is_main else 0
        free, there, needed = distributed.from_main((free, there, needed))
        if needed > free:
            raise UserError(
                f"{self.output.path}: {count} checkpoints of {byte_size(one)} (save.keep: {options.keep}, and one being"
                f" written) and a model of {byte_size(model)} need {byte_size(needed)} more, {byte_size(free)} are"
                " free; make room, give another `output`, or save less (save.keep, save.keep_every)"
            )

    def _size(self) -> int:
        """Bytes of a checkpoint, all processes together: fp32 weights and moments."""
        return sum(engine.state_bytes() for engine in self.engines)

    def _room_for_one(self, step: int) -> None:
        free = distributed.from_main(shutil.disk_usage(self.output.path).free if self.output.is_main else 0)
        if self._size() > free:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} takes {byte_size(self._size())}, {byte_size(free)} are"
                f" free; {self._advice()}"
            )

    def _advice(self) -> str:
        there = complete_checkpoints(self.output.path)
        return (
            f"make room, then the same command resumes from {there[-1].name}"
            if there
            else "make room, then start it again"
        )

    # ---- in the writing thread ---------------------------------------------------------------------------------------

    def _begin(self, action, here: bool) -> None:
        def run():
            try:
                action()
            except Exception as error:  # raised again in the main thread, see _fail
                self.failure = error

        self.thread = None
        if here:
            run()
        else:
            self.thread = threading.Thread(target=run, name="checkpoint", daemon=True)
            self.thread.start()

    @property
    def _temporary(self) -> Path:
        return checkpoint_folder.hidden_path(checkpoint_folder.path_of(self.output.path, self.step))

    def _write(self, parts: dict[str, state.Part]) -> None:
        self._temporary.mkdir(parents=True, exist_ok=True)
        self.written = {}
        for name, part in parts.items():
            file = f"{name}-{distributed.rank():05d}.safetensors"
            self.written[file] = state.write(self._temporary / file, part, self.given_up.is_set)
            if self.output.is_main:
                path = self._temporary / f"{name}.json"
                write_json(path, part.summary)
                self.written[path.name] = {"sha256": sha256_file(path), "size": path.stat().st_size}

    def _publish(self, files: dict) -> None:
        sync_folder(self._temporary)
        faults.point("save")
        marker = {"step": self.step, "state": self.loop_state, "files": files}
        write_json(self._temporary / checkpoint_folder.MARKER, marker)
        final = checkpoint_folder.path_of(self.output.path, self.step)
        if final.exists():  # damaged: a valid one would have been resumed from
            _remove(final)
        self._temporary.rename(final)
        sync_folder(self.folder)
        for path in self._superfluous():
            _remove(path)
        self.output.note_time()

    def _superfluous(self) -> list[Path]:
        there = complete_checkpoints(self.output.path)
        kept = set(there[-self.options.keep :])
        if self.options.keep_every:
            kept |= {path for path in there if step_of(path) % self.options.keep_every == 0}
        losses = self.losses
        measured = [path for path in there if str(step_of(path)) in losses]
        if self.options.keep_best and measured:
            kept.add(min(measured, key=lambda path: losses[str(step_of(path))]))
        return [path for path in there if path not in kept]

    def _fail(self) -> None:
        """Every process raises; what was written goes, and the checkpoints before stay as they are."""
        own, step, temporary = self.failure, self.step, self._temporary
        self.step = self.failure = None
        words = distributed.gathered_object(
            f"{own.strerror or own} ({own.filename or 'file'})"
            if isinstance(own, OSError)
            else repr(own)
            if own
            else None
        )
        if self.output.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if own and not isinstance(own, OSError):
            raise own
        index, what = next((index, word) for index, word in enumerate(words) if word)
        raise UserError(
            f"the checkpoint of step {step} could not be written by process {index}: {what}; {self._advice()}"
        ) from own


# ---- reading ---------------------------------------------------------------------------------------------------------


def newest(output: Output) -> tuple[Path, dict] | None:
    """The newest valid checkpoint and the loop's state in it. Damaged ones are reported and skipped. Collective."""
    run = output.path
    if output.is_main:
        for leftover in checkpoint_folder.leftovers(run):
            shutil.rmtree(leftover)
    checkpoints = distributed.from_main(complete_checkpoints(run))
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path, checkpoint_folder.loop_state(path)
        if output.is_main:  # under a hidden name, so it is never resumed from
            aside = checkpoint_folder.damaged_path(path)
            show(f"checkpoint {path} is damaged ({problem}), skipping it; it is kept as {aside.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    if checkpoints and output.is_main:
        folder = checkpoint_folder.folder_of(run)
        show(f"{output.stage}: no valid checkpoint is left in {folder}, starting from step 0")
    return None


def of_step(run: Path, step: int, name: str) -> Path:
    """The checkpoint of a step in the folder of a run. Raises UserError if there is none, with the steps that there
    are, or if it is damaged. name: the key that asks for it. Collective."""
    checkpoints = distributed.from_main(complete_checkpoints(run))
    path = checkpoint_folder.path_of(run, step)
    if path not in checkpoints:
        steps = ", ".join(str(step_of(checkpoint)) for checkpoint in checkpoints)
        kept = f"those of steps {steps}" if steps else "none"
        raise UserError(
            f"{name}: {run} has no checkpoint of step {step}; it has {kept} (save.keep and save.keep_every decide which"
            " are kept)"
        )
    problem = damage(path)
    if problem:
        raise UserError(f"{name}: {path} is damaged ({problem}); name another step, or run that stage again")
    return path


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None. Each process hashes some of them. Collective."""
    try:
        own = checkpoint_folder.damage(checkpoint, distributed.rank(), distributed.world())
    except OSError as error:  # maybe on this process only, and the others wait for its answer
        own = f"process {distributed.rank()} cannot read it: {error.strerror} ({error.filename})"
    problems = [problem for problem in distributed.gathered_object(own) if problem]
    return problems[0] if problems else None


def _remove(path: Path) -> None:
    """Remove a checkpoint, under a hidden name first, so that a kill in between leaves no damaged one."""
    hidden = checkpoint_folder.removal_path(path)
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)
