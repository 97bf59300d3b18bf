"""Files of intermediate results that are whole and of this run, or refused: a torn or foreign one is never read as
"nothing there"."""

import sys
from pathlib import Path

from pipeline.core.files import write_atomic

MARK = b"alma"


class Torn(Exception):
    """A file that is not what was written there: missing, cut, damaged, or another run's. `path` names it."""

    def __init__(self, path: Path, why: str):
        super().__init__(path, why)  # both, so that it survives the way from a worker
        self.path, self.why = path, why


class _NoPandas:
    """An importer that has no pandas."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        if name == "pandas":
            raise ImportError(name)


def without_pandas() -> None:
    """Keep pyarrow from importing pandas, which it does at its first conversion if it can (0.45 CPU-s a process),
    and asks for only once. For processes that are a stage's own: Table.to_pandas fails in them from now on. Records are
    the same with and without pandas (see arrow.py)."""
    import pyarrow

    sys.meta_path.insert(0, _NoPandas)
    try:
        pyarrow.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def _mark(path: Path) -> bytes:
    """What a file says of itself: the run's fingerprint and its own place in the run."""
    parts = path.absolute().parts
    at = max((i for i, part in enumerate(parts) if part == "work"), default=len(parts) - 1)
    return "/".join((parts[at - 1].partition(".")[0], *parts[at:])).encode()


def write(table, path: Path, **options) -> None:
    """A pyarrow.Table as parquet, with checksums of its pages and its own name; whole or not at all."""
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    marked = table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: _mark(path)})
    pyarrow.parquet.write_table(marked, buffer, write_page_checksum=True, data_page_size=4 << 20, **options)
    write_atomic(path, buffer.getvalue())


def read(path: Path, columns: list[str]):
    """Columns of a file that `write` wrote, as pyarrow.Table with its metadata. Raises Torn."""
    import pyarrow
    import pyarrow.parquet

    try:
        # not read_table, which imports pyarrow.dataset (docs/log.md, 29)
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as opened:
            table = opened.read(columns, use_threads=False)
            # what a changed byte outside the pages' checksums can hide without a word
            if set(table.column_names) != set(columns) or table.num_rows != opened.metadata.num_rows:
                raise Torn(path, "is damaged (columns or rows are missing)")
    except FileNotFoundError:
        raise Torn(path, "is missing") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        raise Torn(path, f"is damaged ({str(error).splitlines()[0][:120]})") from None
    kept = dict(table.schema.metadata or {})
    found = kept.pop(MARK, b"")
    if found != _mark(path):
        raise Torn(path, f"belongs to another run or place ({found.decode(errors='replace') or 'no mark'})")
    return table.replace_schema_metadata(kept or None)


def at_lines(outcome, before: int):
    """The outcome of a unit with the numbers of lines in its places counted from the beginning of the file, of which
    `before` lines are in the units before it."""
    import pyarrow

    if not before:
        return outcome
    parted = (place.rpartition(":") for place in outcome["place"].to_pylist())
    places = pyarrow.array([f"{file}:{int(line) + before}" for file, _, line in parted], pyarrow.string())
    return outcome.set_column(outcome.schema.get_field_index("place"), "place", places)
