"""Which records each epoch of a finetuning stage has, in which order: each of them once, or a mixture of sources.

All of it is a function of (seed, index), so a resumed run takes the records that are left.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.seeds import derive
from pipeline.data.tokens.mixture import Mixture

GROUP = 50  # batches whose rows are sorted by length together, as in transformers' LengthGroupedSampler


@functools.lru_cache(4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of `count` rows in an epoch: a function of (seed, epoch). Part of what a seed means: do not change it."""
    return np.random.Generator(np.random.PCG64(derive(seed, "epoch", epoch))).permutation(count)


class Records:
    """Each record once per epoch. count: records of an epoch."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count

    def epoch(self, epoch: int) -> np.ndarray:
        """Numbers of the records of an epoch, in order."""
        return permutation(self.seed, epoch, self.count)

    def taken(self, epochs: int) -> np.ndarray:
        """How often each record is taken in the first `epochs` epochs."""
        return np.full(self.count, epochs, np.int64)


class MixedRecords(Records):
    """Sources by weight. The records of all epochs are one stream, in which each source has its share of every stretch,
    and takes its own records in turn, each pass in another order: none is taken again before all others of its source.
    An epoch is as many records as there are."""

    def __init__(self, seed: int, source_of: np.ndarray, weights: Sequence[float]):
        """source_of: number of each record's source. weights: of each source, on any scale."""
        super().__init__(seed, len(source_of))
        names = {str(source): weight for source, weight in enumerate(weights) if weight}
        self.mixture = Mixture([(0, names)], seed)
        self.numbers = [np.flatnonzero(source_of == int(name)) for name in self.mixture.sources]

    def epoch(self, epoch: int) -> np.ndarray:
        first = epoch * self.count
        end, at = first + self.count, first
        sources, ordinals = [], []
        while at < end:
            block = self.mixture.block(at)
            part = slice(at - block.first, end - block.first)
            sources.append(block.sources[part])
            ordinals.append(block.ordinals[part])
            at = block.first + len(block.sources)
        return self._records(np.concatenate(sources), np.concatenate(ordinals))

    def taken(self, epochs: int) -> np.ndarray:
        counts = np.zeros(self.count, np.int64)
        for epoch in range(epochs):
            counts += np.bincount(self.epoch(epoch), minlength=self.count)
        return counts

    def _records(self, sources: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
        """Which record each is, given its source and how many records that has given before."""
        records = np.empty(len(sources), np.int64)
        for source, numbers in enumerate(self.numbers):
            places = np.flatnonzero(sources == source)
            passes, inside = np.divmod(ordinals[places], len(numbers))
            for number in np.unique(passes).tolist():
                order = permutation(derive(self.seed, "source", source), number, len(numbers))
                in_pass = passes == number
                records[places[in_pass]] = numbers[order[inside[in_pass]]]
        return records


@dataclass(frozen=True)
class Groups:
    """Rows of a batch are to be of like length."""

    length: Callable[[Any], int]
    """Of a row, in tokens."""
    batch_size: int


def grouped_by_length(rows: list, groups: Groups, first: int, seed: int, epoch: int) -> list:
    """The rows of an epoch, so that those of a batch are of like length: sorted within every GROUP batches, whose order
    is then drawn. The longest of the first epoch are first, so that what does not fit into memory fails at once.

    first: number of the first row in the run. Rows that complete a batch of the epoch before keep their place, because
    batches are cut at multiples of batch_size over the whole run.
    """
    length, batch_size = groups.length, groups.batch_size
    begun = -first % batch_size
    batches = []
    for start in range(begun, len(rows), GROUP * batch_size):
        ordered = sorted(rows[start : start + GROUP * batch_size], key=length, reverse=True)
        batches += [ordered[place : place + batch_size] for place in range(0, len(ordered), batch_size)]
    rest = [batches.pop()] if batches and len(batches[-1]) < batch_size else []
    batches = [batches[number] for number in permutation(derive(seed, "groups"), epoch, len(batches))]
    if epoch == 0 and batches:
        longest = max(range(len(batches)), key=lambda number: length(batches[number][0]))
        batches.insert(0, batches.pop(longest))
    return rows[:begun] + [row for batch in [*batches, *rest] for row in batch]
