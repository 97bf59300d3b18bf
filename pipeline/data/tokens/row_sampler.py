"""Rows for pretraining from packed tokens, as a pure function of (seed, global index).

    sampler = RowSampler(TokenStore(folder), sequence_length=512, weights={"wiki": 0.7, "code": 0.3}, seed=0)
    row = sampler.row(123)                  # the same on any rank of any number of ranks, before or after a restart
    row.tokens[:-1], row.tokens[1:]         # inputs and labels

A source is one stream of documents. packing="concat": its rows are windows of sequence_length + 1 tokens that overlap
by one, so that an epoch predicts every token but the first once (the rest at the end, less than a row, is not used).
packing="best_fit": whole documents, see packing.py. Each epoch of a source has its own order of rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokens import packing as packed
from pipeline.data.tokens.fim import SENTINELS, Cutter
from pipeline.data.tokens.mixture import Mixture
from pipeline.data.tokens.permutation import permutation_keys, permuted
from pipeline.data.tokens.rows import Row, Span, document_starts
from pipeline.data.tokens.store import TokenStore


class _Block(NamedTuple):
    """For the rows first .. first + len(sources): where each comes from."""

    first: int
    sources: list[int]
    """Indices into RowSampler.sources."""
    epochs: list[int]
    indices: list[int]
    """Rows of the source's epoch."""


