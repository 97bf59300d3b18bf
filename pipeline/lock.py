"""One writer per stage folder, on one host or on a file system that many share."""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from pipeline.errors import UserError
from pipeline.files import now, write_json

HEARTBEAT_SECONDS = 5
# A holder on another host is taken for dead when its heartbeat is older than this. File systems shared by nodes may
# show a change of mtime up to a minute late (NFS attribute caches: 60 s by default, nfs(5) acdirmax).
DEAD_AFTER_SECONDS = 120


class Lock:
    """One writer per stage folder, also on file systems shared by several hosts: a file made by link(2), with a
    heartbeat."""

    def __init__(self, folder: Path):
        self.path = folder / "lock.json"
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()

    def acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f".lock.{self.token}")
        job = os.environ.get("SLURM_JOB_ID")
        write_json(
            mine,
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "born": _born(os.getpid()),
                "job": job,
                "token": self.token,
                "since": now(),
            },
        )
        try:
            for _ in range(20):
                try:
                    os.link(mine, self.path)  # atomic on NFS too, unlike O_EXCL before NFSv3
                    threading.Thread(target=self._beat, daemon=True, name="lock heartbeat").start()
                    return
                except FileExistsError:
                    self._take_over_or_refuse()
            raise UserError(
                f"{self.path}: changes hands too quickly; another run is starting at the same time, try again"
            )
        finally:
            mine.unlink()

    def _take_over_or_refuse(self) -> None:
        # Taking over is itself done by one at a time (flock), who looks again: else two takers could both remove a
        # lock, one of them a new one.
        with open(self.path.with_name(".takeover"), "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
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

    def release(self) -> None:
        self._stop.set()
        try:
            if json.loads(self.path.read_text())["token"] == self.token:
                self.path.unlink()
        except FileNotFoundError:
            return


def lock_holder(folder: Path) -> dict | None:
    """Who holds a stage folder: host, pid, job, since, `age` in seconds since the last heartbeat, and whether it is
    dead. None if free."""
    path = folder / "lock.json"
    try:
        holder = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    if holder["host"] == socket.gethostname():
        dead = _born(holder["pid"]) != holder["born"]
    else:
        dead = age > DEAD_AFTER_SECONDS
    return {**holder, "age": age, "dead": dead}


def describe_holder(holder: dict) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    return (
        f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}, last sign of life"
        f" {holder['age']:.0f} s ago"
    )


def _born(pid: int) -> int | None:
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
