"""A heartbeat file of every rank, and a thread in each rank that reads those of others: hangs and dead ranks are found
and named, and the job ends instead of waiting.

    logs/heartbeat/rank-00003.json     a heartbeat (rank_states.py says what is in it)
    logs/stacks-rank-3.txt             Python stacks of all threads, after a hang

Rank 0 and the last rank read all files, the others only those of these two, so that the cost grows with the number of
ranks and not with its square. A reader counts time on its own clock, from the moment at which it saw a file change; it
does not count time in which it was suspended itself (SIGSTOP, `scontrol suspend`) or could not write.

* No rank has entered a phase for `watch.hang` seconds: a hang. The ranks that the others wait for are named, all ranks
  write their stacks and end.
* A rank gave no heartbeat for `watch.lost` seconds, or its process is gone from this host: it is lost, the others end.
* A rank ended with an exception or was asked to stop: the others give their own main thread ten seconds to end by
  itself, and then end too.

A main thread that is blocked in a collective does not hold the interpreter lock (gloo and NCCL release it), so this
thread still runs and can end the process.
"""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from pipeline.core import distributed
from pipeline.core.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError
from pipeline.core.lock import born
from pipeline.core.output import Output
from pipeline.core.stop import write_requeue_marker
from pipeline.train import phases
from pipeline.train.rank_states import RankStates

# Phases of a step, which may take `watch.hang` seconds; all others may take `watch.start`.
STEP_PHASES = {"data", "forward", "backward", "reduce", "update", "pipeline", "log"}
# Rank 0 works and the others wait for a file, however long it takes; only lost ranks are looked for.
UNLIMITED_PHASES = {"prepare"}
INTERVAL = 1.0  # seconds between heartbeats
GRACE = 10.0  # seconds for a main thread to end by itself
# Seconds between the last heartbeat and the end of the process, in which every rank reads it and writes its stacks
# before a launcher ends them all.
LINGER = 4.0
# Parts of messages of collectives that fail because another rank is gone.
CONNECTION_ERRORS = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "Dist",
    "gloo",
    "Gloo",
    "NCCL",
    "ProcessGroup",
    "TCPStore",
)


