"""Work spread over processes (or machines, see executors.py), with what must happen after each piece of it done in
the parent, one piece at a time."""

import concurrent.futures
import concurrent.futures.process
import ctypes
import multiprocessing
import sys
from pathlib import Path

from pipeline.core.errors import Stopped, UserError
from pipeline.core.processes import begin_worker, cores, kill_workers, signals_held
from pipeline.data.cleaning.unit_files import without_pandas

LIBC = ctypes.CDLL(None)


class Pool:
    """Runs functions in `workers` processes, or here if one is enough; `finished(number, result, weight)` is called
    here, for each. `engine`: local, slurm or ray; `folder` is scratch."""

    def __init__(self, workers: int | None, engine: str = "local", folder: Path | None = None):
        self.executor, self.pending, self.held, self.local = None, {}, None, engine == "local"
        if engine != "local":
            from pipeline.data.cleaning.executors import Ray, Slurm

            self.executor = Ray(workers) if engine == "ray" else Slurm(workers, folder)
            self.workers = self.executor.workers
            return
        self.workers = workers or cores()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind, *_) -> None:
        # asked to stop, units in work are finished: they are kept
        if self.executor:
            self.executor.shutdown(wait=kind is None or issubclass(kind, Stopped), cancel_futures=True)

    def submit(self, finished, number: int, weight: int, function, *arguments) -> None:
        task = (finished, number, weight, function, arguments)
        if self.workers == 1 and self.executor is None:
            finished(number, function(*arguments), weight)
        elif self.executor is None and self.held is None:
            self.held = task  # processes are worth their start (about a second) from the second unit on
        else:
            if self.executor is None:
                # spawn, because a forked child would inherit the lock's heartbeat thread in an unknown state
                self.executor = concurrent.futures.ProcessPoolExecutor(
                    self.workers, multiprocessing.get_context("spawn"), _begin
                )
            if self.held:
                held, self.held = self.held, None
                self._start(*held)
            self._start(*task)

    def _start(self, finished, number, weight, function, arguments) -> None:
        while len(self.pending) >= 2 * self.workers:
            self._collect()
        task = (_work, function, *arguments) if self.local else (function, *arguments)
        with signals_held():
            future = self.executor.submit(*task)
        self.pending[future] = (finished, number, weight)

    def _collect(self) -> None:
        ready, _ = concurrent.futures.wait(self.pending, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in ready:
            finished, number, weight = self.pending.pop(future)
            try:
                result = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                kill_workers()
                raise UserError(
                    "a worker process was killed, by the system if memory ran out; "
                    f"give fewer workers than {self.workers}, or a smaller unit_bytes, and run the same command again"
                ) from None
            finished(number, result, weight)

    def drain(self) -> None:
        if self.held:
            held, self.held = self.held, None
            finished, number, weight, function, arguments = held
            finished(number, function(*arguments), weight)
        while self.pending:
            self._collect()


def keep_arrays() -> None:
    """Have glibc keep arrays of a few megabytes that were freed for the next ones. Going back to the system and coming
    again page by page, they cost 0.2 of 6.5 CPU-s (docs/log.md, 29)."""
    if sys.platform == "linux" and hasattr(LIBC, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        LIBC.mallopt(m_mmap_threshold, 32 << 20)
        LIBC.mallopt(m_trim_threshold, 64 << 20)


def _begin() -> None:
    begin_worker()
    without_pandas()
    keep_arrays()


def _work(function, *arguments):
    """In a worker. What it freed goes back to the system: idle workers that kept it were most of the peak while the
    parent deduplicates (docs/log.md, 21)."""
    result = function(*arguments)
    pyarrow = sys.modules.get("pyarrow")
    if pyarrow:
        pyarrow.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(LIBC, "malloc_trim"):  # glibc has it, musl does not
        LIBC.malloc_trim(0)
    return result
