"""Files of intermediate results. They are complete and from this run, or refused: a damaged or foreign file is never
taken for an empty one."""

from pathlib import Path

from pipeline.core.files import write_atomic

MARK = b"alma"  # key of the parquet metadata that holds a file's own name


class CorruptFile(Exception):
    """A file that is not what was written there: missing, truncated, damaged, or from another run."""

    def __init__(self, path: Path, why: str):
        super().__init__(path, why)  # both, so that it can be pickled on the way from a worker
        self.path, self.why = path, why


def _mark(path: Path) -> bytes:
    """What identifies a file: the run's fingerprint and the file's place in the run."""
    parts = path.absolute().parts
    work = max((i for i, part in enumerate(parts) if part == "work"), default=len(parts) - 1)
    fingerprint = parts[work - 1].partition(".")[0]
    return "/".join((fingerprint, *parts[work:])).encode()


def write(table, path: Path, **options) -> None:
    """A pyarrow.Table as parquet, with checksums of its pages and its own name; complete or not at all."""
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    metadata = dict(table.schema.metadata or {})
    metadata[MARK] = _mark(path)
    table = table.replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, buffer, write_page_checksum=True, data_page_size=4 << 20, **options)
    write_atomic(path, buffer.getvalue())


def read(path: Path, columns: list[str]):
    """Columns of a file that `write` wrote, as pyarrow.Table with its metadata. Raises CorruptFile."""
    import pyarrow
    import pyarrow.parquet

    try:
        # not read_table, which imports pyarrow.dataset (docs/log.md, 29)
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as opened:
            table = opened.read(columns, use_threads=False)
            # a changed byte outside the pages' checksums may hide columns or rows without an error
            if set(table.column_names) != set(columns) or table.num_rows != opened.metadata.num_rows:
                raise CorruptFile(path, "is damaged (columns or rows are missing)")
    except FileNotFoundError:
        raise CorruptFile(path, "is missing") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name
        raise CorruptFile(path, f"is damaged ({str(error).splitlines()[0][:120]})") from None
    metadata = dict(table.schema.metadata or {})
    mark = metadata.pop(MARK, b"")
    if mark != _mark(path):
        owner = mark.decode(errors="replace") or "no mark"
        raise CorruptFile(path, f"belongs to another run or place ({owner})")
    return table.replace_schema_metadata(metadata or None)


def with_file_lines(outcomes, lines_before: int):
    """The outcomes of a unit with line numbers in their places that count from the beginning of the file, of which
    `lines_before` lines are in earlier units."""
    import pyarrow

    if not lines_before:
        return outcomes
    places = []
    for place in outcomes["place"].to_pylist():
        file, _, line = place.rpartition(":")
        places.append(f"{file}:{int(line) + lines_before}")
    column = pyarrow.array(places, pyarrow.string())
    return outcomes.set_column(outcomes.schema.get_field_index("place"), "place", column)
