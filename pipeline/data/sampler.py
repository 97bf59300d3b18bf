"""Rows for pretraining from packed tokens, as a pure function of (seed, global index).

    sampler = RowSampler(TokenStore(folder), sequence_length=512, weights={"wiki": 0.7, "code": 0.3}, seed=0)
    row = sampler.row(123)                  # the same whoever asks: any rank of any number of ranks, before or after a restart
    row.tokens[:-1], row.tokens[1:]         # inputs and labels

A source is one stream of documents; its rows are the windows of sequence_length + 1 tokens that overlap by one, so that an epoch predicts
every token but the first once (what is left at the end, less than a row, is not used). Each epoch of a source has its own order of rows.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.tokens import TokenStore
from pipeline.errors import UserError
from pipeline.seeds import derive

BLOCK_BITS = 12  # rows of a mixture block, 4096: sources are dealt out in blocks, evenly inside each
GOLDEN = 0.6180339887498949  # multiples of the golden ratio's fraction fill [0, 1) evenly (Weyl; lowest discrepancy of all additive sequences)
MASK = 2**64 - 1


@dataclass(frozen=True)
class Row:
    """One row of training."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    starts: np.ndarray
    """Positions in `tokens`, above 0, at which a new document begins (the one after each eos)."""
    source: str
    epoch: int
    """How often the source had been read in full before."""
    index: int
    """Which window of the source this is."""


@dataclass(frozen=True)
class HeldoutRow:
    """One row of evaluation; every label counts."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    bytes: int
    """Bytes of text that the labels `tokens[1:]` stand for."""
    source: str


class RowSampler:
    """`weights`: share of rows of each source, any scale; by default sources are mixed in proportion to their tokens."""

    def __init__(self, store: TokenStore, sequence_length: int, weights: dict[str, float] | None, seed: int):
        self.store, self.sequence_length, self.seed = store, sequence_length, seed
        rows = {source: (store.num_tokens(source) - 1) // sequence_length for source in store.sources}
        self.left_out = [] if weights else [source for source, count in rows.items() if count == 0]
        """Sources that are too small for one row."""
        if weights is None:
            weights = {source: store.num_tokens(source) for source in store.sources if rows[source]}
            if not weights:
                raise UserError(f"{store.folder}: no source has the {sequence_length + 1} tokens of one row; shorten sequence_length or pack more text")
        for source, weight in weights.items():
            if source not in rows:
                raise UserError(f"weights: {store.folder} has no source {source!r}; it has {', '.join(store.sources)}")
            if not weight >= 0:
                raise UserError(f"weights: {source} has the weight {weight}, expected 0 or more")
            if weight and not rows[source]:
                found = store.num_tokens(source)
                raise UserError(f"weights: source {source} has {found} tokens, fewer than the {sequence_length + 1} of one row; leave it out or shorten sequence_length")
        total = float(sum(weights.values()))
        if total <= 0:
            raise UserError("weights: all are 0; give at least one source a weight")
        self.sources = sorted(source for source, weight in weights.items() if weight)
        self.weights = {source: weights[source] / total for source in self.sources}
        self.rows_per_epoch = {source: rows[source] for source in self.sources}
        self._bounds = np.cumsum([0.0, *self.weights.values()])
        self._bounds[-1] = 1.0
        self._counts = np.zeros((1, len(self.sources)), dtype=np.int64)  # rows of each source before block b
        self._block: tuple[int, object, object] | None = None
        self._keys: dict[tuple[str, int], list[int]] = {}

    def row(self, index: int) -> Row:
        """Row `index`, counted over the whole run and all ranks."""
        block, offset = index >> BLOCK_BITS, index & (2**BLOCK_BITS - 1)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._deal(block))
        _, chosen, ordinals = self._block
        source = self.sources[chosen[offset]]
        epoch, place = divmod(int(ordinals[offset]), self.rows_per_epoch[source])
        if (source, epoch) not in self._keys:
            self._keys[source, epoch] = [derive(self.seed, "rows", source, epoch, turn) for turn in range(6)]
        window = permuted(place, self.rows_per_epoch[source], self._keys[source, epoch])
        tokens = self.store.read(source, window * self.sequence_length, self.sequence_length + 1).astype(np.int64)
        return Row(tokens, np.flatnonzero(tokens[:-1] == self.store.eos_id) + 1, source, epoch, window)

    def rows_of(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        block, offset = rows >> BLOCK_BITS, rows & (2**BLOCK_BITS - 1)
        before = self._before(block)
        if offset:
            before = before + [(self._deal(block)[0][:offset] == number).sum() for number in range(len(self.sources))]
        return {source: int(count) for source, count in zip(self.sources, before, strict=True)}

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been read after the first `rows` rows."""
        return {source: count / self.rows_per_epoch[source] for source, count in self.rows_of(rows).items()}

    def warnings(self, rows: int) -> list[str]:
        """Lines for the user about a run of `rows` rows: sources that repeat, and sources too small for a row."""
        lines = [
            f"source {source} repeats: {epochs:.2f} epochs of its {self.store.num_tokens(source):,} tokens in this run; more text or a lower weight avoids it"
            for source, epochs in self.epochs(rows).items()
            if epochs > 1
        ]
        needed = self.sequence_length + 1
        return lines + [f"source {source} is left out: its {self.store.num_tokens(source)} tokens are fewer than the {needed} of one row" for source in self.left_out]

    def _shift(self, block):
        """Where a block's points begin, in units of their distance: an even sequence over blocks, so that a rare source gets its share over many."""
        return np.modf((derive(self.seed, "mixture") / 2**63) + np.asarray(block, dtype=np.float64) * GOLDEN)[0]

    def _before(self, block: int):
        """int64 [sources]: rows of each source in all blocks before `block`. Closed form for one block, summed over them."""
        known = len(self._counts) - 1
        if block > known:
            blocks = np.arange(known, max(block, 2 * known, 64))
            ends = np.ceil(self._bounds[None] * 2**BLOCK_BITS - self._shift(blocks)[:, None])  # points (i + shift) / size below each bound
            ends[:, 0], ends[:, -1] = 0, 2**BLOCK_BITS
            self._counts = np.concatenate([self._counts, self._counts[-1] + np.cumsum(np.diff(ends, axis=1).astype(np.int64), axis=0)])
        return self._counts[block]

    def _deal(self, block: int):
        """The source of each row of a block, and which row of that source it is, counted over the run; int64 [rows of a block] each.

        The points i / size (van der Corput's order, scrambled by a mask that depends on the block) fall into the sources' intervals, so every stretch
        of rows holds each source in about its share: the deviation grows with the logarithm of the number of rows, not with its root.
        """
        size = 2**BLOCK_BITS
        points = np.zeros(size, dtype=np.int64)
        for bit in range(BLOCK_BITS):
            points |= ((np.arange(size) >> bit) & 1) << (BLOCK_BITS - 1 - bit)
        points ^= derive(self.seed, "mixture", block) & (size - 1)
        shift = float(self._shift(block))
        ends = np.ceil(self._bounds * size - shift).astype(np.int64)
        chosen = np.searchsorted(ends[1:-1], points, side="right")
        before = self._before(block)
        ordinals = np.empty(size, dtype=np.int64)
        for number in range(len(self.sources)):
            mine = np.flatnonzero(chosen == number)
            ordinals[mine] = before[number] + np.arange(len(mine))
        return chosen, ordinals


