"""The alarms of online RL that a run raised (rl/sentinel.py), as a table and as marks on the curves."""

from dataclasses import dataclass

from pipeline.report.metric_series import Metrics
from pipeline.report.run_folder import StageRun

PREFIX = "alarm/"
# Group of charts -> the alarms that are about its curves.
MARKED = {
    "kl": ("kl", "kl_growth"),
    "length": ("length",),
    "entropy": ("entropy",),
    "reward": ("proxy_gap",),
    "accuracy": ("eos_rate",),
    "update": ("clip_fraction",),
}


@dataclass(frozen=True)
class AlarmRow:
    """An alarm that a stage raised at least once."""

    stage: str
    name: str
    subject: str
    """What its number is."""
    low: float | None
    high: float | None
    """Its healthy range; None: no end."""
    action: str
    count: int
    first: int
    last: int
    """Iterations."""
    value: float
    """Of its number, when it was raised last."""


def alarm_rows(stage: StageRun, metrics: Metrics) -> list[AlarmRow]:
    """In the order in which they were first raised."""
    from pipeline.rl.sentinel import HEALTHY

    own = stage.config.get("alarms") or {}
    rows = []
    for key, series in metrics.series.items():
        name = key.removeprefix(PREFIX)
        if not key.startswith(PREFIX) or name not in HEALTHY or not len(series):
            continue
        healthy, block = HEALTHY[name], own.get(name) or {}
        low, high = block.get("below"), block.get("above")
        rows.append(
            AlarmRow(
                stage.name,
                name,
                healthy.noun,
                _end(healthy.low if low is None else low),
                _end(healthy.high if high is None else high),
                block.get("action", "warn"),
                len(series),
                int(series.steps[0]),
                int(series.steps[-1]),
                float(series.values[-1]),
            )
        )
    return sorted(rows, key=lambda row: row.first)


def _end(value: float) -> float | None:
    return None if abs(value) == float("inf") else value


def marks(group: str, metrics: Metrics) -> list[tuple[int, str]]:
    """(iteration, name) of the alarms that are drawn on the charts of a group."""
    found = []
    for name in MARKED.get(group, ()):
        series = metrics.series.get(f"{PREFIX}{name}")
        if series is not None:
            found += [(int(step), name) for step in series.steps]
    return sorted(found)
