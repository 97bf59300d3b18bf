"""Reading what `clean` published."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.data.sources.arrow_values import damage_errors, first_line, open_parquet

COLUMNS = {"text": "string", "source": "string", "id": "string"}


def documents(artifact: Artifact, split: str) -> Iterator[tuple[str, str, str]]:
    """(text, source, id) of each document of the split `train` or `heldout`, in the published order; one row group
    in memory at a time. Raises UserError for a damaged file."""
    for path in sorted((artifact.path / split).glob("part-*.parquet")):
        with readable(path), open_parquet(path) as opened:
            check_columns(opened, path)
            for batch in opened.iter_batches(batch_size=1024, columns=["text", "source", "id"], use_threads=False):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def check_columns(opened, path: Path) -> None:
    """Raises UserError for a file that stage clean did not write."""
    schema = opened.schema_arrow
    found = {field.name: str(field.type).removeprefix("large_") for field in schema}
    if {name: found.get(name) for name in COLUMNS} != COLUMNS or len(found) < len(schema):
        raise UserError(f"{path}: has the columns {found}, expected {COLUMNS}")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """A file of stage clean is read while this is open; its damage is a UserError."""
    try:
        yield
    except UserError:
        raise
    except damage_errors() as error:
        raise UserError(
            f"{path}: cannot be read as parquet ({first_line(error)}); run stage clean again with --restart"
        ) from None
