"""Which source each row comes from, and which row of that source it is: a pure function of (seed, row).

mixture = Mixture([(0, {"web": 0.8, "code": 0.2}), (10_000, {"web": 0.5, "code": 0.5})], seed)
mixture.block(123)              # the rows around row 123, whose sources are computed together
mixture.rows_by_source(1000)    # exactly how many of the first 1000 rows come from each source
"""

from typing import NamedTuple

import numpy as np

from pipeline.core.seeds import derive

# Rows of a block, 4096, as bits. Sources are dealt out block by block, evenly within each.
BITS = 12
# Multiples of the golden ratio's fraction fill [0, 1) evenly (Weyl; the lowest discrepancy of all additive sequences).
GOLDEN = 0.6180339887498949


class Block(NamedTuple):
    """Rows first .. first + len(sources) of the run."""

    first: int
    sources: np.ndarray
    """int64: index of each row's source in `Mixture.sources`."""
    ordinals: np.ndarray
    """int64: how many rows the source has given before, counted over the run."""


class Mixture:
    """`phases`: (first row, weights of any scale) in order, the first one from row 0. A source with weight 0 gives no
    rows."""

    def __init__(self, phases: list[tuple[int, dict[str, float]]], seed: int):
        names = set()
        for _, weights in phases:
            names |= {source for source, weight in weights.items() if weight}
        self.sources = sorted(names)
        self.firsts = [first for first, _ in phases]
        self.phases = []
        for number, (_, weights) in enumerate(phases):
            path = ("phase", number) if number else ()
            self.phases.append(_Phase(weights, self.sources, seed, path))
        self.rows_before = [np.zeros(len(self.sources), np.int64)]  # of each source, before each phase
        for number in range(1, len(phases)):
            length = self.firsts[number] - self.firsts[number - 1]
            self.rows_before.append(self.rows_before[-1] + self.phases[number - 1].rows_by_source(length))

    def _phase_number(self, row: int) -> int:
        return max(number for number, first in enumerate(self.firsts) if first <= row)

    def block(self, row: int) -> Block:
        """The block that contains a row. It ends early where the mixture changes."""
        number = self._phase_number(row)
        phase, phase_first = self.phases[number], self.firsts[number]
        block = (row - phase_first) >> BITS
        sources, ordinals = phase.block(block)
        first = phase_first + (block << BITS)
        if number + 1 < len(self.firsts):
            length = self.firsts[number + 1] - first
            sources, ordinals = sources[:length], ordinals[:length]
        return Block(first, sources, ordinals + self.rows_before[number][sources])

    def rows_by_source(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        number = self._phase_number(rows)
        counts = self.rows_before[number] + self.phases[number].rows_by_source(rows - self.firsts[number])
        return {source: int(count) for source, count in zip(self.sources, counts, strict=True)}

    def weights(self, phase: int) -> dict[str, float]:
        """Weights of a phase, scaled to add up to 1."""
        return self.phases[phase].weights


class _Phase:
    """Constant weights; rows are counted from the beginning of the phase."""

    def __init__(self, weights: dict[str, float], sources: list[str], seed: int, path: tuple):
        total = float(sum(weights.values()))
        self.weights = {source: weights[source] / total for source in sorted(weights) if weights[source]}
        self.indices = np.array([sources.index(source) for source in self.weights], dtype=np.int64)
        self.num_sources, self.seed, self.path = len(sources), seed, path
        self._bounds = np.cumsum([0.0, *self.weights.values()])
        self._bounds[-1] = 1.0
        self._counts = np.zeros((1, len(self.weights)), dtype=np.int64)  # rows of each source before block b

    def _shift(self, block):
        """Where the points of a block begin, as a fraction of their distance: an even sequence over blocks, so that a
        rare source gets its share over many blocks."""
        begin = derive(self.seed, "mixture", *self.path) / 2**63
        return np.modf(begin + np.asarray(block, dtype=np.float64) * GOLDEN)[0]

    def _rows_before(self, block: int) -> np.ndarray:
        """int64 [sources of the phase]: rows of each in all earlier blocks. A closed form per block, summed."""
        computed = len(self._counts) - 1
        if block > computed:
            blocks = np.arange(computed, max(block, 2 * computed, 64))
            # how many points (i + shift) / size are below each bound
            below = np.ceil(self._bounds[None] * 2**BITS - self._shift(blocks)[:, None])
            below[:, 0], below[:, -1] = 0, 2**BITS
            rows = np.diff(below, axis=1).astype(np.int64)
            self._counts = np.concatenate([self._counts, self._counts[-1] + np.cumsum(rows, axis=0)])
        return self._counts[block]

    def _sources(self, block: int) -> np.ndarray:
        """int64 [rows of a block]: index of each row's source among those of the phase.

        The points i / size, in van der Corput's order scrambled by a mask that depends on the block, fall into the
        sources' intervals. So every stretch of rows has each source in about its share: the deviation grows with the
        logarithm of the number of rows, not with its root.
        """
        size = 2**BITS
        points = _VAN_DER_CORPUT ^ (derive(self.seed, "mixture", *self.path, block) & (size - 1))
        bounds = np.ceil(self._bounds * size - float(self._shift(block))).astype(np.int64)
        return np.searchsorted(bounds[1:-1], points, side="right")

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each row of a block: the index of its source among all sources, and which row of that source it is,
        counted over the phase."""
        sources, rows_before = self._sources(block), self._rows_before(block)
        ordinals = np.empty(len(sources), dtype=np.int64)
        for number in range(len(self.weights)):
            rows = np.flatnonzero(sources == number)
            ordinals[rows] = rows_before[number] + np.arange(len(rows))
        return self.indices[sources], ordinals

    def rows_by_source(self, rows: int) -> np.ndarray:
        """int64 [all sources]: rows of each among the first `rows` of the phase."""
        block, offset = rows >> BITS, rows & (2**BITS - 1)
        counts = self._rows_before(block)
        if offset:
            counts = counts + np.bincount(self._sources(block)[:offset], minlength=len(self.weights))
        result = np.zeros(self.num_sources, dtype=np.int64)
        result[self.indices] = counts
        return result


def _reversed_bits() -> np.ndarray:
    numbers = np.arange(2**BITS)
    result = np.zeros(2**BITS, dtype=np.int64)
    for bit in range(BITS):
        result |= ((numbers >> bit) & 1) << (BITS - 1 - bit)
    return result


_VAN_DER_CORPUT = _reversed_bits()
