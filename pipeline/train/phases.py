"""What this process is doing now. Read by the metrics (how long each phase of a step took) and by the heartbeat (where
a process hangs).

    enter("data", at=12)        # ends the phase before it
    enter("forward")
    take()                      # {"data": 0.0004, "forward": 0.31, ...}: seconds since the last call of take

On a GPU, work is queued: the host's time counts for the phase that waits for it, which is `reduce`, where losses and
norms are read.
"""

import time

step = 0
# Phases entered since the step began. All ranks enter the same ones in the same order, so this shows which is behind.
place = 0
name = "start"
since = time.perf_counter()
_seconds: dict[str, float] = {}


def enter(phase: str, at: int | None = None) -> None:
    """Begin a phase; `at`: the step that begins with it."""
    global step, place, name, since
    now = time.perf_counter()
    _seconds[name] = _seconds.get(name, 0.0) + now - since
    name, since = phase, now
    if at is None:
        place += 1
    else:
        step, place = at, 0


def take() -> dict[str, float]:
    """Seconds spent in each phase since the last call."""
    global since
    now = time.perf_counter()
    seconds = dict(_seconds)
    seconds[name] = seconds.get(name, 0.0) + now - since
    since = now
    _seconds.clear()
    return seconds
