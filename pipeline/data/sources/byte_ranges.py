"""Pieces of a source that are small to send, for the process that gets one opens the file itself: bytes of a file of
lines or paragraphs, rows of a parquet file, small files.

    for piece in pieces(source, name, size):       # in the stage's own process, which reads nothing for them
        found, lines = load(piece, source, name)   # in a worker

Whatever the sizes, the records are those of sources.chunks. The numbers of lines in a range that begins in the middle
of a file count from there, because nobody has read what is before it; whoever knows how many lines the ranges before
it have adds them (outcomes.at_lines).
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.sources import formats
from pipeline.data.sources.csv_parquet import parquet_pieces, parquet_rows
from pipeline.data.sources.formats import BLANK, BOM, EXCERPT, Asked, Chunk, border, last_border, too_long
from pipeline.data.sources.json_files import holds_lines
from pipeline.data.sources.sources import CHUNK_BYTES, Source, chunks, file_chunks, files, format_of, read_whole
from pipeline.data.sources.text_encoding import ends_lines_with_newlines, utf8

LINES = ("jsonl", "line", "paragraph")


@dataclass(frozen=True, slots=True)
class Range:
    """A piece of a file that its reader opens."""

    file: str
    path: Path
    kind: str  # jsonl, line, paragraph: bytes of the file; parquet: rows of it; file: all of it
    begin: int
    end: int
    weight: int  # bytes, about
    state: tuple[int, int]  # of the file when it was cut: bytes, and when it was changed, in nanoseconds

    @property
    def continued(self) -> bool:
        """Whether its lines are counted from its own beginning."""
        return self.kind in LINES and self.begin > 0


def pieces(source: Source, name: str, size: int, asked: Asked = None) -> Iterator[Range | Chunk]:
    """A source in pieces of about `size` bytes: chunks of what has to be read from the beginning (packed files, large
    tables and archives, encodings whose newlines are no newline bytes), ranges of all else. Raises UserError where a
    file is not there, or has changed. `asked` as for sources.chunks."""
    if source.dataset:
        yield from chunks(source, name, size, asked=asked)
        return
    for relative, path, state in [(relative, path, _state(path)) for relative, path in files(source, name)]:
        kind, length = format_of(source, path, f"sources.{name}"), state[0]
        if kind == "json" and length > size and not source.records and holds_lines(path, source.encoding):
            kind = "jsonl"
        by = kind if kind == "jsonl" else source.sample_by if kind == "txt" else ""
        if path.suffix in (".gz", ".zst"):
            yield from _watched(file_chunks(source, f"sources.{name}", relative, path, size), name, path, state)
        elif kind == "parquet":
            whole = read_whole(source, asked)
            for piece in _watched(parquet_pieces(relative, path, size, asked, whole), name, path, state):
                yield piece if isinstance(piece, Chunk) else Range(relative, path, kind, *piece, state)
        elif by in LINES and ends_lines_with_newlines(source.encoding):
            size = max(size, len(BOM) + 1)  # so that the first record begins in the first range
            for begin in range(0, length, size):
                end = min(length, begin + size)
                yield Range(relative, path, by, begin, end, end - begin, state)
        elif length <= size or kind == "html" or by == "document":
            yield Range(relative, path, "file", 0, length, length, state)
        else:
            yield from _watched(file_chunks(source, f"sources.{name}", relative, path, size), name, path, state)


def load(piece: Range | Chunk, source: Source, name: str, asked: Asked = None) -> tuple[list[Chunk], int]:
    """What a piece holds, and for a range of lines how many lines end in it. `asked` as for `pieces`. Raises UserError
    where the file is not there, or is not the one that was cut."""
    if isinstance(piece, Chunk):
        return [piece], 0
    with _unchanged(name, piece.path, piece.state):
        if piece.kind in LINES:
            return _lines(piece, source.encoding)
        if piece.kind == "parquet":
            whole = read_whole(source, asked)
            return list(parquet_rows(piece.file, piece.path, piece.begin, piece.end, asked, whole)), 0
        return list(file_chunks(source, f"sources.{name}", piece.file, piece.path, CHUNK_BYTES)), 0


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextmanager
def _unchanged(name: str, path: Path, state: tuple[int, int]) -> Iterator[None]:
    """What was read while this was open is of the file that was cut, or UserError is raised. Asked afterwards, so that
    a change in between is seen, too, and is the reason given for what it broke."""
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
            f"sources.{name}: {path} is not there on {socket.gethostname()}; leave sources where they are while"
            " the stage runs, and with executor: slurm or ray on a file system that all machines see"
        ) from None
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error)).split())[:EXCERPT]
        raise UserError(
            f"sources.{name}: {path} cannot be read on {socket.gethostname()}: {reason}; mend that, and run the same"
            " command again"
        ) from None


def _refuse_changed(name: str, path: Path, state: tuple[int, int]) -> None:
    if _state(path) != state:
        raise UserError(
            f"sources.{name}: {path} changed while the stage ran; leave sources as they are until it is done, and run"
            " the same command again"
        ) from None


def _watched(items: Iterator, name: str, path: Path, state: tuple[int, int]) -> Iterator:
    """What is read from a file in this process, piece by piece."""
    while True:
        with _unchanged(name, path, state):
            item = next(items, None)
        if item is None:
            return
        yield item


def _lines(piece: Range, encoding: str | None) -> tuple[list[Chunk], int]:
    """The records that begin in the range, to the end of the last one. The first line of a range belongs to the range
    before it unless it begins here. At most MAX_RECORD_BYTES behind the range are read, also if there is no newline in
    the whole file."""
    # No encoding takes more than twice the bytes of UTF-8; what it takes in UTF-8 is judged where records are parsed.
    most = formats.MAX_RECORD_BYTES * (2 if encoding else 1)
    back = min(piece.begin, BLANK)
    with open(piece.path, "rb") as handle:
        handle.seek(piece.begin - back)
        data = bytearray(handle.read(back + piece.end - piece.begin))
        lines = data.count(b"\n", back)
        first = border(data, back, piece.kind) if piece.begin else len(BOM) * (not encoding and data.startswith(BOM))
        if not 0 <= first < len(data):
            return [], lines
        last, looked = max(first, last_border(data, piece.kind)), len(data)
        while (stop := border(data, looked, piece.kind)) < 0 and len(data) - last <= most:
            looked = len(data) + 1
            block = handle.read(1 << 16)
            if not block:
                stop = len(data)
                break
            data += block
    end = stop if stop > 0 else last
    text = utf8(bytes(memoryview(data)[first:end]), encoding)
    if encoding and not piece.begin:
        text = text.removeprefix(BOM)
    found = [Chunk(piece.file, piece.kind, 1 + data.count(b"\n", back, first), text, len(text), encoding)]
    if stop < 0:
        begun = data[last:] if piece.kind == "paragraph" else data[last : last + 4 * EXCERPT]
        number = 1 + data.count(b"\n", back, last)
        found.append(too_long(piece.file, number, bytearray(utf8(bytes(begun), encoding)), piece.kind, encoding))
    return found, lines
