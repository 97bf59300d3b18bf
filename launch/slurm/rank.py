#!/usr/bin/env python3
"""Starts one rank of a stage under Slurm: `rank.py pipeline/KIND.py WORD...`. Signals are forwarded to the rank, and
the exit code is that of the rank (128 + N: killed by signal N).

If the rank fails, $ALMA_ENDED/rank-N records it (host, process, code) before srun sends SIGTERM to the other ranks,
which then know that this is not a request to stop (pipeline/core/stop.py). A shell cannot do this: bash 5.2 loses the
exit code of a process that ends while a signal interrupts `wait`.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

GOOD = (0, 75, 76)  # done, stopped, ended because of another rank


def main(words: list[str]) -> int:
    signals: list[int] = []
    child = None

    def pass_on(number, frame) -> None:
        signals.append(number)
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    child = subprocess.Popen([sys.executable, *words])
    for number in list(signals):  # received before the rank was started
        child.send_signal(number)
    code = child.wait()
    code = code if code >= 0 else 128 - code
    if code not in GOOD and os.environ.get("ALMA_ENDED"):
        rank = os.environ.get("SLURM_PROCID", "0")
        note = Path(os.environ["ALMA_ENDED"]) / f".{rank}"
        note.write_text(f"{socket.gethostname()} {child.pid} {code}\n", encoding="utf-8")
        note.rename(note.with_name(f"rank-{rank}"))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
