"""Files of lines, paragraphs or one document, decompressed, converted to UTF-8 and cut into chunks at record borders.
The records do not depend on where a file is cut."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipeline.data.sources import decompress, formats
from pipeline.data.sources.decompress import Gap
from pipeline.data.sources.formats import Chunk, bad_chunk, too_long
from pipeline.data.sources.text_encoding import printable, to_utf8_blocks

BLANK = 256  # bytes of the longest blank line that separates paragraphs of two chunks
BOM = b"\xef\xbb\xbf"
WITHOUT_MARK = "{0} without a byte order mark; say encoding: {0}-le or {0}-be"


class DamagedFile(Exception):
    """A compressed file that is truncated or damaged, `lost` bytes before its end."""

    def __init__(self, reason: str, lost: int):
        super().__init__(reason)
        self.lost = lost


def read_parts(path: Path, size: int = 1 << 20, encoding: str | None = None) -> Iterator[bytes | Gap]:
    """A file in blocks of UTF-8, decompressed if its suffix says so; of at most `size` bytes if not. A Gap takes the
    place of what cannot be decompressed."""
    parts = decompress.read_parts(path) if decompress.compression_of(path) else _plain_blocks(path, size)
    if not encoding:
        yield from parts
        return
    try:
        yield from to_utf8_blocks(parts, encoding)
    except UnicodeError:  # not from invalid bytes, which are kept, but from decoders that need a byte order mark
        yield Gap(WITHOUT_MARK.format(encoding), 0, path.stat().st_size, False)


def _plain_blocks(path: Path, size: int) -> Iterator[bytes]:
    with open(path, "rb") as handle:
        yield from iter(partial(handle.read, size), b"")


def read_blocks(path: Path, size: int = 1 << 20, encoding: str | None = None) -> Iterator[bytes]:
    """As read_parts, for files that are one piece. Raises DamagedFile where the rest cannot be used."""
    for part in read_parts(path, size, encoding):
        if isinstance(part, Gap):
            raise DamagedFile(part.reason, path.stat().st_size - part.begin)
        yield part


# ---- borders of records ----------------------------------------------------------------------------------------------


def next_border(data: bytearray, at: int, kind: str) -> int:
    """The first offset from `at` (at least 1) on where a line, or a paragraph, may begin; -1 if there is none. It
    depends on the few bytes before it alone, so every reader of a part of the file finds the same one."""
    end = data.find(b"\n", at - 1) + 1
    while end and not _is_border(data, end, kind):
        end = data.find(b"\n", end) + 1
    return end or -1


def last_border(data: bytearray, kind: str, seen: int = 0) -> int:
    """The last such offset after `seen`; 0 if there is none."""
    end = data.rfind(b"\n", seen) + 1
    while end and not _is_border(data, end, kind):
        end = data.rfind(b"\n", seen, end - 1) + 1
    return end


def _is_border(data: bytearray, end: int, kind: str) -> bool:
    if kind != "paragraph":
        return True
    return data[max(0, end - BLANK) : end - 1].rstrip(b" \t\r").endswith(b"\n")


# ---- file -> chunks --------------------------------------------------------------------------------------------------


def too_long_chunk(relative: str, number: int, data: bytearray, kind: str, encoding: str | None) -> Chunk:
    """For a record that begins at line `number` and is not read to its end."""
    if kind == "paragraph":  # it begins after empty lines
        text = data.lstrip()
        number += data.count(b"\n", 0, len(data) - len(text))
        data = text
    bad = too_long(data, f"{relative}:{number}", encoding)
    return bad_chunk(relative, number, bad.reason, bad.raw)


def line_chunks(relative: str, path: Path, kind: str, size: int, encoding: str | None = None) -> Iterator[Chunk]:
    """Complete lines, or complete paragraphs. Line numbers continue after a gap as if nothing were missing, because
    nobody knows how many lines it held."""
    buffer = _LineBuffer(relative, kind, encoding)
    for part in read_parts(path, min(size, 1 << 20), encoding):
        if isinstance(part, Gap):
            yield from buffer.end_at_gap(part)
        else:
            yield from buffer.add(part, size)
    yield from buffer.finish()


class _LineBuffer:
    """The bytes of a file that are not in a chunk yet."""

    def __init__(self, relative: str, kind: str, encoding: str | None):
        self.relative, self.kind, self.encoding = relative, kind, encoding
        self.data = bytearray()
        self.number = 1  # line at which `data` begins
        self.searched = 0  # bytes of `data` in which there is no border
        self.at_start = True  # whether a byte order mark may come
        self.skipping = False  # whether `data` is the rest of a record that cannot be used

    def add(self, part: bytes, size: int) -> Iterator[Chunk]:
        self.data += part
        if self.at_start:
            if len(self.data) < len(BOM):
                return
            self._drop_mark()
        if self.skipping:
            self._skip_record()
        if len(self.data) < size or self.skipping:
            return
        cut = last_border(self.data, self.kind, self.searched)
        self.searched = len(self.data)
        if cut:
            yield self._chunk(cut)
            self._drop(cut)
        if len(self.data) > formats.MAX_RECORD_BYTES:
            yield too_long_chunk(self.relative, self.number, self.data, self.kind, self.encoding)
            self.skipping = True

    def end_at_gap(self, gap: Gap) -> Iterator[Chunk]:
        self._drop_mark()
        cut = 0 if self.skipping else self.data.rfind(b"\n") + 1  # the rest, after the last newline, is incomplete
        if cut:
            yield self._chunk(cut)
        self.number += self.data.count(b"\n")
        excerpt = "" if self.skipping else printable(self.data[cut:][: formats.EXCERPT], self.encoding)
        yield bad_chunk(self.relative, self.number, gap.reason, excerpt, gap.lost)
        self.data.clear()
        self.searched = 0
        # If the data after the gap may not begin a line, its first line is the rest of the incomplete one.
        self.number += gap.aligned
        self.skipping = not gap.aligned

    def finish(self) -> Iterator[Chunk]:
        self._drop_mark()
        if self.data and not self.skipping:
            yield self._chunk(len(self.data))

    def _chunk(self, end: int) -> Chunk:
        return Chunk(self.relative, self.kind, self.number, bytes(self.data[:end]), end, self.encoding)

    def _drop(self, end: int) -> None:
        self.number += self.data.count(b"\n", 0, end)
        del self.data[:end]
        self.searched = 0

    def _drop_mark(self) -> None:
        if self.at_start and self.data.startswith(BOM):
            del self.data[: len(BOM)]
        self.at_start = False

    def _skip_record(self) -> None:
        end = next_border(self.data, 1, self.kind)
        self.skipping = end < 0
        if self.skipping:
            end = max(0, len(self.data) - BLANK)  # a border is recognised by the bytes before it
        self._drop(end)


def document_chunk(relative: str, path: Path, kind: str = "document", encoding: str | None = None) -> Iterator[Chunk]:
    """A file that is one record."""
    data = bytearray()
    try:
        for block in read_blocks(path, encoding=encoding):
            data += block
            if len(data) > formats.MAX_RECORD_BYTES:
                bad = too_long(data, relative, encoding)
                yield bad_chunk(relative, 0, bad.reason, bad.raw)
                return
    except DamagedFile as error:
        yield bad_chunk(relative, 0, str(error), printable(data[: formats.EXCERPT], encoding), error.lost)
        return
    if data.strip():
        yield Chunk(relative, kind, 1, bytes(data.removeprefix(BOM)), len(data), encoding)
