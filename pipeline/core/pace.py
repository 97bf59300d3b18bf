"""How long a run needs from being asked to stop until it has stopped: the longest time between two moments at which it
looks whether it was asked, and the time that a checkpoint takes. Both are in logs/pace.json of the run, for the job
that has to ask early enough (pipeline/cluster/job.py)."""

import time
from pathlib import Path

from pipeline.core.files import read_record, write_json
from pipeline.core.output import Output

WRITE_EVERY = 20.0  # seconds
RECORD = {"longest_step": (int, float), "longest_save": (int, float)}


class Pace:
    """Measures a training loop, and writes what it measured on the main rank."""

    def __init__(self, output: Output):
        self.path = _path(output.path) if output.is_main else None
        self.longest_step = 0.0
        self.last_look: float | None = None
        self.written = 0.0

    def look(self, save_seconds: float) -> None:
        """Called each time that the loop looks whether it was asked to stop. The time before the first look does not
        count: the first step compiles. save_seconds: the longest that a checkpoint took so far."""
        now = time.monotonic()
        if self.last_look is not None:
            self.longest_step = max(self.longest_step, now - self.last_look)
        self.last_look = now
        if self.path is None or not self.longest_step or now - self.written < WRITE_EVERY:
            return
        self.written = now
        write_json(self.path, {"longest_step": round(self.longest_step, 3), "longest_save": round(save_seconds, 3)})


def seconds_to_stop(run: Path) -> float | None:
    """Seconds that a run needs to finish a step and to save, by what it measured; None if it has measured nothing."""
    try:
        record = read_record(_path(run), RECORD)
    except (OSError, ValueError):
        return None
    return record["longest_step"] + record["longest_save"]


def _path(run: Path) -> Path:
    return run / "logs" / "pace.json"
