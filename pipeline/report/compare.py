"""Two runs side by side on a page: what differs between them, and their curves over each other."""

from pathlib import Path

from pipeline.report.charts import charts_of_two
from pipeline.report.differences import names_of, number_differences, stage_differences, stage_names
from pipeline.report.page import Curves, Options, metrics_of, render
from pipeline.report.run_folder import Run
from pipeline.report.words import Words

SECTIONS = ("recipe_differences", "metric_differences", "curves")


def page_of_two(first: Run, second: Run, options: Options) -> str:
    """The page that compares two runs. Raises UserError if plotly is not installed."""
    say = Words(options.language)
    names = names_of(first, second)
    metrics = [metrics_of(run) for run in (first, second)]
    curves = []
    for stage in stage_names(first, second):
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
