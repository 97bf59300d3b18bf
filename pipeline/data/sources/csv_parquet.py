"""Tables cut into chunks: csv and tsv, parquet."""

import csv
import re
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pipeline.data.sources.arrow_values import damage, first_line, opened_table, repeated
from pipeline.data.sources.formats import EXCERPT, MAX_RECORD_BYTES, Asked, Bad, Chunk, bad_chunk, line_chunks
from pipeline.data.sources.text_encoding import encodes, shown

# A file that has a column name twice is one bad record, like a json file that is malformed: a record has one value
# under a name, and nothing says which column is meant. Names that differ in case are different names.
REPEATED = "two columns of one name; rename one"

# Without this a packed file without its suffix is a header line and no rows: nothing, and not told.
UNREADABLE = "a header line with control characters, as compressed data and UTF-16 have"
_CONTROL = re.compile(r"[\0-\x08\x0e-\x1f]")


def csv_chunks(
    columns: list[str], relative: str, path: Path, kind: str, size: int, encoding: str | None = None
) -> Iterator[Chunk]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    torn, ends_torn = [], False

    def lines() -> Iterator[str]:
        nonlocal ends_torn
        for chunk in line_chunks(relative, path, "csv", min(size, 1 << 20), encoding):
            ends_torn = chunk.kind == "values"
            if ends_torn:
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
            after += feed.finish(1 if len(feed.taken) > 1 and not ends_torn else len(feed.taken))
            begun = f"{error}: {first}"[:EXCERPT].encode(errors="surrogateescape")
            rows.append((begins, Bad(f"{relative}:{begins}", "malformed CSV", shown(begun, encoding))))
            weight += len(first)
            continue
        after += feed.finish(len(feed.taken))
        if cells is None:
            break
        if not cells or cells == [""]:
            continue
        if header is None:
            if torn and torn[0][0] <= begins:  # the header line is in it, so no row can be read
                place, bad = torn[0]
                yield bad_chunk(relative, place, bad.reason, bad.raw, path.stat().st_size)
                return
            header = cells
            if any(map(_CONTROL.search, header)):
                begun = ",".join(header)[:EXCERPT].encode(errors="surrogateescape")
                yield bad_chunk(relative, begins, UNREADABLE, shown(begun, encoding))
                return
            if twice := repeated(header):
                begun = f"{twice!r}: {','.join(header)}"[:EXCERPT].encode(errors="surrogateescape")
                yield bad_chunk(relative, begins, REPEATED, shown(begun, encoding))
                return
            continue
        rows.append((begins, _row(header, cells, f"{relative}:{begins}", encoding)))
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


def _row(header: list[str], cells: list[str], place: str, encoding: str | None) -> dict | Bad:
    begun = shown(",".join(cells)[:EXCERPT].encode(errors="surrogateescape"), encoding)
    if len(cells) != len(header):
        return Bad(place, "wrong number of cells", begun)
    if any(not cell.isascii() and not encodes(cell) for cell in cells):
        return Bad(place, f"invalid {encoding or 'UTF-8'}", begun)
    return dict(zip(header, cells, strict=True))


# ---- parquet ---------------------------------------------------------------------------------------------------------

# A row group can only be read from its beginning. Up to so many times the size of a piece it is read as a whole by
# whoever wants a part of it; larger ones are read by one process, a few rows at a time.
WHOLE = 4


def parquet_chunks(relative: str, path: Path, size: int, asked: Asked = None, whole: bool = True) -> Iterator[Chunk]:
    """Rows of a file. `asked`: the fields that are looked up in its records; `whole`: read the columns that nobody asks
    for, too."""
    for piece in parquet_pieces(relative, path, size, asked, whole):
        yield from [piece] if isinstance(piece, Chunk) else parquet_rows(relative, path, *piece[:2], asked, whole)


