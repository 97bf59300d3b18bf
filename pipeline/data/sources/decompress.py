"""Compressed data, decompressed in steps of bounded size, and compressed files, in which damage costs only the gzip
member or zstd frame that contains it.

A few hundred kilobytes can decompress to gigabytes, so nothing here asks for the complete output of some input.
"""

import io
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.core.errors import UserError

STEP = 1 << 20  # bytes of output at a time
SHORT = 1 << 24  # bytes of a member that is not used before its checksum has been verified
UNVERIFIED = "; records before it in the same member may be altered"
SLICE = 1 << 14  # bytes of a file that are decompressed at a time: nothing is read of a slice that contains damage
# zstd has no bound on output; a block of 4 bytes gives at most 128 KiB (RFC 8878, 3.1.1.2), so these give 16 MiB.
ZSTD_INPUT = 512
# A frame may ask for a window of 2 GiB, which takes as much memory as has been filled of it. A window that is larger
# than the zstd program allows without --long may only be filled by a file that has a sixteenth of that size.
ZSTD_WINDOW, ZSTD_RATIO = 1 << 27, 16
GZIP_MAGIC, ZSTD_MAGIC = b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"
# How far after the damage a decoder may have read before it reports an error.
OVERRUN = 1 << 16
NOT_READ = (".bz2", ".lz4", ".lzma", ".xz", ".zip", ".7z")  # suffixes of other compressed files


