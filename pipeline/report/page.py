"""A report as one HTML file that needs no network: texts by jinja2, which escapes everything that comes from a run;
curves by plotly.js, packed into the page. The page's Content-Security-Policy lets only its own two scripts run.

    html = page_of(read_run(Path("runs/quickstart")), Options())
"""

import base64
import gzip
import json
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline import __version__
from pipeline.core.chain_summary import seconds as duration
from pipeline.core.files import now
from pipeline.core.optional_packages import require
from pipeline.report import sections
from pipeline.report.alarms import alarm_rows
from pipeline.report.charts import Chart, charts, resumes
from pipeline.report.funnel import funnels
from pipeline.report.masks import masks
from pipeline.report.metric_series import MOST_POINTS, Metrics, read_metrics
from pipeline.report.normal import bands
from pipeline.report.rollouts import rollouts
from pipeline.report.run_folder import Run
from pipeline.report.words import Words

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("chain", "normal", "curves", "data", "tokenizer", "masks", "rollouts", "evaluation", "lineage", "cost")


@dataclass(frozen=True)
class Options:
    """What a user may ask for."""

    language: str = "en"
    price: float | None = None
    """Per process hour, in any currency."""
    watts: float | None = None
    """Per process."""
    live: str = ""
    """Version of what a live page shows; empty for a file."""


@dataclass(frozen=True)
class Curves:
    """The charts of one stage."""

    stage: str
    rows: int
    unreadable: int
    unplaced: int
    charts: list[Chart]


def page_of(run: Run, options: Options) -> str:
    """The page of one run. Raises UserError if plotly is not installed."""
    say = Words(options.language)
    metrics = metrics_of(run)
    found = {}
    for name, numbers in metrics.items():
        found[name] = bands(run.stages[name], numbers, run)
    curves = []
    for name, numbers in metrics.items():
        drawn = charts(run.stages[name], numbers, found[name], say)
        unplaced = resumes(run.stages[name]).unplaced
        curves.append(Curves(name, numbers.rows, numbers.unreadable, unplaced, drawn))
    memory = {name: _largest(numbers, "peak_memory_gb") for name, numbers in metrics.items()}
    stages = list(run.stages.values())
    raised = [row for name, numbers in metrics.items() for row in alarm_rows(run.stages[name], numbers)]
    context = {
        "run": run,
        "alarms": raised,
        "bands": {name: entries for name, entries in found.items() if entries},
        "curves": curves,
        "funnels": funnels(run),
        "tokenizers": [stage for stage in stages if stage.kind == "tokenizer" and stage.metrics],
        "masks": masks(run),
        "answers": sections.answers(run),
        "rollouts": rollouts(run),
        "changes": sections.changes(run),
        "assessments": sections.assessments(run),
        "shares": sections.shares(run),
        "warnings": [(stage.name, text) for stage in stages for text in stage.metrics.get("warnings") or []],
        "lineage": [(stage, sections.ancestors(stage, run)) for stage in stages if stage.path],
        "costs": sections.costs(run, memory, options.price, options.watts),
        "total_seconds": sum(stage.seconds or 0.0 for stage in stages),
    }
    title = say("title", name=run.name)
    drawn = [chart for entry in curves for chart in entry.charts]
    return render(title, str(run.path), SECTIONS, context, drawn, say, options.live)


def metrics_of(run: Run) -> dict[str, Metrics]:
    """The metrics of every stage that has logged any."""
    found = {}
    for name, stage in run.stages.items():
        metrics = read_metrics(stage.path / "metrics.jsonl") if stage.path else Metrics()
        if metrics.rows:
            found[name] = metrics
    return found


def _largest(metrics: Metrics, name: str) -> float | None:
    series = metrics.series.get(name)
    return float(np.max(series.values)) if series is not None and len(series) else None


def render(
    title: str, path: str, names: tuple[str, ...], context: dict, drawn: list[Chart], say: Words, live: str = ""
) -> str:
    """A page of the named sections. context: what their templates read."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    nonce = secrets.token_urlsafe(16)
    figures = {f"plot-{chart.id}": chart.figure for chart in drawn}
    data = {"figures": figures, "nonce": nonce, "version": live, "live": bool(live)}
    return environment.get_template("report.html.jinja").render(
        context
        | {
            "say": say,
            "title": title,
            "made": say("made", when=sections.moment(now()), version=__version__, path=path),
            "sections": names,
            "nonce": nonce,
            "live": bool(live),
            "css": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
            "js": (TEMPLATES / "report.js").read_text(encoding="utf-8"),
            "plotly": packed_plotly() if figures else "",
            "page_data": as_script(data),
            "number": sections.number,
            "moment": sections.moment,
            "duration": duration,
            "most_points": MOST_POINTS,
        }
    )


def as_script(value) -> str:
    """JSON that may stand in a <script>: it contains no character that HTML gives a meaning to."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


@lru_cache(maxsize=1)
def packed_plotly() -> str:
    """plotly.js, compressed: 1.9 MB of base64 for 4.8 MB. Raises UserError if plotly is not installed."""
    require("plotly", "alma report")
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
