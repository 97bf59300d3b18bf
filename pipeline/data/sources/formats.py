"""File formats: a file cut into chunks at record borders, and a chunk's records. What is read does not depend on
where a file is cut."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.data.sources import decompress
from pipeline.data.sources.decompress import Gap
from pipeline.data.sources.text_encoding import shown, transcoded

# A longer record is taken for a file whose record separators are missing; reading it whole would take memory without
# bound.
MAX_RECORD_BYTES = 64 << 20
EXCERPT = 200
NULS = "NUL characters, as UTF-16 text has when it is read as UTF-8"
BLANK = 256  # bytes of the longest blank line that parts paragraphs of two chunks
BOM = b"\xef\xbb\xbf"

# Names of the fields, such as `text` or `meta.url`, that are looked up in the records of a source; None: any may be.
Asked = frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Bad:
    """A record, or the rest of a file, that could not be read; `raw` is how it begins."""

    place: str
    reason: str
    raw: str = ""
    lost: int = 0  # bytes of the file that could not be unpacked


@dataclass(frozen=True, slots=True)
class Passed:
    """A record of an archive that holds no text by its kind, such as an image: counted by reason, not kept aside."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shown:
    """Characters of a web page without spaces and marks of structure: those that it shows, and those of its text as
    `extract` makes it."""

    page: int
    text: int


