"""The records of a source, one after the other, and what could not be read.

for item in read(source, "wiki"):
    item is a Record (id, fields, place), or a Bad (place, reason, raw) for what could not be read, which is never fatal
    and never dropped silently
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.sources.formats import EXCERPT, NULS, Bad, Chunk, FieldNames, Page, Skipped, VisibleText, values
from pipeline.data.sources.sources import Source, chunks
from pipeline.data.sources.templates import look_up, render
from pipeline.data.sources.text_encoding import LARGER


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `id` is a hash of all fields that were read, `place` is where it is (file:line), `changed` counts
    what was done to read it, `visible` is how much of a web page its text is. `columnar`: it is the row of a table,
    whose columns give every object the keys of all."""

    id: str
    fields: dict
    place: str
    changed: dict[str, int] = field(default_factory=dict)
    visible: VisibleText | None = None
    columnar: bool = False


def read(source: Source, name: str, key: str = "sources", needed: FieldNames = None) -> Iterator[Record | Bad]:
    """Records of a source in file order, after `where`, `part` and `limit`, and Bad for what cannot be read. `needed`
    as for sources.chunks. Raises UserError, which names `key.name`, if the source is missing."""
    number = 0
    for chunk in chunks(source, name, key=key, needed=needed):
        for item in parse(chunk):
            if isinstance(item, Bad):
                yield item
            elif isinstance(item, Record) and not deselected_by(source, item):
                yield item
                number += 1
                if number == source.limit:
                    return


def deselected_by(source: Source, record: Record) -> str | None:
    """The key, `where` or `part`, that drops the record."""
    for name, allowed in source.where.items():
        try:
            value = look_up(record.fields, name)
        except KeyError:
            return "where"
        if value not in (allowed if isinstance(allowed, list) else [allowed]):
            return "where"
    if source.part != (0.0, 1.0) and not source.part[0] <= fraction(record.id) < source.part[1]:
        return "part"
    return None


def parse(chunk: Chunk) -> Iterator[Record | Bad | Skipped]:
    """The records of one chunk."""
    for position, value in values(chunk):
        if isinstance(value, (Bad, Skipped)):
            yield value
            continue
        place = f"{chunk.file}:{position}" if position else chunk.file
        if isinstance(value, Page):
            yield Record(_id(value.fields), value.fields, place, value.changed, value.visible)
            continue
        fields = _fields(value)
        if fields is None:
            yield Bad(place, "not a record", str(value)[:EXCERPT])
        else:
            yield Record(_id(fields), fields, place, columnar=chunk.kind == "table")


def _fields(value: Any) -> dict | None:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, list):
        return {str(index): item for index, item in enumerate(value)}
    return None


def text_of(source: Source, record: Record) -> str:
    """The text of a record by the source's `text` key. Raises MissingField, or UserError if the field is not text."""
    template = source.text if "{" in source.text else "{" + source.text + "}"
    return render(template, record.fields, record.place, source.join)


def encoding_advice(source: Source, reason: str) -> str:
    """The end of a message about a bad record: what to do if the text is not in the encoding it was read in."""
    if source.encoding and reason == f"invalid {source.encoding}":
        larger = LARGER.get(source.encoding)
        hint = f"; Windows writes more characters under that name: try encoding: {larger}" if larger else ""
        return f"; the source says encoding: {source.encoding}, but its files are in another one, or damaged{hint}"
    if reason in ("invalid UTF-8", NULS):
        return "; if the text is not UTF-8, set encoding, such as encoding: gb18030 (or big5, utf-16, latin-1)"
    return ""


def fraction(id: str) -> float:
    """A record's number in [0, 1), uniform and the same in every stage. Finetuning stages hold out the records with
    fraction(id) >= 1 - holdout."""
    return int(id[:13], 16) / 16**13


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode


def _id(fields: dict) -> str:
    return hashlib.blake2b(_canonical(fields).encode(), digest_size=16).hexdigest()