def compression_of(path: Path) -> str:
    """`.gz` or `.zst` if the suffix says so, in capitals or not; else empty."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".gz", ".zst") else ""


class Unreadable(Exception):
    """Compressed data that is `damaged` or `truncated`."""


class Mismatch(Unreadable):
    """Data that could be decompressed but does not match its checksum."""


class TooLong(Exception):
    """The output is longer than was allowed."""


class Decompressor(Protocol):
    """One member: `feed` yields the output of some input, at most 16 MiB at a time, and raises Unreadable. After the
    end of the member `eof` is true and `unused` is the rest of the input."""

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
                output = self._member.decompress(raw, STEP)
            except zlib.error as error:
                is_mismatch = "incorrect" in str(error) and "check" in str(error)
                raise (Mismatch if is_mismatch else Unreadable)("damaged") from None
            raw = self._member.unconsumed_tail
            self.eof, self.unused = self._member.eof, self._member.unused_data
            yield output
            if self.eof or (not raw and len(output) < STEP):
                return


class Zstd:
    """A frame of zstd. Raises TooLong if the frame has a large window and its output more than `most` bytes."""

    def __init__(self, most: int = ZSTD_WINDOW):
        import zstandard

        self._zstd, self._most = zstandard, most
        self._frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        self._bytes_left: int | None = None
        self._begun, self.eof, self.unused = False, False, b""

    def feed(self, raw: bytes) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            self._bytes_left = self._most if self._window(raw) > ZSTD_WINDOW else None
        outputs = []
        for at in range(0, len(raw), ZSTD_INPUT):
            try:
                outputs.append(self._frame.decompress(raw[at : at + ZSTD_INPUT]))
            except self._zstd.ZstdError as error:
                yield b"".join(outputs)
                raise (Mismatch if "checksum" in str(error) else Unreadable)("damaged") from None
            if self._bytes_left is not None:
                self._bytes_left -= len(outputs[-1])
                if self._bytes_left < 0:
                    raise TooLong
            if sum(map(len, outputs)) >= STEP:
                yield b"".join(outputs)
                outputs = []
            self.eof = self._frame.eof
            if self.eof:
                self.unused = self._frame.unused_data + raw[at + ZSTD_INPUT :]
                break
        yield b"".join(outputs)

    def _window(self, raw: bytes) -> int:
        try:
            return self._zstd.get_frame_parameters(raw[:18]).window_size
        except self._zstd.ZstdError:  # not the head of a frame; decompressing it will fail
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
                output = self._stream.process(raw, output_buffer_limit=STEP)
            except self._error:
                raise Unreadable("damaged") from None
            raw, self.eof = b"", self._stream.is_finished()
            yield output
            if self.eof or self._stream.can_accept_more_data():
                return


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gap:
    """Where a file could not be decompressed: `lost` of its bytes, from offset `begin` on. `aligned`: the data after
    the gap begins a line, as far as the other members show."""

    reason: str
    begin: int
    lost: int
    aligned: bool


def read_parts(path: Path) -> Iterator[bytes | Gap]:
    """A .gz or .zst file, decompressed in blocks of at most 16 MiB. After damage reading resumes at the next member, or
    frame, that can be decompressed."""
    with open(path, "rb") as handle:
        yield from _Members(handle, compression_of(path)).parts()


@dataclass
class _DamagedMember(Exception):
    """A member that cannot be decompressed from byte `at` of the file on. `is_dropped`: none of its output was used."""

    why: str
    at: int
    is_dropped: bool = False


class _Members:
    """A file of members, or frames, one after the other."""

    def __init__(self, handle: io.BufferedReader, suffix: str):
        self.handle, self.suffix = handle, suffix
        self.size = handle.seek(0, io.SEEK_END)
        self.magic = GZIP_MAGIC if suffix == ".gz" else ZSTD_MAGIC
        self.aligned = True  # whether all members so far end with a newline

    def parts(self) -> Iterator[bytes | Gap]:
        at = 0
        while (at := self._after_padding(at)) < self.size:
            try:
                at = yield from self._member(at)
            except _DamagedMember as damaged:
                begin = damaged.at
                after = self._next_member(max(at + 1, begin - OVERRUN), begin)
                if after <= begin:  # the last output was garbage: it came from the beginning of the next member
                    begin = at
                if damaged.is_dropped:
                    begin = at
                yield Gap(damaged.why, begin, after - begin, self.aligned)
                at = after

    def _after_padding(self, at: int) -> int:
        """Offset after the zeros that may separate members (gzip -t allows them)."""
        self.handle.seek(at)
        while block := self.handle.read(SLICE):
            if rest := block.lstrip(b"\0"):
                return at + len(block) - len(rest)
            at += len(block)
        return at

    def _member(self, begin: int) -> Generator[bytes, None, int]:
        """Yields the output of a member, of a short one only after its checksum has been verified: one flipped bit can
        alter text long before the decoder fails, or without that it fails. Of a truncated member all output is used.
        Returns the offset of its end."""
        member = Zlib(31) if self.suffix == ".gz" else Zstd(max(ZSTD_WINDOW, ZSTD_RATIO * self.size))
        self.handle.seek(begin)
        held, held_bytes, is_short, at, last_byte = [], 0, True, begin, b""
        try:
            while raw := self.handle.read(SLICE):
                for output in member.feed(raw):
                    last_byte = output[-1:] or last_byte
                    held.append(output)
                    held_bytes += len(output)
                    if held_bytes > SHORT:
                        is_short = False
                        yield from held
                        held = []
                at += len(raw)
                if member.eof:
                    break
        except Mismatch as error:
            why = f"{error} {self.suffix} data"
            raise _DamagedMember(why if is_short else why + UNVERIFIED, begin if is_short else at) from None
        except Unreadable as error:
            why = f"{error} {self.suffix} data"
            raise _DamagedMember(why if is_short else why + UNVERIFIED, at, is_dropped=is_short) from None
        except TooLong:
            raise _DamagedMember(f"{self.suffix} data that needs too much memory", at) from None
        yield from held
        if not member.eof:
            raise _DamagedMember(f"truncated {self.suffix} data", at)
        self.aligned = self.aligned and last_byte == b"\n"
        return at - len(member.unused)

    def _next_member(self, at: int, certain: int) -> int:
        """Offset of the next member that can be decompressed; the end of the file if there is none. Before `certain`
        the member must be complete, because its bytes may belong to a member that has been decompressed."""
        while at < self.size:
            self.handle.seek(at)
            block = self.handle.read(STEP + len(self.magic) - 1)
            offset = block.find(self.magic)
            if offset < 0:
                at += STEP
                continue
            at += offset
            if self._can_be_decompressed(at, must_be_complete=at < certain):
                return at
            at += 1
        return self.size

    def _can_be_decompressed(self, at: int, must_be_complete: bool) -> bool:
        """Tries the first megabyte, and notes whether the member ends a line."""
        member = Zlib(31) if self.suffix == ".gz" else Zstd()
        self.handle.seek(at)
        size, last_byte = 0, b""
        try:
            while size < STEP and not member.eof and (raw := self.handle.read(SLICE)):
                for output in member.feed(raw):
                    size += len(output)
                    last_byte = output[-1:] or last_byte
        except (Unreadable, TooLong):
            return False
        if member.eof and size:
            self.aligned = self.aligned and last_byte == b"\n"
        return size > 0 and (member.eof or not must_be_complete)
