"""A keyed permutation of range(size) without a table."""

import numpy as np

from pipeline.core.seeds import derive, splitmix64

ROUNDS = 6


def permutation_keys(seed: int, *path: int | str) -> list[int]:
    """Keys of one permutation."""
    return [derive(seed, *path, number) for number in range(ROUNDS)]


def permuted(index: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """Where each `index` goes in a permutation of range(size): a Feistel network over a x b >= size, repeated until the
    result is below `size` (cycle walking; Black & Rogaway, 2002).

    There is no table, so a billion rows cost no memory. a and b are close to the square root of size, so repetitions
    are rare.
    """
    root = max(1, round(size**0.5))
    a, b = np.uint64(root), np.uint64(-(-size // root))
    values = index.astype(np.uint64)
    pending = np.arange(len(index))
    result = np.empty(len(index), dtype=np.int64)
    while len(pending):
        left, right = values // b, values % b
        for number, key in enumerate(keys):
            if number % 2:
                left = (left + splitmix64(right ^ np.uint64(key)) % a) % a
            else:
                right = (right + splitmix64(left ^ np.uint64(key)) % b) % b
        values = left * b + right
        inside = values < size
        result[pending[inside]] = values[inside]
        values, pending = values[~inside], pending[~inside]
    return result
