"""Fixed rows of the held-out split, with the bytes of text of each, for losses and bits per byte."""

from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokens.rows import HeldoutRow, document_starts
from pipeline.data.tokens.store import TokenStore


def heldout_rows(packed: TokenStore | Path, sequence_length: int, max_rows: int) -> list[HeldoutRow]:
    """At most `max_rows` fixed rows of the held-out split of a packed folder, evenly from its sources; no label is
    counted twice.

    A source's stream is read from its beginning, with the end-of-document token as context of its first token, in rows
    that overlap by one token. Bits per byte of the rows = sum of the labels' losses in nats / ln 2 / sum of `bytes`. A
    label's bytes are those that its token spells; where tokens do not spell a document exactly (inexact_documents of
    pack), its bytes are spread over its tokens. Raises UserError if no source fills a row.
    """
    folder = packed.folder if isinstance(packed, TokenStore) else packed
    store = TokenStore(folder, "heldout")
    available = {source: store.num_tokens(source) // sequence_length for source in store.sources}
    if not any(available.values()):
        num_tokens = sum(store.num_tokens(source) for source in store.sources)
        raise UserError(
            f"{store.folder}: no source of its held-out split has the {sequence_length} tokens of one row"
            f" ({num_tokens} tokens in total); shorten sequence_length or hold out more text"
        )
    rows = []
    for source, num_rows in _shared_out(available, max_rows).items():
        if num_rows:
            rows += _rows_of_source(store, source, num_rows, sequence_length)
    return rows


def _shared_out(available: dict[str, int], most: int) -> dict[str, int]:
    """Rows to take from each source: one after another, until `most` are taken or there are no more."""
    result = dict.fromkeys(available, 0)
    while sum(result.values()) < min(most, sum(available.values())):
        for source in available:
            if result[source] < available[source] and sum(result.values()) < most:
                result[source] += 1
    return result


def _rows_of_source(store: TokenStore, source: str, num_rows: int, sequence_length: int) -> list[HeldoutRow]:
    num_tokens = num_rows * sequence_length
    documents = store.documents(source)
    num_documents = int(np.searchsorted(documents[:, 0], num_tokens)) + 1  # the last document may be longer
    ends, document_bytes = documents[:num_documents].T
    begins = np.concatenate([[0], ends[:-1]])
    tokens = store.read(source, 0, int(ends[-1]))
    spelled = store.token_bytes[tokens]
    scale = document_bytes / np.maximum(np.add.reduceat(spelled, begins), 1)  # 1 for an exact document
    bytes_before = np.cumsum(spelled * np.repeat(scale, ends - begins))
    bytes_before = np.concatenate([[0], np.rint(bytes_before)])
    stream = np.concatenate([[store.eos_id], tokens[:num_tokens].astype(np.int64)])
    rows = []
    for begin in range(0, num_tokens, sequence_length):
        end = begin + sequence_length
        row_tokens = stream[begin : end + 1]
        num_bytes = int(bytes_before[end] - bytes_before[begin])
        rows.append(HeldoutRow(row_tokens, document_starts(row_tokens, store.eos_id), num_bytes, source))
    return rows
