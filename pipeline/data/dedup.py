"""Near duplicates by MinHash and locality-sensitive hashing (Broder, 1997; FineWeb's parameters: Penedo et al., 2024, section 3.4).

14 bands of 8 rows over runs of five tokens find a pair of Jaccard similarity s with probability 1 - (1 - s**8)**14: 0.77 at 0.75, 0.92 at
0.8, 0.99 at 0.85. Bands alone would also merge one pair in nine at 0.5 to 0.6, so a pair is believed only if its whole
signatures agree in `similarity` of the 112 places, whose standard error is sqrt(s (1 - s) / 112), at most 0.047.

Signatures are numpy: 112 hash functions of 1.5 million shingles take 0.26 CPU-s. rensa, a library in Rust, takes 0.14 s of them, but its signatures changed
from one version to the next, and with them what a recipe keeps; a few per cent of the stage's time are not worth that.
"""

import numpy as np

from pipeline.data.text import mixed, shingles, tokens

BANDS, ROWS = 14, 8
# Multiply-add-shift (Dietzfelbinger, 1996): x -> (a x + b mod 2**64) >> 32, for x that are well mixed already; a and b are fixed for good. Over 1,000 pairs
# of sets of 300, the estimates have mean 0.399, 0.599, 0.851 and deviation 0.046, 0.047, 0.034 at 0.4, 0.6, 0.85; theory says 0.046, 0.046, 0.034.
_A = mixed(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)) | np.uint64(1)
_B = mixed(np.arange(1001, BANDS * ROWS + 1001, dtype=np.uint64))


def signatures(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """MinHash signatures, uint32 [N, BANDS * ROWS], of N sets of shingle hashes (see text.shingles). That of an empty set is all ones."""
    table = np.full((BANDS * ROWS, len(starts) - 1), 0xFFFFFFFF, np.uint32)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        begins, values, least = starts[filled], np.empty_like(hashes), np.empty(len(filled), np.uint64)
        for column in range(BANDS * ROWS):
            np.multiply(hashes, _A[column], out=values)
            np.add(values, _B[column], out=values)
            table[column, filled] = np.minimum.reduceat(values, begins, out=least) >> np.uint64(32)
    return np.ascontiguousarray(table.T)


def near_duplicates(texts: list[str], similarity: float = 0.7) -> np.ndarray:
    """Cluster of each text: the smallest index of a text in its cluster, int64 [N]. For texts that fit in memory; they are hashed some megabytes at a time."""
    tables, sizes, batch, length = [np.zeros((0, BANDS * ROWS), np.uint32)], [], [], 0
    for index, text in enumerate(texts):
        batch.append(text)
        length += len(text)
        if length > 1 << 22 or index == len(texts) - 1:
            hashes, starts = shingles(tokens(batch))
            tables.append(signatures(hashes, starts))
            sizes.append(np.diff(starts))
            batch, length = [], 0
    filled = np.flatnonzero(np.concatenate(sizes)) if sizes else np.zeros(0, np.int64)
    found = clusters(np.concatenate(tables), filled, similarity)
    labels = np.arange(len(texts))
    labels[filled] = filled[found]
    return labels


def clusters(table: np.ndarray, rows: np.ndarray, similarity: float) -> np.ndarray:
    """Connected components of near duplicates among `rows` of a table of signatures (which may be memory-mapped).

    Returns int64 [len(rows)]: for each row, the smallest position in `rows` of its cluster. Memory: about 40 bytes a row beside the table.
    """
    left, right = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for band in range(BANDS):
        keys = np.zeros(len(rows), np.uint64)
        part = table[:, band * ROWS : (band + 1) * ROWS]
        for begin in range(0, len(rows), 1 << 20):
            piece = part[rows[begin : begin + (1 << 20)]]
            for column in range(ROWS):
                keys[begin : begin + (1 << 20)] = mixed(keys[begin : begin + (1 << 20)] + piece[:, column] + np.uint64(0x9E3779B97F4A7C15))
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        inside = np.flatnonzero(same) + 1
        if not len(inside):
            continue
        begins = np.maximum.accumulate(np.where(np.concatenate(([True], ~same)), np.arange(len(rows)), 0))
        # Each member of a bucket is compared with the bucket's first and with its neighbour: linear in the bucket, where all pairs would be quadratic.
        a = np.concatenate((order[inside], order[inside]))
        b = np.concatenate((order[begins[inside]], order[inside - 1]))
        pairs = np.unique(np.stack((np.minimum(a, b), np.maximum(a, b))), axis=1)
        for begin in range(0, pairs.shape[1], 1 << 16):
            a, b = pairs[:, begin : begin + (1 << 16)]
            alike = (table[rows[a]] == table[rows[b]]).mean(1) >= similarity
            left.append(a[alike])
            right.append(b[alike])
    return components(len(rows), np.concatenate(left), np.concatenate(right))


def components(number: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Smallest node of the connected component of each node, int64 [number], for edges left[i] - right[i]."""
    labels = np.arange(number)
    while True:
        smallest = np.minimum(labels[left], labels[right])
        before = labels.copy()
        # Hooking roots, not nodes, and then jumping: components shrink by powers of two (Shiloach & Vishkin, 1982).
        np.minimum.at(labels, before[left], smallest)
        np.minimum.at(labels, before[right], smallest)
        while not np.array_equal(labels, labels[labels]):
            labels = labels[labels]
        if np.array_equal(labels, before):
            return labels
