"""What differs between two runs: keys of their recipes, states, numbers, and their curves where both have logged.

stage_differences(first, second)      # StageDifference of every stage
number_differences(first, second)     # NumberDifference of what their stages measured
"""

from dataclasses import dataclass, field

import numpy as np

from pipeline.core.changes import explain
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.value_differences import same, value_differences
from pipeline.report.metric_series import read_metrics
from pipeline.report.run_folder import Run, StageRun

# Curves that are compared where both runs have logged them.
CURVES = ("loss", "heldout_loss", "bits_per_byte", "accuracy", "margin", "reward", "heldout_reward", "kl")


@dataclass(frozen=True)
class StageDifference:
    """A stage of two runs; a run that lacks it has the state ''."""

    stage: str
    states: tuple[str, str]
    differences: list[str]
    """Keys of the recipe, and inputs, that differ."""
    same: bool
    """Both have it and nothing differs that decides its result."""
    execution: list[str] = field(default_factory=list)
    """Keys that differ and decide how the stage is run, not its result."""
    same_content: bool | None = None
    """Whether both have published the same bytes; None unless both have published."""


@dataclass(frozen=True)
class NumberDifference:
    """A number that stages of both runs measured, or one of them."""

    stage: str
    name: str
    first: float | None
    second: float | None
    step: int | None = None
    """At which both logged it; None for what a stage measured at its end."""

    @property
    def difference(self) -> float | None:
        if self.first is None or self.second is None:
            return None
        return self.second - self.first


def stage_differences(first: Run, second: Run) -> list[StageDifference]:
    """Of every stage that either of the runs has."""
    found = []
    for name in stage_names(first, second):
        one, two = first.stages.get(name), second.stages.get(name)
        states = (one.state if one else "", two.state if two else "")
        lines: list[str] = []
        execution: list[str] = []
        comparable = bool(one and two and one.record and two.record)
        if comparable:
            lines = explain(one.path.parent, one.record, two.record)
            execution = _execution_differences(one, two)
        content = None
        if comparable and one.is_published and two.is_published:
            content = one.record["digest"] == two.record["digest"]
        found.append(StageDifference(name, states, lines, comparable and not lines, execution, content))
    return found


def _execution_differences(one: StageRun, two: StageRun) -> list[str]:
    """Differences of the keys that are marked as execution, for stages of the same kind."""
    if one.kind != two.kind or one.kind not in KINDS:
        return []
    fields = module_of(one.kind).Config.model_fields
    phrases = []
    for name in sorted(one.config.keys() & two.config.keys() & fields.keys()):
        extra = fields[name].json_schema_extra
        if isinstance(extra, dict) and extra.get("execution") and not same(one.config[name], two.config[name]):
            phrases += value_differences(one.config[name], two.config[name], name)
    return phrases


def number_differences(first: Run, second: Run) -> list[NumberDifference]:
    """The numbers of the manifests, also those within blocks (`models.sft.reward`)."""
    found = []
    for name in stage_names(first, second):
        one, two = (_flat(run.stages.get(name)) for run in (first, second))
        for key in [*one, *(key for key in two if key not in one)]:
            found.append(NumberDifference(name, key, one.get(key), two.get(key)))
    return found


def numbers_in(metrics: dict) -> dict[str, float]:
    """The numbers of a manifest's metrics; those within blocks are called `models.sft.reward`."""
    numbers: dict[str, float] = {}

    def add(prefix: str, block: dict) -> None:
        for key, value in block.items():
            if isinstance(value, dict):
                add(f"{prefix}{key}.", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[f"{prefix}{key}"] = value

    add("", metrics)
    return numbers


def _flat(stage: StageRun | None) -> dict[str, float]:
    if stage is None:
        return {}
    numbers = numbers_in(stage.metrics)
    if stage.seconds is not None:
        numbers["seconds"] = stage.seconds
    return numbers


def last_common_values(first: Run, second: Run) -> list[NumberDifference]:
    """Of each curve that a stage has in both runs, the values at the last step that both have logged, so that a run in
    progress can be compared with a finished one."""
    found = []
    for name in stage_names(first, second):
        stages = [run.stages.get(name) for run in (first, second)]
        if not all(stage and stage.path for stage in stages):
            continue
        one, two = (read_metrics(stage.path / "metrics.jsonl").series for stage in stages)
        for metric in (metric for metric in CURVES if metric in one and metric in two):
            steps, at_one, at_two = np.intersect1d(one[metric].steps, two[metric].steps, return_indices=True)
            if len(steps):
                values = (float(one[metric].values[at_one[-1]]), float(two[metric].values[at_two[-1]]))
                found.append(NumberDifference(name, metric, *values, int(steps[-1])))
    return found


def stage_names(first: Run, second: Run) -> list[str]:
    return [*first.stages, *(name for name in second.stages if name not in first.stages)]


def names_of(first: Run, second: Run) -> tuple[str, str]:
    """What to call the runs: by their folders' names, or by their paths if these are equal."""
    if first.name != second.name:
        return first.name, second.name
    return str(first.path), str(second.path)
