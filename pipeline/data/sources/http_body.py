"""Bodies of HTTP responses as web archives hold them: transfer and content codings removed, output bounded.

Many crawlers remove the codings and leave the headers, so a body that cannot be decoded and looks like text is taken
for text.
"""

import re
from collections.abc import Callable

from pipeline.data.sources.decompress import (
    GZIP_MAGIC,
    ZSTD_MAGIC,
    Brotli,
    Decompressor,
    TooLong,
    Unreadable,
    Zlib,
    Zstd,
)
from pipeline.data.sources.formats import MAX_RECORD_BYTES

MAX_CODINGS = 4  # of one body: each may take the time of 64 MiB
SMALLEST_MEMBER = 20  # bytes of gzip (RFC 1952: 10 of head, 2 of data, 8 of tail)
_CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # not ESC, which ISO-2022-JP has
_CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,8})[^\r\n]{0,200}\r\n")


def _gzip() -> Decompressor:
    return Zlib(31)


def _zlib() -> Decompressor:
    return Zlib(15)


def _raw_deflate() -> Decompressor:
    return Zlib(-15)


# Content codings (RFC 9110, 8.4.1; RFC 8878, 7.1; RFC 7932) and their decompressors, tried in order. Servers also send
# raw deflate where the standard means zlib.
CODINGS: dict[str, tuple[Callable[[], Decompressor], ...]] = {
    "gzip": (_gzip,),
    "x-gzip": (_gzip,),
    "deflate": (_zlib, _raw_deflate, _gzip),
    "zlib": (_zlib,),  # no server sends this name
    "br": (Brotli,),
    "zstd": (Zstd,),
}


class BadBody(Exception):
    """Why a body cannot be decoded."""


def decode_body(body: bytes, codings: str, is_cut: bool) -> bytes:
    """A body without its `codings`, as HTTP's headers list them. `is_cut`: the crawler says that the body is
    incomplete. Raises BadBody."""
    names = [coding.partition(";")[0].strip() for coding in codings.lower().split(",")]
    names = [name for name in names if name not in ("", "identity")]
    if len(names) > MAX_CODINGS:
        raise BadBody("HTTP body in an unknown coding")
    if body:
        for name in reversed(names):
            body = _without_coding(body, name, is_cut)
    for magic, name in ((GZIP_MAGIC, "gzip"), (ZSTD_MAGIC, "zstd")):
        if body.startswith(magic):  # no text begins so: the header is missing, or the body was compressed twice
            return _without_coding(body, name, is_cut)
    if _is_binary(body):  # zlib has no magic that text lacks; raw deflate and brotli have none
        try:
            return decompress_body(body, "zlib", MAX_RECORD_BYTES, is_cut)
        except (Unreadable, TooLong):
            raise BadBody("HTTP body in an unknown coding") from None
    return body


def _without_coding(body: bytes, coding: str, is_cut: bool) -> bytes:
    if coding == "chunked":
        return _join_chunks(body, is_cut)
    if coding not in CODINGS:
        if _looks_like_text(body):
            return body
        raise BadBody("HTTP body in an unknown coding")
    try:
        return decompress_body(body, coding, MAX_RECORD_BYTES, is_cut)
    except TooLong:
        raise BadBody(f"longer than {MAX_RECORD_BYTES >> 20} MiB") from None
    except Unreadable as error:
        if _looks_like_text(body):
            return body
        raise BadBody(f"{error} HTTP body") from None


def _looks_like_text(body: bytes) -> bool:
    """Whether its beginning is UTF-16 or has no control characters but those of text."""
    return not _CONTROL.search(body, 0, 1024) or body.startswith((b"\xff\xfe", b"\xfe\xff", b"<\0", b"\0<"))


def _is_binary(body: bytes) -> bool:
    """Whether one in 32 of the first bytes is a control character, as one in ten of compressed data. Text has hardly
    any but the zeros of UTF-16, whose Chinese characters contain others."""
    head = body[:1024]
    if b"<\0" in head or b"\0<" in head or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return False
    return len(_CONTROL.findall(head.replace(b"\0", b""))) > max(1, len(head) // 32)


def _join_chunks(body: bytes, is_cut: bool) -> bytes:
    """Undo HTTP's chunked transfer coding (RFC 9112, 7.1). A body that is not in it, because the crawler removed it, is
    returned as it is. Raises BadBody for one that ends too early, unless it is known to be cut."""
    joined, at = bytearray(), 0
    while head := _CHUNK_HEAD.match(body, at):
        length = int(head[1], 16)
        if not length:
            return bytes(joined)
        at = head.end() + length + 2
        if body[at - 2 : at] != b"\r\n":
            if not joined and not body[head.end() :].lstrip().startswith(b"<"):
                return body  # text that begins with something like a length
            joined += body[head.end() : head.end() + length]
            break
        joined += body[head.end() : at - 2]
    if not joined:
        return body
    if not is_cut:
        raise BadBody("truncated HTTP body")
    return bytes(joined)


def decompress_body(raw: bytes, coding: str, most: int, partial: bool = False) -> bytes:
    """A body in one of CODINGS; with `partial`, what there is of one that is cut. Raises Unreadable, and TooLong if
    the output has more than `most` bytes."""
    first_error = None
    for make in CODINGS[coding]:
        try:
            return _members(raw, make, most, partial)
        except Unreadable as error:
            first_error = first_error or error
    raise first_error


def _members(raw: bytes, make: Callable[[], Decompressor], most: int, partial: bool) -> bytes:
    """The output of all members. Bytes after the last one that are too few for a member are ignored; more may be a
    member with a damaged head, without which the page would be cut."""
    body = bytearray()
    while True:
        member = make()
        for output in member.feed(raw):
            body += output
            if len(body) > most:
                raise TooLong
        if not member.eof:
            if partial:
                return bytes(body)
            raise Unreadable("truncated")
        raw = member.unused.lstrip(b"\0")
        if raw.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
            continue
        if len(raw) >= SMALLEST_MEMBER and not partial:
            raise Unreadable("damaged")
        return bytes(body)
