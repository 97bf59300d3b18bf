"""Two runs side by side: what differs in their recipes, states and numbers, and their curves over each other."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.core.changes import explain
from pipeline.report.charts import charts_of_two
from pipeline.report.page import Curves, Options, metrics_of, render
from pipeline.report.run_folder import Run, StageRun
from pipeline.report.words import Words

SECTIONS = ("recipe_differences", "metric_differences", "curves")


@dataclass(frozen=True)
class StageDifference:
    """A stage of two runs; a run that lacks it has the state ''."""

    stage: str
    states: tuple[str, str]
    differences: list[str]
    """Keys of the recipe, and inputs, that differ."""
    same: bool
    """Both have it and nothing differs."""


@dataclass(frozen=True)
class NumberDifference:
    """A number that stages of both runs measured, or one of them."""

    stage: str
    name: str
    first: float | None
    second: float | None

    @property
    def difference(self) -> float | None:
        if self.first is None or self.second is None:
            return None
        return self.second - self.first


def stage_differences(first: Run, second: Run) -> list[StageDifference]:
    """Of every stage that either of the runs has."""
    found = []
    for name in _names(first, second):
        one, two = first.stages.get(name), second.stages.get(name)
        states = (one.state if one else "", two.state if two else "")
        lines: list[str] = []
        comparable = bool(one and two and one.record and two.record)
        if comparable:
            lines = explain(one.path.parent, one.record, two.record)
        found.append(StageDifference(name, states, lines, comparable and not lines))
    return found


def number_differences(first: Run, second: Run) -> list[NumberDifference]:
    """The numbers of the manifests, also those within blocks (`models.sft.reward`)."""
    found = []
    for name in _names(first, second):
        one, two = (_flat(run.stages.get(name)) for run in (first, second))
        for key in [*one, *(key for key in two if key not in one)]:
            found.append(NumberDifference(name, key, one.get(key), two.get(key)))
    return found


def _flat(stage: StageRun | None) -> dict[str, float]:
    numbers: dict[str, float] = {}

    def add(prefix: str, block: dict) -> None:
        for key, value in block.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[f"{prefix}{key}"] = value

    if stage is not None:
        add("", stage.metrics)
        if stage.seconds is not None:
            numbers["seconds"] = stage.seconds
    return numbers


def _names(first: Run, second: Run) -> list[str]:
    return [*first.stages, *(name for name in second.stages if name not in first.stages)]


def names_of(first: Run, second: Run) -> tuple[str, str]:
    """What to call the runs: by their folders' names, or by their paths if these are equal."""
    if first.name != second.name:
        return first.name, second.name
    return str(first.path), str(second.path)


def page_of_two(first: Run, second: Run, options: Options) -> str:
    """The page that compares two runs. Raises UserError if plotly is not installed."""
    say = Words(options.language)
    names = names_of(first, second)
    metrics = [metrics_of(run) for run in (first, second)]
    curves = []
    for stage in _names(first, second):
        both = {name: numbers[stage] for name, numbers in zip(names, metrics, strict=True) if stage in numbers}
        if not both:
            continue
        rows = sum(numbers.rows for numbers in both.values())
        unreadable = sum(numbers.unreadable for numbers in both.values())
        drawn = charts_of_two(stage, both, say)
        curves.append(Curves(stage, rows, unreadable, 0, drawn))
    context = {
        "names": names,
        "stages": stage_differences(first, second),
        "numbers": number_differences(first, second),
        "curves": curves,
    }
    title = say("title_two", first=names[0], second=names[1])
    drawn = [chart for entry in curves for chart in entry.charts]
    path = f"{Path(first.path)}, {Path(second.path)}"
    return render(title, path, SECTIONS, context, drawn, say)
