"""Cleaning one work unit: its records read, cleaned in batches, and the outcomes of all of them in one file."""

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import faults
from pipeline.data.cleaning import outcomes
from pipeline.data.cleaning.addresses import address_hash, url_of
from pipeline.data.cleaning.outcomes import Document, Outcome
from pipeline.data.cleaning.steps import Steps, clean_batch, excerpt_of, rejected_text
from pipeline.data.cleaning.work_units import Unit, fields_to_read
from pipeline.data.sources import records as reading
from pipeline.data.sources.byte_ranges import read_piece
from pipeline.data.sources.formats import Bad, Skipped
from pipeline.data.sources.sources import Source
from pipeline.data.sources.templates import MissingField

# of texts that are cleaned at a time, so that numpy's arrays of a batch stay in the cache (1 << 22: half the speed)
BATCH_CHARACTERS = 1 << 18


def clean_unit(unit: Unit, source: Source, name: str, steps: Steps, path: Path) -> int:
    """Clean one unit and write its outcomes, one row per record in order. Returns how many records count towards
    `limit`."""
    needed = fields_to_read(source, steps.dedup, steps.block)
    chunks, lines = [], 0
    for piece in unit:
        piece_chunks, piece_lines = read_piece(piece, source, name, needed)
        chunks += piece_chunks
        lines += piece_lines
    all_outcomes: list[Outcome] = []
    documents: list[Document] = []
    for chunk in chunks:
        for item in reading.parse(chunk):
            outcome = Outcome(_valid(item.place))
            all_outcomes.append(outcome)
            document = _document(item, source, steps, outcome)
            if document:
                documents.append(document)
    for batch in _batches(documents):
        clean_batch(batch, steps)
    faults.point("save")
    outcomes.write(all_outcomes, path, unit[0].continued, lines)
    return sum(outcome.counted for outcome in all_outcomes)


def _document(item: reading.Record | Bad | Skipped, source: Source, steps: Steps, outcome: Outcome) -> Document | None:
    """The text of a record, to be cleaned; None, with the reason in `outcome`, if there is none."""
    if isinstance(item, Bad):
        outcome.reject("bad", item.reason)
        outcome.excerpt, outcome.lost = excerpt_of(_valid(item.raw), steps.mask), item.lost
        return None
    if isinstance(item, Skipped):
        outcome.reject("not selected", item.reason)
        return None
    outcome.id = item.id
    deselected_by = reading.deselected_by(source, item)
    if deselected_by:
        outcome.reject("not selected", deselected_by)
        return None
    outcome.counted = 1
    written = reason = None
    try:
        text = reading.text_of(source, item)
        outcome.bytes = len(text) if text.isascii() else len(text.encode())
    except MissingField:
        written, reason = json.dumps(item.fields, ensure_ascii=False, default=str), "missing field"
    except UnicodeEncodeError:  # JSON may hold half of a surrogate pair
        written, reason = text, "lone surrogate"
    if reason:
        written = _valid(written)
        outcome.reject("bad", reason)
        outcome.excerpt, outcome.whole = excerpt_of(written, steps.mask), rejected_text(written, steps)
        return None
    outcome.address = address_hash(steps.dedup.url, item)
    if item.visible:
        outcome.shown, outcome.extracted = item.visible.page, item.visible.text
    url = url_of(steps.block.url, item) if steps.block.urls else None
    return Document(outcome, text, url, dict(item.changed))


def _batches(documents: list[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _valid(text: str) -> str:
    """The text with lone surrogates escaped, so that it can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()
