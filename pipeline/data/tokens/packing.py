"""Documents into rows by best fit: what a row holds, as a table of pieces (Ding et al., "Fewer Truncations Improve
Language Modeling", 2024).

A document that fits into a row is never cut. A longer one gives rows of its own and a rest, and what is shorter than a
row is packed by best-fit-decreasing, in groups of documents, so that memory is bounded. A row is `length` + 1 tokens:

    [token before the first piece] [piece] [piece] ... [padding]

The first is the end of a document, or what a piece that fills a row goes on from. A rest begins with the last token
before it, as context, whose own label does not count. So each token is a label once an epoch. `spare` slots a piece are
left free for fill-in-the-middle's three tokens.
"""

import bisect
import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

GROUP = 2**20  # documents packed together
PARTS = {"offsets": np.int64, "starts": np.int64, "lengths": np.int32}


class Table(NamedTuple):
    """Pieces of each row of one source's epoch: those of row r are offsets[r] .. offsets[r + 1]."""

    offsets: np.ndarray
    """int64 [rows + 1]."""
    starts: np.ndarray
    """int64 [pieces]: first token in the source."""
    lengths: np.ndarray
    """int32 [pieces]: tokens; negative: the first of them is context, whose label does not count."""

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item, int64 [items], by best-fit-decreasing: largest first, each into the fullest bin that has room,
    else into a new one.

    Items of one size come in their order; of equally full bins the one that has been so full for longest is taken.
    Sizes are 1 .. capacity.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    borders = np.flatnonzero(np.diff(sizes[order], prepend=0, append=0))
    room: dict[int, deque] = {}  # free slots -> arrays of bins, in the order in which they came to have so many
    rooms: list[int] = []  # its keys, sorted
    opened = 0

    def put(free: int, ids: np.ndarray) -> None:
        if free and len(ids):
            if free not in room:
                room[free] = deque()
                bisect.insort(rooms, free)
            room[free].append(ids)

    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        items, size = order[begin:end], int(sizes[order[begin]])
        while len(items):
            place = bisect.bisect_left(rooms, size)
            if place == len(rooms):
                free = capacity
                ids = np.arange(opened, opened - (-len(items) // (capacity // size)))
                opened += len(ids)
            else:
                free = rooms[place]
                ids = room[free].popleft()
                if not room[free]:
                    del room[free], rooms[place]
            each = free // size  # a bin that has taken one is the fullest with room for the next, until it has none
            needed = -(-len(items) // each)
            if needed < len(ids):
                if free not in room:
                    room[free] = deque()
                    bisect.insort(rooms, free)
                room[free].appendleft(ids[needed:])
                ids = ids[:needed]
            taken = min(len(items), each * len(ids))
            bins[items[:taken]] = np.repeat(ids, each)[:taken]
            full, rest = divmod(taken, each)
            put(free - each * size, ids[:full])
            if rest:
                put(free - rest * size, ids[full:])
            items = items[taken:]
    return bins


def table_of(ends: np.ndarray, length: int, spare: int = 0) -> Table:
    """The table of documents that end at `ends` (int64 [documents], ascending, in one stream) for rows of `length`
    labels."""
    found = [
        _group(ends[at : at + GROUP], int(ends[at - 1]) if at else 0, length, spare)
        for at in range(0, len(ends), GROUP)
    ]
    counts = [np.diff(part.offsets) for part in found]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]) if found else np.zeros(1)
    return Table(
        offsets.astype(np.int64),
        np.concatenate([part.starts for part in found] or [np.zeros(0, np.int64)]),
        np.concatenate([part.lengths for part in found] or [np.zeros(0, np.int32)]),
    )


def _group(ends: np.ndarray, begin: int, length: int, spare: int) -> Table:
    most = length - spare  # tokens of a piece
    begins = np.concatenate([[begin], ends[:-1]])
    sizes = ends - begins
    whole = sizes // most * (sizes > most)  # pieces that fill a row, of documents that are longer than one
    rest = sizes - whole * most
    cut = np.repeat(begins, whole) + (np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)) * most
    some = rest > 0
    context = (whole > 0)[some].astype(np.int64)
    starts = (ends - rest)[some] - context
    lengths = rest[some] + context
    bins = best_fit(lengths + spare, length)
    rows = np.concatenate([np.arange(len(cut)), len(cut) + bins])
    starts, lengths = (
        np.concatenate([cut, starts]),
        np.concatenate([np.full(len(cut), most), np.where(context > 0, -lengths, lengths)]),
    )
    order = np.lexsort((starts, rows))
    counts = np.bincount(rows)
    return Table(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        starts[order].astype(np.int64),
        lengths[order].astype(np.int32),
    )


def write(folder: Path, name: str, table: Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, dtype in PARTS.items():
        temporary = folder / f"{name}.{part}.tmp"
        with open(temporary, "wb") as handle:
            np.save(handle, getattr(table, part).astype(dtype))
        os.replace(temporary, folder / f"{name}.{part}.npy")


def there(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{part}.npy").exists() for part in PARTS)


def read(folder: Path, name: str) -> Table:
    """A table that was written before, memory-mapped."""
    return Table(*(np.asarray(np.load(folder / f"{name}.{part}.npy", mmap_mode="r")) for part in PARTS))
