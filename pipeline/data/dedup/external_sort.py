"""Arrays larger than memory: scratch arrays on disk, rows grouped by key, and connected components.

Memory use depends on BLOCK and PARTITION only. Memory-mapped scratch pages are page cache; the kernel drops them under
pressure.
"""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

BLOCK = 1 << 18  # rows processed together
PARTITION = 32 << 20  # bytes of rows sorted together; sorting takes about four times as much
MAX_FILES = 256  # open at a time


def scratch_array(path: Path, dtype, shape) -> np.ndarray:
    """A scratch array on disk, of zeros. Nothing is resumed from it: a killed run makes it again."""
    shape = shape if isinstance(shape, tuple) else (shape,)
    path.parent.mkdir(parents=True, exist_ok=True)
    if 0 in shape:
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, "w+", shape=shape)


def blocks(number: int, size: int = BLOCK) -> Iterator[slice]:
    for begin in range(0, number, size):
        yield slice(begin, min(number, begin + size))


def grouped_by_key(parts: Iterable[np.ndarray], total: int, folder: Path) -> Iterator[np.ndarray]:
    """All rows of `parts` (uint64 [n, columns], the first column a well-mixed key), in partitions that fit into memory
    and hold all rows of a key.

    Partitions come in the order of their keys, the rows of a partition in the order in which they came. `total` is
    about the number of rows, `folder` is scratch.
    """
    parts = iter(parts)
    first = next(parts, None)
    if first is None:
        return
    width = first.shape[1]
    number = 1
    while number < MAX_FILES and total * width * 8 > number * PARTITION:
        number *= 2
    if number == 1:
        yield np.concatenate([first, *parts])
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    paths = [folder / f"{i:03d}" for i in range(number)]
    files = [open(path, "wb") for path in paths]
    try:
        _append_to_partitions(first, files)
        for part in parts:
            _append_to_partitions(part, files)
    finally:
        for file in files:
            file.close()
    for path in paths:
        rows = np.fromfile(path, np.uint64).reshape(-1, width)
        path.unlink()
        if len(rows):
            yield rows
    folder.rmdir()


def _append_to_partitions(rows: np.ndarray, files: list) -> None:
    """Write each row to the file that the upper bits of its key name; the number of files is a power of two."""
    number = len(files)
    partition = rows[:, 0] >> np.uint64(65 - number.bit_length())
    order = np.argsort(partition, kind="stable")
    bounds = np.searchsorted(partition[order], np.arange(number + 1, dtype=np.uint64))
    ordered = np.ascontiguousarray(rows[order], np.uint64)
    for i in np.flatnonzero(np.diff(bounds)):
        files[i].write(ordered[bounds[i] : bounds[i + 1]].tobytes())


def run_starts(keys: np.ndarray) -> np.ndarray:
    """For sorted keys, [N] or [N, columns]: the index at which the run of equal keys of each begins, int64 [N]."""
    differs = keys[1:] != keys[:-1]
    if differs.ndim > 1:
        differs = differs.any(1)
    is_start = np.concatenate(([True], differs))[: len(keys)]
    return np.maximum.accumulate(np.where(is_start, np.arange(len(keys)), 0))


# ---- connected components --------------------------------------------------------------------------------------------


def union(labels: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Join left[i] and right[i] in a forest whose roots are the smallest nodes of their trees (labels[root] ==
    root)."""
    a, b = find_roots(labels, left), find_roots(labels, right)
    while True:
        differs = a != b
        if not differs.any():
            return
        low, high = np.minimum(a[differs], b[differs]), np.maximum(a[differs], b[differs])
        # only roots are attached, never inner nodes; if a root is attached several times, the others wait for the next
        # round
        np.minimum.at(labels, high, low)
        a, b = find_roots(labels, low), find_roots(labels, high)


def find_roots(labels: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Root of each node; paths are shortened on the way."""
    roots = labels[nodes]
    while True:
        parents = labels[roots]
        if np.array_equal(parents, roots):
            labels[nodes] = roots
            return roots
        roots = parents


def components(number: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Smallest node of the connected component of each node, int64 [number], for edges left[i] - right[i]."""
    labels = np.arange(number)
    union(labels, np.asarray(left, np.int64), np.asarray(right, np.int64))
    return find_roots(labels, np.arange(number))
