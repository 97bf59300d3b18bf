"""The end of a run as its user reads it: what each stage did, where its result is, and how to talk to the model."""

import os
import shlex
import sys

from pipeline.core.artifact import Artifact
from pipeline.core.config import PublishedModel
from pipeline.core.graph import Node
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.terminal import columns, show

FILE_WIDTH = 160  # columns of the table in a file
MIN_WIDTHS = {"in": 10, "out": 10, "measured": 20}  # columns that these need to be readable
TITLES = ("stage", "in", "out", "measured", "time")


def shown_path(artifact: Artifact) -> str:
    """Where a stage's published result is, from here."""
    return os.path.relpath(artifact.path.parent / "current")


def published_model(artifact: Artifact) -> PublishedModel | None:
    return module_of(artifact.kind).Config.published_model(artifact) if artifact.kind in KINDS else None


def model_folder(artifact: Artifact) -> str | None:
    """The folder for from_pretrained that a stage published, or None."""
    model = published_model(artifact)
    return None if model is None else os.path.normpath(os.path.join(shown_path(artifact), model.folder))


def result(artifact: Artifact) -> str:
    """One line: time, what was measured, and where the result is."""
    parts = [f"done in {seconds(artifact.manifest['seconds'])}"]
    measured = artifact.metrics.get("summary", {}).get("measure", "")
    if measured:
        parts.append(measured)
    place = model_folder(artifact) or shown_path(artifact)
    return f"{artifact.stage}: {', '.join(parts)}; the result is in {place}"


def seconds(number: float) -> str:
    """Whole seconds below an hour, because the table of a short run compares them; hours and minutes above."""
    if number < 3600:
        return f"{number:.0f} s"
    hours, minutes = divmod(round(number / 60), 60)
    return f"{hours} h {minutes:02d} min"


def show_chain(graph: dict[str, Node]) -> None:
    """The table of all stages that are up to date, and how to talk to the model that they made."""
    show_table(graph)
    chosen = None
    for node in graph.values():
        model = published_model(node.output) if node.state == "up to date" and node.output else None
        if model is None or model.use == "score":
            continue
        if chosen is None or model.for_users or not published_model(chosen).for_users:
            chosen = node.output
    if chosen:
        show(f"model      {model_folder(chosen)}")
        show(f"           to talk to it: {talk(chosen)}")


def talk(artifact: Artifact) -> str:
    """The command that talks to a stage's model, or for a base model has it continue texts."""
    return f"alma chat {shlex.quote(f'{os.path.relpath(artifact.path.parents[1])}:{artifact.stage}')}"


def show_table(graph: dict[str, Node]) -> None:
    """One row per stage: what went in, what came out, its metric before and after, time."""
    rows, total = [], 0.0
    for name, node in graph.items():
        if node.state != "up to date" or node.output is None:
            continue
        summary, spent = node.output.metrics.get("summary", {}), node.output.manifest["seconds"]
        total += spent
        rows.append([name, *(summary.get(key, "") for key in ("input", "output", "measure")), seconds(spent)])
    rows.append(["all", "", "", "", seconds(total)])
    width = columns(sys.stdout) or FILE_WIDTH
    if table_width(rows) <= width:
        _print_table(rows, width)
    else:
        _print_paragraphs(rows)


def table_width(rows: list[list[str]]) -> int:
    """Columns of a terminal below which the table would break words or times."""
    total = 3 * len(TITLES)
    for title, width in zip(TITLES, _word_widths(rows), strict=True):
        total += max(width, MIN_WIDTHS.get(title, 0))
    return total


def _word_widths(rows: list[list[str]]) -> list[int]:
    """Width of the longest word of each column; of the longest time, because times are not broken."""
    from rich.cells import cell_len

    widths = []
    for title, cells in zip(TITLES, zip(*rows, strict=True), strict=True):
        words = [title]
        for cell in cells:
            words += [cell] if title == "time" else cell.split()
        widths.append(max(map(cell_len, words)))
    return widths


def _print_table(rows: list[list[str]], width: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title, word_width in zip(TITLES, _word_widths(rows), strict=True):
        # "measured" is the longest: on a narrow terminal the others are limited in its favour
        limited = title in ("in", "out") and width < FILE_WIDTH
        most = max(word_width, width // 5) if limited else None
        justify = "right" if title == "time" else "left"
        table.add_column(title, min_width=word_width, max_width=most, no_wrap=title == "time", justify=justify)
    for row in rows[:-1]:
        table.add_row(*map(Text, row))
    table.add_section()
    table.add_row(*rows[-1])
    Console(width=width, highlight=False).print(table)


def _print_paragraphs(rows: list[list[str]]) -> None:
    """For a narrow terminal: a stage and its time, and below it one line for each other column."""
    for name, *cells, spent in rows:
        show(f"{name}  {spent}")
        for title, cell in zip(TITLES[1:-1], cells, strict=True):
            if cell:
                show(f"  {title:<8}  {cell}")
