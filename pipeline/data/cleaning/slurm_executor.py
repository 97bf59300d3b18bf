"""`executor: slurm`: an array job of `workers` tasks (partition, account and time by sbatch's own SBATCH_* variables)
that take work from a folder which all machines share.

The stage's process keeps the list of tasks and handles their results as it does for its own processes. Functions write
complete files, so a task that runs twice does no harm. The folder has:

    worker.sbatch         the job script of a task
    todo/TASK             to be taken
    taken/TASK@WORKER     being run: a worker renames the file
    done/TASK             the result
    workers/WORKER        touched every few seconds by a worker that lives
    alive, stop           touched by the stage while it lives; written when it is done
"""

import concurrent.futures
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster.slurm import number_in
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.lock import ALIVE, born
from pipeline.data.cleaning.process_setup import ROOT
from pipeline.data.cleaning.slurm_worker import HEARTBEAT, SILENCE

WORKER = "pipeline.data.cleaning.slurm_worker"
SQUEUE_PATIENCE = 300.0  # seconds for which squeue may fail before a warning
# The package may be installed, or may be in a folder that only this process has on its path.
PROGRAM = f"import runpy, sys; sys.path.append({str(ROOT)!r}); runpy.run_module({WORKER!r}, run_name='__main__')"
JOB_SCRIPT = """#!/bin/bash
#SBATCH --job-name=alma-units
#SBATCH --cpus-per-task=1
#SBATCH --requeue
# Partition, account and time: SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT.
export OMP_NUM_THREADS=1
exec {command}
"""
MAX_LOSSES = 3  # workers that may be lost with the same task


