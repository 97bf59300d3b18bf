"""Training checkpoints: a folder that is complete or is ignored, written while training continues.

    checkpoints/.step-000100.tmp/      being written, or being removed
    checkpoints/step-000100/           complete.json, written last, has sizes and sha256 of all other files and the
                                       state of the loop
    checkpoints/losses.json            held-out losses of the steps that were evaluated, for save.keep_best

Training waits while this process's fragments are copied in memory. A thread writes, hashes and syncs the copy; when all
processes have reported that they are done, in the all-reduce that follows each step anyway, a thread of the main
process writes the marker and renames the folder. Threads make no collective calls. At most one checkpoint is being
written at a time."""

import json
import math
import shutil
import threading
import time
from pathlib import Path

from pipeline.core import checkpoint_folder, distributed, faults, transient_errors
from pipeline.core.checkpoint_folder import complete_checkpoints, step_of
from pipeline.core.errors import UserError
from pipeline.core.files import sha256_file, sync_folder, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import byte_size, plural, show
from pipeline.train import state
from pipeline.train.config import Save

LOSSES = "losses.json"


class Saver:
    """Saves a run's engines. `with Saver(...) as saver:` finishes the checkpoint that is being written, or abandons it
    if the processes cannot be waited for.

    In each step, on all processes: `saver.settle(*distributed.all_reduce_max(saver.flags()))`, in one all-reduce with
    whatever else is agreed on.
    """

    def __init__(self, output: Output, engines: list, options: Save, keep_best: bool | None = None):
        """keep_best: whether the checkpoint with the lowest noted loss stays; by default as the options say."""
        self.output, self.engines, self.options = output, engines, options
        self.keep_best = options.keep_best if keep_best is None else keep_best
        self.kept_steps: set[int] = set()
        """Steps whose checkpoints stay until the run ends."""
        self.folder = checkpoint_folder.folder_of(output.path)
        self.copiers = {engine.name: state.Copier() for engine in engines}
        self.step: int | None = None  # of the checkpoint that is being written
        self.loop_state: dict = {}
        self.written: dict | None = None  # {file: {sha256, size}} of this process
        self.publishing = False
        self.thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self.abandoned = threading.Event()
        self.started = 0.0  # of the checkpoint that is being written, by time.perf_counter
        self.seconds = 0.0
        """The longest that a checkpoint of this process took: copy, writing and new name (main process)."""
        self.write_seconds = 0.0  # of the newest one: copy and writing
        path = self.folder / LOSSES
        self.losses: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def save(self, step: int, loop_state: dict, wait: bool = False) -> None:
        """Start a checkpoint of `step` steps; with `wait`, or save.asynchronous: false, also finish it. Collective.

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
        self._check_room_for_one(step)
        self.started = time.perf_counter()
        wait = wait or not self.options.asynchronous
        parts = {engine.name: engine.part() for engine in self.engines}
        if not wait:
            for name, part in parts.items():
                parts[name] = part._replace(fragments=self.copiers[name].copy(part.fragments))
        self.step, self.loop_state, self.publishing = step, json.loads(json.dumps(loop_state)), False
        self._start(lambda: self._write(parts), in_this_thread=wait)
        if wait:
            self.finish()

    def flags(self) -> list[float]:
        """[something is being written here, it failed here]: their maxima over all processes are for `settle`."""
        return [float(self.thread is not None and self.thread.is_alive()), float(self.failure is not None)]

    def settle(self, busy: float, failed: float) -> None:
        """Continue with the checkpoint that is being written, given the maxima of all processes' flags. Raises
        UserError if one of them could not write."""
        if self.step is None or busy:
            return
        if failed:
            self._fail()
        if self.publishing:
            self.step = None
            return
        parts = distributed.all_gather_object(self.written)
        self.publishing = True
        if self.output.is_main:
            files = {name: entry for part in parts for name, entry in part.items()}
            self._start(lambda: self._publish(files), in_this_thread=False)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Collective."""
        while self.step is not None:
            if self.thread:
                self.thread.join()
            self.settle(*distributed.all_reduce_max(self.flags()))

    def is_worth_more_than_a_new_one(self, step: int) -> bool:
        """Whether a run that has to stop after `step` should wait for the checkpoint that is being written, and make
        the steps since then again, instead of writing another one: it then stops earlier, which counts before a time
        limit. Not if the writing has ended already and these steps took longer than a checkpoint. Collective."""
        if self.step is None:
            return False
        is_writing = self.thread is not None and self.thread.is_alive()
        is_worth_it = distributed.from_main(is_writing or time.perf_counter() - self.started <= self.seconds)
        if is_worth_it and self.output.is_main:
            show(
                f"{self.output.stage}: the checkpoint of step {self.step} is being written; it is finished, and the"
                f" {plural(step - self.step, 'step')} since then will be made again"
            )
        return is_worth_it

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            self.finish()
            return
        if distributed.world() > 1:
            # The other processes may be anywhere: nothing can be agreed on, and the folder keeps its hidden name.
            self.abandoned.set()
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
        existing = {str(step_of(path)) for path in complete_checkpoints(self.output.path)} | {str(self.step)}
        self.losses = {key: value for key, value in self.losses.items() if key in existing}
        self.losses[str(step)] = loss
        if self.keep_best:
            write_json(self.folder / LOSSES, self.losses)

    # ---- room on the disk --------------------------------------------------------------------------------------------

    def check_room(self, steps: int | None) -> None:
        """Before the first step: is there room for all checkpoints that will exist at a time, and for the model? Raises
        UserError with the numbers. Collective."""
        one, options = self._size(), self.options
        count = options.keep + 1 + self.keep_best + len(self.kept_steps)
        if steps is not None:  # None: as many as fit into a time, which the first steps will show
            if options.keep_every:
                count += steps // options.keep_every
            count = min(count, -(-steps // options.every_steps) + len(self.kept_steps))
        model = 4 * sum(math.prod(shape) for shape in self.engines[0].shapes.values())
        existing = free = 0
        if self.output.is_main:
            files = [file for path in complete_checkpoints(self.output.path) for file in path.iterdir()]
            existing = sum(file.stat().st_size for file in files)
            free = shutil.disk_usage(self.output.path).free
        free, needed = distributed.from_main((free, count * one + model - existing))
        if needed > free:
            raise UserError(
                f"{self.output.path}: {count} checkpoints of {byte_size(one)} (save.keep: {options.keep}, and one being"
                f" written) and a model of {byte_size(model)} need {byte_size(needed)} more, {byte_size(free)} are"
                " free; make room, give another `output`, or save less (save.keep, save.keep_every)"
            )

    def _size(self) -> int:
        """Bytes of a checkpoint, all processes together: fp32 weights and moments."""
        return sum(engine.state_bytes() for engine in self.engines)

    def _check_room_for_one(self, step: int) -> None:
        free = distributed.from_main(shutil.disk_usage(self.output.path).free if self.output.is_main else 0)
        if self._size() > free:
            raise UserError(
                f"{self.folder}: the checkpoint of step {step} takes {byte_size(self._size())}, {byte_size(free)} are"
                f" free; {self._advice()}"
            )

    def _advice(self) -> str:
        checkpoints = complete_checkpoints(self.output.path)
        if checkpoints:
            return f"make room, then the same command resumes from {checkpoints[-1].name}"
        return "make room, then start it again"

    # ---- in the writing thread ---------------------------------------------------------------------------------------

    def _start(self, action, in_this_thread: bool) -> None:
        def run():
            try:
                action()
            except Exception as error:  # raised again in the main thread, see _fail
                self.failure = error

        self.thread = None
        if in_this_thread:
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
            self.written[file] = state.write(self._temporary / file, part, self.abandoned.is_set)
            if self.output.is_main:
                path = self._temporary / f"{name}.json"
                write_json(path, part.summary)
                self.written[path.name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
        self.write_seconds = time.perf_counter() - self.started

    def _publish(self, files: dict) -> None:
        start = time.perf_counter()
        sync_folder(self._temporary)
        faults.point("save")
        marker = {"step": self.step, "state": self.loop_state, "files": files}
        write_json(self._temporary / checkpoint_folder.MARKER, marker)
        final = checkpoint_folder.path_of(self.output.path, self.step)
        if final.exists():  # damaged: the run would have resumed from a valid one
            _remove(final)
        self._temporary.rename(final)
        sync_folder(self.folder)
        for path in self._superfluous():
            _remove(path)
        self.output.note_time()
        self.seconds = max(self.seconds, self.write_seconds + time.perf_counter() - start)

    def _superfluous(self) -> list[Path]:
        checkpoints = complete_checkpoints(self.output.path)
        kept = set(checkpoints[-self.options.keep :])
        if self.options.keep_every:
            kept |= {path for path in checkpoints if step_of(path) % self.options.keep_every == 0}
        kept |= {path for path in checkpoints if step_of(path) in self.kept_steps}
        losses = self.losses
        evaluated = [path for path in checkpoints if str(step_of(path)) in losses]
        if self.keep_best and evaluated:
            kept.add(min(evaluated, key=lambda path: losses[str(step_of(path))]))
        return [path for path in checkpoints if path not in kept]

    def _fail(self) -> None:
        """Raises on every process. What was written is removed, and the checkpoints before stay as they are."""
        own, step, temporary = self.failure, self.step, self._temporary
        self.step = self.failure = None
        problems = distributed.all_gather_object((_failure_text(own), own.errno if isinstance(own, OSError) else None))
        if self.output.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        if own and not isinstance(own, OSError):
            raise own
        rank, (text, number) = next((rank, problem) for rank, problem in enumerate(problems) if problem[0])
        message = f"the checkpoint of step {step} could not be written by process {rank}: {text}"
        if number in transient_errors.STORAGE:  # a file server that may answer again: nothing for the user to fix
            raise OSError(number, message) from own
        raise UserError(f"{message}; {self._advice()}") from own


def _failure_text(error: Exception | None) -> str | None:
    if isinstance(error, OSError):
        return f"{error.strerror or error} ({error.filename or 'file'})"
    return repr(error) if error else None


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
    problems = [problem for problem in distributed.all_gather_object(own) if problem]
    return problems[0] if problems else None


def _remove(path: Path) -> None:
    """Remove a checkpoint, under a hidden name first, so that a kill in between leaves no damaged one."""
    hidden = checkpoint_folder.removal_path(path)
    if hidden.exists():
        shutil.rmtree(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)
