"""What the processes of a stage have printed: the end of a log, and the first error of each process."""

import re
from collections.abc import Callable
from pathlib import Path

from pipeline.core.terminal import ranks_text

NUM_LAST_LINES = 15
MOST_LINES = 8  # of a summary
PREFIX = re.compile(r"^\[rank\d+\]: ")  # of tracebacks, by torch
# Last lines of a traceback, messages for the user, and what the watchdog says of another rank.
ERROR = re.compile(
    r"error: |[\w.]*(Error|Exception|Interrupt)(: |$)|.*\branks? \d.*\b(failed|killed|lost|in phase|did not start)\b"
)


class RankLogs:
    """Logs of one start of a job, which add to those of the starts before. path_of: rank -> file."""

    def __init__(self, path_of: Callable[[int], Path], count: int):
        self.path_of, self.count = path_of, count
        self.begins = {rank: _size(path_of(rank)) for rank in range(count)}

    def lines(self, rank: int) -> list[str]:
        """What a process printed in this start, without empty lines."""
        try:
            with open(self.path_of(rank), "rb") as file:
                file.seek(self.begins[rank])
                text = file.read().decode(errors="replace")
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines() if line.strip()]

    def end(self, rank: int) -> list[str]:
        return self.lines(rank)[-NUM_LAST_LINES:]

    def first_error(self, rank: int) -> str | None:
        """The first line of a process that is an error."""
        for line in self.lines(rank):
            text = PREFIX.sub("", line, count=1).strip()
            if ERROR.match(text):
                return text
        return None

    def summary(self) -> list[str]:
        """One line for each first error and the processes that have it."""
        ranks: dict[str, list[int]] = {}
        for rank in range(self.count):
            error = self.first_error(rank)
            if error:
                ranks.setdefault(error, []).append(rank)
        lines = [f"{ranks_text(numbers)}: {error}" for error, numbers in ranks.items()]
        if len(lines) > MOST_LINES:
            lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} other errors"]
        return lines


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
