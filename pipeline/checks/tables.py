"""Tables of `alma inspect` and `alma verify` on a terminal or in a file."""

import sys
from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160  # columns where the output is not a terminal


def console(width: int = WIDTH) -> Console:
    """Standard output; `width` columns where it is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False, markup=False)


def new_table(*columns: str, text: Collection[str], title: str | None = None, no_wrap: Collection[str] = ()) -> Table:
    """A table without rows. The columns in `text` are aligned left and wrap, unless they are in `no_wrap`; the others
    are numbers: aligned right, on one line."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold not italic",
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        is_text = column in text
        table.add_column(
            column, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text or column in no_wrap
        )
    return table


def one_line(excerpt: str | None, width: int) -> Text:
    """An excerpt on one indented line of at most `width` columns."""
    line = Text("      " + " ".join((excerpt or "").split()), style="dim")
    line.truncate(width, overflow="ellipsis")
    return line


def percent(part: int, total: int) -> str:
    return f"{part / total:.1%}" if total else ""
