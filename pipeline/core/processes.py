"""Processes of this machine: the ranks of a stage, started and stopped together, and workers of a pool. None of them
outlives its parent, however the parent ends."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

from pipeline.core.errors import EXIT_STOPPED

# Seconds that the other ranks have to end by themselves after one has failed: their watchdog (train/heartbeat.py) takes
# up to fifteen to find out why, and a rank that is still starting has none.
KILL_AFTER = 40.0
FOR_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # signals that workers leave to them


def cores() -> int:
    """Processor cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the process `parent` ends, also by SIGKILL; end now if it has ended
    already.

    The kernel looks at the thread that started this process, so a main thread has to be the one (Linux: prctl(2)). Call
    it between fork and exec (`preexec_fn`), and there is no moment at which the parent's end goes unnoticed.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def die_with_launcher() -> None:
    """The same for a rank of torchrun or `accelerate launch`, which leave their ranks behind when they get SIGKILL."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return  # not Linux
    if any(name in command for name in (b"torchrun", b"torch.distributed", b"accelerate", b"deepspeed")):
        die_with_parent(parent)
    elif parent == 1 and os.environ.get("TORCHELASTIC_RUN_ID"):
        os._exit(1)  # the launcher was killed while this process was starting


@contextlib.contextmanager
def signals_held():
    """Context for starting workers of a pool, or ranks: they start with signals blocked, so that none ends them while
    they are still importing; `begin_worker` or `stop.begin` unblocks them. This process gets the signals that came
    meanwhile at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_PARENTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker() -> None:
    """To be called first in a worker of a pool: it ends with its parent, and ignores signals that the parent handles. A
    terminal and Slurm send them to all processes at once, and a worker that they end would look like one that was
    killed for its memory."""
    for number in FOR_PARENTS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FOR_PARENTS)
    parent = multiprocessing.parent_process()
    die_with_parent(parent.pid)
    if sys.platform != "linux":
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def kill_workers() -> None:
    """End the workers of a pool that lost one. concurrent.futures would send SIGTERM, which they ignore."""
    for child in multiprocessing.active_children():
        child.kill()


class Ranks:
    """One launch of a program on this machine, as `count` processes that know their rank.

    program: the words after `python`. Signals are sent to each rank, and exit codes are those of the ranks. torchrun is
    not used because it passes on only SIGTERM and SIGINT, kills ranks that have not saved within 30 s, turns every exit
    code except 0 into 1, and leaves its ranks behind when it is killed.
    """

    def __init__(self, program: list[str], count: int, environment: dict[str, str], stdout=None):
        self.ranks: list[subprocess.Popen] = []
        self.killed = False  # by `kill`
        parent = os.getpid()
        # The socket on which rank 0 will serve the ranks' store is opened here, so that no other process can take the
        # port in the seconds that the ranks need to start.
        store = socket.create_server(("127.0.0.1", 0), backlog=count) if count > 1 else None
        launch = uuid.uuid4().hex[:12]
        try:
            for rank in range(count):
                mine = dict(environment)
                if store:
                    port = str(store.getsockname()[1])
                    mine |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
                    mine |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                    mine |= {"ALMA_LAUNCH": launch, "ALMA_STORE": str(store.fileno())}
                process = subprocess.Popen(
                    [sys.executable, *program],
                    env=mine,
                    stdout=stdout,
                    stderr=subprocess.STDOUT if stdout else None,
                    pass_fds=(store.fileno(),) if store and rank == 0 else (),
                    preexec_fn=lambda: die_with_parent(parent),
                )
                self.ranks.append(process)
        except BaseException:
            self.kill()
            raise
        finally:
            if store:
                store.close()

    def send(self, number: int) -> None:
        """Send a signal to every rank that is running."""
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def kill(self) -> None:
        self.killed = True
        self.send(signal.SIGKILL)

    def wait(self) -> list[int]:
        """Exit codes by rank (negative: killed by that signal). When one rank fails, the others get KILL_AFTER seconds
        to end by themselves, with a reason, and are then killed."""
        try:
            failed = None
            while any(code is None for code in self._codes()):
                time.sleep(0.05)
                bad = [code for code in self._codes() if code not in (None, 0, EXIT_STOPPED)]
                if bad and failed is None:
                    failed = time.monotonic()
                if failed is not None and time.monotonic() - failed > KILL_AFTER:
                    self.send(signal.SIGKILL)
            return self._codes()
        except BaseException:
            self.kill()
            for rank in self.ranks:
                rank.wait()
            raise

    def _codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]