def permuted(index: int, size: int, keys: list[int]) -> int:
    """Where `index` goes in a permutation of range(size): a Feistel network over a x b >= size, walked until it lands inside (Black & Rogaway, 2002).

    No table, so that a billion rows cost no memory. a and b are next to the square root of size, so that walking is rare.
    """
    a = max(1, round(size**0.5))
    b = -(-size // a)
    while True:
        left, right = divmod(index, b)
        for turn, key in enumerate(keys):
            if turn % 2:
                left = (left + _mixed(right ^ key)) % a
            else:
                right = (right + _mixed(left ^ key)) % b
        index = left * b + right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea & Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def heldout_rows(store: TokenStore | Path, sequence_length: int, max_rows: int) -> list[HeldoutRow]:
    """At most `max_rows` fixed rows of the held-out split, evenly from its sources; no label is counted twice.

    A source's stream is read from its beginning, with the end-of-document token as context of its first token, in rows that overlap by one
    token. Bits per byte of the rows = sum of the labels' losses in nats / ln 2 / sum of `bytes`. A label's bytes are those that its token stands for;
    where tokens do not spell a document exactly (inexact_documents of pack) its bytes are spread over its tokens. Raises UserError if no source fills a row.
    """
    store = TokenStore(getattr(store, "folder", store), "heldout")
    available = {source: store.num_tokens(source) // sequence_length for source in store.sources}
    if not any(available.values()):
        found = sum(store.num_tokens(source) for source in store.sources)
        raise UserError(
            f"{store.folder}: no source of its held-out split has the {sequence_length} tokens of one row ({found} tokens in all); "
            "shorten sequence_length or hold out more text"
        )
    wanted = dict.fromkeys(store.sources, 0)
    while sum(wanted.values()) < min(max_rows, sum(available.values())):
        for source in store.sources:
            if wanted[source] < available[source] and sum(wanted.values()) < max_rows:
                wanted[source] += 1
    rows = []
    for source, count in wanted.items():
        if not count:
            continue
        length = count * sequence_length
        documents = store.documents(source)
        used = int(np.searchsorted(documents[:, 0], length)) + 1  # the last document may reach beyond
        ends, text_bytes = documents[:used].T
        tokens = store.read(source, 0, int(ends[-1]))
        starts = np.concatenate([[0], ends[:-1]])
        spelled = store.token_bytes[tokens]
        scale = text_bytes / np.maximum(np.add.reduceat(spelled, starts), 1)  # 1 for an exact document
        size = np.concatenate([[0], np.rint(np.cumsum(spelled * np.repeat(scale, ends - starts)))])
        stream = np.concatenate([[store.eos_id], tokens[:length].astype(np.int64)])
        for number in range(count):
            at = number * sequence_length
            rows.append(HeldoutRow(stream[at : at + sequence_length + 1], int(size[at + sequence_length] - size[at]), source))
    return rows
