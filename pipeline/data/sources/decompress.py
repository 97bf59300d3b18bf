"""Compressed data, unpacked in steps of bounded size: files, whose damage costs the member that it is in and no other,
and the bodies of HTTP responses.

A few hundred kilobytes can unpack to gigabytes, so nothing here asks for all that some input gives.
"""

import io
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.core.errors import UserError

STEP = 1 << 20  # bytes of output at a time
SHORT = 1 << 16  # bytes of a member that is not used before its checksum is known to be right
SLICE = 1 << 14  # bytes of a file that are unpacked at a time: of a slice with damage in it nothing is read
# zstd has no bound on output; a block of 4 bytes gives at most 128 KiB (RFC 8878, 3.1.1.2), so these give 16 MiB.
ZSTD_INPUT = 512
# A frame may ask for a window of 2 GiB, which takes as much memory as it has been filled. A larger window than the zstd
# program allows without --long may be filled only by a file that has a sixteenth of it.
ZSTD_WINDOW, ZSTD_RATIO = 1 << 27, 16
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
# How far behind the end of a damaged member its decoder may have read before it saw that something is wrong.
OVERRUN = 1 << 16


class Unreadable(Exception):
    """Compressed data that is `damaged` or `truncated`."""


class Mismatch(Unreadable):
    """Data that could be unpacked, and is not what was packed."""


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
            except zlib.error as error:
                kind = Mismatch if "incorrect" in str(error) and "check" in str(error) else Unreadable
                raise kind("damaged") from None
            raw = self._member.unconsumed_tail
            self.eof, self.unused = self._member.eof, self._member.unused_data
            yield found
            if self.eof or not raw and len(found) < STEP:
                return


class Zstd:
    """A frame of zstd. Raises TooLong where one with a large window gives more than `most` bytes."""

    def __init__(self, most: int = ZSTD_WINDOW):
        import zstandard

        self._zstd, self._most = zstandard, most
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._left: int | None = None
        self._begun, self.eof, self.unused = False, False, b""

    def feed(self, raw: bytes) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            self._left = self._most if self._window(raw) > ZSTD_WINDOW else None
        parts = []
        for at in range(0, len(raw), ZSTD_INPUT):
            try:
                parts.append(self._frame.decompress(raw[at : at + ZSTD_INPUT]))
            except self._zstd.ZstdError as error:
                yield b"".join(parts)
                raise (Mismatch if "checksum" in str(error) else Unreadable)("damaged") from None
            if self._left is not None:
                self._left -= len(parts[-1])
                if self._left < 0:
                    raise TooLong
            if sum(map(len, parts)) >= STEP:
                yield b"".join(parts)
                parts = []
            self.eof = self._frame.eof
            if self.eof:
                self.unused = self._frame.unused_data + raw[at + ZSTD_INPUT :]
                break
        yield b"".join(parts)

    def _window(self, raw: bytes) -> int:
        try:
            return self._zstd.get_frame_parameters(raw[:18]).window_size
        except self._zstd.ZstdError:  # not the head of a frame, as will be seen
            return 0


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


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """Where a file could not be unpacked: `lost` of its bytes, from `begin` on. `aligned`: what follows begins a line,
    as far as the other members show."""

    reason: str
    begin: int
    lost: int
    aligned: bool


def parts_of(path: Path) -> Iterator[bytes | Gap]:
    """A file in .gz or .zst unpacked in blocks of at most 16 MiB. Behind damage reading resumes at the next member, or
    frame, that can be unpacked."""
    with open(path, "rb") as handle:
        yield from _Members(handle, path.suffix).parts()


@dataclass
class _Broken(Exception):
    """A member that cannot be unpacked from byte `at` of the file on."""

    why: str
    at: int


class _Members:
    """A file of members, or frames, one after the other."""

    def __init__(self, handle: io.BufferedReader, suffix: str):
        self.handle, self.suffix = handle, suffix
        self.size = handle.seek(0, io.SEEK_END)
        self.magic = GZIP_MAGIC if suffix == ".gz" else ZSTD_MAGIC
        self.aligned = True  # whether all members end with a newline

    def parts(self) -> Iterator[bytes | Gap]:
        at = 0
        while (at := self._past_padding(at)) < self.size:
            try:
                at = yield from self._member(at)
            except _Broken as broken:
                begin = broken.at
                after = self._next_member(max(at + 1, begin - OVERRUN), begin)
                if after <= begin:  # what was unpacked of the member is the garbage that the next one seems to be in it
                    begin = at
                yield Gap(broken.why, begin, after - begin, self.aligned)
                at = after

    def _past_padding(self, at: int) -> int:
        """Where the zeros end that may stand between members (gzip -t allows them)."""
        self.handle.seek(at)
        while block := self.handle.read(SLICE):
            if rest := block.lstrip(b"\0"):
                return at + len(block) - len(rest)
            at += len(block)
        return at

    def _member(self, begin: int) -> Generator[bytes, None, int]:
        """What a member unpacks to; returns where it ends. A short one is given when its checksum is right."""
        member = Zlib(31) if self.suffix == ".gz" else Zstd(max(ZSTD_WINDOW, ZSTD_RATIO * self.size))
        self.handle.seek(begin)
        held, short, at, last = [], True, begin, b""
        try:
            while raw := self.handle.read(SLICE):
                for piece in member.feed(raw):
                    last = piece[-1:] or last
                    held.append(piece)
                    short = short and sum(map(len, held)) <= SHORT
                    if not short:
                        yield from held
                        held = []
                at += len(raw)
                if member.eof:
                    break
            if not member.eof:
                raise Unreadable("truncated")
        except Mismatch as error:
            raise _Broken(f"{error} {self.suffix} data", begin if short else at) from None
        except Unreadable as error:
            yield from held
            raise _Broken(f"{error} {self.suffix} data", at) from None
        except TooLong:
            raise _Broken(f"{self.suffix} data that needs too much memory", at) from None
        yield from held
        self.aligned = self.aligned and last == b"\n"
        return at - len(member.unused)

    def _next_member(self, at: int, sure: int) -> int:
        """Where the next member begins that can be unpacked; the end of the file if there is none. Before `sure` it
        must be whole, for the bytes may be those of a member that has been unpacked."""
        while at < self.size:
            self.handle.seek(at)
            block = self.handle.read(STEP + len(self.magic) - 1)
            found = block.find(self.magic)
            if found < 0:
                at += STEP
                continue
            at += found
            if self._can_be_unpacked(at, at < sure):
                return at
            at += 1
        return self.size

    def _can_be_unpacked(self, at: int, whole: bool) -> bool:
        """Tried on the first megabyte. Sees whether it ends a line, too."""
        member = Zlib(31) if self.suffix == ".gz" else Zstd()
        self.handle.seek(at)
        size, last = 0, b""
        try:
            while size < STEP and not member.eof and (raw := self.handle.read(SLICE)):
                for piece in member.feed(raw):
                    size += len(piece)
                    last = piece[-1:] or last
        except (Unreadable, TooLong):
            return False
        if member.eof and size:
            self.aligned = self.aligned and last == b"\n"
        return size > 0 and (member.eof or not whole)


# ---- HTTP ------------------------------------------------------------------------------------------------------------

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
