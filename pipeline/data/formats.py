"""File formats: a file cut into chunks at record borders, and a chunk's records. What is read does not depend on
where a file is cut."""

import csv
import functools
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

# A longer record is taken for a file whose record separators are missing; reading it whole would take memory without
# bound.
MAX_RECORD_BYTES = 64 << 20
EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Bad:
    """A record, or the rest of a file, that could not be read; `raw` is how it begins."""

    place: str
    reason: str
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive records of one file, not parsed yet, cheap to send to another process."""

    file: str
    # jsonl, line, paragraph, document, html: bytes; warc: list of (position, fields or Bad); values: list of (position,
    # value or Bad); table: pyarrow.Table
    kind: str
    first: int  # line or row of the first record, from 1
    data: Any
    weight: int  # bytes, about


# ---- chunk -> records ------------------------------------------------------------------------------------------------


def values(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    if chunk.kind == "values":
        yield from chunk.data
    elif chunk.kind == "table":
        yield from _rows(chunk)
    elif chunk.kind.startswith("warc"):
        from pipeline.data.web import pages

        yield from pages(chunk)
    elif chunk.kind.startswith("html"):
        from pipeline.data.web import text_of_html

        yield 0, {"text": text_of_html(chunk.data, "", chunk.kind.partition(" ")[2])}
    elif chunk.kind == "jsonl":
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line.strip():
                yield number, _json(line, f"{chunk.file}:{number}")
    elif chunk.kind == "line":
        for number, line in enumerate(chunk.data.split(b"\n"), chunk.first):
            if line.strip():
                yield number, _decoded(line.removesuffix(b"\r"), f"{chunk.file}:{number}")
    elif chunk.kind == "paragraph":
        number = chunk.first
        for block in re.split(rb"(\n[ \t\r]*\n\s*)", chunk.data):
            stripped = block.strip()  # so that blank lines at the border of two chunks make no difference
            if stripped:
                at = number + block.count(b"\n", 0, block.index(stripped))
                yield at, _decoded(stripped, f"{chunk.file}:{at}")
            number += block.count(b"\n")
    else:
        yield 0, _decoded(chunk.data, chunk.file)


def _decoded(raw: bytes, place: str) -> str | Bad:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Bad(place, "invalid UTF-8", raw[max(0, error.start - 40) :][:EXCERPT].decode(errors="backslashreplace"))


def _json(raw: bytes, place: str) -> Any:
    text = _decoded(raw, place)
    if isinstance(text, Bad):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Bad(place, "malformed JSON", text[:EXCERPT])
    return value if isinstance(value, (dict, str)) else Bad(place, "not a JSON object", text[:EXCERPT])


def _rows(chunk: Chunk) -> Iterator[tuple[int, Any]]:
    try:
        yield from enumerate(chunk.data.to_pylist(), chunk.first)
    except UnicodeDecodeError:  # one bad cell must not cost its neighbours
        for index in range(chunk.data.num_rows):
            place = f"{chunk.file}:{chunk.first + index}"
            try:
                yield chunk.first + index, chunk.data.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield (
                    chunk.first + index,
                    Bad(place, "invalid UTF-8", error.object[:EXCERPT].decode(errors="backslashreplace")),
                )


# ---- file -> chunks --------------------------------------------------------------------------------------------------


class _Torn(Exception):
    """A compressed file that ends too early or is damaged."""


def _blocks(path: Path, size: int = 1 << 20) -> Iterator[bytes]:
    """Bytes of a file in blocks of at most `size` on disk, unpacked by suffix. Raises _Torn where the rest cannot be
    unpacked."""
    make = None
    if path.suffix == ".gz":
        make = functools.partial(zlib.decompressobj, 31)  # 31: gzip header and checksum (zlib.h, inflateInit2)
    elif path.suffix == ".zst":
        import zstandard

        make = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
    with open(path, "rb") as handle:
        if make is None:
            yield from iter(lambda: handle.read(size), b"")
            return
        # The streaming readers of zstandard end without a word where a file is cut; decompressobj knows whether its
        # frame was complete.
        unpack = None
        while packed := handle.read(min(size, 1 << 16)):
            while packed:
                unpack = unpack or make()
                try:
                    yield unpack.decompress(packed)
                except Exception as error:
                    if isinstance(error, zlib.error) or type(error).__name__ == "ZstdError":
                        raise _Torn(f"damaged {path.suffix} data") from None
                    raise
                packed = b""
                if unpack.eof:
                    # several members, or zero padding (gzip -t allows it)
                    packed, unpack = unpack.unused_data.lstrip(b"\0"), None
        if unpack is not None:
            raise _Torn(f"truncated {path.suffix} data")


def line_chunks(relative: str, path: Path, kind: str, size: int) -> Iterator[Chunk]:
    """Whole lines, or whole paragraphs."""
    buffer, number, torn, skipping = bytearray(), 1, None, False
    blocks = _blocks(path, min(size, 1 << 20))
    start = True
    while True:
        try:
            block = next(blocks, None)
        except _Torn as error:
            block, torn = None, error
        if block is None:
            break
        buffer += block
        if start:
            if len(buffer) < 3:
                continue
            start = False
            if buffer.startswith(b"\xef\xbb\xbf"):
                del buffer[:3]
        if skipping:
            end = buffer.find(b"\n")
            if end < 0:
                buffer.clear()
                continue
            del buffer[: end + 1]
            number, skipping = number + 1, False
        if len(buffer) < size:
            continue
        cut = buffer.rfind(b"\n") + 1
        if kind == "paragraph":
            cut = max((match.end() for match in re.finditer(rb"\n[ \t\r]*\n", buffer)), default=0)
        if cut:
            yield Chunk(relative, kind, number, bytes(buffer[:cut]), cut)
            number += buffer.count(b"\n", 0, cut)
            del buffer[:cut]
        if len(buffer) > MAX_RECORD_BYTES:
            yield _bad(
                relative,
                number,
                f"longer than {MAX_RECORD_BYTES >> 20} MiB",
                bytes(buffer[:EXCERPT]).decode(errors="backslashreplace"),
            )
            number += buffer.count(b"\n")
            buffer.clear()
            skipping = True
    if start and buffer.startswith(b"\xef\xbb\xbf"):
        del buffer[:3]
    cut = len(buffer)
    if torn:  # what stands after the last whole line is the torn record
        cut = buffer.rfind(b"\n") + 1
    if cut:
        yield Chunk(relative, kind, number, bytes(buffer[:cut]), cut)
    if torn:
        yield _bad(
            relative,
            number + buffer.count(b"\n", 0, cut),
            str(torn),
            bytes(buffer[cut:][:EXCERPT]).decode(errors="backslashreplace"),
        )


def _bad(relative: str, position: int, reason: str, raw: str = "") -> Chunk:
    return Chunk(
        relative,
        "values",
        position,
        [(position, Bad(f"{relative}:{position}" if position else relative, reason, raw))],
        len(raw),
    )


def document_chunk(relative: str, path: Path, kind: str = "document") -> Iterator[Chunk]:
    data = bytearray()
    try:
        for block in _blocks(path):
            data += block
            if len(data) > MAX_RECORD_BYTES:
                yield _bad(
                    relative,
                    0,
                    f"longer than {MAX_RECORD_BYTES >> 20} MiB",
                    data[:EXCERPT].decode(errors="backslashreplace"),
                )
                return
    except _Torn as error:
        yield _bad(relative, 0, str(error), data[:EXCERPT].decode(errors="backslashreplace"))
        return
    if data.strip():
        yield Chunk(relative, kind, 1, bytes(data.removeprefix(b"\xef\xbb\xbf")), len(data))


def json_chunks(records: str, where: str, relative: str, path: Path, size: int) -> Iterator[Chunk]:
    """One JSON value a file, in memory as a whole; big data belongs into jsonl."""
    try:
        raw = b"".join(_blocks(path))
    except _Torn as error:
        yield _bad(relative, 0, str(error))
        return
    try:
        value = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield _bad(
            relative, 0, "invalid UTF-8", raw[max(0, error.start - 40) :][:EXCERPT].decode(errors="backslashreplace")
        )
        return
    except (ValueError, RecursionError) as error:
        at = getattr(error, "pos", 0)
        yield _bad(relative, 0, "malformed JSON", raw.decode("utf-8-sig")[max(0, at - 40) :][:EXCERPT])
        return
    items = _walk(value, steps_of(records), f"{where}: {path}", records)
    several = max(1, len(items) * size // max(1, len(raw)))
    for first in range(0, len(items), several):
        part = items[first : first + several]
        yield Chunk(relative, "values", first + 1, list(enumerate(part, first + 1)), len(raw) * len(part) // len(items))


def steps_of(path: str) -> list[str]:
    """`data[*].context[*]` -> data, *, context, *."""
    if path and not re.fullmatch(r"(\[\*\]|[^\[\].*]+)(\[\*\]|\.[^\[\].*]+)*", path):
        raise ValueError(
            f"records: {path!r} is no path; write names joined by dots and [*] for every item, such as"
            " data[*].context[*]"
        )
    return [step if step != "[*]" else "*" for step in re.findall(r"\[\*\]|[^\[\].]+", path)] or ["*"]


def _walk(value: Any, steps: list[str], where: str, path: str) -> list:
    found = [value]
    for step in steps:
        if step == "*":
            found = [item for node in found for item in _items(node)]
        else:
            found = [node[step] for node in found if isinstance(node, dict) and step in node]
            if not found:
                shape = (
                    f"a block with the keys {', '.join(list(value)[:8])}"
                    if isinstance(value, dict)
                    else f"a {type(value).__name__}"
                )
                raise UserError(f"{where}: has nothing at {step!r} of records: {path!r}; it holds {shape}")
    return found


def _items(node: Any) -> list:
    if isinstance(node, dict):
        return [
            (
                {"key": key, **item}
                if isinstance(item, dict)
                else {"key": key, "text": item}
                if isinstance(item, str)
                else item
            )
            for key, item in node.items()
        ]
    return node if isinstance(node, list) else []


def csv_chunks(columns: list[str], relative: str, path: Path, kind: str, size: int) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    torn = []

    def lines() -> Iterator[str]:
        for chunk in line_chunks(relative, path, "csv", min(size, 1 << 20)):
            if chunk.kind == "values":
                torn.extend(chunk.data)
                continue
            for line in chunk.data.removesuffix(b"\n").decode(errors="surrogateescape").split("\n"):
                yield line + "\n"

    # RFC 4180 for csv; tsv (IANA text/tab-separated-values) has no quotes.
    feed = _Lines(lines())
    reader = (
        csv.reader(feed, strict=True) if kind == "csv" else csv.reader(feed, delimiter="\t", quoting=csv.QUOTE_NONE)
    )
    header, rows, weight = columns or None, [], 0
    begins, after = 1, 1
    while True:
        begins = after
        try:
            cells = next(reader, None)
        except csv.Error as error:
            first = feed.taken[0]
            # At a cut the open cell is the file's last; anywhere else a quote that nobody closed must not cost the rows
            # that it ran through.
            after += feed.finish(1 if len(feed.taken) > 1 and not torn else len(feed.taken))
            shown = f"{error}: {first}"[:EXCERPT].encode(errors="surrogateescape").decode(errors="backslashreplace")
            rows.append((begins, Bad(f"{relative}:{begins}", "malformed CSV", shown)))
            weight += len(first)
            continue
        after += feed.finish(len(feed.taken))
        if cells is None:
            break
        if not cells or cells == [""]:
            continue
        if header is None:
            header = cells
            continue
        rows.append((begins, _row(header, cells, f"{relative}:{begins}")))
        weight += sum(map(len, cells))
        if weight >= size:
            yield Chunk(relative, "values", rows[0][0], rows, weight)
            rows, weight = [], 0
    if rows or torn:
        yield Chunk(relative, "values", begins, rows + torn, weight)


class _Lines:
    """Lines for the csv reader, which can be told to read those of a broken record again. Each is read at most about
    twice: where a second quote stands, the first is not open any more."""

    def __init__(self, lines: Iterator[str]):
        self.lines, self.again, self.taken = lines, deque(), []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        self.taken.append(self.again.popleft() if self.again else next(self.lines))
        return self.taken[-1]

    def finish(self, number: int) -> int:
        """The record has `number` lines; the others that were taken come again."""
        self.again.extendleft(reversed(self.taken[number:]))
        self.taken.clear()
        return number


def _row(header: list[str], cells: list[str], place: str) -> dict | Bad:
    shown = ",".join(cells)[:EXCERPT].encode(errors="surrogateescape").decode(errors="backslashreplace")
    if len(cells) != len(header):
        return Bad(place, "wrong number of cells", shown)
    if any(not cell.isascii() and not _encodes(cell) for cell in cells):
        return Bad(place, "invalid UTF-8", shown)
    return dict(zip(header, cells, strict=True))


def _encodes(text: str) -> bool:
    try:
        text.encode()
        return True
    except UnicodeEncodeError:
        return False


def parquet_chunks(relative: str, path: Path, size: int) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        yield _bad(relative, 1, "damaged parquet data", str(error).splitlines()[0][:EXCERPT])
        return
    with opened:
        meta = opened.metadata
        weight = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        several = max(1, min(1 << 16, meta.num_rows * size // max(1, weight)))
        begins = 1
        for group in range(meta.num_row_groups):  # one by one, so that damage in one costs no other
            row = begins
            try:
                for batch in opened.iter_batches(batch_size=several, row_groups=[group]):
                    yield Chunk(relative, "table", row, pyarrow.Table.from_batches([batch]), batch.nbytes)
                    row += batch.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                yield _bad(relative, row, "damaged parquet data", str(error).splitlines()[0][:EXCERPT])
            begins += meta.row_group(group).num_rows
