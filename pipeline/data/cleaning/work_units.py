"""Sources cut into work units of a few megabytes, each for one process."""

from collections.abc import Iterator

from pipeline.data.cleaning.blocklist import Block
from pipeline.data.dedup.minhash import Dedup
from pipeline.data.sources.byte_ranges import Range, cut_source
from pipeline.data.sources.formats import Chunk, FieldNames
from pipeline.data.sources.sources import Source, needed_fields

Unit = list[Range | Chunk]


def fields_to_read(source: Source, dedup: Dedup, block: Block) -> frozenset[str]:
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
