"""Rows of tokens for training and evaluation, and where their documents begin."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.data.tokens.store import TokenStore


class Span(NamedTuple):
    """Slots of a row with consecutive tokens of the source, in this order or in fill-in-the-middle order (fim.py)."""

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
    """How many times the whole source was read before."""
    index: int
    """Which row of the source's epoch this is, in the order of the text."""
    label_mask: np.ndarray | None
    """bool [sequence_length]: the labels `tokens[1:]` that count; None: all."""
    spans: Sequence[Span]
    """Where the tokens come from, without padding."""


class HeldoutRow(NamedTuple):
    """One row of evaluation."""

    tokens: np.ndarray
    """int64 [sequence_length + 1]."""
    starts: np.ndarray
    """Slots, above 0, at which a new document begins."""
    bytes: int
    """Bytes of text that the labels `tokens[1:]` spell."""
    source: str
    label_mask: None = None
    """As in Row: all labels count."""


def document_starts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Slots, above 0, at which a new document begins in a row that is cut out of a stream."""
    return (tokens[:-1] == eos_id).nonzero()[0] + 1


def positions_of(row: Row | HeldoutRow) -> np.ndarray:
    """int64 [sequence_length]: the place of each input in its document, counted from the beginning of the document or
    of the row."""
    positions = np.arange(len(row.tokens) - 1)
    starts = np.concatenate([[0], row.starts[row.starts < len(positions)]])
    lengths = np.diff(np.append(starts, len(positions)))
    return positions - np.repeat(starts, lengths)


def documents_of(row: Row, store: TokenStore) -> list[dict]:
    """The documents of a row, in order: `id`, slot at which it begins (`start`), its slots, including the sentinels of
    fill-in-the-middle (`tokens`), tokens of the document before them (`offset`)."""
    documents = []
    for span in row.spans:
        num_sentinels = span.slots - span.length
        for part in store.document_spans(row.source, span.start, span.length):
            document = {
                "id": part.id,
                "start": span.slot + part.start,
                "tokens": part.length + num_sentinels,
                "offset": part.offset,
            }
            documents.append(document)
    return documents
