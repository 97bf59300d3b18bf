"""WARC and WET files cut into records (ISO 28500).

This is an own reader because damage must cost only the record that contains it: a record with a wrong length is counted
as bad, with its place, and reading resumes at the next line that begins a record. fastwarc stops there
(docs/decisions.md).
"""

import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from pipeline.data.sources.decompress import Gap
from pipeline.data.sources.formats import EXCERPT, MAX_RECORD_BYTES, Bad, Chunk
from pipeline.data.sources.line_chunks import read_parts
from pipeline.data.sources.text_encoding import printable

MAX_HEAD = 1 << 16  # bytes of a record's headers
_FIRST_LINE = re.compile(rb"(?:\A|\n)(WARC/[01]\.\d+\r?\n)")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d+)[ \t]*\r?$", re.I | re.M)
_HTML = ("text/html", "application/xhtml+xml")
# Reasons why a record is skipped must be few, whatever servers call their files: these media types have a reason of
# their own, the others are counted by what comes before the slash.
_RECORD_TYPES = ("warcinfo", "response", "resource", "request", "metadata", "revisit", "continuation")  # ISO 28500, 5.5
_MEDIA_FAMILIES = ("image", "audio", "video", "font", "application", "text", "message", "multipart", "model")
_COUNTED_MEDIA = (
    "application/pdf",
    "application/json",
    "application/javascript",
    "application/xml",
    "application/rss+xml",
    "application/atom+xml",
    "text/javascript",
    "text/css",
    "text/xml",
    "text/markdown",
    "text/csv",
)


def warc_chunks(relative: str, path: Path, extract: str, size: int) -> Iterator[Chunk]:
    """Records of a WARC or WET file, about `size` bytes at a time: the fields of those that may hold text, why others
    are skipped, and Bad where the file is damaged. Positions count records from 1."""
    rows: list[tuple[int, Any]] = []
    weight = 0
    for number, item in enumerate(_records(path), 1):
        if isinstance(item, tuple):
            item = Bad(f"{relative}:{number}", *item)
        rows.append((number, item))
        weight += 200
        if isinstance(item, dict):
            weight += len(item["body"])
        if weight >= size:
            yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)
            rows, weight = [], 0
    if rows:
        yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)


# A record as this module yields it: its fields, why it is skipped, or (why it is bad, how it begins) with the bytes of
# the file that could not be decompressed.
Item = dict | str | tuple


def _records(path: Path) -> Iterator[Item]:
    parts, more = read_parts(path), True
    while more:
        reader = _Reader(parts)
        yield from reader.records()
        more = reader.gap is not None


class _Reader:
    """Reads records up to the end of the file or the next gap in it, which is then in `gap`."""

    def __init__(self, parts: Iterator[bytes | Gap]):
        self.parts, self.buffer = parts, bytearray()
        self.gap: Gap | None = None
        self.ended = False

    def records(self) -> Generator[Item, None, None]:
        while self._fill(1):
            first_line = _FIRST_LINE.match(self.buffer)
            if not first_line:  # between records there are empty lines; anything else belongs to no record
                self._fill(MAX_HEAD)
                skipped = self._resync()
                if skipped.strip():
                    yield "no WARC record", _excerpt(skipped)
                continue
            self._fill(MAX_HEAD)
            end_of_head = _END_OF_HEAD.search(self.buffer, 0, MAX_HEAD)
            length = _LENGTH.search(self.buffer, 0, end_of_head.start()) if end_of_head else None
            if length is None:
                if self.gap:
                    break
                excerpt = _excerpt(self.buffer)
                self._resync(first_line.end())
                yield "WARC record without a length", excerpt
                continue
            item = self._record(bytes(self.buffer[: end_of_head.start()]), end_of_head.end(), int(length[1]))
            if item is None:
                break
            yield item
        if self.gap:
            yield self.gap.reason, _excerpt(self.buffer), self.gap.lost
        elif self.buffer.strip():
            yield "truncated WARC record", _excerpt(self.buffer)

    def _record(self, head: bytes, begin: int, length: int) -> Item | None:
        """The record whose body begins at `begin`, removed from the buffer. None: the data ends within it."""
        if length > MAX_RECORD_BYTES:
            self._resync(begin)  # the length may be wrong, so the next record is searched for, not jumped to
            return f"longer than {MAX_RECORD_BYTES >> 20} MiB", _excerpt(head)
        end = begin + length
        if not self._fill(end):
            if _next_record(self.buffer, begin) < 0:
                return None
            self._resync(begin)  # it ends before its length says, and others follow
            return "WARC record with a wrong length", _excerpt(head)
        body = bytes(self.buffer[begin:end])
        self._fill(end + 16)
        after = bytes(self.buffer[end : end + 16])
        if not after.startswith(b"\r\n\r\n") and after.lstrip(b"\r\n")[:5] not in (b"", b"WARC/"):
            self._resync(begin)
            return "WARC record with a wrong length", _excerpt(head)
        del self.buffer[:end]
        while self._fill(1) and self.buffer[:1] in (b"\r", b"\n"):
            del self.buffer[:1]
        return _fields_or_reason(head, body)

    def _fill(self, size: int) -> bool:
        """Whether the buffer has `size` bytes, after reading as much as there is."""
        while len(self.buffer) < size and not self.ended:
            part = next(self.parts, None)
            if isinstance(part, bytes):
                self.buffer.extend(part)
            else:
                self.gap, self.ended = part, True
        return len(self.buffer) >= size

    def _resync(self, begin: int = 0) -> bytes:
        """Drop `begin` bytes and what comes before the next record; returns the beginning of the latter."""
        del self.buffer[:begin]
        skipped = b""
        while True:
            self._fill(1 << 20)
            next_record = _next_record(self.buffer, 1)
            skipped = skipped or bytes(self.buffer[: next_record if next_record > 0 else EXCERPT])
            if next_record > 0:
                del self.buffer[:next_record]
                return skipped[:EXCERPT]
            if len(self.buffer) < 1 << 20:
                self.buffer.clear()
                return skipped[:EXCERPT]
            del self.buffer[:-16]  # a record's first line may lie across two blocks


