"""Web archives and pages: WARC and WET files cut into records, and the main text of HTML.

A WARC file (ISO 28500) is read by its own reader, because what must happen to a record with a wrong length is decided
here: it is counted as bad with its place, and reading goes on at the next line that begins a record. Text comes out of
HTML with resiliparse (Apache-2.0; `pip install 'alma[web]'`): 1,326 MB of HTML in 38 s on two cores (docs/log.md).
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.formats import EXCERPT, MAX_RECORD_BYTES, Bad, Chunk, _blocks, _Torn
from pipeline.errors import UserError

_START = re.compile(rb"(?:\A|\n)(WARC/[01]\.\d+\r?\n)")
_LENGTH = re.compile(rb"^content-length[ \t]*:[ \t]*(\d+)[ \t]*\r?$", re.I | re.M)
_HTML = ("text/html", "application/xhtml+xml")
MAX_HEAD = 1 << 16


def warc_chunks(relative: str, path: Path, extract: str, size: int) -> Iterator[Chunk]:
    """Records of a WARC or WET file that may hold text, `size` bytes at a time, and Bad where the file is not what
    it says. Positions count records from 1."""
    rows: list[tuple[int, Any]] = []
    weight = number = 0
    for number, item in enumerate(_records(path), 1):
        if isinstance(item, str):
            rows.append((number, Bad(f"{relative}:{number}", *item.split("\0", 1))))
        elif item is not None:
            rows.append((number, item))
            weight += len(item["body"]) + 200
        if rows and weight >= size:
            yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)
            rows, weight = [], 0
    if rows:
        yield Chunk(relative, f"warc {extract}", rows[0][0], rows, weight)


def _records(path: Path) -> Iterator[dict | str | None]:
    """Each record in order: its fields, None if it holds no text, or why it is bad, a NUL, and how it begins."""
    buffer, blocks, torn = bytearray(), _blocks(path), None

    def fill(wanted: int) -> bool:
        nonlocal torn
        while len(buffer) < wanted and torn is None:
            try:
                block = next(blocks, None)
            except _Torn as error:
                torn = str(error)
                break
            if block is None:
                torn = ""
                break
            buffer.extend(block)
        return len(buffer) >= wanted

    while fill(1):
        start = _START.match(buffer)
        if not start:  # between records there are empty lines; anything else belongs to none
            fill(MAX_HEAD)
            skipped = _resync(buffer, fill)
            if skipped.strip():
                yield f"no WARC record\0{_shown(skipped)}"
            continue
        fill(MAX_HEAD)
        end = re.compile(rb"\r?\n\r?\n").search(buffer, 0, MAX_HEAD)
        length = _LENGTH.search(buffer, 0, end.start()) if end else None
        if length is None:
            if torn:
                break
            shown = _shown(buffer)
            del buffer[: start.end()]
            _resync(buffer, fill)
            yield f"WARC record without a length\0{shown}"
            continue
        head, begin, number = bytes(buffer[: end.start()]), end.end(), int(length[1])
        if number > MAX_RECORD_BYTES:
            del buffer[:begin]  # the length may be a slip, so the next record is looked for and not leapt to
            _resync(buffer, fill)
            yield f"longer than {MAX_RECORD_BYTES >> 20} MiB\0{_shown(head)}"
            continue
        if not fill(begin + number):
            if not _START.search(buffer, begin):
                break
            del buffer[:begin]  # it ends before its length says, and others follow
            _resync(buffer, fill)
            yield f"WARC record with a wrong length\0{_shown(head)}"
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
            yield f"WARC record with a wrong length\0{_shown(head)}"
    if torn or buffer.strip():
        yield f"{torn or 'truncated WARC record'}\0{_shown(buffer)}"


def _resync(buffer: bytearray, fill) -> bytes:
    """Drop what stands before the next record, and return how it begins."""
    shown = b""
    while True:
        fill(1 << 20)
        found = _START.search(buffer, 1) if len(buffer) > 1 else None
        shown = shown or bytes(buffer[: found.start(1) if found else EXCERPT])
        if found:
            del buffer[: found.start(1)]
            return shown[:EXCERPT]
        if len(buffer) < 1 << 20:
            buffer.clear()
            return shown[:EXCERPT]
        del buffer[:-16]  # a record's first line may lie across two blocks


def _shown(raw: bytes) -> str:
    return bytes(raw[:EXCERPT]).decode(errors="backslashreplace").replace("\0", "\\x00")


def _record(head: bytes, body: bytes) -> dict | None:
    fields = _headers(head)
    kind = fields.get("warc-type", "")
    found = {
        "url": fields.get("warc-target-uri", "").strip("<>"),
        "date": fields.get("warc-date", ""),
        "type": fields.get("content-type", ""),
    }
    if kind == "conversion":
        return {**found, "body": body, "plain": True}
    if kind == "resource" and found["type"].split(";")[0].strip().lower() in (*_HTML, "text/plain"):
        return {**found, "body": body, "plain": found["type"].startswith("text/plain")}
    if kind == "response" and body.startswith(b"HTTP/"):
        top, _, payload = body.partition(b"\r\n\r\n") if b"\r\n\r\n" in body else body.partition(b"\n\n")
        http = _headers(top)
        status = top.split(None, 2)[1:2]
        found["type"] = http.get("content-type", "")
        media = found["type"].split(";")[0].strip().lower()
        if status == [b"200"] and (media in (*_HTML, "text/plain") or not media and b"<html" in payload[:4096].lower()):
            return {
                **found,
                "body": payload,
                "plain": media == "text/plain",
                "chunked": "chunked" in http.get("transfer-encoding", "").lower(),
                "packed": http.get("content-encoding", "").lower(),
            }
    return None


def _headers(raw: bytes) -> dict[str, str]:
    lines = raw.decode("utf-8", "replace").replace("\r\n", "\n").split("\n")[1:]
    return {
        name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines) if colon
    }


# ---- record -> text --------------------------------------------------------------------------------------------------


def pages(chunk: Chunk) -> Iterator[tuple[int, dict | Bad]]:
    """The texts of a chunk of warc_chunks: {text, url, date}."""
    extract = chunk.kind.partition(" ")[2]
    for position, item in chunk.data:
        if isinstance(item, Bad):
            yield position, item
            continue
        body = _plain_body(item)
        if body is None:
            yield position, Bad(f"{chunk.file}:{position}", "damaged HTTP body", item["url"][:EXCERPT])
            continue
        text = _decoded(body, item["type"]) if item["plain"] else text_of_html(body, item["type"], extract)
        yield position, {"text": text, "url": item["url"], "date": item["date"]}


def _plain_body(item: dict) -> bytes | None:
    body = item["body"]
    if item.get("chunked"):
        body = _unchunked(body)
    packed = item.get("packed", "")
    if packed in ("gzip", "x-gzip", "deflate") and body[:1] != b"<":  # crawlers unpack the body and leave the header
        try:
            unpack = zlib.decompressobj(47 if packed != "deflate" else 15)
            body = unpack.decompress(body, MAX_RECORD_BYTES)
        except zlib.error:
            return None
    return body


def _unchunked(body: bytes) -> bytes:
    """HTTP's chunked transfer coding (RFC 9112, 7.1); a body that is not so coded, because the crawler undid it,
    comes back as it is."""
    found, at = bytearray(), 0
    while match := re.compile(rb"([0-9A-Fa-f]{1,8})[^\r\n]{0,200}\r\n").match(body, at):
        length = int(match[1], 16)
        if not length:
            return bytes(found)
        found += body[match.end() : match.end() + length]
        at = match.end() + length + 2
    return bytes(found) if found else body


def _decoded(raw: bytes, media: str) -> str:
    """By the charset that the server gave, else as UTF-8 if it is that, else as what its bytes look like."""
    given = re.search(r"charset=[\"']?([\w.:-]+)", media, re.I)
    for name in ([given[1]] if given else []) + ["utf-8"]:
        try:
            return raw.decode({"gb2312": "gb18030", "gbk": "gb18030"}.get(name.lower(), name))
        except (UnicodeDecodeError, LookupError):
            continue
    return _library()[1](raw)


def text_of_html(raw: bytes, media: str, extract: str) -> str:
    """The text of a page; `extract` main leaves out menus, headers and footers, all keeps them."""
    plain, decode = _library()
    given = re.search(r"charset=[\"']?([\w.:-]+)", media, re.I)
    if not given and (meta := re.search(rb"<meta[^>]{0,200}?charset=[\"']?([\w.:-]+)", raw[:4096], re.I)):
        given = re.match(r"([\w.:-]+)", meta[1].decode("ascii", "replace"))
    page = _decoded(raw, f"charset={given[1]}") if given else decode(raw)
    return plain(
        page.replace("\0", ""),
        preserve_formatting=True,
        main_content=extract == "main",
        list_bullets=True,
        alt_texts=False,
        links=False,
        noscript=False,
    )


def _library():
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    except ImportError:
        raise UserError("reading HTML needs resiliparse, which is not installed; run pip install 'alma[web]'") from None
    return extract_plain_text, lambda raw: bytes_to_str(
        raw, detect_encoding(raw), fallback_encodings=("utf-8", "gb18030", "windows-1252")
    )
