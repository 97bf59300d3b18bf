"""Engines for many machines, with the one method that Pool needs: `submit(function, *arguments)` gives a
concurrent.futures.Future.

    executor: ray      tasks of a Ray cluster: the one that RAY_ADDRESS names, or one on this machine (pip install
                       'alma[ray]')
    executor: slurm    an array job of `workers` tasks (launch/slurm/units.sbatch; partition, account and time by
                       sbatch's own SBATCH_* variables), which take work from a folder

The stage's process keeps the list of what is to be done, checks and joins the results as it does for its own processes;
the folder of the run must be on a file system that all machines share. Functions publish what they make as whole files,
so work that is done twice does no harm.
"""

import concurrent.futures
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.lock import ALIVE, born

BEAT = 5.0  # seconds between signs of life of the stage and of workers, and looks at the array job
ALONE = 120.0  # seconds without a sign of life after which the stage, or a worker, is taken for dead
PATIENCE = 300.0  # seconds for which squeue may fail before a word about it
MOST = 3  # workers that may be lost with the same unit of work
ROOT = Path(__file__).parents[3]


def _call(folder: str, function, arguments):
    from pipeline.data.cleaning.unit_files import without_pandas

    without_pandas()
    os.chdir(folder)  # relative paths are the stage's
    return function(*arguments)


class Ray:
    def __init__(self, workers: int | None):
        try:
            import ray
        except ImportError:
            raise UserError(
                "executor: ray needs Ray, which is not installed; run pip install 'alma[ray]', or say executor: local"
            ) from None
        self.ray = ray
        # Ray hides exceptions of import paths: workers must find this very program, also where it is not installed.
        ray.init(
            num_cpus=workers if "RAY_ADDRESS" not in os.environ else None,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}},
        )
        self.workers = workers or int(ray.cluster_resources().get("CPU", 1))
        self.task = ray.remote(num_cpus=1)(_call)

    def submit(self, function, *arguments) -> concurrent.futures.Future:
        return self.task.remote(os.getcwd(), function, arguments).future()

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self.ray.shutdown()


