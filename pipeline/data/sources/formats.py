"""Chunks: what a file is cut into, and the records of a chunk of each format."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.data.sources.text_encoding import printable

# A longer record means that the file's record separators are missing; reading it completely would take memory without
# bound.
MAX_RECORD_BYTES = 64 << 20
EXCERPT = 200  # characters of a record that are shown in messages and reports
NULS = "NUL characters, as UTF-16 text has when it is read as UTF-8"

# Names of the fields, such as `text` or `meta.url`, that are looked up in the records of a source; None: any may be.
FieldNames = frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Bad:
    """A record, or the rest of a file, that could not be read; `raw` is how it begins."""

    place: str
    reason: str
    raw: str = ""
    lost: int = 0  # bytes of the file that could not be decompressed


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record of an archive that is not a text, such as an image: counted by reason, not listed."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class VisibleText:
    """Numbers of characters of a web page, without spaces and marks of structure: of everything that it shows, and of
    the text that `extract` makes of it."""

    page: int
    text: int


@dataclass(frozen=True, slots=True)
class Page:
    """A web page, or plain text from a web archive, as a record; `changed` counts what was done to damaged bytes, by
    kind."""

    fields: dict
    changed: dict[str, int]
    visible: VisibleText | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file, not parsed yet, cheap to send to another process."""

    file: str
    # jsonl, line, paragraph, document, html: bytes; warc: list of (position, fields, Bad, or why it is skipped);
    # values: list of (position, value or Bad); table: pyarrow.Table
    kind: str
    first: int  # line or row of the first record, from 1
    data: Any
    weight: int  # bytes, about
    encoding: str | None = None  # of the file, if it was not UTF-8; `data` is UTF-8
    needed: FieldNames = None  # table: a record in which one of these fields cannot be read is bad
    continued: ClassVar[bool] = False  # as byte_ranges.Range.continued


def bad_chunk(relative: str, position: int, reason: str, raw: str = "", lost: int = 0) -> Chunk:
    """A chunk that holds one Bad."""
    bad = Bad(f"{relative}:{position}" if position else relative, reason, raw, lost)
    return Chunk(relative, "values", position, [(position, bad)], len(raw))


def too_long(raw: bytes | bytearray, place: str, encoding: str | None) -> Bad:
    return Bad(place, f"longer than {MAX_RECORD_BYTES >> 20} MiB", printable(raw[:EXCERPT], encoding))


# ---- JSON ------------------------------------------------------------------------------------------------------------


class RepeatedKey(ValueError):
    """A JSON object with a duplicate key: RFC 8259, section 4, does not say which value is meant."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise RepeatedKey("a JSON object has the same key twice")
    return record


JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates)


# ---- chunk -> records ------------------------------------------------------------------------------------------------


def values(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    """(position, value) of each record: a dict, str, list, Page, Bad or Skipped. Position 0: the whole file."""
    kind, _, extract = chunk.kind.partition(" ")
    if kind == "values":
        yield from chunk.data
    elif kind == "table":
        from pipeline.data.sources.arrow_values import table_rows

        yield from table_rows(chunk)
    elif kind == "warc":
        from pipeline.data.sources.web_pages import archive_pages

        yield from archive_pages(chunk, extract)
    elif kind == "html":
        from pipeline.data.sources.web_pages import parse_page

        yield 0, parse_page(chunk.data, "text/html", extract, chunk.file, {})
    elif kind == "jsonl":
        yield from _lines(chunk, _parse_json)
    elif kind == "line":
        yield from _lines(chunk, _decode_line)
    elif kind == "paragraph":
        yield from _paragraphs(chunk)
    else:
        yield 0, _decode(chunk.data, chunk.file, chunk.encoding)


def _lines(chunk: Chunk, parse) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
        if len(line) > MAX_RECORD_BYTES:
            yield number, too_long(line, f"{chunk.file}:{number}", chunk.encoding)
        elif line.strip():
            yield number, parse(line, f"{chunk.file}:{number}", chunk.encoding)


def _paragraphs(chunk: Chunk) -> Iterator[tuple[int, str | Bad]]:
    number = chunk.first
    for block in re.split(rb"(\n[ \t\r]*\n\s*)", chunk.data):
        stripped = block.strip()  # so that blank lines at the border of two chunks make no difference
        if stripped:
            line = number + block.count(b"\n", 0, block.index(stripped))
            place = f"{chunk.file}:{line}"
            if len(stripped) > MAX_RECORD_BYTES:
                yield line, too_long(stripped, place, chunk.encoding)
            else:
                yield line, _decode(stripped, place, chunk.encoding)
        number += block.count(b"\n")


def _decode_line(raw: bytes, place: str, encoding: str | None) -> str | Bad:
    return _decode(raw.removesuffix(b"\r"), place, encoding)


def _decode(raw: bytes, place: str, encoding: str | None) -> str | Bad:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        excerpt = raw[max(0, error.start - 40) :][:EXCERPT]
        return Bad(place, f"invalid {encoding or 'UTF-8'}", printable(excerpt, encoding))
    if 0 < len(text) < 8 * text.count("\0"):
        return Bad(place, NULS, printable(raw[:EXCERPT], encoding))
    return text


def _parse_json(raw: bytes, place: str, encoding: str | None) -> Any:
    text = _decode(raw, place, encoding)
    if isinstance(text, Bad):
        return text
    try:
        value = JSON.decode(text)
    except RepeatedKey as error:
        return Bad(place, str(error), text[:EXCERPT])
    except (ValueError, RecursionError):
        return Bad(place, "malformed JSON", text[:EXCERPT])
    if not isinstance(value, (dict, str)):
        return Bad(place, "not a JSON object", text[:EXCERPT])
    return value
