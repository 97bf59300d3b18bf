"""Which source each row comes from, and which row of that source it is: a pure function of (seed, row).

mixture = Mixture([(0, {"web": 0.8, "code": 0.2}), (10_000, {"web": 0.5, "code": 0.5})], seed)
mixture.block(123)          # the rows around row 123, dealt out together
mixture.rows_of(1000)       # exactly how many of the first 1000 rows each source gives
"""

from typing import NamedTuple

import numpy as np

from pipeline.core.seeds import derive

BITS = 12  # rows of a block, 4096: sources are dealt out in blocks, evenly inside each
# multiples of the golden ratio's fraction fill [0, 1) evenly (Weyl; lowest discrepancy of all additive sequences)
GOLDEN = 0.6180339887498949


class Block(NamedTuple):
    """Rows first .. first + len(chosen) of the run."""

    first: int
    chosen: np.ndarray
    """int64: place of each row's source in `Mixture.sources`."""
    ordinals: np.ndarray
    """int64: how many rows its source has given before, counted over the run."""


class Mixture:
    """`phases`: (first row, weights of any scale) in order, the first one from row 0. A weight of 0 leaves a source
    out."""

    def __init__(self, phases: list[tuple[int, dict[str, float]]], seed: int):
        self.sources = sorted({source for _, weights in phases for source, weight in weights.items() if weight})
        self.parts = [
            _Part(weights, self.sources, seed, ("phase", number) if number else ())
            for number, (_, weights) in enumerate(phases)
        ]
        self.firsts = [first for first, _ in phases]
        self.before = [np.zeros(len(self.sources), np.int64)]  # rows of each source before a phase
        for number in range(1, len(phases)):
            self.before.append(
                self.before[-1] + self.parts[number - 1].rows_of(self.firsts[number] - self.firsts[number - 1])
            )

    def _phase(self, row: int) -> int:
        return max(number for number, first in enumerate(self.firsts) if first <= row)

    def block(self, row: int) -> Block:
        """The block that a row stands in. It ends early where the mixture changes."""
        phase = self._phase(row)
        first, part = self.firsts[phase], self.parts[phase]
        number = (row - first) >> BITS
        chosen, ordinals = part.deal(number)
        start = first + (number << BITS)
        if phase + 1 < len(self.firsts) and start + len(chosen) > self.firsts[phase + 1]:
            chosen, ordinals = chosen[: self.firsts[phase + 1] - start], ordinals[: self.firsts[phase + 1] - start]
        return Block(start, chosen, ordinals + self.before[phase][chosen])

    def rows_of(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        phase = self._phase(rows)
        counts = self.before[phase] + self.parts[phase].rows_of(rows - self.firsts[phase])
        return {source: int(count) for source, count in zip(self.sources, counts, strict=True)}

    def weights(self, phase: int) -> dict[str, float]:
        """Shares of a phase, adding up to 1."""
        return self.parts[phase].weights


class _Part:
    """One phase: constant weights, rows counted from its beginning."""

    def __init__(self, weights: dict[str, float], sources: list[str], seed: int, path: tuple):
        total = float(sum(weights.values()))
        self.weights = {source: weights[source] / total for source in sorted(weights) if weights[source]}
        self.places = np.array([sources.index(source) for source in self.weights], dtype=np.int64)
        self.width, self.seed, self.path = len(sources), seed, path
        self._bounds = np.cumsum([0.0, *self.weights.values()])
        self._bounds[-1] = 1.0
        self._counts = np.zeros((1, len(self.weights)), dtype=np.int64)  # rows of each source before block b

    def _shift(self, block):
        """Where a block's points begin, in units of their distance: an even sequence over blocks, so that a rare
        source gets its share over many."""
        return np.modf(
            (derive(self.seed, "mixture", *self.path) / 2**63) + np.asarray(block, dtype=np.float64) * GOLDEN
        )[0]

    def _before(self, block: int) -> np.ndarray:
        """int64 [its sources]: rows of each in all blocks before `block`. Closed form for one block, summed over
        them."""
        known = len(self._counts) - 1
        if block > known:
            blocks = np.arange(known, max(block, 2 * known, 64))
            # points (i + shift) / size below each bound
            ends = np.ceil(self._bounds[None] * 2**BITS - self._shift(blocks)[:, None])
            ends[:, 0], ends[:, -1] = 0, 2**BITS
            self._counts = np.concatenate(
                [self._counts, self._counts[-1] + np.cumsum(np.diff(ends, axis=1).astype(np.int64), axis=0)]
            )
        return self._counts[block]

    def _chosen(self, block: int) -> np.ndarray:
        """int64 [rows of a block]: which of its sources each row comes from.

        The points i / size (van der Corput's order, scrambled by a mask that depends on the block) fall into the
        sources' intervals, so every stretch of rows holds each source in about its share: the deviation grows with the
        logarithm of the number of rows, not with its root.
        """
        size = 2**BITS
        points = _VAN_DER_CORPUT ^ (derive(self.seed, "mixture", *self.path, block) & (size - 1))
        ends = np.ceil(self._bounds * size - float(self._shift(block))).astype(np.int64)
        return np.searchsorted(ends[1:-1], points, side="right")

    def deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Place of the source of each row of a block among all sources, and which row of that source it is, counted
        over the phase."""
        chosen, before = self._chosen(block), self._before(block)
        ordinals = np.empty(len(chosen), dtype=np.int64)
        for number in range(len(self.weights)):
            mine = np.flatnonzero(chosen == number)
            ordinals[mine] = before[number] + np.arange(len(mine))
        return self.places[chosen], ordinals

    def rows_of(self, rows: int) -> np.ndarray:
        """int64 [all sources]: rows of each among the first `rows` of the phase."""
        block, offset = rows >> BITS, rows & (2**BITS - 1)
        own = self._before(block)
        if offset:
            own = own + np.bincount(self._chosen(block)[:offset], minlength=len(self.weights))
        found = np.zeros(self.width, dtype=np.int64)
        found[self.places] = own
        return found


def _reversed_bits() -> np.ndarray:
    numbers, found = np.arange(2**BITS), np.zeros(2**BITS, dtype=np.int64)
    for bit in range(BITS):
        found |= ((numbers >> bit) & 1) << (BITS - 1 - bit)
    return found


_VAN_DER_CORPUT = _reversed_bits()
