"""Parquet files cut into ranges of rows, and the rows of a range. Only the columns that are needed are read."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from pipeline.data.sources.arrow_values import damage_errors, first_duplicate, first_line, open_parquet
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import EXCERPT, Chunk, FieldNames, bad_chunk

# A row group can only be read from its beginning. Up to this many times the size of a range it is read completely by
# every process that needs a part of it; larger ones are read by one process, a few rows at a time.
SHARED = 4


def parquet_chunks(
    relative: str, path: Path, size: int, needed: FieldNames = None, all_columns: bool = True
) -> Iterator[Chunk]:
    """Rows of a file. `needed`: the fields that are looked up in its records; `all_columns`: read the others, too."""
    for part in parquet_ranges(relative, path, size, needed, all_columns):
        if isinstance(part, Chunk):
            yield part
        else:
            begin, end, _ = part
            yield from parquet_rows(relative, path, begin, end, needed, all_columns)


def parquet_ranges(
    relative: str, path: Path, size: int, needed: FieldNames = None, all_columns: bool = True
) -> Iterator[Chunk | tuple[int, int, int]]:
    """Consecutive ranges of a file, (first row, row after the last, bytes), for `parquet_rows`; chunks of rows where
    row groups are large."""
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_parquet(path))
            names = opened.schema_arrow.names
        except damage_errors() as error:
            yield bad_chunk(relative, 1, "damaged parquet data", first_line(error))
            return
        if duplicate := first_duplicate(names):
            yield bad_chunk(relative, 1, REPEATED, f"{duplicate!r}: {', '.join(names)}"[:EXCERPT])
            return
        columns = needed_columns(names, needed, all_columns)
        metadata = opened.metadata
        # of all columns: to ask for one column of a damaged file may end the process (a C++ exception, pyarrow 26)
        sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
        batch_rows = max(1, min(1 << 16, metadata.num_rows * size // max(1, sum(sizes))))
        first = row = weight = 0  # `first` to `row`: row groups that are not in a range yet
        for group, group_size in enumerate(sizes):
            if row > first and weight + group_size > size:
                yield first, row, weight
                first, weight = row, 0
            rows = metadata.row_group(group).num_rows
            if group_size > SHARED * size:
                yield from _streamed(opened, relative, group, row, batch_rows, columns, needed)
                first = row + rows
            elif group_size > size:
                yield from _cut_evenly(row, rows, group_size, parts=-(-group_size // size))
                first = row + rows
            else:
                weight += group_size
            row += rows
        if row > first:
            yield first, row, weight


def _cut_evenly(row: int, rows: int, size: int, parts: int) -> Iterator[tuple[int, int, int]]:
    borders = [row + rows * part // parts for part in range(parts + 1)]
    for begin, end in pairwise(borders):
        if end > begin:
            yield begin, end, size // parts


def needed_columns(names: list[str], needed: FieldNames, all_columns: bool) -> list[str] | None:
    """The columns that hold the needed fields; None: all of them. If a needed field has no column, all are read, so
    that a message can list them."""
    if all_columns or needed is None:
        return None
    columns = {field if field in names else field.partition(".")[0] for field in needed}
    if not columns <= set(names):
        return None
    return [name for name in names if name in columns]


def _streamed(
    opened, relative: str, group: int, row: int, batch_rows: int, columns: list[str] | None, needed: FieldNames
) -> Iterator[Chunk]:
    """A row group that is too large for memory, a few rows at a time. It is decoded twice: whether its last page is
    damaged must be known before its first row is used, because damage costs a smaller group completely."""
    import pyarrow

    try:
        for _ in opened.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns):
            pass
    except damage_errors():
        yield _damaged(relative, row, row + opened.metadata.row_group(group).num_rows)
        return
    for batch in opened.iter_batches(batch_size=batch_rows, row_groups=[group], columns=columns):
        table = pyarrow.Table.from_batches([batch])
        yield Chunk(relative, "table", row + 1, _selected(table, columns), batch.nbytes, needed=needed)
        row += batch.num_rows


def parquet_rows(
    relative: str, path: Path, begin: int, end: int, needed: FieldNames = None, all_columns: bool = True
) -> Iterator[Chunk]:
    """Rows [begin, end). Damage costs the row group that contains it and no other; the range with the group's first row
    reports it."""
    with open_parquet(path) as opened:
        columns, after = needed_columns(opened.schema_arrow.names, needed, all_columns), 0
        for group in range(opened.metadata.num_row_groups):
            row, after = after, after + opened.metadata.row_group(group).num_rows
            if after <= begin or row >= end:
                continue
            try:
                table = opened.read_row_group(group, columns, use_threads=False)
            except damage_errors():
                if row >= begin:
                    yield _damaged(relative, row, after)
                continue
            first = max(row, begin)
            table = _selected(table.slice(first - row, min(end, after) - first), columns)
            yield Chunk(relative, "table", first + 1, table, table.nbytes, needed=needed)


def _selected(table, columns: list[str] | None):
    """Arrow reads the name `a.b` as the part b of a column a as well as a column of that name."""
    return table if columns is None else table.select(columns)


def _damaged(relative: str, row: int, after: int) -> Chunk:
    """A row group that is lost. Arrow's message is not used: of several errors it reports a different one when the
    group is read in another way."""
    return bad_chunk(relative, row + 1, "damaged parquet data", f"rows {row + 1} to {after}")