class SlurmExecutor:
    def __init__(self, workers: int | None, folder: Path):
        if not workers:
            raise UserError("executor: slurm needs `workers`: the number of tasks of the array job")
        if not shutil.which("sbatch"):
            raise UserError(
                "executor: slurm needs sbatch, which is not on the PATH; start the stage on a login node of the"
                " cluster, or set executor: local"
            )
        self.workers, self.number, self.ended = workers, 0, threading.Event()
        self.futures: dict[str, concurrent.futures.Future] = {}  # by task
        self.losses: Counter[str] = Counter()  # task -> workers that were lost while they had it
        self.signs: dict[str, tuple[int, float]] = {}  # worker -> its last sign of life, and when it was seen
        self.last_answer = time.time()  # of squeue
        _end_earlier_jobs(folder)
        self.folder = folder.absolute() / uuid.uuid4().hex[:12]
        for name in ("todo", "taken", "done", "workers"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "alive").touch()
        self.job = self._submit_job()
        write_atomic(self.folder / "job", self.job)
        # Reads until this process writes or ends, even by SIGKILL; in that case it cancels the array job, which would
        # otherwise wait for SILENCE seconds.
        self.canceller = subprocess.Popen(
            ["sh", "-c", 'read -r ended; [ -n "$ended" ] || scancel "$0"', self.job],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def _submit_job(self) -> str:
        script = self.folder / "worker.sbatch"
        write_atomic(
            script, JOB_SCRIPT.format(command=shlex.join([sys.executable, "-P", "-c", PROGRAM, str(self.folder)]))
        )
        command = ["sbatch", "--parsable", f"--array=0-{self.workers - 1}", f"--output={self.folder}/worker-%a.log"]
        command.append(str(script))
        sbatch = subprocess.run(command, capture_output=True, text=True)
        if sbatch.returncode:
            message = sbatch.stderr.strip() or sbatch.stdout.strip()
            raise UserError(f"executor: slurm: sbatch refused the array job: {message}")
        return number_in(sbatch.stdout)

    def submit(self, function: Callable[..., Any], *arguments) -> concurrent.futures.Future:
        name, future = f"{self.number:08d}", concurrent.futures.Future()
        self.number += 1
        self.futures[name] = future
        scratch = self.folder / name
        scratch.write_bytes(pickle.dumps((os.getcwd(), function, arguments)))
        scratch.rename(self.folder / "todo" / name)  # complete or missing; not synced, as nobody reads it after a crash
        return future

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """End the array job: no result is awaited any more, and tasks that are still queued in Slurm have no work."""
        self.ended.set()
        self.watcher.join()
        (self.folder / "stop").touch()
        subprocess.run(["scancel", self.job], capture_output=True)
        self.canceller.communicate(b"ended\n")

    # ---- in a thread: results, and workers that are lost -------------------------------------------------------------

    def _watch(self) -> None:
        last_check = time.time()
        while not self.ended.wait(0.05):
            try:
                self._collect_results()
                if time.time() - last_check > HEARTBEAT:
                    last_check = time.time()
                    (self.folder / "alive").touch()
                    self._check_workers()
            except Exception as error:  # the stage waits for futures, and would not see an error in this thread
                self._fail(error)
                return

    def _collect_results(self) -> None:
        for path in sorted((self.folder / "done").glob("[0-9]*")):
            future = self.futures.pop(path.name, None)
            if future is None:  # done twice: its first worker was only silent
                path.unlink()
                continue
            has_succeeded, value = pickle.loads(path.read_bytes())  # from our own worker, in the run's own folder
            path.unlink()
            if has_succeeded:
                future.set_result(value)
            else:
                future.set_exception(value)

    def _fail(self, error: Exception) -> None:
        for future in list(self.futures.values()):
            future.set_exception(error)
        self.futures.clear()

    def _check_workers(self) -> None:
        """Put back what workers that are gone had taken. Before an array job counts as ended, squeue is asked twice,
        with results collected in between."""
        running = self._running_tasks()
        if running is not None and not running:
            self._collect_results()
            running = self._running_tasks()
            if running is not None and not running and self.futures:
                self._fail(
                    UserError(
                        f"the array job {self.job} has ended before its work was done; look into"
                        f" {self.folder}/worker-*.log, then run the same command again"
                    )
                )
                return
        for taken in (self.folder / "taken").glob("*@*"):
            name, _, worker = taken.name.partition("@")
            if name not in self.futures:
                taken.unlink(missing_ok=True)  # its result is here: the worker died before it could remove the file
                continue
            why = self._why_gone(worker, running)
            if why and not (self.folder / "done" / name).exists():
                self._put_back(taken, name, worker, why)

    def _running_tasks(self) -> set[str] | None:
        """Tasks of the array job that run or wait: TASK, with a + if it has a process. None: squeue fails, which
        means nothing, because the controller may be busy or restarting."""
        command = ["squeue", "--noheader", "--array", "--jobs", self.job, "--format=task %K %T"]
        try:
            squeue = subprocess.run(command, capture_output=True, text=True, timeout=60)
            message = squeue.stderr.strip() if squeue.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            squeue, message = None, str(error)
        if squeue is not None and not squeue.returncode:
            self.last_answer = time.time()
            return {_task_of(line.split()) for line in squeue.stdout.splitlines() if line.strip()}
        if "invalid job id" in message.lower():
            return set()
        if time.time() - self.last_answer > SQUEUE_PATIENCE:
            print(
                f"WARNING executor: slurm: squeue has failed for {SQUEUE_PATIENCE:.0f} s ({message}); waiting",
                flush=True,
            )
            self.last_answer = time.time()
        return None

    def _why_gone(self, worker: str, running: set[str] | None) -> str | None:
        """Why a worker cannot finish its task, or None."""
        path = self.folder / "workers" / worker
        try:
            host, process, start = path.read_text().split()
            sign = path.stat().st_mtime_ns
        except (OSError, ValueError):
            host, process, start, sign = "", "0", "0", 0  # not visible yet on this file system
        if host == socket.gethostname() and str(born(int(process))) != start:
            return "its process is gone"
        number = worker.split("-")[1]
        if running is not None and "?" not in running and f"{number}+" not in running:
            return f"task {number} of the array job is not running any more"
        if worker not in self.signs or self.signs[worker][0] != sign:
            self.signs[worker] = (sign, time.time())
        silence = time.time() - self.signs[worker][1]
        return f"it has given no sign of life for {silence:.0f} s" if silence > SILENCE else None

    def _put_back(self, taken: Path, name: str, worker: str, why: str) -> None:
        self.losses[name] += 1
        log = self.folder / f"worker-{worker.split('-')[1]}.log"
        if self.losses[name] == MAX_LOSSES:
            self._fail(
                UserError(
                    f"{MAX_LOSSES} workers of the array job were lost with the same unit of work, the last because"
                    f" {why}; look into {log}, give them more memory (SBATCH_MEM_PER_CPU) or a smaller unit_bytes, and"
                    " run the same command again"
                )
            )
            return
        print(f"WARNING worker {worker} of the array job is lost: {why} ({log}); its unit is done again", flush=True)
        try:
            taken.rename(self.folder / "todo" / name)
        except FileNotFoundError:
            return  # it was alive, and finished at this moment


def _task_of(words: list[str]) -> str:
    """A line of squeue, `task NUMBER STATE`, as an entry of `_running_tasks`; `?` for any other line."""
    if len(words) != 3 or words[0] != "task":
        return "?"
    return f"{words[1]}+" if words[2] in ALIVE else words[1]


def _end_earlier_jobs(folder: Path) -> None:
    """Cancel array jobs of runs that were killed before they could, and remove their tasks."""
    for path in folder.glob("*/job"):
        subprocess.run(["scancel", path.read_text()], capture_output=True)
    if folder.exists():
        shutil.rmtree(folder)
