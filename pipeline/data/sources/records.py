"""The records of a source, one after the other, and what could not be read.

for item in read(source, "wiki"):
    item is a Record (id, fields, place), or a Bad (place, reason, raw): what could not be read, never fatal and
    never silent
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from pipeline.data.sources.formats import EXCERPT, NULS, Asked, Bad, Chunk, Page, Passed, Shown, values
from pipeline.data.sources.sources import Source, chunks
from pipeline.data.sources.templates import look_up, render


@dataclass(frozen=True, slots=True)
class Record:
    """One record: `id` hashes all fields that were read, `place` says where it stands (file:line), `changed` counts
    what was done to read it, `shown` is how much of a web page is in its text."""

    id: str
    fields: dict
    place: str
    changed: dict[str, int] = field(default_factory=dict)
    shown: Shown | None = None


def read(source: Source, name: str, key: str = "sources", asked: Asked = None) -> Iterator[Record | Bad]:
    """Records of a source in file order, after `where`, `part` and `limit`; what cannot be read comes as Bad. `asked`
    as for sources.chunks. Raises UserError, which names `key.name`, if it is not there."""
    found = 0
    for chunk in chunks(source, name, key=key, asked=asked):
        for item in parse(chunk):
            if isinstance(item, Bad):
                yield item
            elif not isinstance(item, Passed) and not deselected(source, item):
                yield item
                found += 1
                if found == source.limit:
                    return


def deselected(source: Source, record: Record) -> str | None:
    """`where` or `part` if that key leaves the record out."""
    for name, wanted in source.where.items():
        try:
            value = look_up(record.fields, name)
        except KeyError:
            return "where"
        if value not in (wanted if isinstance(wanted, list) else [wanted]):
            return "where"
    if source.part != (0.0, 1.0) and not source.part[0] <= fraction(record.id) < source.part[1]:
        return "part"
    return None


def parse(chunk: Chunk) -> Iterator[Record | Bad | Passed]:
    """The records of one chunk."""
    for position, value in values(chunk):
        if isinstance(value, (Bad, Passed)):
            yield value
            continue
        changed: dict[str, int] = {}
        shown = None
        if isinstance(value, Page):
            value, changed, shown = value.fields, value.changed, value.shown
        fields = value if isinstance(value, dict) else None
        if isinstance(value, str):
            fields = {"text": value}
        elif isinstance(value, list):
            fields = {str(index): item for index, item in enumerate(value)}
        place = f"{chunk.file}:{position}" if position else chunk.file
        if fields is None:
            yield Bad(place, "not a record", str(value)[:EXCERPT])
        else:
            yield Record(_id(fields), fields, place, changed, shown)


def text_of(source: Source, record: Record) -> str:
    """The text of a record by the source's `text` key. Raises MissingField, or UserError if the field holds no text."""
    template = source.text if "{" in source.text else "{" + source.text + "}"
    return render(template, record.fields, record.place, source.join)


def other_encoding(source: Source, reason: str) -> str:
    """What to do, to be put behind a sentence, where text is not in the encoding that it was read in."""
    if source.encoding and reason == f"invalid {source.encoding}":
        return f"; the source says encoding: {source.encoding}, and its files are in another one, or damaged"
    if reason in ("invalid UTF-8", NULS):
        return "; text that is not UTF-8 needs to say what it is, such as encoding: gb18030 (or big5, utf-16, latin-1)"
    return ""


def fraction(id: str) -> float:
    """A record's number in [0, 1), uniform and the same in every stage. Tuning stages hold out what has fraction(id)
    >= 1 - holdout."""
    return int(id[:13], 16) / 16**13


_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode


def _id(fields: dict) -> str:
    return hashlib.blake2b(_canonical(fields).encode(), digest_size=16).hexdigest()
