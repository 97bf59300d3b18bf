"""`alma compare A B`: what differs between two runs, as text and as JSON. The page of `alma report A B` shows the same
differences, with curves."""

from dataclasses import dataclass

from pipeline.checks.tables import console, new_table
from pipeline.core.terminal import plural, show
from pipeline.report.differences import (
    NumberDifference,
    StageDifference,
    last_common_values,
    names_of,
    number_differences,
    stage_differences,
)
from pipeline.report.run_folder import Run
from pipeline.report.sections import number


@dataclass(frozen=True)
class Comparison:
    """Two runs."""

    names: tuple[str, str]
    stages: list[StageDifference]
    numbers: list[NumberDifference]
    """That finished stages measured."""
    curves: list[NumberDifference]
    """Values at the last step that both have logged."""


def compared(first: Run, second: Run) -> Comparison:
    return Comparison(
        names_of(first, second),
        stage_differences(first, second),
        number_differences(first, second),
        last_common_values(first, second),
    )


def show_comparison(result: Comparison, everything: bool) -> None:
    one, two = result.names
    show(f"{one} and {two}")
    table = new_table("stage", one, two, "differences", text=("stage", one, two, "differences"))
    for stage in result.stages:
        table.add_row(stage.stage, *map(_state, stage.states), "\n".join(_lines(stage, one, two)))
    console().print(table)
    _show_numbers("measured at the end", result.numbers, result.names, everything)
    _show_numbers("last step that both have logged", result.curves, result.names, everything)


def _state(state: str) -> str:
    return {"": "-", "missing": "not started"}.get(state, state)


def _lines(stage: StageDifference, one: str, two: str) -> list[str]:
    lines = [*stage.differences, *(f"{line} (decides no result)" for line in stage.execution)]
    if not all(stage.states):
        return [f"only in {one if stage.states[0] else two}"]
    if stage.same:
        lines.append("same recipe and inputs")
    if stage.same_content is not None:
        lines.append("same bytes" if stage.same_content else "other bytes")
    return lines


def _show_numbers(title: str, numbers: list[NumberDifference], names: tuple[str, str], everything: bool) -> None:
    if not numbers:
        return
    of_both = [row for row in numbers if row.difference is not None]
    equal = sum(row.first == row.second for row in of_both)
    shown = numbers if everything else [row for row in of_both if row.first != row.second]
    if shown:
        columns = ("stage", "number", "step", *names, "difference", "")
        has_steps = any(row.step is not None for row in shown)
        kept = [column for column in columns if column != "step" or has_steps]
        table = new_table(*kept, text=("stage", "number"), title=title)
        for row in shown:
            cells = [row.stage, row.name, *([number(row.step)] if has_steps else []), number(row.first)]
            table.add_row(*cells, number(row.second), *_change(row))
        console().print(table)
    if len(shown) < len(numbers):
        one_sided = len(numbers) - len(of_both)
        show(f"{title}: {plural(equal, 'number')} equal, {one_sided} of one run only (--all shows them)")


def _change(row: NumberDifference) -> tuple[str, str]:
    """The difference, and how much that is of the first value."""
    if row.difference is None:
        return "", ""
    share = f"{row.difference / abs(row.first):+.1%}" if row.first else ""
    return f"{row.difference:+.4g}", share
