"""Compressed data, unpacked in steps of bounded size: the bodies of HTTP responses.

A few hundred kilobytes can unpack to gigabytes, so nothing here asks for all that some input gives.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from pipeline.errors import UserError

STEP = 1 << 20  # bytes of output at a time
# zstd has no bound on output; a block of 4 bytes gives at most 128 KiB (RFC 8878, 3.1.1.2), so these give 16 MiB.
ZSTD_INPUT = 512
# What the zstd program unpacks without --long; a frame may ask for 2 GiB of memory before its first byte.
ZSTD_WINDOW = 1 << 27
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"


class Unreadable(Exception):
    """Compressed data that is `damaged` or `truncated`."""


class TooLong(Exception):
    """It unpacks to more than was allowed."""


class Unpacker(Protocol):
    """One member: `feed` gives the output of some input, at most 16 MiB at a time, and raises Unreadable; behind the
    end, `eof` is true and `unused` the rest of the input."""

    eof: bool
    unused: bytes

    def feed(self, raw: bytes) -> Iterator[bytes]: ...


class Zlib:
    """gzip, zlib or raw deflate, by `wbits` (zlib.h, inflateInit2)."""

    def __init__(self, wbits: int):
        self._member, self.eof, self.unused = zlib.decompressobj(wbits), False, b""

    def feed(self, raw: bytes) -> Iterator[bytes]:
        while True:
            try:
                found = self._member.decompress(raw, STEP)
            except zlib.error:
                raise Unreadable("damaged") from None
            raw = self._member.unconsumed_tail
            self.eof, self.unused = self._member.eof, self._member.unused_data
            yield found
            if self.eof or not raw and len(found) < STEP:
                return


class Zstd:
    """A frame of zstd."""

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._frame, self.eof, self.unused = (
            zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj(),
            False,
            b"",
        )

    def feed(self, raw: bytes) -> Iterator[bytes]:
        for at in range(0, len(raw), ZSTD_INPUT):
            try:
                found = self._frame.decompress(raw[at : at + ZSTD_INPUT])
            except self._error:
                raise Unreadable("damaged") from None
            self.eof = self._frame.eof
            yield found
            if self.eof:
                self.unused = self._frame.unused_data + raw[at + ZSTD_INPUT :]
                return


class Brotli:
    """A stream of brotli, which has no members and no checksum."""

    def __init__(self) -> None:
        try:
            import brotli
        except ImportError:
            raise UserError(
                "an HTTP body in brotli needs the package brotli, which is not installed; run pip install 'alma[web]'"
            ) from None
        self._error = brotli.error
        self._stream, self.eof, self.unused = brotli.Decompressor(), False, b""

    def feed(self, raw: bytes) -> Iterator[bytes]:
        while True:
            try:
                found = self._stream.process(raw, output_buffer_limit=STEP)
            except self._error:
                raise Unreadable("damaged") from None
            raw, self.eof = b"", self._stream.is_finished()
            yield found
            if self.eof or self._stream.can_accept_more_data():
                return


# Ways to read a content coding (RFC 9110, 8.4.1; RFC 8878, 7.1; RFC 7932), the first that fits. Servers send raw
# deflate, too, where the standard means zlib.
CODINGS: dict[str, tuple[Callable[[], Unpacker], ...]] = {
    "gzip": (lambda: Zlib(31),),
    "deflate": (lambda: Zlib(15), lambda: Zlib(-15), lambda: Zlib(31)),
    "br": (Brotli,),
    "zstd": (Zstd,),
}
CODINGS |= {"x-gzip": CODINGS["gzip"]}


def unpacked(raw: bytes, coding: str, most: int, partial: bool = False) -> bytes:
    """A body in one of CODINGS; with `partial`, what is there of one that is cut. Raises Unreadable, and TooLong if it
    has more than `most` bytes."""
    first = None
    for way in CODINGS[coding]:
        try:
            return _members(raw, way, most, partial)
        except Unreadable as error:
            first = first or error
    raise first


def _members(raw: bytes, make: Callable[[], Unpacker], most: int, partial: bool) -> bytes:
    """All members. What follows the last one is no part of the body, as for gzip and for browsers."""
    found = bytearray()
    while True:
        member = make()
        for piece in member.feed(raw):
            found += piece
            if len(found) > most:
                raise TooLong
        if not member.eof:
            if partial:
                return bytes(found)
            raise Unreadable("truncated")
        raw = member.unused.lstrip(b"\0")
        if not raw.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
            return bytes(found)
