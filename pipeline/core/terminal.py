"""Text for people. On a terminal a line wraps at words; in a file or a pipe it is not broken. Standard output may be
closed: hours of work must not end because nobody reads it any more."""

import errno
import io
import os
import re
import sys
from typing import TextIO

from pipeline.core.errors import UserError

# `schedule   adamw, ...`: further lines are indented to the text, not to the label
LABEL = re.compile(r"\s*(?:\S+ {2,})?")
OPENING = "([{（《「『【“‘"
CLOSING = ")]}）》」』】”’，。、；：？！…,.;:?!%"


def columns(stream: TextIO) -> int | None:
    """Width of the terminal that a stream writes to; None for a file or a pipe. COLUMNS overrides it."""
    if not stream.isatty():
        return None
    given = os.environ.get("COLUMNS", "")
    if given.isdigit() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:  # it was closed at this moment
        return None


def show(text: str, stream: TextIO | None = None) -> None:
    """Print to `stream`, by default standard output, which may have been closed."""
    stream = sys.stdout if stream is None else stream
    if stream is None:
        return
    width = columns(stream)
    print(wrap(text, width) if width else text, file=stream, flush=True)


def wrap(text: str, width: int) -> str:
    """Lines of at most `width` columns, broken at spaces and between Chinese characters. A path or another word that
    is longer is not broken, so that it can be copied."""
    return "\n".join(_wrap_line(line, width) for line in text.split("\n"))


def _wrap_line(line: str, width: int) -> str:
    from rich.cells import cell_len

    if cell_len(line) <= width:
        return line
    label = LABEL.match(line).group()
    indent = cell_len(label) if 0 < cell_len(label) <= width // 2 else 2
    lines, current, empty = [], label, True
    for space, unit in _units(line[len(label) :]):
        if empty or cell_len(current + space + unit) <= width:
            current += space + unit
        else:
            lines.append(current)
            current = " " * indent + unit
        empty = False
    return "\n".join([*lines, current])


def _units(text: str) -> list[tuple[str, str]]:
    """(space in front, unit that must not be broken): a word, or one Chinese character with its punctuation."""
    from rich.cells import cell_len

    units: list[tuple[str, str]] = []
    for space, word in re.findall(r"(\s*)(\S+)", text):
        start = 0
        for at in range(1, len(word)):
            before, here = word[at - 1], word[at]
            wide = cell_len(before) == 2 or cell_len(here) == 2
            if wide and cell_len(here) and before not in OPENING and here not in CLOSING:
                units.append((space, word[start:at]))
                space, start = "", at
        units.append((space, word[start:]))
    return units


def short(value: float) -> str:
    """A number in at most three digits and a letter: 0.123, 11.1k, 2.5M."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # from where three digits round up to it
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def byte_size(number: float) -> str:
    """512 bytes, 0.5 MB, 12.5 GB, 1.2 TB."""
    if number < 1e5:
        return f"{number:.0f} bytes"
    if number < 1e8:
        return f"{number / 1e6:.1f} MB"
    if number < 1e12:
        return f"{number / 1e9:.1f} GB"
    return f"{number / 1e12:.1f} TB"


def time_left(seconds: float) -> str:
    """0m12s, 3h05m, 2d04h."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def plural(number: int, noun: str, form: str = "") -> str:
    """`1 source`, `2 sources`; `form` "," writes 12,000. Nouns with another plural come as `process/processes`."""
    one, _, several = noun.partition("/")
    return f"{number:{form}} {one if number == 1 else several or one + 's'}"


def ranks_text(ranks: list[int]) -> str:
    """[3] -> rank 3; [0, 1, 2, 5] -> ranks 0-2, 5"""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def say(text: str, rank: int | None = None) -> None:
    """Print a line for the user, on rank 0 only."""
    if rank is None:
        rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        show(text)


# Errors of writing to a pipe without a reader, or to a terminal or descriptor that was closed.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


class _UnbrokenPipe(io.FileIO):
    """A file descriptor whose reader may go away. Later output is discarded, also that of processes that are started
    later."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if error.errno not in GONE:
                name = "standard error" if self.fileno() == 2 else "standard output"
                raise UserError(f"{name}: {error.strerror}; send it to a place that can be written") from None
            return len(data)


def keep_open() -> None:
    """Make this process's standard streams safe to write to. Call it first: a file that is opened while descriptor 1 is
    closed would get its number, and with it everything that is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller; open takes the lowest free number, which is this one
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _unbroken(1, sys.stdout)
    sys.stderr = _unbroken(2, sys.stderr)


def _unbroken(number: int, stream):
    """A stream on descriptor `number` in place of `stream`, or `stream` itself if it writes elsewhere, such as into a
    buffer of a program that uses this one as a library."""
    try:
        if stream is not None and stream.fileno() != number:
            return stream
    except io.UnsupportedOperation:
        return stream
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "backslashreplace")
    if stream:
        stream.flush()
    raw = _UnbrokenPipe(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors, line_buffering=number == 2 or raw.isatty(), write_through=number == 2
    )
