"""Web archives and pages: WARC and WET files cut into records, and the main text of HTML.

A WARC file (ISO 28500) is read by its own reader, because what must happen to a record with a wrong length is decided
here: it is counted as bad with its place, and reading goes on at the next line that begins a record. Text comes out of
HTML with resiliparse (Apache-2.0; `pip install 'alma[web]'`): 1,326 MB of HTML in 38 s on two cores (docs/log.md).
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.data.sources import bounded_call, html_nesting, html_structure
from pipeline.data.sources.decompress import CODINGS, GZIP_MAGIC, ZSTD_MAGIC, Gap, TooLong, Unreadable, unpacked
from pipeline.data.sources.formats import EXCERPT, MAX_RECORD_BYTES, Bad, Chunk, Page, Passed, Shown, parts_of
from pipeline.data.sources.html_charset import decoded, label_of

_START = re.compile(rb"(?:\A|\n)(WARC/[01]\.\d+\r?\n)")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d+)[ \t]*\r?$", re.I | re.M)
_HTML = ("text/html", "application/xhtml+xml")
MAX_HEAD = 1 << 16
# Time of the processor for the extraction of a page. A usual page takes 0.01 s, a table of 0.5 MB 0.3 s.
SECONDS, SECONDS_PER_MB = 5, 2
MAX_CODINGS = 4  # of one body: each may take the time of 64 MiB
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not ESC, which ISO-2022-JP has
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})[^\r\n]{0,200}\r\n")
# Reasons why a record is passed over must be few, whatever servers call their files: these types are named, others by
# what stands before the slash.
_KINDS = ("warcinfo", "response", "resource", "request", "metadata", "revisit", "continuation")  # ISO 28500, 5.5
_FAMILIES = ("image", "audio", "video", "font", "application", "text", "message", "multipart", "model")
_NAMED = (
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
    """Records of a WARC or WET file, `size` bytes at a time: fields of those that may hold text, why others are
    passed over, and Bad where the file is not what it says. Positions count records from 1."""
    rows: list[tuple[int, Any]] = []
    weight = 0
    for number, item in enumerate(_records(path), 1):
        rows.append((number, Bad(f"{relative}:{number}", *item) if isinstance(item, tuple) else item))
        weight += (len(item["body"]) if isinstance(item, dict) else 0) + 200
        if weight >= size:
            yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)
            rows, weight = [], 0
    if rows:
        yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)


def _records(path: Path) -> Iterator[dict | str | tuple]:
    """Each record in order: its fields, why it holds no text, or (why it is bad, how it begins, bytes of the file that
    could not be unpacked)."""
    parts, more = parts_of(path), True
    while more:
        more = yield from _until_gap(parts)


def _until_gap(parts: Iterator[bytes | Gap]) -> Generator[dict | str | tuple, None, bool]:
    """The records up to the next gap. Returns whether there is one."""
    buffer, gap, ended = bytearray(), None, False

    def fill(wanted: int) -> bool:
        nonlocal gap, ended
        while len(buffer) < wanted and not ended:
            part = next(parts, None)
            ended = not isinstance(part, bytes)
            if ended:
                gap = part
            else:
                buffer.extend(part)
        return len(buffer) >= wanted

    while fill(1):
        start = _START.match(buffer)
        if not start:  # between records there are empty lines; anything else belongs to none
            fill(MAX_HEAD)
            skipped = _resync(buffer, fill)
            if skipped.strip():
                yield "no WARC record", _shown(skipped)
            continue
        fill(MAX_HEAD)
        end = re.compile(rb"\r?\n\r?\n").search(buffer, 0, MAX_HEAD)
        length = _LENGTH.search(buffer, 0, end.start()) if end else None
        if length is None:
            if gap:
                break
            shown = _shown(buffer)
            del buffer[: start.end()]
            _resync(buffer, fill)
            yield "WARC record without a length", shown
            continue
        head, begin, number = bytes(buffer[: end.start()]), end.end(), int(length[1])
        if number > MAX_RECORD_BYTES:
            del buffer[:begin]  # the length may be a slip, so the next record is looked for and not leapt to
            _resync(buffer, fill)
            yield f"longer than {MAX_RECORD_BYTES >> 20} MiB", _shown(head)
            continue
        if not fill(begin + number):
            if _next_start(buffer, begin) < 0:
                break
            del buffer[:begin]  # it ends before its length says, and others follow
            _resync(buffer, fill)
            yield "WARC record with a wrong length", _shown(head)
            continue
        body = bytes(buffer[begin : begin + number])
        fill(begin + number + 16)
        after = bytes(buffer[begin + number : begin + number + 16])
        if after.startswith(b"\r\n\r\n") or after.lstrip(b"\r\n")[:5] in (b"", b"WARC/"):
            del buffer[: begin + number]
            while fill(1) and buffer[:1] in (b"\r", b"\n"):
                del buffer[:1]
            yield _record(head, body)
        else:
            del buffer[:begin]
            _resync(buffer, fill)
            yield "WARC record with a wrong length", _shown(head)
    if gap:
        yield gap.reason, _shown(buffer), gap.lost
    elif buffer.strip():
        yield "truncated WARC record", _shown(buffer)
    return gap is not None


def _next_start(buffer: bytearray, at: int) -> int:
    """Where the next record begins behind `at`; -1 if none does. Looks for its first word first: ten times as fast."""
    while (at := buffer.find(b"\nWARC/", at)) >= 0:
        if _START.match(buffer, at):
            return at + 1
        at += 1
    return -1


def _resync(buffer: bytearray, fill) -> bytes:
    """Drop what stands before the next record, and return how it begins."""
    shown = b""
    while True:
        fill(1 << 20)
        found = _next_start(buffer, 1)
        shown = shown or bytes(buffer[: found if found > 0 else EXCERPT])
        if found > 0:
            del buffer[:found]
            return shown[:EXCERPT]
        if len(buffer) < 1 << 20:
            buffer.clear()
            return shown[:EXCERPT]
        del buffer[:-16]  # a record's first line may lie across two blocks


def _shown(raw: bytes) -> str:
    return bytes(raw[:EXCERPT]).decode(errors="backslashreplace").replace("\0", "\\x00")


def _record(head: bytes, body: bytes) -> dict | str:
    """Its fields, or why it holds no text."""
    fields = _headers(head)
    kind = fields.get("warc-type", "")
    found = {
        "url": fields.get("warc-target-uri", "").strip("<>"),
        "date": fields.get("warc-date", ""),
        "type": fields.get("content-type", ""),
    }
    if kind == "conversion":
        return {**found, "body": body, "plain": True, "utf8": True}  # WET files are in UTF-8, whatever the page was in
    if kind == "resource":
        media = _media(found["type"])
        return {**found, "body": body, "plain": media == "text/plain"} if _texts(media) else _other(media)
    if kind != "response":
        return f"WARC {kind}" if kind in _KINDS else "WARC record of no known kind"
    if not body.startswith(b"HTTP/"):
        return "no HTTP response"
    top, _, payload = body.partition(b"\r\n\r\n") if b"\r\n\r\n" in body else body.partition(b"\n\n")
    http = _headers(top)
    status = top.split(None, 2)[1:2]
    if status != [b"200"]:
        return f"HTTP {status[0].decode()}" if status and re.fullmatch(rb"[1-5]\d\d", status[0]) else "no HTTP response"
    found["type"] = http.get("content-type", "")
    media = _media(found["type"])
    if not _texts(media) and (media or b"<html" not in payload[:4096].lower()):
        return _other(media)
    return {
        **found,
        "body": payload,
        "plain": media == "text/plain",
        "codings": f"{http.get('content-encoding', '')},{http.get('transfer-encoding', '')}",
        "cut": bool(fields.get("warc-truncated")),
    }


def _media(given: str) -> str:
    return given.split(";")[0].strip().lower()


def _texts(media: str) -> bool:
    return media in (*_HTML, "text/plain")


def _other(media: str) -> str:
    family = media.partition("/")[0]
    return media if media in _NAMED else f"{family}/*" if family in _FAMILIES else "of no known type"


def _headers(raw: bytes) -> dict[str, str]:
    """Names in lower case. Codings that stand in several headers are one list, as in HTTP; else the last counts."""
    found: dict[str, str] = {}
    for line in raw.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")[1:]:
        name, colon, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        if name in found and name in ("content-encoding", "transfer-encoding"):
            value = f"{found[name]}, {value}"
        if colon:
            found[name] = value
    return found


# ---- record -> text --------------------------------------------------------------------------------------------------


def pages(chunk: Chunk) -> Iterator[tuple[int, Page | Bad | Passed]]:
    """The texts of a chunk of warc_chunks: {text, url, date}."""
    extract = chunk.kind.partition(" ")[2]
    for position, item in chunk.data:
        if not isinstance(item, dict):
            yield position, item if isinstance(item, Bad) else Passed(f"{chunk.file}:{position}", item)
            continue
        body = _body(item) if "codings" in item else item["body"]
        if isinstance(body, str):
            yield position, Bad(f"{chunk.file}:{position}", body, item["url"][:EXCERPT])
            continue
        media = "text/plain" if item["plain"] else "text/html"
        header = label_of(item["type"]) if not item.get("utf8") else "utf-8"
        fields = {"url": item["url"], "date": item["date"]}
        yield position, page(body, media, extract, f"{chunk.file}:{position}", fields, header)


def _body(item: dict) -> bytes | str:
    """The body of a response without its transfer and content codings, or why it cannot be read. Many crawlers undo
    codings and leave the headers, so what cannot be undone and looks like text is taken for text."""
    body = item["body"]
    codings = [coding.partition(";")[0].strip() for coding in item["codings"].lower().split(",")]
    codings = [coding for coding in codings if coding not in ("", "identity")][::-1]
    if len(codings) > MAX_CODINGS:
        return "HTTP body in an unknown coding"
    for coding in codings if body else []:
        found = _undone(body, coding, item["cut"])
        if isinstance(found, str):
            return found
        body = found
    for magic, coding in ((GZIP_MAGIC, "gzip"), (ZSTD_MAGIC, "zstd")):
        if body.startswith(magic):  # no text begins so: the server did not say it, or did it twice
            return _undone(body, coding, item["cut"])
    return body


def _undone(body: bytes, coding: str, cut: bool) -> bytes | str:
    """A body without one of its codings, or why it cannot be read."""
    if coding == "chunked":
        found = _unchunked(body, cut)
        return "truncated HTTP body" if found is None else found
    if coding not in CODINGS:
        return body if _looks_like_text(body) else "HTTP body in an unknown coding"
    try:
        return unpacked(body, coding, MAX_RECORD_BYTES, cut)
    except TooLong:
        return f"longer than {MAX_RECORD_BYTES >> 20} MiB"
    except Unreadable as error:
        return body if _looks_like_text(body) else f"{error} HTTP body"


def _looks_like_text(body: bytes) -> bool:
    """Whether it has no control characters but those of text, or is UTF-16."""
    return not _CONTROL.search(body, 0, 1024) or body.startswith((b"\xff\xfe", b"\xfe\xff", b"<\0", b"\0<"))


def _unchunked(body: bytes, cut: bool) -> bytes | None:
    """HTTP's chunked transfer coding (RFC 9112, 7.1); None where it ends too early, unless it is known to be `cut`. A
    body that is not so coded, because the crawler undid it, comes back as it is."""
    found, at = bytearray(), 0
    while match := _CHUNK.match(body, at):
        length = int(match[1], 16)
        if not length:
            return bytes(found)
        at = match.end() + length + 2
        if body[at - 2 : at] != b"\r\n":
            if not found and not body[match.end() :].lstrip().startswith(b"<"):
                return body  # text that begins with something like a length
            found += body[match.end() : match.end() + length]
            break
        found += body[match.end() : at - 2]
    if not found:
        return body
    return bytes(found) if cut else None


def page(raw: bytes, media: str, extract: str, place: str, fields: dict[str, str], label: str = "") -> Page | Bad:
    """A page or plain text as the record {text, **fields}; `label` is the character set that its server declared."""
    found = decoded(raw, label, media != "text/plain")
    if found is None:
        return Bad(place, "in no known character set", _shown(raw))
    text = found.text.replace("\0", "")
    changed = {"replaced_bytes": found.replaced} if found.replaced else {}
    if media == "text/plain":
        return Page({"text": text, **fields}, changed, None)
    try:
        seconds = SECONDS + SECONDS_PER_MB * len(text) / 1e6
        extracted = bounded_call.call(text_of_html, text, extract, seconds=seconds)
    except bounded_call.OutOfBounds as error:
        return Bad(place, f"HTML whose extraction {error}", _shown(raw))
    if extracted.flattened:
        changed["flattened_elements"] = extracted.flattened
    return Page({"text": extracted.text, **fields}, changed, extracted.shown)


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of a page, how much of what the page shows that is, and how many elements were flattened because they
    are too deep."""

    text: str
    shown: Shown
    flattened: int


def text_of_html(page: str, extract: str) -> Extracted:
    """`extract`: main leaves out what does not look like the main content; structure leaves out navigation and writes
    headings, tables and code as Markdown does; all is everything."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise UserError("reading HTML needs resiliparse, which is not installed; run pip install 'alma[web]'") from None
    tree = HTMLTree.parse(page)
    flattened = html_nesting.flatten(tree) if html_nesting.may_be_deep(page) else 0
    options = {"preserve_formatting": True, "list_bullets": True, "alt_texts": False, "links": False, "noscript": False}
    whole = extract_plain_text(tree, **options)
    if extract == "all":
        text = whole
    elif extract == "main":
        text = extract_plain_text(tree, main_content=True, **options)
    else:
        html_structure.mark(tree)
        text = extract_plain_text(tree, skip_elements=html_structure.NAVIGATION, **options)
    return Extracted(text, Shown(_visible(whole), _visible(text)), flattened)


def _visible(text: str) -> int:
    """Characters but spaces, and but those with which Markdown writes structure."""
    return len(text) - sum(map(text.count, " \n\t#|`-"))