@dataclass(frozen=True, slots=True)
class Page:
    """A web page, or plain text out of a web archive, as a record; `changed` counts what was done to bytes that are
    damaged, by kind."""

    fields: dict
    changed: dict[str, int]
    shown: Shown | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file, not parsed yet, cheap to send to another process."""

    file: str
    # jsonl, line, paragraph, document, html: bytes; warc: list of (position, fields, Bad, or why it is passed over);
    # values: list of (position, value or Bad); table: pyarrow.Table
    kind: str
    first: int  # line or row of the first record, from 1
    data: Any
    weight: int  # bytes, about
    encoding: str | None = None  # of the file, if it was not UTF-8; `data` is
    asked: Asked = None  # table: a record of which one of these fields cannot be read is bad
    continued: ClassVar[bool] = False  # as ranges.Range


class RepeatedKey(ValueError):
    """An object of JSON that has a key twice: which value is meant, nothing says (RFC 8259, 4)."""


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RepeatedKey("a key stands twice in a JSON object")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_once)


# ---- chunk -> records ------------------------------------------------------------------------------------------------


def values(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    if chunk.kind == "values":
        yield from chunk.data
    elif chunk.kind == "table":
        from pipeline.data.sources.arrow_values import rows

        yield from rows(chunk)
    elif chunk.kind.startswith("warc"):
        from pipeline.data.sources.warc_html import pages

        yield from pages(chunk)
    elif chunk.kind.startswith("html"):
        from pipeline.data.sources.warc_html import page

        yield 0, page(chunk.data, "text/html", chunk.kind.partition(" ")[2], chunk.file, {})
    elif chunk.kind == "jsonl":
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if len(line) > MAX_RECORD_BYTES:
                yield number, _long(line, f"{chunk.file}:{number}", chunk.encoding)
            elif line.strip():
                yield number, _json(line, f"{chunk.file}:{number}", chunk.encoding)
    elif chunk.kind == "line":
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if len(line) > MAX_RECORD_BYTES:
                yield number, _long(line, f"{chunk.file}:{number}", chunk.encoding)
            elif line.strip():
                yield number, _decoded(line.removesuffix(b"\r"), f"{chunk.file}:{number}", chunk.encoding)
    elif chunk.kind == "paragraph":
        number = chunk.first
        for block in re.split(rb"(\n[ \t\r]*\n\s*)", chunk.data):
            stripped = block.strip()  # so that blank lines at the border of two chunks make no difference
            if stripped:
                at = number + block.count(b"\n", 0, block.index(stripped))
                if len(stripped) > MAX_RECORD_BYTES:
                    yield at, _long(stripped, f"{chunk.file}:{at}", chunk.encoding)
                else:
                    yield at, _decoded(stripped, f"{chunk.file}:{at}", chunk.encoding)
            number += block.count(b"\n")
    else:
        yield 0, _decoded(chunk.data, chunk.file, chunk.encoding)


def _long(raw: bytes | bytearray, place: str, encoding: str | None) -> Bad:
    return Bad(place, f"longer than {MAX_RECORD_BYTES >> 20} MiB", shown(raw[:EXCERPT], encoding))


def _decoded(raw: bytes, place: str, encoding: str | None) -> str | Bad:
    try:
        text = raw.decode()
        many = 0 < len(text) < 8 * text.count("\0")
        return Bad(place, NULS, shown(raw[:EXCERPT], encoding)) if many else text
    except UnicodeDecodeError as error:
        return Bad(place, f"invalid {encoding or 'UTF-8'}", shown(raw[max(0, error.start - 40) :][:EXCERPT], encoding))


def _json(raw: bytes, place: str, encoding: str | None) -> Any:
    text = _decoded(raw, place, encoding)
    if isinstance(text, Bad):
        return text
    try:
        value = JSON.decode(text)
    except RepeatedKey as error:
        return Bad(place, str(error), text[:EXCERPT])
    except (ValueError, RecursionError):
        return Bad(place, "malformed JSON", text[:EXCERPT])
    return value if isinstance(value, (dict, str)) else Bad(place, "not a JSON object", text[:EXCERPT])


# ---- file -> chunks --------------------------------------------------------------------------------------------------


WITHOUT_MARK = "{0} without a byte order mark; say encoding: {0}-le or {0}-be"


class TornFile(Exception):
    """A compressed file that ends too early or is damaged, `lost` bytes before its end."""

    def __init__(self, reason: str, lost: int):
        super().__init__(reason)
        self.lost = lost


def parts_of(path: Path, size: int = 1 << 20, encoding: str | None = None) -> Iterator[bytes | Gap]:
    """Bytes of a file in blocks, unpacked by suffix and in UTF-8; of at most `size` where nothing is unpacked. A Gap
    stands where some cannot be unpacked."""
    parts = decompress.parts_of(path) if path.suffix in (".gz", ".zst") else _plain(path, size)
    try:
        yield from transcoded(parts, encoding) if encoding else parts
    except UnicodeError:  # bytes that stand for nothing are kept; this is of decoders that begin with a mark
        yield Gap(WITHOUT_MARK.format(encoding), 0, path.stat().st_size, False)


def _plain(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        yield from iter(lambda: handle.read(size), b"")


def blocks_of(path: Path, size: int = 1 << 20, encoding: str | None = None) -> Iterator[bytes]:
    """As parts_of, for files that are of one piece. Raises TornFile where the rest cannot be used."""
    for part in parts_of(path, size, encoding):
        if isinstance(part, Gap):
            raise TornFile(part.reason, path.stat().st_size - part.begin)
        yield part


def border(data: bytearray, at: int, kind: str) -> int:
    """The first place from `at` (at least 1) on where a line, or a paragraph, may begin; -1 if there is none. It
    depends on the few bytes before it alone, so whoever reads a part of a file finds the same."""
    end = data.find(b"\n", at - 1) + 1
    while end and not _parts(data, end, kind):
        end = data.find(b"\n", end) + 1
    return end or -1


def last_border(data: bytearray, kind: str, seen: int = 0) -> int:
    """The last such place behind `seen`; 0 if there is none."""
    end = data.rfind(b"\n", seen) + 1
    while end and not _parts(data, end, kind):
        end = data.rfind(b"\n", seen, end - 1) + 1
    return end


def _parts(data: bytearray, end: int, kind: str) -> bool:
    return kind != "paragraph" or data[max(0, end - BLANK) : end - 1].rstrip(b" \t\r").endswith(b"\n")


def too_long(relative: str, number: int, data: bytearray, kind: str, encoding: str | None) -> Chunk:
    """For a record that begins at line `number` and is not read to its end."""
    if kind == "paragraph":  # it begins behind empty lines
        text = data.lstrip()
        number, data = number + data.count(b"\n", 0, len(data) - len(text)), text
    bad = _long(data, f"{relative}:{number}", encoding)
    return bad_chunk(relative, number, bad.reason, bad.raw)


def line_chunks(relative: str, path: Path, kind: str, size: int, encoding: str | None = None) -> Iterator[Chunk]:
    """Whole lines, or whole paragraphs. Behind a gap, whose line nobody knows, they are counted on."""
    buffer, number, skipping = bytearray(), 1, False
    start, seen = True, 0
    for part in parts_of(path, min(size, 1 << 20), encoding):
        if isinstance(part, Gap):
            if start and buffer.startswith(BOM):
                del buffer[:3]
            cut = 0 if skipping else buffer.rfind(b"\n") + 1  # what stands after the last whole line is torn
            if cut:
                yield Chunk(relative, kind, number, bytes(buffer[:cut]), cut, encoding)
            number += buffer.count(b"\n")
            excerpt = shown(buffer[cut:][:EXCERPT], encoding) if not skipping else ""
            yield bad_chunk(relative, number, part.reason, excerpt, part.lost)
            buffer.clear()
            # If nobody knows whether a line begins behind the gap, the first one there is the rest of the torn one.
            number, skipping, start, seen = number + part.aligned, not part.aligned, False, 0
            continue
        buffer += part
        if start:
            if len(buffer) < 3:
                continue
            start = False
            if buffer.startswith(BOM):
                del buffer[:3]
        if skipping:
            end = border(buffer, 1, kind)
            skipping = end < 0
            end = max(0, len(buffer) - BLANK) if skipping else end  # a border is known by what stands before it
            number += buffer.count(b"\n", 0, end)
            del buffer[:end]
            seen = 0
        if len(buffer) < size or skipping:
            continue
        cut, seen = last_border(buffer, kind, seen), len(buffer)
        if cut:
            yield Chunk(relative, kind, number, bytes(buffer[:cut]), cut, encoding)
            number += buffer.count(b"\n", 0, cut)
            del buffer[:cut]
            seen = 0
        if len(buffer) > MAX_RECORD_BYTES:
            yield too_long(relative, number, buffer, kind, encoding)
            skipping = True
    if start and buffer.startswith(BOM):
        del buffer[:3]
    if buffer and not skipping:
        yield Chunk(relative, kind, number, bytes(buffer), len(buffer), encoding)


def bad_chunk(relative: str, position: int, reason: str, raw: str = "", lost: int = 0) -> Chunk:
    bad = Bad(f"{relative}:{position}" if position else relative, reason, raw, lost)
    return Chunk(relative, "values", position, [(position, bad)], len(raw))


def document_chunk(relative: str, path: Path, kind: str = "document", encoding: str | None = None) -> Iterator[Chunk]:
    data = bytearray()
    try:
        for block in blocks_of(path, encoding=encoding):
            data += block
            if len(data) > MAX_RECORD_BYTES:
                reason = f"longer than {MAX_RECORD_BYTES >> 20} MiB"
                yield bad_chunk(relative, 0, reason, shown(data[:EXCERPT], encoding))
                return
    except TornFile as error:
        yield bad_chunk(relative, 0, str(error), shown(data[:EXCERPT], encoding), error.lost)
        return
    if data.strip():
        yield Chunk(relative, kind, 1, bytes(data.removeprefix(BOM)), len(data), encoding)
