"""One writer per stage folder, on one host or on a file system that several hosts share."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import now, read_record, write_json

HEARTBEAT_SECONDS = 5
# A holder on another host counts as dead when its heartbeat is older than this. File systems shared by nodes may
# show a change of mtime up to a minute late (NFS attribute caches: 60 s by default, nfs(5) acdirmax).
DEAD_AFTER_SECONDS = 120
# The same for a holder whose job Slurm has ended: it would be alive only on a node that Slurm has lost contact with.
ENDED_AFTER_SECONDS = 15
# Of `squeue --format=%T`: states of a job whose processes may still run.
ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING", "RESIZING"}
HOLDER = {"host": str, "pid": int, "born": (int, type(None)), "token": str, "since": str}
MIN_BEATS = 2  # new beats that prove that a holder is alive; the last one of a dead holder may become visible late


class Lock:
    """The lock of a stage folder: a file created by link(2), with a heartbeat."""

    def __init__(self, folder: Path):
        self.path = folder / "lock.json"
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock. Raises UserError if a running process holds it. Waits for a holder that Slurm has ended, or
        that is of this very job, until it is known whether it is alive."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f".lock.{self.token}")
        write_json(mine, _me() | {"token": self.token, "since": now()})
        try:
            for _ in range(20):
                try:
                    os.link(mine, self.path)  # atomic on NFS too, unlike O_EXCL before NFSv3
                    threading.Thread(target=self._beat, daemon=True, name="lock heartbeat").start()
                    _sweep(self.path.parent)
                    return
                except FileExistsError:
                    self._wait()
                    self._take_over_or_refuse()
            raise UserError(
                f"{self.path}: was taken and released several times meanwhile; another run is starting at the same"
                " time, try again"
            )
        finally:
            mine.unlink(missing_ok=True)

    def _wait(self) -> None:
        """Wait while a holder may be of an earlier start of this job, or of a job that has ended, and has not been
        silent for long enough."""
        beats: dict[str, set[float]] = {}  # by holder
        while (holder := lock_holder(self.path.parent)) and not holder["dead"] and holder["waits"]:
            if holder["token"] not in beats:
                print(f"{self.path.parent}: waiting for {describe_holder(holder)}: {holder['waits']}", flush=True)
            seen = beats.setdefault(holder["token"], set())
            seen.add(holder["beat"])
            # A holder of this start of this job that keeps beating is not from an earlier one: two runs were started.
            if not holder["ended"] and len(seen) > MIN_BEATS:
                return
            time.sleep(1)

    def _take_over_or_refuse(self) -> None:
        # One process at a time takes over, and looks again first. Otherwise two could both remove a lock, one of them a
        # new one.
        with _one_at_a_time(self.path.with_name(".takeover")):
            holder = lock_holder(self.path.parent)
            if holder is None:
                return
            if not holder["dead"]:
                raise UserError(
                    f"{self.path.parent}: another run is writing here: {describe_holder(holder)}; wait for it, or end"
                    " it and run the same command again"
                )
            self.path.unlink()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if json.loads(self.path.read_text())["token"] != self.token:
                    print(
                        f"{self.path}: another run took this lock over while this one was suspended; ending without"
                        " touching its files",
                        flush=True,
                    )
                    os._exit(1)
                os.utime(self.path)
            except FileNotFoundError:
                return
            except OSError:
                continue  # a file server that does not answer for a while; the next beat may be in time

    def release(self) -> None:
        self._stop.set()
        try:
            if json.loads(self.path.read_text())["token"] == self.token:
                self.path.unlink()
        except FileNotFoundError:
            return


@contextlib.contextmanager
def _one_at_a_time(path: Path):
    """Hold a file that exists only while a process holds it, or was killed while it did."""
    while True:
        with open(path, "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            # the previous holder may have removed it, and another process may have created a new one
            if not _is_at(path, guard):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _is_at(path: Path, guard) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(guard.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sweep(folder: Path) -> None:
    """Remove files of killed processes that were taking the lock. This process holds it."""
    takeover = folder / ".takeover"
    if takeover.exists():
        with open(takeover, "w") as guard, contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(takeover, guard):
                takeover.unlink()
    for path in [*folder.glob(".lock.*"), *folder.glob("..lock.*.tmp")]:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > DEAD_AFTER_SECONDS or _is_orphan(path):
                path.unlink()


def _is_orphan(path: Path) -> bool:
    """Whether a file for taking the lock belongs to a process of this host that has ended."""
    try:
        taker = json.loads(path.read_text())
        return taker["host"] == socket.gethostname() and born(taker["pid"]) != taker["born"]
    except (OSError, ValueError, KeyError):
        number = re.search(r"\.(\d+)\.tmp$", path.name)
        return number is not None and born(int(number[1])) is None


def _me() -> dict:
    """What identifies this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": born(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }


def lock_holder(folder: Path) -> dict | None:
    """The process that holds a stage folder, or None: host, pid, job, since, `beat` (time of its last heartbeat), `age`
    (seconds since then), whether it is `dead`, whether Slurm has `ended` it, and why a start of this process `waits`
    for it, or None."""
    path = folder / "lock.json"
    try:
        beat = path.stat().st_mtime
        holder = read_record(path, HOLDER)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a lock file of alma; remove it") from None
    except ValueError:  # damaged: the holder is not known
        holder = {"host": "an unknown host", "pid": 0, "born": None, "token": "", "since": "an unknown time"}
    age = time.time() - beat
    holder |= {"age": age, "beat": beat, "ended": False, "waits": None}
    if holder["host"] == socket.gethostname():
        return {**holder, "dead": holder["born"] is None or born(holder["pid"]) != holder["born"]}
    holder["dead"] = age > DEAD_AFTER_SECONDS
    if not holder["dead"]:
        ended, why = _of_slurm(holder)
        dead = ended and age > ENDED_AFTER_SECONDS
        holder |= {"ended": ended, "waits": why, "dead": dead}
    return holder


def _of_slurm(holder: dict) -> tuple[bool, str | None]:
    """Whether Slurm has ended a holder on another host, and why a start of this process should wait for it."""
    job, cluster = holder.get("job"), holder.get("cluster")
    here = _me()
    if not job or (cluster and here["cluster"] and cluster != here["cluster"]):
        return False, None
    if job == here["job"]:
        if here["restarts"] > holder.get("restarts", 0):
            return True, "it is of an earlier start of this job"
        return False, "it is of this job"
    if job_ended(job):
        return True, f"job {job} has ended"
    return False, None


def job_ended(job: str) -> bool:
    """Whether Slurm says that no process of a job is running. False if Slurm cannot be asked."""
    if not shutil.which("squeue"):
        return False
    command = ["squeue", "--noheader", "--jobs", job, "--format=%T", "--states=all"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if answer.returncode:
        return "invalid job id" in answer.stderr.lower()  # it ended so long ago that Slurm no longer has it
    return not ALIVE & set(answer.stdout.upper().split())


def describe_holder(holder: dict) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return (
        f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}, last sign of life"
        f" {holder['age']:.0f} s ago"
    )


def born(pid: int) -> int | None:
    """When a process of this host started, in clock ticks since boot, so that a reused pid is not taken for the old
    process. None: no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc (macOS): existence is all that can be asked
            os.kill(pid, 0)
            return 0
        except ProcessLookupError:
            return None
    return None if fields[0] in "ZX" else int(fields[19])
