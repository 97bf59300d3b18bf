"""Work spread over processes of this machine, or over machines, with callbacks in the stage's own process."""

import concurrent.futures
import concurrent.futures.process
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import Stopped, UserError
from pipeline.core.processes import begin_worker, cores, kill_workers, signals_held
from pipeline.data.cleaning.process_setup import keep_freed_memory, release_memory, without_pandas


@dataclass(frozen=True)
class _Task:
    function: Callable
    arguments: tuple
    done: Callable[[Any], None] | None

    def finish(self, result: Any) -> None:
        if self.done:
            self.done(result)


class Pool:
    """Runs functions in `workers` processes, or in this one if that is enough. `executor`: local, slurm or ray;
    `folder`: scratch for slurm."""

    def __init__(self, workers: int | None, executor: str = "local", folder: Path | None = None):
        self.executor, self.is_local = None, executor == "local"
        self.pending: dict[concurrent.futures.Future, _Task] = {}
        self.first: _Task | None = None  # the only task so far
        if executor == "ray":
            from pipeline.data.cleaning.ray_executor import RayExecutor

            self.executor = RayExecutor(workers)
        elif executor == "slurm":
            from pipeline.data.cleaning.slurm_executor import SlurmExecutor

            self.executor = SlurmExecutor(workers, folder)
        if self.executor:
            self.workers = self.executor.workers
        else:
            self.workers = workers or cores()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind, *_) -> None:
        if self.executor:
            # when the run is asked to stop, the units that workers have begun are finished, so that they are kept
            is_orderly = kind is None or issubclass(kind, Stopped)
            self.executor.shutdown(wait=is_orderly, cancel_futures=True)

    def submit(self, function: Callable, *arguments, done: Callable[[Any], None] | None = None) -> None:
        """Run function(*arguments) in a worker; then `done` is called with the result in this process. May wait for
        earlier tasks."""
        task = _Task(function, arguments, done)
        if self.executor is None:
            if self.workers == 1:
                self._run_here(task)
                return
            if self.first is None:
                self.first = task  # the second task makes it worth starting processes, which takes about a second
                return
            # spawn, because a forked child would inherit the lock's heartbeat thread in an unknown state
            context = multiprocessing.get_context("spawn")
            self.executor = concurrent.futures.ProcessPoolExecutor(self.workers, context, _begin_process)
        if self.first:
            first, self.first = self.first, None
            self._start(first)
        self._start(task)

    def drain(self) -> None:
        """Wait for all tasks."""
        if self.first:
            first, self.first = self.first, None
            self._run_here(first)
        while self.pending:
            self._collect()

    def _run_here(self, task: _Task) -> None:
        task.finish(task.function(*task.arguments))

    def _start(self, task: _Task) -> None:
        while len(self.pending) >= 2 * self.workers:
            self._collect()
        with signals_held():
            if self.is_local:
                future = self.executor.submit(_run_and_release, task.function, *task.arguments)
            else:
                future = self.executor.submit(task.function, *task.arguments)
        self.pending[future] = task

    def _collect(self) -> None:
        ready, _ = concurrent.futures.wait(self.pending, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ready:
            task = self.pending.pop(future)
            try:
                result = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                kill_workers()
                raise UserError(
                    "a worker process was killed, probably by the system because memory ran out; give fewer workers"
                    f" than {self.workers}, or a smaller unit_bytes, and run the same command again"
                ) from None
            task.finish(result)


def _begin_process() -> None:
    begin_worker()
    without_pandas()
    keep_freed_memory()


def _run_and_release(function: Callable, *arguments) -> Any:
    result = function(*arguments)
    release_memory()
    return result
