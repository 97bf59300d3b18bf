#!/usr/bin/env python3
"""Starts one rank of a stage under Slurm: `rank.py pipeline/KIND.py WORD...`, or any other words after `python`.
Slurm's names for rank and size become torch's, signals are forwarded to the rank, and the exit code is that of the rank
(128 + N: killed by signal N).

If the rank fails, $ALMA_ENDED/rank-N records it (host, process, code) before srun sends SIGTERM to the other ranks,
which then know that this is not a request to stop (pipeline/core/stop.py). A shell cannot do this: bash 5.2 loses the
exit code of a process that ends while a signal interrupts `wait`.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

GOOD = (0, 75, 76)  # done, stopped, ended because of another rank


def environment() -> dict[str, str]:
    """The rank's environment: torch's variables, unless it is the only one."""
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    size, nodes = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("SLURM_JOB_NUM_NODES", 1))
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", nodes))  # a stage may use fewer nodes than its job has
    variables = dict(os.environ)
    for name in (*names, "LOCAL_WORLD_SIZE"):
        variables.pop(name, None)
    if size > 1:
        variables |= {name: os.environ[slurm] for name, slurm in names.items()}
        variables["LOCAL_WORLD_SIZE"] = str(size // nodes)
    return variables


def die_with(parent: int) -> None:
    """In the rank, before its program: the kernel kills it when this process is killed (prctl(2), PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main(words: list[str]) -> int:
    signals: list[int] = []
    child = None

    def pass_on(number, frame) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    here = os.getpid()
    child = subprocess.Popen([sys.executable, *words], env=environment(), preexec_fn=lambda: die_with(here))
    for number in list(signals):  # received before the rank was started
        child.send_signal(number)
    code = child.wait()
    code = code if code >= 0 else 128 - code
    if code not in GOOD and os.environ.get("ALMA_ENDED"):
        rank = os.environ.get("SLURM_PROCID", "0")
        note = Path(os.environ["ALMA_ENDED"]) / f".{rank}"
        with contextlib.suppress(FileNotFoundError):  # the job has ended before this rank, and reads it no more
            note.write_text(f"{socket.gethostname()} {child.pid} {code}\n", encoding="utf-8")
            note.rename(note.with_name(f"rank-{rank}"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
