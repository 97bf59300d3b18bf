"""Tables and lines of `alma inspect data`."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLACES = 3  # of each kind of bad input, without --samples


def titled(title: str, *columns: str) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold not italic",
        padding=(0, 1, 0, 0),
    )
    words = ("source", "language", "reason", "overlaps most", "by language", "also fail", "set", "documents in it")
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in words else "right",
            overflow="fold",
            no_wrap=column not in words or column == "reason",
        )
    return table


def line_of(console: Console, excerpt: str | None) -> Text:
    """An excerpt on one line."""
    line = Text("      " + " ".join((excerpt or "").split()), style="dim")
    line.truncate(console.width, overflow="ellipsis")
    return line


def percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
