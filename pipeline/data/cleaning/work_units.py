"""Work units of cleaning: a few megabytes of one source that one process cleans, with the outcomes of all records in
one file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import faults
from pipeline.data.cleaning import outcomes
from pipeline.data.cleaning.addresses import address_hash, url_of
from pipeline.data.cleaning.outcomes import Document, Outcome
from pipeline.data.dedup.minhash import Dedup
from pipeline.data.sources import records as reading
from pipeline.data.sources.byte_ranges import Range, cut_source, read_piece
from pipeline.data.sources.formats import Bad, Chunk, FieldNames, Skipped
from pipeline.data.sources.sources import Source, needed_fields
from pipeline.data.sources.templates import MissingField

if TYPE_CHECKING:  # the recipe's models load without numpy
    from pipeline.data.cleaning.blocklist import Block
    from pipeline.data.cleaning.steps import Steps

Unit = list[Range | Chunk]
# of texts that are cleaned at a time, so that numpy's arrays of a batch stay in the cache (1 << 22: half the speed)
BATCH_CHARACTERS = 1 << 18


def fields_to_read(source: Source, dedup: Dedup, block: "Block") -> frozenset[str]:
    """Fields that cleaning looks up in the records of a source."""
    return needed_fields(source, dedup.url, block.url if block.urls else None)


def cut_units(source: Source, name: str, size: int, needed: FieldNames = None) -> Iterator[Unit]:
    """Pieces of together up to `size` bytes: big files are cut, small ones joined. A part of a file that is not its
    first one is a unit of its own, so that all its line numbers count from the same place."""
    unit, weight = [], 0
    for piece in cut_source(source, name, size, needed):
        if unit and (weight + piece.weight > size or unit[-1].continued):
            yield unit
            unit, weight = [], 0
        unit.append(piece)
        weight += piece.weight
    if unit:
        yield unit


def clean_unit(unit: Unit, source: Source, name: str, steps: "Steps", path: Path) -> int:
    """Clean one unit and write its outcomes, one row per record in order. Returns how many records count towards
    `limit`."""
    from pipeline.data.cleaning.steps import clean_batch

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


def _document(
    item: reading.Record | Bad | Skipped, source: Source, steps: "Steps", outcome: Outcome
) -> Document | None:
    """The text of a record, to be cleaned; None, with the reason in `outcome`, if there is none."""
    from pipeline.data.cleaning.steps import excerpt_of, rejected_text

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
