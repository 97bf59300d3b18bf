"""What a user sees of a run: metrics.jsonl always, Weights & Biases if asked for, a progress bar on a terminal,
plain lines elsewhere."""

import json
import math
import os
import sys
import time
from pathlib import Path

from pipeline.files import write_atomic

PLAIN_SECONDS = 10


class Tracker:
    """Writes one JSON line per call to `log`. Only the main process writes; the others' calls cost nothing."""

    def __init__(
        self,
        folder: Path,
        is_main: bool = True,
        wandb_project: str | None = None,
        name: str = "",
        config: dict | None = None,
    ):
        self.path, self.is_main, self.wandb = folder / "metrics.jsonl", is_main, None
        if is_main and wandb_project:
            self.wandb = _start_wandb(folder, wandb_project, name, config or {})

    def rewind(self, step: int, evaluated: bool = True) -> None:
        """Drop lines after `step`, and unless `evaluated` the evaluation at it: a resumed run makes them again, and
        a curve must not run twice."""
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

    def log(self, step: int, **values) -> None:
        if not self.is_main:
            return
        values = plain(values)
        line = json.dumps({"step": step, "time": round(time.time(), 3), **values}, ensure_ascii=False)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")
        if self.wandb:
            self.wandb.log({key: value for key, value in values.items() if isinstance(value, (int, float))}, step=step)

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def plain(values: dict) -> dict:
    """JSON has no NaN and no infinity: null says that there is no number."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def step_of(line: str) -> int:
    """Step of a line of metrics.jsonl; a line that was cut off comes after all others."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return sys.maxsize  # the torn last line of a killed run


def _start_wandb(folder: Path, project: str, name: str, config: dict):
    """Never blocks and never fails a run: without a key it is offline, and what goes wrong is said and then left."""
    try:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        settings = wandb.Settings(silent=True, init_timeout=20)
        return wandb.init(
            project=project,
            name=name,
            id=folder.name.removesuffix(".partial"),
            resume="allow",
            dir=folder,
            mode=mode,
            config=config,
            settings=settings,
        )
    except Exception as error:  # a tracker must not be the reason for a lost run
        print(f"Weights & Biases could not start ({error}); metrics.jsonl goes on", flush=True)
        return None


class Progress:
    """Progress with rate and time left. `with Progress("pretrain", total, unit="tok") as bar: bar.update(n,
    loss=2.1)`."""

    def __init__(self, name: str, total: float, unit: str = "it", start: float = 0, is_main: bool = True):
        self.name, self.total, self.unit, self.done, self.is_main = name, total, unit, start, is_main
        self.start, self.begun, self.said = start, time.time(), time.time()
        self.bar = None
        if is_main and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self.bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
            )

    def __enter__(self):
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, completed=self.done, shown="")
        return self

    def update(self, amount: float, **values) -> None:
        self.done += amount
        if not self.is_main:
            return
        now = time.time()
        if self.bar:
            self.bar.update(self.task, completed=self.done, shown=f"{self._rate(now)} {_shown(values)}")
        elif now - self.said >= PLAIN_SECONDS:
            self.said = now
            rate = (self.done - self.start) / max(now - self.begun, 1e-9)
            left = (self.total - self.done) / rate if rate > 0 else 0
            print(
                f"{self.name}: {100 * self.done / max(self.total, 1e-9):.0f}% ({_count(self.done)} of"
                f" {_count(self.total)} {self.unit}), {self._rate(now)}, {_time(left)} left {_shown(values)}".rstrip(),
                flush=True,
            )

    def retarget(self, total: float) -> None:
        """Another end than was thought."""
        self.total = total
        if self.bar:
            self.bar.update(self.task, total=total)

    def _rate(self, now: float) -> str:
        return f"{_count((self.done - self.start) / max(now - self.begun, 1e-9))} {self.unit}/s"

    def __exit__(self, *_):
        if self.bar:
            self.bar.stop()


def _shown(values: dict) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
    )


def _count(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _time(seconds: float) -> str:
    seconds = int(seconds)
    return (
        f"{seconds // 3600}h{seconds % 3600 // 60:02d}m" if seconds >= 3600 else f"{seconds // 60}m{seconds % 60:02d}s"
    )