def parquet_pieces(
    relative: str, path: Path, size: int, asked: Asked = None, whole: bool = True
) -> Iterator[Chunk | tuple[int, int, int]]:
    """Consecutive pieces of a file: (first row, row behind the last, bytes) for `parquet_rows`; chunks where row groups
    are large."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(opened_table(path))
            names = opened.schema_arrow.names
        except damage() as error:
            yield bad_chunk(relative, 1, "damaged parquet data", first_line(error))
            return
        if twice := repeated(names):
            yield bad_chunk(relative, 1, REPEATED, f"{twice!r}: {', '.join(names)}"[:EXCERPT])
            return
        columns = wanted_columns(names, asked, whole)
        meta = opened.metadata
        # of all columns: to ask for one column of a damaged file may end the process (a C++ exception, pyarrow 26)
        sizes = [meta.row_group(group).total_byte_size for group in range(meta.num_row_groups)]
        several = max(1, min(1 << 16, meta.num_rows * size // max(1, sum(sizes))))
        first = row = weight = 0  # of row groups that are waiting, and where the next one begins
        for group, bytes_here in enumerate(sizes):
            if row > first and weight + bytes_here > size:
                yield first, row, weight
                first, weight = row, 0
            rows = meta.row_group(group).num_rows
            if bytes_here > WHOLE * size:
                yield from _streamed(opened, relative, group, row, several, columns, asked)
                first = row + rows
            elif bytes_here > size:
                number = -(-bytes_here // size)
                cuts = [row + rows * part // number for part in range(number + 1)]
                yield from ((a, b, bytes_here // number) for a, b in zip(cuts, cuts[1:], strict=False) if b > a)
                first = row + rows
            else:
                weight += bytes_here
            row += rows
        if row > first:
            yield first, row, weight


def wanted_columns(names: list[str], asked: Asked, whole: bool) -> list[str] | None:
    """The columns that hold the fields asked for; None: all of them. All are read, too, where a field asked for has no
    column, so that a message can name those that are there."""
    if whole or asked is None:
        return None
    found = {field if field in names else field.partition(".")[0] for field in asked}
    return [name for name in names if name in found] if found <= set(names) else None


def _streamed(
    opened, relative: str, group: int, row: int, several: int, columns: list[str] | None, asked: Asked
) -> Iterator[Chunk]:
    """A row group that is too large to be held, a few rows at a time. It is decoded twice: whether its last page is
    damaged has to be known before its first row is handed out, for smaller groups are lost as a whole."""
    import pyarrow

    try:
        for _ in opened.iter_batches(batch_size=several, row_groups=[group], columns=columns):
            pass
    except damage():
        yield _damaged(relative, row, row + opened.metadata.row_group(group).num_rows)
        return
    for batch in opened.iter_batches(batch_size=several, row_groups=[group], columns=columns):
        table = pyarrow.Table.from_batches([batch])
        yield Chunk(relative, "table", row + 1, _selected(table, columns), batch.nbytes, asked=asked)
        row += batch.num_rows


def parquet_rows(
    relative: str, path: Path, begin: int, end: int, asked: Asked = None, whole: bool = True
) -> Iterator[Chunk]:
    """Rows [begin, end). Damage costs the row group that it is in, and no other, and is told by whoever has the first
    row of it."""
    with opened_table(path) as opened:
        columns, after = wanted_columns(opened.schema_arrow.names, asked, whole), 0
        for group in range(opened.metadata.num_row_groups):
            row, after = after, after + opened.metadata.row_group(group).num_rows
            if after <= begin or row >= end:
                continue
            try:
                table = opened.read_row_group(group, columns, use_threads=False)
            except damage():
                if row >= begin:
                    yield _damaged(relative, row, after)
                continue
            first = max(row, begin)
            table = _selected(table.slice(first - row, min(end, after) - first), columns)
            yield Chunk(relative, "table", first + 1, table, table.nbytes, asked=asked)


def _selected(table, columns: list[str] | None):
    """Arrow takes the name `a.b` for the part b of a column a as well as for a column of that name."""
    return table if columns is None else table.select(columns)


def _damaged(relative: str, row: int, after: int) -> Chunk:
    """A row group that is lost. With the rows and not with what Arrow says: of several errors it tells another one when
    it reads the group in another way."""
    return bad_chunk(relative, row + 1, "damaged parquet data", f"rows {row + 1} to {after}")
