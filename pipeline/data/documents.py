"""Reading what `clean` published."""

from collections.abc import Iterator

from pipeline.artifact import Artifact


def documents(artifact: Artifact, split: str) -> Iterator[tuple[str, str, str]]:
    """(text, source, id) of each document of the split `train` or `heldout`, in the published order; one row group
    in memory at a time."""
    import pyarrow.parquet

    for path in sorted((artifact.path / split).glob("part-*.parquet")):
        with pyarrow.parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=1024, columns=["text", "source", "id"], use_threads=False):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
