"""Rows for pretraining from packed tokens, as a pure function of (seed, global index).

    sampler = RowSampler(TokenStore(folder), sequence_length=512, weights={"wiki": 0.7, "code": 0.3}, seed=0)
    row = sampler.row(123)                  # the same whoever asks: any rank of any number of ranks, before or after a
                                            # restart
    row.tokens[:-1], row.tokens[1:]         # inputs and labels

A source is one stream of documents. packing="concat": its rows are the windows of sequence_length + 1 tokens that
overlap by one, so that an epoch predicts every token but the first once (what is left at the end, less than a row, is
not used). packing="best_fit": whole documents, see data/packing.py. Each epoch of a source has its own order of rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from pipeline.core.errors import UserError
from pipeline.core.seeds import derive, splitmix64
from pipeline.data.tokens import packing as packs
from pipeline.data.tokens.fim import SPARE, Cutter
from pipeline.data.tokens.mixture import Mixture
from pipeline.data.tokens.store import TokenStore


class Stretch(NamedTuple):
    """Slots of a row that hold tokens which stand together in the source, in this order or turned round
    (data/fim.py)."""

    slot: int
    slots: int
    start: int
    """First token in the source."""
    length: int


class Row(NamedTuple):
    """One row of training."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    starts: np.ndarray
    """Slots, above 0, at which a new document begins; padding, at the end of a packed row, counts as one."""
    source: str
    epoch: int
    """How often the source had been read in full before."""
    index: int
    """Which row of the source's epoch this is, in the order of the text."""
    counted: np.ndarray | None
    """bool [sequence_length]: the labels `tokens[1:]` that count; None: all."""
    stretches: Sequence[Stretch]
    """Where the tokens come from, padding left out."""


