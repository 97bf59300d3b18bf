"""Curves of a training stage as plotly figures: plain JSON, drawn by plotly.js in the page.

    for chart in charts(stage, metrics, bands, say):      # of one run
        chart.id, chart.title, chart.figure
    charts_of_two("pretrain", {"a": metrics, "b": metrics}, say)

Colors are readable on light and on dark; background, text and grid are set in the page, which knows which of the two it
is.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.report import alarms
from pipeline.report.metric_series import Metrics, Series, outliers, thin
from pipeline.report.normal import Band, planned_rates
from pipeline.report.run_folder import StageRun
from pipeline.report.words import Words

# Okabe and Ito's palette for color-blind readers, darkened or lightened to a contrast of 3:1 on white and on black.
COLORS = ("#3b82c4", "#d9772b", "#2f9e75", "#c2559d", "#8a7ad6", "#a8872b", "#4aa3b5", "#b5604a")
GREEN = "rgba(47,158,117,0.16)"
MOST_SOURCES = 10  # curves of a chart by source
GROUPS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "heldout_loss", "value_loss"),
    "bits": ("bits_per_byte", "heldout_bits_per_byte"),
    "reward": ("reward", "heldout_reward", "heldout_reward_greedy", "rlhf_reward", "score"),
    "kl": ("kl", "heldout_kl"),
    "lr": ("lr", "value_lr"),
    "grad": ("grad_norm", "value_grad_norm"),
    "speed": (),
    "accuracy": (
        "accuracy",
        "heldout_accuracy",
        "eos_rate",
        "heldout_eos_rate",
        "rule",
        "heldout_rule",
        "heldout_right",
    ),
    "margin": ("margin", "heldout_margin", "reward_chosen", "reward_rejected"),
    "entropy": ("entropy",),
    "update": ("approx_kl", "clip_fraction"),
    "value": ("explained_variance",),
    "length": ("length_mean", "length_max"),
    "loss_sources": (),
}


@dataclass(frozen=True)
class Chart:
    """One figure of the page."""

    id: str
    title: str
    figure: dict
    """data and layout, as plotly.js takes them."""


@dataclass(frozen=True)
class Resumes:
    """Where a stage was started again."""

    steps: list[int]
    unplaced: int
    """Starts of which only the number is known."""


def resumes(stage: StageRun) -> Resumes:
    """From logs/starts.jsonl, which the training loop writes at each start."""
    steps = []
    path = stage.path / "logs" / "starts.jsonl" if stage.path else Path("missing")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                steps.append(int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a killed process
    later = steps[1:]
    return Resumes(later, 0 if steps else int(stage.record.get("resumed", 0)))


def names_of(group: str, metrics: Metrics) -> list[str]:
    """The metrics of a group that a stage has."""
    if group == "speed":
        return [name for name in metrics.series if name.endswith("_per_second")]
    if group == "loss_sources":
        names = [name for name in metrics.series if name.startswith("loss/")]
        return sorted(names, key=lambda name: -len(metrics.series[name]))[:MOST_SOURCES]
    return [name for name in GROUPS[group] if name in metrics.series and len(metrics.series[name])]


def charts(stage: StageRun, metrics: Metrics, bands: list[Band], say: Words) -> list[Chart]:
    """The charts of one stage, with bands, resumes, spikes and steps that were not applied."""
    found = []
    for group in GROUPS:
        names = names_of(group, metrics)
        if not names:
            continue
        traces = []
        for number, name in enumerate(names):
            traces.append(_curve(metrics.series[name], name, COLORS[number % len(COLORS)]))
        if group == "lr":
            planned = planned_rates(stage, metrics.series.get("lr"))
            if planned is not None:
                traces.append(_curve(planned, say("planned"), "#888888", dash="dot"))
        if group == "loss":
            traces += _marks(metrics, say)
        shapes, notes = _bands(bands, names, metrics, say)
        if group == "grad":
            _add_limit(stage, shapes, notes, say)
        _add_resumes(resumes(stage), metrics, shapes, notes, say)
        _add_alarms(alarms.marks(group, metrics), shapes, notes, say)
        figure = {"data": traces, "layout": _layout(say, shapes, notes)}
        found.append(Chart(f"{stage.name}-{group}", say(f"chart.{group}"), figure))
    return found


def charts_of_two(stage: str, runs: dict[str, Metrics], say: Words) -> list[Chart]:
    """The curves of a stage of two runs over each other: one color a run, held-out numbers as dots."""
    found = []
    for group in GROUPS:
        traces = []
        for number, (run, metrics) in enumerate(runs.items()):
            for name in names_of(group, metrics)[:3]:
                traces.append(_curve(metrics.series[name], f"{run} {name}", COLORS[number]))
        if traces:
            found.append(
                Chart(f"{stage}-{group}", say(f"chart.{group}"), {"data": traces, "layout": _layout(say, [], [])})
            )
    return found


def _curve(series: Series, name: str, color: str, dash: str = "solid") -> dict:
    series = thin(series)
    is_measured = name.split(" ")[-1].startswith("heldout_")  # at evaluations only
    few = len(series) < 40
    return {
        "type": "scatter",
        "mode": "lines+markers" if is_measured or few else "lines",
        "name": name,
        "x": [int(step) for step in series.steps],
        "y": [float(f"{value:.6g}") for value in series.values],
        "line": {"color": color, "width": 1.6, "dash": "dash" if is_measured else dash},
        "marker": {"color": color, "size": 7 if is_measured else 4, "symbol": "diamond" if is_measured else "circle"},
    }


def _marks(metrics: Metrics, say: Words) -> list[dict]:
    """Points of the loss that stand out, and steps that were not applied."""
    marks = []
    losses = metrics.series.get("loss")
    if losses is not None:
        places = outliers(losses)[:200]
        points = [(int(losses.steps[at]), float(losses.values[at])) for at in places]
        marks += _points(points, say("mark.spike"), "x", "#d9402b")
    refused = [(step, loss) for step, loss in metrics.refused if loss is not None][:200]
    marks += _points(refused, say("mark.refused"), "circle-open", "#d9402b")
    return marks


def _points(points: list[tuple[int, float]], name: str, symbol: str, color: str) -> list[dict]:
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    marker = {"symbol": symbol, "size": 11, "color": color, "line": {"width": 2, "color": color}}
    return [{"type": "scatter", "mode": "markers", "name": name, "x": list(steps), "y": list(values), "marker": marker}]


def _bands(bands: list[Band], names: list[str], metrics: Metrics, say: Words) -> tuple[list[dict], list[dict]]:
    """Rectangles of the bands that belong to the curves of a chart, and their labels."""
    shapes, notes = [], []
    for band in bands:
        if band.metric not in names or band.key in ("schedule", "spikes", "throughput"):
            continue
        series = metrics.series[band.metric]
        first, last = int(series.steps[0]), int(series.steps[-1])
        for name in names:
            first, last = min(first, int(metrics.series[name].steps[0])), max(last, int(metrics.series[name].steps[-1]))
        width = max(1, (last - first) // 10)
        left = last - width if band.where == "last" else first
        right = first + width if band.where == "first" else last
        # the whole band may be much taller than the curve: it is drawn as far as a reader needs it
        reach = float(np.ptp(series.values)) or 1.0
        low = max(band.low, float(series.values.min()) - reach)
        high = min(band.high, float(series.values.max()) + reach)
        if low >= high:
            continue
        box = {"x0": left, "x1": right, "y0": low, "y1": high}
        shapes.append({"type": "rect", "layer": "below", "fillcolor": GREEN, "line": {"width": 0}} | box)
        notes.append(_note(left, high, say("normal_band")))
    return shapes, notes


def _add_limit(stage: StageRun, shapes: list, notes: list, say: Words) -> None:
    limit = (stage.config.get("optimizer") or {}).get("max_grad_norm")
    if limit:
        line = {"color": "#888888", "width": 1, "dash": "dot"}
        shapes.append({"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": line})
        notes.append(_note(1, limit, say("clip_limit"), xref="paper", xanchor="right"))


def _add_resumes(starts: Resumes, metrics: Metrics, shapes: list, notes: list, say: Words) -> None:
    marks = [(step, "mark.resumed", "#8a7ad6") for step in starts.steps]
    marks += [(step, "mark.rollback", "#d9402b") for step in metrics.rollbacks]
    for step, key, color in marks[:60]:
        line = {"color": color, "width": 1, "dash": "dash"}
        shapes.append({"type": "line", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line})
        if len(marks) <= 8:
            notes.append(_note(step, 1, say(key), yref="paper"))


def _add_alarms(raised: list[tuple[int, str]], shapes: list, notes: list, say: Words) -> None:
    for step, name in raised[:60]:
        line = {"color": "#d9402b", "width": 1, "dash": "dot"}
        shapes.append({"type": "line", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line})
        if len(raised) <= 8:
            notes.append(_note(step, 0.9, say("mark.alarm", name=name), yref="paper"))


def _note(x: float, y: float, text: str, **more) -> dict:
    place = {"x": x, "y": y, "text": text, "showarrow": False, "xanchor": "left", "yanchor": "bottom"}
    return place | {"font": {"size": 10}} | more


def _layout(say: Words, shapes: list[dict], notes: list[dict]) -> dict:
    return {
        "height": 300,
        "margin": {"l": 56, "r": 12, "t": 24, "b": 40},
        "xaxis": {"title": {"text": say("step")}, "zeroline": False},
        "yaxis": {"zeroline": False, "exponentformat": "power"},
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "hovermode": "x unified",
        "shapes": shapes,
        "annotations": notes,
    }
