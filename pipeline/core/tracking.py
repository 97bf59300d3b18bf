"""How a user follows a run: metrics.jsonl always, the trackers that the recipe asks for (trackers.py), a progress bar
on a terminal, plain lines elsewhere."""

import json
import math
import os
import sys
import time
from pathlib import Path

from pipeline.core.files import write_atomic
from pipeline.core.terminal import short, time_left
from pipeline.core.trackers import TrackedRun, TrackerName, Trackers

PLAIN_SECONDS = 10
MIN_BAR, MAX_BAR = 10, 40  # columns


class Tracker:
    """Writes one JSON line per call to `log`. Only the main process writes; calls in other processes do nothing."""

    def __init__(self, folder: Path, is_main: bool = True, to: list[TrackerName] = (), run: TrackedRun | None = None):
        self.path, self.is_main = folder / "metrics.jsonl", is_main
        self.trackers = Trackers(to, run) if is_main and to else None

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drop lines after `step`, and the evaluation at it unless `evaluated`: a resumed run writes them again, and a
        curve must not have two values for a step."""
        if not self.is_main or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [
            line
            for line in lines
            if step_of(line) <= step and (evaluated or step_of(line) < step or "heldout_" not in line)
        ]
        if len(kept) != len(lines):
            write_atomic(self.path, "".join(line + "\n" for line in kept))
            if self.trackers:
                self.trackers.rewind(step)

    def started(self, step: int) -> None:
        """Note in logs/starts.jsonl that a process began or resumed at `step`: metrics.jsonl has no trace of it,
        because a resumed run writes the lines of one that was not killed."""
        if self.is_main:
            folder = self.path.parent / "logs"
            folder.mkdir(exist_ok=True)
            with open(folder / "starts.jsonl", "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, "time": round(time.time(), 3)}) + "\n")

    def log(self, step: int, **values) -> None:
        if not self.is_main:
            return
        values = plain(values)
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}, ensure_ascii=False)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        if self.trackers:
            self.trackers.log(step, values)

    def close(self) -> None:
        if self.trackers:
            self.trackers.close()


def plain(values: dict) -> dict:
    """Values for JSON, which has no NaN and no infinity: they become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def drop_lines(path: Path, after: int) -> None:
    """Drop the lines of a file whose `step` is after `after`: a resumed run writes them again."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if step_of(line) <= after]
    if len(kept) < len(lines):
        write_atomic(path, "".join(line + "\n" for line in kept))


def step_of(line: str) -> int:
    """Step of a line of metrics.jsonl; a line that was cut off counts as after all others."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize  # the incomplete last line of a killed run


class Progress:
    """Progress with rate and time left. `with Progress("pretrain", total, unit="tok") as bar: bar.update(n,
    loss=2.1)`. One line of a terminal, as wide as it is; lines every `PLAIN_SECONDS` elsewhere."""

    def __init__(self, name: str, total: float, unit: str = "it", start: float = 0, is_main: bool = True):
        self.name, self.total, self.unit, self.done, self.is_main = name, total, unit, start, is_main
        self.start, self.began, self.printed = start, time.time(), time.time()
        self.values: dict = {}
        self.live = None
        if is_main and sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
            from rich.live import Live

            self.live = Live(get_renderable=self._line, refresh_per_second=4)

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def update(self, amount: float, **values) -> None:
        self.done += amount
        self.values = values
        if not self.is_main or self.live:
            return
        now = time.time()
        if now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            parts = [f"{self._percent()} ({short(self.done)} of {short(self.total)} {self.unit})", self._rate()]
            print(f"{self.name}: {', '.join([*parts, self._left()])} {', '.join(_shown(values))}".rstrip(), flush=True)

    def retarget(self, total: float) -> None:
        """Change the total."""
        self.total = total

    def __exit__(self, *_):
        if self.live:
            self.live.stop()

    def _percent(self) -> str:
        return f"{100 * self.done / max(self.total, 1e-9):.0f}%"

    def _per_second(self) -> float:
        return (self.done - self.start) / max(time.time() - self.began, 1e-9)

    def _rate(self) -> str:
        return f"{short(self._per_second())} {self.unit}/s"

    def _left(self) -> str:
        rate = self._per_second()
        if rate <= 0:
            return "time left unknown"
        return f"{time_left(max(0.0, self.total - self.done) / rate)} left"

    def _line(self) -> "_Line":
        time_text = f"in {time_left(time.time() - self.began)}" if self.done >= self.total else self._left()
        return _Line(self, [f"{self._percent():>4}", time_text, *_shown(self.values), self._rate()])


class _Line:
    """A line of a terminal for rich: name, bar, and as many of `parts` as fit, the most important first."""

    def __init__(self, progress: Progress, parts: list[str]):
        self.progress, self.parts = progress, parts

    def __rich_console__(self, console, options):
        from rich.cells import cell_len, set_cell_size
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        name = self.progress.name
        if cell_len(name) > options.max_width // 3:
            name = set_cell_size(name, max(1, options.max_width // 3 - 1)) + "…"
        bar = min(MAX_BAR, max(MIN_BAR, options.max_width // 6))
        room = options.max_width - cell_len(name) - bar - 2
        text = ""
        for part in self.parts:
            longer = f"{text}  {part}" if text else part
            if cell_len(longer) <= room:
                text = longer
        line = Table.grid(padding=(0, 1))
        for _ in range(3):
            line.add_column(no_wrap=True)
        total = max(self.progress.total, 1e-9)
        line.add_row(Text(name), ProgressBar(total, min(self.progress.done, total), width=bar), Text(text))
        yield line


def _shown(values: dict) -> list[str]:
    """`loss 2.1`, `11.1k tok/s`, in the order of importance: what is measured, its rates after the first of them."""
    rates = [f"{short(value)} {key}" for key, value in values.items() if key.endswith("/s")]
    others = [f"{key} {_number(value)}" for key, value in values.items() if not key.endswith("/s")]
    return [*others[:1], *rates, *others[1:]]


def _number(value) -> str:
    if not isinstance(value, float):
        return str(value)
    return short(value) if abs(value) >= 9999.5 else f"{value:.4g}"