class RowSampler:
    """`weights`: share of the rows of each source, on any scale; by default sources are mixed in proportion to their
    tokens.

    changes: (tokens, weights) that apply after so many tokens, sequence_length per row. fim: only with best_fit. work:
    a folder for the tables of best_fit, which are written if they do not exist yet; None: in memory. once: makes one of
    several processes write them, and returns on each process when they are written.
    """

    def __init__(
        self,
        store: TokenStore,
        sequence_length: int,
        weights: dict[str, float] | None,
        seed: int,
        *,
        changes: Sequence[tuple[int, dict[str, float]]] = (),
        packing: str = "concat",
        fim: Cutter | None = None,
        work: Path | None = None,
        once: Callable[[Callable[[], None]], None] = lambda make: make(),
    ):
        self.store, self.sequence_length, self.seed, self.packing, self.fim = store, sequence_length, seed, packing, fim
        least = sequence_length if packing == "concat" else 0
        fits = {source: store.num_tokens(source) > least for source in store.sources}
        self.too_small: list[str] = []
        """Sources without the tokens of one row, which the default weights leave out."""
        if weights is None:
            self.too_small = [source for source in store.sources if not fits[source]]
            weights = {source: store.num_tokens(source) for source in store.sources if fits[source]}
            if not weights:
                raise UserError(
                    f"{store.folder}: no source has the {sequence_length + 1} tokens of one row; shorten"
                    " sequence_length or pack more text"
                )
        _check_weights("mixture", weights, store, sequence_length, fits)
        for _, new_weights in changes:
            _check_weights("mixture_changes", new_weights, store, sequence_length, fits)
        self.changes = [(-(-tokens // sequence_length), new_weights) for tokens, new_weights in changes]
        self.mixture = Mixture([(0, weights), *self.changes], seed)
        self.sources = self.mixture.sources
        self.weights = self.mixture.weights(0)
        self.rows_per_epoch: dict[str, int] = {}
        self.epoch_tokens: dict[str, int] = {}
        """Labels of one epoch of each source."""
        self._tables: dict[str, packed.Table] = {}
        for source in self.sources:
            if packing == "concat":
                self.rows_per_epoch[source] = (store.num_tokens(source) - 1) // sequence_length
                self.epoch_tokens[source] = self.rows_per_epoch[source] * sequence_length
            else:
                self._tables[source] = self._table(source, work, once)
                self.rows_per_epoch[source] = self._tables[source].rows
                self.epoch_tokens[source] = store.num_tokens(source)
        self._all_labels = np.ones(sequence_length, dtype=bool)
        self._block: _Block | None = None
        self._keys: dict[tuple[str, int], list[int]] = {}

    def _is_cut(self, source: str) -> bool:
        """Does fill-in-the-middle apply to the source?"""
        return self.fim is not None and (self.fim.sources is None or source in self.fim.sources)

    def _spare(self, source: str) -> int:
        """Slots that each segment of the source may grow by."""
        return SENTINELS if self._is_cut(source) else 0

    def _table(self, source: str, work: Path | None, once: Callable) -> packed.Table:
        ends, spare = self.store.documents(source)[:, 0], self._spare(source)
        if work is None:
            return packed.table_of(ends, self.sequence_length, spare)
        name = f"rows-{quote(source, safe='')}-{self.sequence_length}-{spare}"

        def write_if_missing() -> None:
            if not packed.exists(work, name):
                packed.write(work, name, packed.table_of(ends, self.sequence_length, spare))

        once(write_if_missing)
        return packed.read(work, name)

    # ---- rows ----

    def row(self, index: int) -> Row:
        """Row `index`, counted over the whole run and all ranks."""
        block = self._block
        if block is None or not 0 <= index - block.first < len(block.sources):
            block = self._block = self._block_of(index)
        place = index - block.first
        source, epoch, index_in_epoch = self.sources[block.sources[place]], block.epochs[place], block.indices[place]
        if self.packing == "concat":
            return self._window(source, epoch, index_in_epoch)
        return self._packed_row(source, epoch, index_in_epoch, index)

    def _block_of(self, index: int) -> _Block:
        """The block that contains row `index`."""
        block = self.mixture.block(index)
        epochs, indices = np.zeros_like(block.sources), np.zeros_like(block.sources)
        for number in np.unique(block.sources).tolist():
            source, rows = self.sources[number], np.flatnonzero(block.sources == number)
            num_rows = self.rows_per_epoch[source]
            epochs[rows], ordinals = np.divmod(block.ordinals[rows], num_rows)
            for epoch in np.unique(epochs[rows]).tolist():
                if (source, epoch) not in self._keys:
                    self._keys[source, epoch] = permutation_keys(self.seed, "rows", source, epoch)
                in_epoch = epochs[rows] == epoch
                indices[rows[in_epoch]] = permuted(ordinals[in_epoch], num_rows, self._keys[source, epoch])
        return _Block(block.first, block.sources.tolist(), epochs.tolist(), indices.tolist())

    def _window(self, source: str, epoch: int, index: int) -> Row:
        length, start = self.sequence_length, index * self.sequence_length
        tokens = self.store.read(source, start, length + 1).astype(np.int64)
        spans = (Span(0, length + 1, start, length + 1),)
        return Row(tokens, document_starts(tokens, self.store.eos_id), source, epoch, index, None, spans)

    def _packed_row(self, source: str, epoch: int, index: int, row: int) -> Row:
        """Row `index` of the source's epoch, which is row `row` of the run."""
        length, eos, table = self.sequence_length, self.store.eos_id, self._tables[source]
        segments = slice(table.offsets.item(index), table.offsets.item(index + 1))
        starts, lengths = table.starts[segments].tolist(), table.lengths[segments].tolist()
        is_cut = self._is_cut(source)
        tokens, label_mask = np.empty(length + 1, dtype=np.int64), self._all_labels.copy()
        tokens[0] = eos
        slot, borders, spans = 1, [], []
        for number, start in enumerate(starts):
            has_context, size = lengths[number] < 0, abs(lengths[number])
            before = 1 if start and not number else 0  # the row's first segment is read with the token before it
            segment = self.store.read(source, start - before, size + before)
            cut = None
            if is_cut:
                text_size = size - has_context - (segment.item(-1) == eos)
                cut = self.fim.cut(text_size, row, number)
            if cut:
                # a segment that begins with a sentinel does not use its context
                segment, start, size = segment[before + has_context :], start + has_context, size - has_context
                slots = size + SENTINELS
                for place in self.fim.write(segment, text_size, *cut, tokens[slot : slot + slots]):
                    label_mask[slot - 1 + place] = False
            else:
                slots = size
                tokens[slot - before : slot + slots] = segment
                if has_context:
                    label_mask[slot - 1] = False
            if number or tokens.item(0) == eos:
                borders.append(slot)
                spans.append(Span(slot, slots, start, size))
            else:  # it continues the document of the token before it
                spans.append(Span(0, slots + 1, start - 1, size + 1))
            slot += slots
        if slot <= length:
            borders.append(slot)
            tokens[slot:] = eos
            label_mask[slot - 1 :] = False
        return Row(tokens, np.array(borders, dtype=np.int64), source, epoch, index, label_mask, spans)

    # ---- figures about a run ----

    def rows_by_source(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        return self.mixture.rows_by_source(rows)

    def epochs(self, rows: int) -> dict[str, float]:
        """How many times each source is read in the first `rows` rows."""
        return {source: count / self.rows_per_epoch[source] for source, count in self.rows_by_source(rows).items()}

    def warnings(self, rows: int) -> list[str]:
        """Lines for the user about a run of `rows` rows: sources that repeat, sources too small for a row, changes that
        are never reached."""
        lines = []
        for source, epochs in self.epochs(rows).items():
            if epochs > 1:
                lines.append(
                    f"source {source} repeats: {epochs:.2f} epochs of its {self.store.num_tokens(source):,} tokens in"
                    " this run; more text or a lower weight avoids it"
                )
        for source in self.too_small:
            lines.append(
                f"source {source} is not used: its {self.store.num_tokens(source)} tokens are fewer than the"
                f" {self.sequence_length + 1} of one row"
            )
        for first, _ in self.changes:
            if first >= rows:
                lines.append(
                    f"mixture_changes: the change at row {first:,} is never reached, this run reads {rows:,} rows"
                )
        return lines

    def padding(self) -> dict[str, float]:
        """Share of the slots of an epoch without a label, by source."""
        shares = {}
        for source, rows in self.rows_per_epoch.items():
            shares[source] = 1 - self.epoch_tokens[source] / (rows * self.sequence_length)
        return shares

    def cut_documents(self) -> dict[str, int]:
        """Number of documents that are in more than one row, by source."""
        counts = {}
        for source in self.sources:
            ends = self.store.documents(source)[:, 0]
            begins = np.concatenate([[0], ends[:-1]])
            if self.packing == "concat":
                first_row = np.maximum(begins - 1, 0) // self.sequence_length
                last_row = (ends - 2) // self.sequence_length
                is_cut = first_row != last_row
            else:
                is_cut = ends - begins > self.sequence_length - self._spare(source)
            counts[source] = int(is_cut.sum())
        return counts


def _check_weights(
    key: str, weights: dict[str, float], store: TokenStore, sequence_length: int, fits: dict[str, bool]
) -> None:
    for source, weight in weights.items():
        if source not in fits:
            raise UserError(f"{key}: {store.folder} has no source {source!r}; it has {', '.join(store.sources)}")
        if not weight >= 0:
            raise UserError(f"{key}: {source} has the weight {weight}, expected 0 or more")
        if weight and not fits[source]:
            raise UserError(
                f"{key}: source {source} has {store.num_tokens(source)} tokens, fewer than the {sequence_length + 1} of"
                " one row; remove it or shorten sequence_length"
            )
    if sum(weights.values()) <= 0:
        raise UserError(f"{key}: all weights are 0; give at least one source a weight")