class HeldoutRow(NamedTuple):
    """One row of evaluation; every label counts."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    starts: np.ndarray
    """Slots, above 0, at which a new document begins."""
    bytes: int
    """Bytes of text that the labels `tokens[1:]` stand for."""
    source: str


class RowSampler:
    """`weights`: share of rows of each source, any scale; by default sources are mixed in proportion to their tokens.

    changes: (tokens, weights) from so many tokens on, sequence_length a row. fim: only with best_fit. work: a folder in
    which the tables of best_fit are kept, made there if they are not there yet; none: in memory. once: lets one of
    several processes make them, and returns on each when they are made.
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
        fits = {
            source: store.num_tokens(source) > (sequence_length if packing == "concat" else 0)
            for source in store.sources
        }
        self.left_out = [] if weights else [source for source, enough in fits.items() if not enough]
        """Sources that are too small for one row."""
        if weights is None:
            weights = {source: store.num_tokens(source) for source in store.sources if fits[source]}
            if not weights:
                raise UserError(
                    f"{store.folder}: no source has the {sequence_length + 1} tokens of one row; shorten"
                    " sequence_length or pack more text"
                )
        self.changes = [(-(-tokens // sequence_length), shares) for tokens, shares in changes]
        for name, shares in [("mixture", weights), *(("mixture_changes", shares) for _, shares in changes)]:
            _check(name, shares, store, sequence_length, fits)
        self.mixture = Mixture([(0, weights), *self.changes], seed)
        self.sources = self.mixture.sources
        self.weights = self.mixture.weights(0)
        self._tables: dict[str, packs.Table] = {}
        self.rows_per_epoch: dict[str, int] = {}
        self.epoch_tokens: dict[str, int] = {}
        """Labels of one pass over each source."""
        for source in self.sources:
            if packing == "concat":
                self.rows_per_epoch[source] = (store.num_tokens(source) - 1) // sequence_length
                self.epoch_tokens[source] = self.rows_per_epoch[source] * sequence_length
            else:
                self._tables[source] = self._table(source, SPARE * self._cuts(source), work, once)
                self.rows_per_epoch[source] = self._tables[source].rows
                self.epoch_tokens[source] = store.num_tokens(source)
        self._all = np.ones(sequence_length, dtype=bool)
        self._block = None
        self._keys: dict[tuple[str, int], list[int]] = {}

    def _cuts(self, source: str) -> bool:
        return self.fim is not None and (self.fim.sources is None or source in self.fim.sources)

    def _table(self, source: str, spare: int, work: Path | None, once: Callable) -> packs.Table:
        def made() -> packs.Table:
            return packs.table_of(self.store.documents(source)[:, 0], self.sequence_length, spare)

        if work is None:
            return made()
        name = f"rows-{quote(source, safe='')}-{self.sequence_length}-{spare}"
        once(lambda: None if packs.there(work, name) else packs.write(work, name, made()))
        return packs.read(work, name)

    def row(self, index: int) -> Row:
        """Row `index`, counted over the whole run and all ranks."""
        if self._block is None or not 0 <= index - self._block[0] < len(self._block[1]):
            self._block = self._places(index)
        first, sources, epochs, windows = self._block
        offset = index - first
        source, epoch, window = self.sources[sources[offset]], epochs[offset], windows[offset]
        return (
            self._window(source, epoch, window)
            if self.packing == "concat"
            else self._packed(source, epoch, window, index)
        )

    def _window(self, source: str, epoch: int, window: int) -> Row:
        length, start = self.sequence_length, window * self.sequence_length
        tokens = self.store.read(source, start, length + 1).astype(np.int64)
        return Row(
            tokens,
            _starts(tokens, self.store.eos_id),
            source,
            epoch,
            window,
            None,
            (Stretch(0, length + 1, start, length + 1),),
        )

    def _packed(self, source: str, epoch: int, window: int, index: int) -> Row:
        length, eos, table, read = self.sequence_length, self.store.eos_id, self._tables[source], self.store.read
        pieces = slice(table.offsets.item(window), table.offsets.item(window + 1))
        starts, lengths = table.starts[pieces].tolist(), table.lengths[pieces].tolist()
        tokens, counted = np.empty(length + 1, dtype=np.int64), self._all.copy()
        slot, borders, stretches, cuts = 1, [], [], self._cuts(source)
        tokens[0] = eos
        for number, start in enumerate(starts):
            goes_on, size = lengths[number] < 0, abs(lengths[number])
            before = 1 if start and not number else 0  # a row's first piece is read with its context
            part, turned, slots = read(source, start - before, size + before), None, size
            if cuts:
                text = size - goes_on - (part.item(-1) == eos)
                turned = self.fim.cut(text, index, number)
            if turned:
                # what begins with a sentinel has no use for context
                part, start, size = part[before + goes_on :], start + goes_on, size - goes_on
                slots = size + SPARE
                for place in self.fim.turn(part, text, *turned, tokens[slot : slot + slots]):
                    counted[slot - 1 + place] = False
            else:
                tokens[slot - before : slot + slots] = part
                if goes_on:
                    counted[slot - 1] = False
            if number or tokens.item(0) == eos:
                borders.append(slot)
                stretches.append(Stretch(slot, slots, start, size))
            else:  # it goes on from the token before it
                stretches.append(Stretch(0, slots + 1, start - 1, size + 1))
            slot += slots
        if slot <= length:
            borders.append(slot)
            tokens[slot:] = eos
            counted[slot - 1 :] = False
        return Row(tokens, np.array(borders, dtype=np.int64), source, epoch, window, counted, stretches)

    def _places(self, index: int) -> tuple[int, list[int], list[int], list[int]]:
        """First row of the block that `index` stands in, and for each of its rows the source, the epoch and the row
        of that epoch."""
        first, chosen, ordinals = self.mixture.block(index)
        epochs, windows = np.zeros_like(chosen), np.zeros_like(chosen)
        for number in np.unique(chosen).tolist():
            source, mine = self.sources[number], np.flatnonzero(chosen == number)
            rows = self.rows_per_epoch[source]
            epochs[mine], places = np.divmod(ordinals[mine], rows)
            for epoch in np.unique(epochs[mine]).tolist():
                if (source, epoch) not in self._keys:
                    self._keys[source, epoch] = [derive(self.seed, "rows", source, epoch, turn) for turn in range(6)]
                same = epochs[mine] == epoch
                windows[mine[same]] = permuted(places[same], rows, self._keys[source, epoch])
        return first, chosen.tolist(), epochs.tolist(), windows.tolist()

    def rows_of(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows come from each source."""
        return self.mixture.rows_of(rows)

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been read after the first `rows` rows."""
        return {source: count / self.rows_per_epoch[source] for source, count in self.rows_of(rows).items()}

    def warnings(self, rows: int) -> list[str]:
        """Lines for the user about a run of `rows` rows: sources that repeat, sources too small for a row, changes
        that never come."""
        lines = [
            f"source {source} repeats: {epochs:.2f} epochs of its {self.store.num_tokens(source):,} tokens in this run;"
            " more text or a lower weight avoids it"
            for source, epochs in self.epochs(rows).items()
            if epochs > 1
        ]
        needed = self.sequence_length + 1
        lines += [
            f"source {source} is left out: its {self.store.num_tokens(source)} tokens are fewer than the {needed} of"
            " one row"
            for source in self.left_out
        ]
        return lines + [
            f"mixture_changes: the one at row {first:,} never comes, this run reads {rows:,} rows"
            for first, _ in self.changes
            if first >= rows
        ]

    def padding(self) -> dict[str, float]:
        """Share of the slots of an epoch that hold no label, by source."""
        return {
            source: 1 - self.epoch_tokens[source] / (rows * self.sequence_length)
            for source, rows in self.rows_per_epoch.items()
        }

    def cut_documents(self) -> dict[str, int]:
        """Documents that stand in more than one row, by source."""
        found = {}
        for source in self.sources:
            ends = self.store.documents(source)[:, 0]
            begins = np.concatenate([[0], ends[:-1]])
            if self.packing == "concat":
                found[source] = int(
                    (np.maximum(begins - 1, 0) // self.sequence_length != (ends - 2) // self.sequence_length).sum()
                )
            else:
                found[source] = int((ends - begins > self.sequence_length - SPARE * self._cuts(source)).sum())
        return found


def _check(
    name: str, weights: dict[str, float], store: TokenStore, sequence_length: int, fits: dict[str, bool]
) -> None:
    for source, weight in weights.items():
        if source not in fits:
            raise UserError(f"{name}: {store.folder} has no source {source!r}; it has {', '.join(store.sources)}")
        if not weight >= 0:
            raise UserError(f"{name}: {source} has the weight {weight}, expected 0 or more")
        if weight and not fits[source]:
            found = store.num_tokens(source)
            short = f"{found} tokens, fewer than the {sequence_length + 1} of one row"
            raise UserError(f"{name}: source {source} has {short}; leave it out or shorten sequence_length")
    if sum(weights.values()) <= 0:
        raise UserError(f"{name}: all are 0; give at least one source a weight")


def permuted(index: np.ndarray, size: int, keys: list[int]) -> np.ndarray:
    """Where each `index` goes in a permutation of range(size): a Feistel network over a x b >= size, walked until it
    lands inside (Black & Rogaway, 2002).

    No table, so that a billion rows cost no memory. a and b are next to the square root of size, so that walking is
    rare.
    """
    root = max(1, round(size**0.5))
    a, b = np.uint64(root), np.uint64(-(-size // root))
    value, todo, found = index.astype(np.uint64), np.arange(len(index)), np.empty(len(index), dtype=np.int64)
    while len(todo):
        left, right = value // b, value % b
        for turn, key in enumerate(keys):
            if turn % 2:
                left = (left + splitmix64(right ^ np.uint64(key)) % a) % a
            else:
                right = (right + splitmix64(left ^ np.uint64(key)) % b) % b
        value = left * b + right
        inside = value < size
        found[todo[inside]] = value[inside]
        value, todo = value[~inside], todo[~inside]
    return found


def documents_of(row: Row, store: TokenStore) -> list[dict]:
    """The documents of a row, in order: id, slot at which it begins, slots (with the sentinels of
    fill-in-the-middle), tokens of the document before."""
    found = []
    for stretch in row.stretches:
        grown = stretch.slots - stretch.length
        for piece in store.pieces(row.source, stretch.start, stretch.length):
            found.append(
                {
                    "id": piece.id,
                    "start": stretch.slot + piece.start,
                    "tokens": piece.length + grown,
                    "offset": piece.offset,
                }
            )
    return found


def _starts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Slots, above 0, of a row cut out of a stream at which a new document begins."""
    return (tokens[:-1] == eos_id).nonzero()[0] + 1


def positions_of(row: Row | HeldoutRow) -> np.ndarray:
    """int64 [sequence_length]: the place of each input in its document, from 0 where a document begins or the row
    does."""
    positions = np.arange(len(row.tokens) - 1)
    starts = np.concatenate([[0], row.starts[row.starts < len(positions)]])
    return positions - np.repeat(starts, np.diff(np.append(starts, len(positions))))


def heldout_rows(store: TokenStore | Path, sequence_length: int, max_rows: int) -> list[HeldoutRow]:
    """At most `max_rows` fixed rows of the held-out split, evenly from its sources; no label is counted twice.

    A source's stream is read from its beginning, with the end-of-document token as context of its first token, in rows
    that overlap by one token. Bits per byte of the rows = sum of the labels' losses in nats / ln 2 / sum of `bytes`. A
    label's bytes are those that its token stands for; where tokens do not spell a document exactly (inexact_documents
    of pack) its bytes are spread over its tokens. Raises UserError if no source fills a row.
    """
    store = TokenStore(getattr(store, "folder", store), "heldout")
    available = {source: store.num_tokens(source) // sequence_length for source in store.sources}
    if not any(available.values()):
        found = sum(store.num_tokens(source) for source in store.sources)
        raise UserError(
            f"{store.folder}: no source of its held-out split has the {sequence_length} tokens of one row ({found}"
            " tokens in all); shorten sequence_length or hold out more text"
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
            part, text = stream[at : at + sequence_length + 1], int(size[at + sequence_length] - size[at])
            rows.append(HeldoutRow(part, _starts(part, store.eos_id), text, source))
    return rows
