"""Reading what stage clean published."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.data.sources.arrow_values import damage_errors, first_line, open_parquet

COLUMNS = {"text": "string", "source": "string", "id": "string"}


def documents(artifact: Artifact, split: str) -> Iterator[tuple[str, str, str]]:
    """(text, source, id) of each document of the split `train` or `heldout`, in the published order; one row group in
    memory at a time. Raises UserError for a damaged file."""
    for path in sorted((artifact.path / split).glob("part-*.parquet")):
        with damage_reported(path), open_parquet(path) as table:
            check_columns(table, path)
            for batch in table.iter_batches(batch_size=1024, columns=["text", "source", "id"], use_threads=False):
                columns = [column.to_pylist() for column in batch.columns]
                yield from zip(*columns, strict=True)


def check_columns(table, path: Path) -> None:
    """Raise UserError for a parquet file that stage clean did not write."""
    schema = table.schema_arrow
    types = {field.name: str(field.type).removeprefix("large_") for field in schema}
    has_columns = all(types.get(name) == kind for name, kind in COLUMNS.items())
    if not has_columns or len(types) < len(schema):  # fewer: two columns have the same name
        raise UserError(f"{path}: has the columns {types}, expected {COLUMNS}; give the output of stage clean")


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """While a file of stage clean is read: damage becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except damage_errors() as error:
        raise UserError(
            f"{path}: cannot be read as parquet ({first_line(error)}); run stage clean again with --restart"
        ) from None