class Slurm:
    """Tasks are files in todo/; a worker takes one by renaming it to taken/TASK@WORKER, and writes its result to
    done/. Its sign of life is workers/WORKER. What a worker took that is gone is put back into todo/."""

    def __init__(self, workers: int | None, folder: Path):
        if not workers:
            raise UserError("executor: slurm needs `workers`: the number of tasks of the array job")
        if not shutil.which("sbatch"):
            raise UserError(
                "executor: slurm needs sbatch, which is not on the PATH; start the stage on a login node of the"
                " cluster, or say executor: local"
            )
        self.workers, self.number, self.futures, self.ended = workers, 0, {}, threading.Event()
        self.losses: Counter[str] = Counter()  # task -> workers that were lost while they had it
        self.signs: dict[str, tuple[int, float]] = {}  # worker -> its last sign of life, and when it was seen
        self.answered = time.time()
        _end_earlier(folder)
        self.folder = folder.absolute() / uuid.uuid4().hex[:12]
        for name in ("todo", "taken", "done", "workers"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "alive").touch()
        command = [
            "sbatch",
            "--parsable",
            f"--array=0-{workers - 1}",
            f"--output={self.folder}/worker-%a.log",
            str(ROOT / "launch/slurm/units.sbatch"),
            sys.executable,
            str(ROOT),
            str(self.folder),
        ]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise UserError(
                f"executor: slurm: sbatch refused the array job: {answer.stderr.strip() or answer.stdout.strip()}"
            )
        self.job = answer.stdout.strip().partition(";")[0]
        write_atomic(self.folder / "job", self.job)
        # It reads until this process writes or ends, also by SIGKILL: then the array job would wait for two minutes.
        self.reaper = subprocess.Popen(
            ["sh", "-c", 'read -r ended; [ -n "$ended" ] || scancel "$0"', self.job],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def submit(self, function, *arguments) -> concurrent.futures.Future:
        name, future = f"{self.number:08d}", concurrent.futures.Future()
        self.number += 1
        self.futures[name] = future
        written = self.folder / name
        written.write_bytes(pickle.dumps((os.getcwd(), function, arguments)))
        written.rename(self.folder / "todo" / name)  # whole or not there; not synced, for nobody reads it after a crash
        return future

    def _watch(self) -> None:
        looked = time.time()
        while not self.ended.wait(0.05):
            try:
                self._collect()
                if time.time() - looked > BEAT:
                    looked = time.time()
                    (self.folder / "alive").touch()
                    self._look()
            except Exception as error:  # of this thread: the stage waits for futures
                self._fail(error)
                return

    def _look(self) -> None:
        """Which workers are gone: what they had is put back. An array job that has ended is looked at twice."""
        running = self._running()
        if running is not None and not running:
            self._collect()
            running = self._running()
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
                taken.unlink(missing_ok=True)  # its result is here, and it died before it could clear up
                continue
            why = self._gone(worker, running)
            if why and not (self.folder / "done" / name).exists():
                self._put_back(taken, name, worker, why)

    def _running(self) -> set[str] | None:
        """Tasks of the array job that have a process, or wait for one: TASK or TASK+ with a process. None: Slurm does
        not say. A command that fails is no news: the controller may be busy or starting again."""
        command = ["squeue", "--noheader", "--array", "--jobs", self.job, "--format=task %K %T"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
            failed = answer.stderr.strip() if answer.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            answer, failed = None, str(error)
        if answer is not None and not answer.returncode:
            self.answered = time.time()
            lines = [line.split() for line in answer.stdout.splitlines() if line.strip()]
            return {
                f"{words[1]}{'+' * (words[2] in ALIVE)}" if words[0] == "task" and len(words) == 3 else "?"
                for words in lines
            }
        if "invalid job id" in failed.lower():
            return set()
        if time.time() - self.answered > PATIENCE:
            print(f"WARNING executor: slurm: squeue has failed for {PATIENCE:.0f} s ({failed}); waiting", flush=True)
            self.answered = time.time()
        return None

    def _gone(self, worker: str, running: set[str] | None) -> str | None:
        """Why a worker cannot finish what it took, or None."""
        path = self.folder / "workers" / worker
        try:
            host, process, start = path.read_text().split()
            sign = path.stat().st_mtime_ns
        except (OSError, ValueError):
            host, process, start, sign = "", "0", "0", 0  # not seen yet on this file system
        if host == socket.gethostname() and str(born(int(process))) != start:
            return "its process is gone"
        task, number = worker.split("-")[:2]
        if running is not None and "?" not in running and f"{number}+" not in running:
            return f"task {number} of the array job runs no more"
        if worker not in self.signs or self.signs[worker][0] != sign:
            self.signs[worker] = (sign, time.time())
        silent = time.time() - self.signs[worker][1]
        return f"it has given no sign of life for {silent:.0f} s" if silent > ALONE else None

    def _put_back(self, taken: Path, name: str, worker: str, why: str) -> None:
        self.losses[name] += 1
        log = self.folder / f"worker-{worker.split('-')[1]}.log"
        if self.losses[name] == MOST:
            self._fail(
                UserError(
                    f"{MOST} workers of the array job were lost with the same unit of work, the last because {why};"
                    f" look into {log}, give them more memory (SBATCH_MEM_PER_CPU) or a smaller unit_bytes, and run the"
                    " same command again"
                )
            )
            return
        print(f"WARNING worker {worker} of the array job is lost: {why} ({log}); its unit is done again", flush=True)
        try:
            taken.rename(self.folder / "todo" / name)
        except FileNotFoundError:
            return  # it lived, and finished at this moment

    def _fail(self, error: Exception) -> None:
        for future in list(self.futures.values()):
            future.set_exception(error)
        self.futures.clear()

    def _collect(self) -> None:
        for path in sorted((self.folder / "done").glob("[0-9]*")):
            future = self.futures.pop(path.name, None)
            if future is None:  # done twice: its first worker was only silent
                path.unlink()
                continue
            good, value = pickle.loads(path.read_bytes())  # written by our own worker into the run's own folder
            path.unlink()
            (future.set_result if good else future.set_exception)(value)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        """End the array job: nothing is waited for any more, and tasks that are still in the queue have no work."""
        self.ended.set()
        self.watcher.join()
        (self.folder / "stop").touch()
        subprocess.run(["scancel", self.job], capture_output=True)
        self.reaper.communicate(b"ended\n")


def _end_earlier(folder: Path) -> None:
    """Cancel array jobs of runs that were killed before they could, and remove their tasks."""
    for path in folder.glob("*/job"):
        subprocess.run(["scancel", path.read_text()], capture_output=True)
    if folder.exists():
        shutil.rmtree(folder)


def work(folder: Path) -> None:
    """A worker of an array job: take what is there until the stage says stop, or is silent for two minutes."""
    me = f"task-{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}-{uuid.uuid4().hex[:8]}"
    sign = folder / "workers" / me
    write_atomic(sign, f"{socket.gethostname()} {os.getpid()} {born(os.getpid())}")
    threading.Thread(target=_live, args=(folder, sign), daemon=True).start()
    while not (folder / "stop").exists() and folder.exists():
        for path in sorted((folder / "todo").glob("[0-9]*")):
            taken = folder / "taken" / f"{path.name}@{me}"
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue  # another worker was faster
            try:
                result = (True, _call(*pickle.loads(taken.read_bytes())))
            except Exception as error:
                # it is the stage's to judge: a damaged file, a full disk, a mistake in the recipe
                result = (False, error)
            if not folder.exists():
                return  # the stage has ended
            write_atomic(folder / "done" / path.name, pickle.dumps(result))
            taken.unlink(missing_ok=True)
            break
        else:
            time.sleep(0.1)


def _live(folder: Path, sign: Path) -> None:
    """Give signs of life, and end this worker when the stage gives none, whatever unit it is at."""
    seen, silent = None, time.time()
    while True:
        time.sleep(BEAT)
        try:
            os.utime(sign)
            beat = (folder / "alive").stat().st_mtime_ns
        except OSError:
            beat = seen
            if not folder.exists():
                os._exit(0)
        if beat != seen:
            seen, silent = beat, time.time()  # by this machine's own clock
        elif time.time() - silent > ALONE:
            os._exit(1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
