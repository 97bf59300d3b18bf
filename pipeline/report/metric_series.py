"""metrics.jsonl as curves: read as a stream, and thinned so that a page stays small but shows every extreme."""

import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MOST_POINTS = 800  # of a curve on a page; a screen has fewer columns


@dataclass
class Series:
    """A metric over steps."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class Metrics:
    """The numbers of a training stage, as its metrics.jsonl has them."""

    series: dict[str, Series] = field(default_factory=dict)
    """Metric -> its finite values. Lines without it, or with null in its place, are left out."""
    rows: int = 0
    unreadable: int = 0
    """Lines that are not JSON: the last one of a killed run, as a rule."""
    refused: list[tuple[int, float | None]] = field(default_factory=list)
    """(step, loss) of steps that were not applied: spikes, and losses that were no number (None)."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps after which the run had gone back to a checkpoint."""

    def last(self, name: str) -> float | None:
        series = self.series.get(name)
        return None if series is None or not len(series) else float(series.values[-1])

    def first(self, name: str) -> float | None:
        series = self.series.get(name)
        return None if series is None or not len(series) else float(series.values[0])


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.jsonl; a file that is not there has no rows."""
    metrics = Metrics()
    steps: dict[str, array] = {}
    values: dict[str, array] = {}
    if not path.exists():
        return metrics
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step = int(row["step"])
            except (ValueError, KeyError, TypeError):
                metrics.unreadable += 1
                continue
            metrics.rows += 1
            if row.get("applied") is False:
                metrics.refused.append((step, row.get("loss")))
            if "rollbacks" in row:
                metrics.rollbacks.append(step)
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                    steps.setdefault(name, array("q")).append(step)
                    values.setdefault(name, array("d")).append(value)
    for name, column in values.items():
        numbers, at = np.frombuffer(column, np.float64), np.frombuffer(steps[name], np.int64)
        finite = np.isfinite(numbers)
        metrics.series[name] = Series(at[finite], numbers[finite])
    return metrics


def last_values(path: Path, most: int = 1 << 16) -> dict[str, float]:
    """The last value of each metric among the last `most` bytes of a metrics.jsonl; empty for a file that is not
    there."""
    values: dict[str, float] = {}
    if not path.exists():
        return values
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # cut off, at either end
            continue
        if isinstance(row, dict) and "step" in row:
            numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
            values.update(numbers)
    return values


def thin(series: Series, most: int = MOST_POINTS) -> Series:
    """At most `most` points: of each stretch of the curve its lowest and its highest one, and both ends, so that a
    spike of one step is seen however long the run is."""
    count = len(series)
    if count <= most:
        return series
    edges = np.linspace(0, count, (most - 2) // 2 + 1).astype(int)
    kept = {0, count - 1}
    for begin, end in zip(edges[:-1], edges[1:], strict=True):
        part = series.values[begin:end]
        kept.add(begin + int(part.argmin()))
        kept.add(begin + int(part.argmax()))
    chosen = np.array(sorted(kept))
    return Series(series.steps[chosen], series.values[chosen])


def outliers(series: Series, window: int = 128, sigma: float = 6.0) -> list[int]:
    """Places of values more than `sigma` robust deviations above the median of the `window` values before their block:
    the rule of train/spikes.py, with medians taken once per window. Fewer than half a window of values have none."""
    found: list[int] = []
    values = series.values
    for begin in range(window // 2, len(values), window):
        history = values[max(0, begin - window) : begin]
        median = float(np.median(history))
        deviation = 1.4826 * float(np.median(np.abs(history - median)))
        deviation = max(deviation, 1e-3 * max(1.0, abs(median)))
        block = values[begin : begin + window]
        found += [begin + int(at) for at in np.flatnonzero(block > median + sigma * deviation)]
    return found