class Watch:
    """`with Watch(output, config.watch):` around the work of a stage. In one process it finds hangs; in several it also
    watches the others."""

    def __init__(self, output: Output, config):
        self.output, self.config = output, config
        self.rank, self.world = distributed.rank(), distributed.world()
        self.folder = output.path / "logs" / "heartbeat"
        self.own = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": born(os.getpid()),
            "space": _pid_namespace(),
            "launch": _launch(),
            "stage": output.stage,
        }
        self.states = RankStates(self.own, self.world)
        # a round of reading takes 36 ms of CPU time at 512 ranks, 0.6 ms at 2
        self.interval = min(max(INTERVAL, self.world / 64), config.hang / 4, config.lost / 4)
        observers = {0, self.world - 1}
        self.is_observer = self.rank in observers
        watched = range(self.world) if self.is_observer else sorted(observers)
        self.watched = [rank for rank in watched if rank != self.rank]
        self.beats = 0
        self.ending: dict | None = None
        self.first_step: int | None = None  # of this process: compiling makes it slow
        self.old_launch: dict[int, str] = {}  # rank -> file that an earlier launch left
        self.over, self.leaving = threading.Event(), threading.Event()

    # ---- the main thread ---------------------------------------------------------------------------------------------

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._beat()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()
        return self

    def __exit__(self, kind, error, trace):
        if self.leaving.is_set():
            self.thread.join()  # it ends the process, with its own message and code
        self.over.set()
        self.thread.join()
        if kind is None:
            self.ending = {"reason": "done"}
        elif isinstance(error, Stopped):
            self.ending = {"reason": "stopped", "text": "was asked to stop", "code": EXIT_STOPPED}
        elif self.world > 1:
            cause = self._cause_in_another_rank(error)
            if cause:
                self._leave(cause)
            code = EXIT_USER if isinstance(error, UserError) else 1
            self.ending = {"reason": "failed", "text": f"{kind.__name__}: {error}", "code": code}
        self._beat()
        if self.world > 1 and kind is not None and self.own["launch"] is None:
            for _ in range(3):  # a rank that has just started takes the first heartbeat for one of an earlier launch
                time.sleep(self.interval)
                self._beat()

    def _cause_in_another_rank(self, error: BaseException) -> dict | None:
        """A collective usually fails because another rank is gone. The ending of that rank, if it appears in time."""
        text = f"{type(error).__name__} {error}"
        if not any(part in text for part in CONNECTION_ERRORS):
            return None
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            self.read_others()
            ending = self.states.ending_of_another() or self._lost_or_ended(min(self.config.lost, GRACE / 2))
            if ending:
                return ending
            time.sleep(self.interval / 2)
            self.states.clock += self.interval / 2
            self._beat()
        return None

    # ---- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        before = time.monotonic()
        while not self.over.wait(self.interval):
            now = time.monotonic()
            if self._beat():
                self.states.clock += min(now - before, 2 * self.interval)
            before = now
            self.read_others()
            ending = self._find_ending()
            if ending is None:
                continue
            if ending["reason"] in ("failed", "stopped") and self.over.wait(GRACE):
                return
            self.leaving.set()
            self._leave(ending)

    def _find_ending(self) -> dict | None:
        """Why this process must end, or None."""
        ending = self.states.ending_of_another() or self._lost_or_ended(self.config.lost)
        if ending is None and self.is_observer:
            limits = {"hang": self.config.hang, "start": self.config.start}
            ending = self.states.hang(limits, self.interval)
        return ending

    def _lost_or_ended(self, limit: float) -> dict | None:
        """A rank that is gone may have written an ending before. It shows when the files are read again, which matters
        if this rank was suspended between the first reading and the finding."""
        if self.states.lost(limit) is None:
            return None
        self.read_others()
        return self.states.ending_of_another() or self.states.lost(limit)

    def _beat(self) -> bool:
        """Write this rank's file; False if the file system refused it."""
        self.beats += 1
        step, phase, place = phases.step, phases.name, phases.place
        if self.first_step is None and step:
            self.first_step = step
        heartbeat = self.own | {
            "step": step,
            "phase": phase,
            "place": place,
            "seconds": round(time.perf_counter() - phases.since, 1),
            "patience": self._patience(step, phase),
            "beats": self.beats,
            "ending": self.ending,
        }
        self.states.update(self.rank, heartbeat)
        path = self._path(self.rank)
        try:  # without fsync: a heartbeat is worth nothing after a crash
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(heartbeat))
            os.replace(temporary, path)
            return True
        except OSError:
            return False

    def _patience(self, step: int, phase: str) -> str:
        """Which limit applies to a phase."""
        if phase in UNLIMITED_PHASES:
            return "none"
        if phase in STEP_PHASES and self.first_step is not None and step > self.first_step:
            return "hang"
        return "start"

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def read_others(self) -> None:
        """Read the heartbeats of the ranks that this one watches."""
        for rank in self.watched:
            try:
                text = self._path(rank).read_text()
                heartbeat = json.loads(text)
            except (OSError, json.JSONDecodeError):
                continue
            if rank not in self.states.newest and not self._is_of_this_launch(heartbeat):
                # without a name of the launch, the first content that is seen may be an earlier launch's
                if self.old_launch.setdefault(rank, text) == text:
                    continue
            self.states.update(rank, heartbeat)

    def _is_of_this_launch(self, heartbeat: dict) -> bool:
        return heartbeat["launch"] is not None and heartbeat["launch"] == self.own["launch"]

    # ---- ending ------------------------------------------------------------------------------------------------------

    def _leave(self, ending: dict) -> None:
        """Report an ending, write the marker for the job script, and end this process, whatever its main thread is
        blocked in."""
        self.ending = ending
        self._beat()
        if ending["reason"] == "hang":
            self._write_stacks()
        # Only one rank prints, and it must be alive.
        if self.rank == (0 if ending["rank"] else self.world - 1):
            os.write(2, f"{self.output.stage}: {ending['message']}\n".encode())
        if self.is_observer and ending["reason"] in ("hang", "lost"):
            details = {key: ending[key] for key in ("rank", "phase", "message")}
            with contextlib.suppress(OSError):
                write_requeue_marker(self.output, ending["reason"], ending["step"], **details)
        deadline = time.monotonic() + (LINGER if self.world > 1 else 0)
        while time.monotonic() < deadline:
            time.sleep(self.interval)
            self._beat()
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        self.output.close()  # releases the lock, so that the next run need not find out that its holder is dead
        os._exit(ending["code"])

    def _write_stacks(self) -> None:
        path = self.output.path / "logs" / f"stacks-rank-{self.rank}.txt"
        with contextlib.suppress(OSError), open(path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)


def _launch() -> str | None:
    """A name that all processes of this launch share and no other launch has; None if the launcher gives none."""
    launch = os.environ.get("ALMA_LAUNCH")  # first: one step of Slurm may be an `alma run` with several launches
    if launch:
        return launch
    if os.environ.get("SLURM_STEP_ID") and os.environ.get("SLURM_JOB_ID"):
        return ".".join(os.environ.get(f"SLURM_{key}", "0") for key in ("JOB_ID", "RESTART_COUNT", "STEP_ID"))
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if run == "none" else f"{run}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"


def _pid_namespace() -> str | None:
    """Process ids mean the same to two processes only in one namespace, and each rank may have its own container. None:
    unknown."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def wait_for(path: Path) -> None:
    """Wait until the main process has written `path`, however long that takes. Its heartbeat is watched meanwhile; a
    collective would give up after its timeout."""
    phases.enter("prepare")
    while not path.exists():
        time.sleep(0.5)
