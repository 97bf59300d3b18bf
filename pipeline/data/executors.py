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
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import write_atomic

BEAT = 5.0  # seconds between signs of life of the stage, and looks at the array job
ALONE = 120.0  # seconds without a sign of life after which a worker ends: the stage was killed
ROOT = Path(__file__).parents[2]


def _call(folder: str, function, arguments):
    from pipeline.data.outcomes import without_pandas

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
    """Tasks are files in todo/; a worker takes one by renaming it to taken/, and writes its result to done/."""

    def __init__(self, workers: int | None, folder: Path):
        if not workers:
            raise UserError("executor: slurm needs `workers`: the number of tasks of the array job")
        if not shutil.which("sbatch"):
            raise UserError(
                "executor: slurm needs sbatch, which is not on the PATH; start the stage on a login node of the"
                " cluster, or say executor: local"
            )
        self.workers, self.number, self.futures, self.ended = workers, 0, {}, threading.Event()
        self.folder = folder.absolute() / uuid.uuid4().hex[:12]
        for name in ("todo", "taken", "done"):
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
            self._collect()
            if time.time() - looked > BEAT:
                looked = time.time()
                (self.folder / "alive").touch()
                here = subprocess.run(["squeue", "--noheader", "--jobs", self.job], capture_output=True, text=True)
                if here.returncode or not here.stdout.strip():
                    self._collect()
                    for future in list(self.futures.values()):
                        future.set_exception(
                            UserError(
                                f"the array job {self.job} has ended before its work was done; look into"
                                f" {self.folder}/worker-*.log, then run the same command again"
                            )
                        )
                    self.futures.clear()

    def _collect(self) -> None:
        for path in sorted((self.folder / "done").glob("[0-9]*")):
            future = self.futures.pop(path.name, None)
            if future is None:
                continue
            good, value = pickle.loads(path.read_bytes())  # written by our own worker into the run's own folder
            path.unlink()
            (future.set_result if good else future.set_exception)(value)

    def shutdown(self, wait: bool = True, cancel_futures: bool = False) -> None:
        self.ended.set()
        self.watcher.join()
        (self.folder / "stop").touch()
        if not wait:
            subprocess.run(["scancel", self.job], capture_output=True)


def work(folder: Path) -> None:
    """A worker of an array job: take what is there until the stage says stop, or is silent for two minutes."""
    seen, silent = None, time.time()
    while not (folder / "stop").exists():
        beat = (folder / "alive").stat().st_mtime_ns
        if beat != seen:
            seen, silent = beat, time.time()  # by this machine's own clock
        elif time.time() - silent > ALONE:
            return
        for path in sorted((folder / "todo").glob("[0-9]*")):
            taken = folder / "taken" / path.name
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue  # another worker was faster
            try:
                result = (True, _call(*pickle.loads(taken.read_bytes())))
            except Exception as error:
                # it is the stage's to judge: a damaged file, a full disk, a mistake in the recipe
                result = (False, error)
            write_atomic(folder / "done" / path.name, pickle.dumps(result))
            taken.unlink()
            break
        else:
            time.sleep(0.1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
