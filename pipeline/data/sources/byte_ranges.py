"""Pieces of a source that are cheap to send, because the process that gets one opens the file itself: byte ranges of
files of lines or paragraphs, rows of parquet files, small files.

    for piece in cut_source(source, name, size):          # in the stage's own process, which reads nothing for them
        chunks, lines = read_piece(piece, source, name)   # in a worker

Whatever the sizes, the records are those of sources.chunks. Line numbers in a range that begins in the middle of a file
count from there, because nobody has read what is before it; they are corrected once the ranges before it have been read
(unit_files.with_file_lines).
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.sources import formats
from pipeline.data.sources.decompress import compression_of
from pipeline.data.sources.formats import EXCERPT, Chunk, FieldNames
from pipeline.data.sources.json_files import holds_lines
from pipeline.data.sources.line_chunks import BLANK, BOM, last_border, next_border, too_long_chunk
from pipeline.data.sources.parquet_files import parquet_ranges, parquet_rows
from pipeline.data.sources.sources import CHUNK_BYTES, Source, chunks, file_chunks, files, format_of, needs_all_columns
from pipeline.data.sources.text_encoding import ends_lines_with_newlines, to_utf8

LINES = ("jsonl", "line", "paragraph")


@dataclass(frozen=True, slots=True)
class Range:
    """A part of a file that its reader opens."""

    file: str
    path: Path
    kind: str  # jsonl, line, paragraph: bytes of the file; parquet: rows of it; file: all of it
    begin: int
    end: int
    weight: int  # bytes, about
    state: tuple[int, int]  # of the file when it was cut: size in bytes, time of its last change in nanoseconds

    @property
    def continued(self) -> bool:
        """Whether its line numbers count from its own beginning."""
        return self.kind in LINES and self.begin > 0


def cut_source(source: Source, name: str, size: int, needed: FieldNames = None) -> Iterator[Range | Chunk]:
    """A source in pieces of about `size` bytes: chunks of what must be read from the beginning (compressed files, large
    tables and archives, encodings whose newlines are not newline bytes), ranges of everything else. `needed` as for
    sources.chunks. Raises UserError if a file is missing or has changed."""
    if source.dataset:
        yield from chunks(source, name, size, needed=needed)
        return
    # the states of all files first: a change while the others are cut is then noticed
    listed = [(relative, path, _state(path)) for relative, path in files(source, name)]
    for relative, path, state in listed:
        yield from _cut_file(source, name, relative, path, state, size, needed)


def _cut_file(
    source: Source, name: str, relative: str, path: Path, state: tuple[int, int], size: int, needed: FieldNames
) -> Iterator[Range | Chunk]:
    where, length = f"sources.{name}", state[0]
    kind = format_of(source, path, where)
    if kind == "json" and length > size and not source.records and holds_lines(path, source.encoding):
        kind = "jsonl"
    unit = source.sample_by if kind == "txt" else kind
    if compression_of(path):
        yield from _checked(file_chunks(source, where, relative, path, size), name, path, state)
    elif kind == "parquet":
        ranges = parquet_ranges(relative, path, size, needed, needs_all_columns(source, needed))
        for piece in _checked(ranges, name, path, state):
            yield piece if isinstance(piece, Chunk) else Range(relative, path, kind, *piece, state)
    elif unit in LINES and ends_lines_with_newlines(source.encoding):
        size = max(size, len(BOM) + 1)  # so that the first record begins in the first range
        for begin in range(0, length, size):
            end = min(length, begin + size)
            yield Range(relative, path, unit, begin, end, end - begin, state)
    elif length <= size or kind == "html" or unit == "document":
        yield Range(relative, path, "file", 0, length, length, state)
    else:
        yield from _checked(file_chunks(source, where, relative, path, size), name, path, state)


def read_piece(piece: Range | Chunk, source: Source, name: str, needed: FieldNames = None) -> tuple[list[Chunk], int]:
    """The chunks of a piece, and for a range of lines how many lines end in it. `needed` as for `cut_source`. Raises
    UserError if the file is missing or has changed since it was cut."""
    if isinstance(piece, Chunk):
        return [piece], 0
    with _unchanged(name, piece.path, piece.state):
        if piece.kind in LINES:
            return _read_lines(piece, source.encoding)
        if piece.kind == "parquet":
            all_columns = needs_all_columns(source, needed)
            return list(parquet_rows(piece.file, piece.path, piece.begin, piece.end, needed, all_columns)), 0
        return list(file_chunks(source, f"sources.{name}", piece.file, piece.path, CHUNK_BYTES)), 0


# ---- files that change -----------------------------------------------------------------------------------------------


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextmanager
def _unchanged(name: str, path: Path, state: tuple[int, int]) -> Iterator[None]:
    """Raises UserError if the file is not in this state after the block. Afterwards, so that a change during the block
    is noticed, too, and is the reason given for an error that it caused."""
    import pyarrow

    try:
        try:
            yield
        except Exception:
            _refuse_changed(name, path, state)
            raise
        _refuse_changed(name, path, state)
    except FileNotFoundError:
        raise UserError(
            f"sources.{name}: {path} does not exist on {socket.gethostname()}; leave sources where they are while the"
            " stage runs, and with executor: slurm or ray on a file system that all machines share"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        message = error.strerror if isinstance(error, OSError) else None
        reason = " ".join((message or str(error)).split())[:EXCERPT]
        raise UserError(
            f"sources.{name}: {path} cannot be read on {socket.gethostname()}: {reason}; fix that, and run the same"
            " command again"
        ) from None


def _refuse_changed(name: str, path: Path, state: tuple[int, int]) -> None:
    if _state(path) != state:
        raise UserError(
            f"sources.{name}: {path} changed while the stage ran; do not change sources until it is done, and run the"
            " same command again"
        ) from None


def _checked(items: Iterator, name: str, path: Path, state: tuple[int, int]) -> Iterator:
    """Items that are read from a file in this process, each under `_unchanged`."""
    while True:
        with _unchanged(name, path, state):
            item = next(items, None)
        if item is None:
            return
        yield item


# ---- lines -----------------------------------------------------------------------------------------------------------


def _read_lines(piece: Range, encoding: str | None) -> tuple[list[Chunk], int]:
    """The records that begin in the range, up to the end of the last one. The first line of a range belongs to the
    range before it unless it begins exactly there. At most MAX_RECORD_BYTES after the range are read, even if there is
    no newline in the entire file."""
    # No encoding takes more than twice the bytes of UTF-8; the length in UTF-8 is checked where records are parsed.
    most = formats.MAX_RECORD_BYTES * (2 if encoding else 1)
    back = min(piece.begin, BLANK)  # bytes before the range, which decide whether a record begins at its first byte
    with open(piece.path, "rb") as handle:
        handle.seek(piece.begin - back)
        data = bytearray(handle.read(back + piece.end - piece.begin))
        lines = data.count(b"\n", back)
        first = _first_record(data, back, piece, encoding)
        if not 0 <= first < len(data):
            return [], lines
        last, searched = max(first, last_border(data, piece.kind)), len(data)
        while (end := next_border(data, searched, piece.kind)) < 0 and len(data) - last <= most:
            searched = len(data) + 1
            block = handle.read(1 << 16)
            if not block:
                end = len(data)
                break
            data += block
    is_too_long = end < 0  # the last record
    text = to_utf8(bytes(memoryview(data)[first : end if end > 0 else last]), encoding)
    if encoding and not piece.begin:
        text = text.removeprefix(BOM)
    number = 1 + data.count(b"\n", back, first)
    chunks_here = [Chunk(piece.file, piece.kind, number, text, len(text), encoding)]
    if is_too_long:
        beginning = data[last:] if piece.kind == "paragraph" else data[last : last + 4 * EXCERPT]
        beginning = bytearray(to_utf8(bytes(beginning), encoding))
        number = 1 + data.count(b"\n", back, last)
        chunks_here.append(too_long_chunk(piece.file, number, beginning, piece.kind, encoding))
    return chunks_here, lines


def _first_record(data: bytearray, back: int, piece: Range, encoding: str | None) -> int:
    """Offset in `data` of the first record that begins in the range; -1 if there is none."""
    if piece.begin:
        return next_border(data, back, piece.kind)
    return len(BOM) if not encoding and data.startswith(BOM) else 0
