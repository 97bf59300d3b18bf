"""Documents into rows by best fit: which segments of documents are in each row (Ding et al., "Fewer Truncations Improve
Language Modeling", 2024).

A document that fits into a row is never cut. A longer one fills rows of its own, and its last segment, like all shorter
documents, is packed by best-fit-decreasing, in groups of documents to bound memory. A row is `length` + 1 tokens:

    [token before the first segment] [segment] [segment] ... [padding]

The first token is an end of document, or the token before the segment if the segment continues a document and fills the
row. A last segment begins with the token before it, as context whose own label does not count. So each token is a label
once per epoch. `spare` slots per segment are left free for the three sentinels of fill-in-the-middle.
"""

import bisect
import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

GROUP = 2**20  # documents packed together
ARRAYS = {"offsets": np.int64, "starts": np.int64, "lengths": np.int32}


class Table(NamedTuple):
    """Segments of each row of one source's epoch: row r has the segments offsets[r] .. offsets[r + 1]."""

    offsets: np.ndarray
    """int64 [rows + 1]."""
    starts: np.ndarray
    """int64 [segments]: first token in the source."""
    lengths: np.ndarray
    """int32 [segments]: tokens; negative if the first of them is context, whose label does not count."""

    @property
    def rows(self) -> int:
        return len(self.offsets) - 1


class _OpenBins:
    """Bins with room, by free slots; bins with equally many are in the order in which they came to have so many."""

    def __init__(self):
        self.bins: dict[int, deque] = {}  # free slots -> arrays of bins
        self.sizes: list[int] = []  # the keys, sorted

    def least_free(self, size: int) -> int | None:
        """The smallest number of free slots of a bin that has room for `size`; None if no bin has."""
        place = bisect.bisect_left(self.sizes, size)
        return self.sizes[place] if place < len(self.sizes) else None

    def take(self, free: int) -> np.ndarray:
        """The oldest bins with so many free slots."""
        ids = self.bins[free].popleft()
        if not self.bins[free]:
            del self.bins[free]
            del self.sizes[bisect.bisect_left(self.sizes, free)]
        return ids

    def put(self, free: int, ids: np.ndarray, oldest: bool = False) -> None:
        if not free or not len(ids):
            return
        if free not in self.bins:
            self.bins[free] = deque()
            bisect.insort(self.sizes, free)
        if oldest:
            self.bins[free].appendleft(ids)
        else:
            self.bins[free].append(ids)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Bin of each item, int64 [items], by best-fit-decreasing: largest first, each into the fullest bin that has room,
    else into a new one.

    Items of one size are taken in their order; of equally full bins, the one that has been so full for longest. Sizes
    are 1 .. capacity.
    """
    bin_of_item = np.empty(len(sizes), dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    borders = np.flatnonzero(np.diff(sizes[order], prepend=0, append=0))
    open_bins = _OpenBins()
    num_bins = 0
    # all items of one size are placed together, into all bins with equally many free slots
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        items = order[begin:end]
        size = int(sizes[items[0]])
        while len(items):
            free = open_bins.least_free(size)
            if free is None:
                free = capacity
                new = -(-len(items) // (capacity // size))
                bins = np.arange(num_bins, num_bins + new)
                num_bins += new
            else:
                bins = open_bins.take(free)
            # a bin that has taken one item is the fullest with room for the next one, until it has no more room
            per_bin = free // size
            needed = -(-len(items) // per_bin)
            if needed < len(bins):
                open_bins.put(free, bins[needed:], oldest=True)
                bins = bins[:needed]
            num_placed = min(len(items), per_bin * len(bins))
            bin_of_item[items[:num_placed]] = np.repeat(bins, per_bin)[:num_placed]
            full, rest = divmod(num_placed, per_bin)
            open_bins.put(free - per_bin * size, bins[:full])
            if rest:
                open_bins.put(free - rest * size, bins[full:])
            items = items[num_placed:]
    return bin_of_item


def table_of(ends: np.ndarray, length: int, spare: int = 0) -> Table:
    """The table of documents that end at `ends` (int64 [documents], ascending, in one stream) for rows of `length`
    labels."""
    groups = []
    for first in range(0, len(ends), GROUP):
        begin = int(ends[first - 1]) if first else 0
        groups.append(_pack_group(ends[first : first + GROUP], begin, length, spare))
    if not groups:
        return Table(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32))
    segments_per_row = np.concatenate([np.diff(group.offsets) for group in groups])
    offsets = np.concatenate([[0], np.cumsum(segments_per_row)]).astype(np.int64)
    starts = np.concatenate([group.starts for group in groups])
    lengths = np.concatenate([group.lengths for group in groups])
    return Table(offsets, starts, lengths)


def _pack_group(ends: np.ndarray, begin: int, length: int, spare: int) -> Table:
    most = length - spare  # tokens of a segment
    begins = np.concatenate([[begin], ends[:-1]])
    sizes = ends - begins
    # segments that fill a row, of documents that are longer than a row
    num_full = sizes // most * (sizes > most)
    number_in_document = np.arange(num_full.sum()) - np.repeat(np.cumsum(num_full) - num_full, num_full)
    full_starts = np.repeat(begins, num_full) + number_in_document * most
    # what remains of each document
    rest = sizes - num_full * most
    has_rest = rest > 0
    context = (num_full > 0)[has_rest].astype(np.int64)
    rest_starts = (ends - rest)[has_rest] - context
    rest_lengths = rest[has_rest] + context
    bins = best_fit(rest_lengths + spare, length)

    rows = np.concatenate([np.arange(len(full_starts)), len(full_starts) + bins])
    starts = np.concatenate([full_starts, rest_starts])
    signed_lengths = np.where(context > 0, -rest_lengths, rest_lengths)
    lengths = np.concatenate([np.full(len(full_starts), most), signed_lengths])
    order = np.lexsort((starts, rows))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows))])
    return Table(offsets.astype(np.int64), starts[order].astype(np.int64), lengths[order].astype(np.int32))


# ---- on disk ---------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, table: Table) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for array, dtype in ARRAYS.items():
        temporary = folder / f"{name}.{array}.tmp"
        with open(temporary, "wb") as handle:
            np.save(handle, getattr(table, array).astype(dtype))
        os.replace(temporary, folder / f"{name}.{array}.npy")


def exists(folder: Path, name: str) -> bool:
    return all((folder / f"{name}.{array}.npy").exists() for array in ARRAYS)


def read(folder: Path, name: str) -> Table:
    """A table that was written before, memory-mapped."""
    arrays = [np.load(folder / f"{name}.{array}.npy", mmap_mode="r") for array in ARRAYS]
    return Table(*map(np.asarray, arrays))
