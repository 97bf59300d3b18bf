"""The page of a sweep: its members as a table, and its metric over each key that differs."""

from pipeline.report.charts import COLORS, Chart
from pipeline.report.page import render
from pipeline.report.words import Words

SECTIONS = ("sweep_plots", "sweep_members")


def sweep_page(content: dict, path: str, name: str, language: str = "en") -> str:
    """content: what sweep.json has. Raises UserError if plotly is not installed."""
    say = Words(language)
    drawn = [_chart(number, key, content, say) for number, key in enumerate(content["axes"]) if content["metric"]]
    context = {"charts": drawn, "sweep": content}
    return render(say("title_sweep", name=name), path, SECTIONS, context, drawn, say)


def _chart(number: int, key: str, content: dict, say: Words) -> Chart:
    """A point for each member: the key's value and the metric. Numbers have an axis of numbers, by powers of ten if
    they differ by more than a factor of 20; other values are names."""
    metric = content["metric"]["name"]
    members = [member for member in content["members"] if metric in member["numbers"]]
    values = [member["values"][key] for member in members]
    numbers = [_as_number(value) for value in values]
    axis: dict = {"title": {"text": key}, "zeroline": False}
    if any(value is None for value in numbers):
        axis["type"] = "category"
        places: list = values
    else:
        places = numbers
        if numbers and min(numbers) > 0 and max(numbers) > 20 * min(numbers):
            axis["type"] = "log"
    texts = [", ".join(f"{other}={value}" for other, value in member["values"].items()) for member in members]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": metric,
        "x": places,
        "y": [member["numbers"][metric] for member in members],
        "text": texts,
        "marker": {"color": COLORS[number % len(COLORS)], "size": 10},
    }
    layout = {
        "height": 320,
        "margin": {"l": 60, "r": 12, "t": 12, "b": 48},
        "xaxis": axis,
        "yaxis": {"title": {"text": metric}, "zeroline": False},
        "hovermode": "closest",
    }
    return Chart(f"sweep-{number}", say("sweep_over", metric=metric, swept=key), {"data": [points], "layout": layout})


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
