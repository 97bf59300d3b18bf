"""Processes that a reward has started, ended with all that they started (on Linux; elsewhere none are found)."""

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

ROUNDS = 50  # of looking for processes that were started while others were being ended


def adopt_orphans() -> None:
    """Have this process become the parent of its descendants' orphans, so that none of them gets out of sight (Linux:
    PR_SET_CHILD_SUBREAPER)."""
    if sys.platform == "linux":
        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1)


def children(pid: int) -> list[int]:
    """Processes whose parent is `pid`; also those that have ended and that it has not waited for."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in path.read_text().split()]
    return found


def _is_running(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def end_children(pid: int) -> None:
    """End all descendants of a process."""
    for _ in range(ROUNDS):
        running = [child for child in children(pid) if _is_running(child)]
        if not running:
            break
        for child in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGSTOP)  # so that it starts no further ones
            end_children(child)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