def _next_record(buffer: bytearray, at: int) -> int:
    """Offset of the next record after `at`; -1 if there is none. Searching for its first word first is ten times as
    fast."""
    while (at := buffer.find(b"\nWARC/", at)) >= 0:
        if _FIRST_LINE.match(buffer, at):
            return at + 1
        at += 1
    return -1


def _excerpt(raw: bytes | bytearray) -> str:
    return printable(raw[:EXCERPT]).replace("\0", "\\x00")


# ---- one record ------------------------------------------------------------------------------------------------------


def _fields_or_reason(head: bytes, body: bytes) -> dict | str:
    """A record's fields, or why it is skipped. `body`, and for HTTP `codings` and `cut`, are decoded by web_pages."""
    headers = _headers(head)
    record_type = headers.get("warc-type", "")
    fields = {
        "url": headers.get("warc-target-uri", "").strip("<>"),
        "date": headers.get("warc-date", ""),
        "type": headers.get("content-type", ""),
    }
    if record_type == "conversion":  # WET files are in UTF-8, whatever the page was in
        return {**fields, "body": body, "plain": True, "utf8": True}
    if record_type == "resource":
        media = _media_type(fields["type"])
        if not _is_text(media):
            return _skipped_media(media)
        return {**fields, "body": body, "plain": media == "text/plain"}
    if record_type != "response":
        return f"WARC {record_type}" if record_type in _RECORD_TYPES else "WARC record of no known kind"
    return _response(fields, body, is_cut=bool(headers.get("warc-truncated")))


def _response(fields: dict, body: bytes, is_cut: bool) -> dict | str:
    if not body.startswith(b"HTTP/"):
        return "no HTTP response"
    top, _, payload = body.partition(b"\r\n\r\n" if b"\r\n\r\n" in body else b"\n\n")
    status = top.split(None, 2)[1:2]
    if status != [b"200"]:
        if status and re.fullmatch(rb"[1-5]\d\d", status[0]):
            return f"HTTP {status[0].decode()}"
        return "no HTTP response"
    http = _headers(top)
    fields["type"] = http.get("content-type", "")
    media = _media_type(fields["type"])
    if not _is_text(media) and (media or b"<html" not in payload[:4096].lower()):
        return _skipped_media(media)
    return {
        **fields,
        "body": payload,
        "plain": media == "text/plain",
        "codings": f"{http.get('content-encoding', '')},{http.get('transfer-encoding', '')}",
        "cut": is_cut,
    }


def _media_type(content_type: str) -> str:
    return content_type.split(";")[0].strip().lower()


def _is_text(media: str) -> bool:
    return media in (*_HTML, "text/plain")


def _skipped_media(media: str) -> str:
    """The reason why a record of this media type is skipped."""
    if media in _COUNTED_MEDIA:
        return media
    family = media.partition("/")[0]
    return f"{family}/*" if family in _MEDIA_FAMILIES else "of no known type"


def _headers(raw: bytes) -> dict[str, str]:
    """Headers by name in lower case. Codings in several headers are one list, as in HTTP; otherwise the last one
    counts."""
    headers: dict[str, str] = {}
    for line in raw.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")[1:]:
        name, colon, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in headers and name in ("content-encoding", "transfer-encoding"):
            value = f"{headers[name]}, {value}"
        if colon:
            headers[name] = value
    return headers
