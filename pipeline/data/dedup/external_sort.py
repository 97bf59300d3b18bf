"""Arrays larger than memory: scratch arrays on disk, rows brought together by key, and connected components.

What is held in memory depends on BLOCK and PARTITION alone. Pages of scratch arrays that the system keeps are its cache
and go when somebody needs the room.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BLOCK = 1 << 18  # rows looked at together
PARTITION = 32 << 20  # bytes of rows sorted together; sorting takes about four times as much
MOST_FILES = 256  # open at a time


def array(path: Path, dtype, shape) -> np.ndarray:
    """A scratch array on disk, of zeros. Nothing is resumed from it: a killed run makes it again."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    path.parent.mkdir(parents=True, exist_ok=True)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "w+", shape=shape)


def blocks(number: int, size: int = BLOCK) -> Iterator[slice]:
    for begin in range(0, number, size):
        yield slice(begin, min(number, begin + size))


def together(parts: Iterable[np.ndarray], total: int, folder: Path) -> Iterator[np.ndarray]:
    """All rows of `parts` (uint64 [n, columns], the first column a well-mixed key), in pieces that fit into memory and
    hold all rows of a key.

    Pieces come in the order of their keys; rows of a piece in the order in which they came. `total` is about the number
    of rows, `folder` scratch.
    """
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        return
    width = first.shape[1]
    number = 1
    while number < MOST_FILES and total * width * 8 > number * PARTITION:
        number *= 2
    if number == 1:
        yield np.concatenate([first, *parts])
        return
    shift = np.uint64(65 - number.bit_length())
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    files = [open(folder / f"{i:03d}", "wb") for i in range(number)]
    try:
        part = first
        while part is not None:
            where = part[:, 0] >> shift
            order = np.argsort(where, kind="stable")
            bounds = np.searchsorted(where[order], np.arange(number + 1, dtype=np.uint64))
            sorted_part = np.ascontiguousarray(part[order], np.uint64)
            for i in np.flatnonzero(np.diff(bounds)):
                files[i].write(sorted_part[bounds[i] : bounds[i + 1]].tobytes())
            part = next(parts, None)
    finally:
        for file in files:
            file.close()
    for i in range(number):
        rows = np.fromfile(folder / f"{i:03d}", np.uint64).reshape(-1, width)
        (folder / f"{i:03d}").unlink()
        if len(rows):
            yield rows
    folder.rmdir()


def runs(keys: np.ndarray) -> np.ndarray:
    """For sorted keys, [N] or [N, columns]: the index at which the run of equal keys of each begins, int64 [N]."""
    differ = keys[1:] != keys[:-1]
    fresh = np.concatenate(([True], differ.any(1) if differ.ndim > 1 else differ))[: len(keys)]
    return np.maximum.accumulate(np.where(fresh, np.arange(len(keys)), 0))


# ---- connected components --------------------------------------------------------------------------------------------


def union(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join left[i] and right[i] in a forest whose roots are the smallest nodes of their trees (labels[root] ==
    root)."""
    a, b = roots(labels, left), roots(labels, right)
    while True:
        differ = a != b
        if not differ.any():
            return
        low, high = np.minimum(a[differ], b[differ]), np.maximum(a[differ], b[differ])
        # roots are hooked, never inner nodes; of several hooks on one root the others wait for the next round
        np.minimum.at(labels, high, low)
        a, b = roots(labels, low), roots(labels, high)


def roots(labels: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Root of each node; paths are shortened on the way."""
    found = labels[nodes]
    while True:
        further = labels[found]
        if np.array_equal(further, found):
            labels[nodes] = found
            return found
        found = further


def components(number: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Smallest node of the connected component of each node, int64 [number], for edges left[i] - right[i]."""
    labels = np.arange(number)
    union(labels, np.asarray(left, np.int64), np.asarray(right, np.int64))
    return roots(labels, np.arange(number))
