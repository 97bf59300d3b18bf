"""Published shards: writing them from the files of units, and signatures of the shards of an earlier output."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core import faults
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.data.cleaning import unit_files
from pipeline.data.dedup.minhash import Dedup

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.dedup.document_index import Index
    from pipeline.data.dedup.exact_substring import UnitDocuments

SHARD_BYTES = 32 << 20  # of text: one shard is held in memory while it is written


@dataclass(frozen=True)
class ShardRows:
    """Documents of one unit that go into a shard."""

    source: str
    unit: Path
    rows: "np.ndarray"  # of the unit's file
    clusters: "np.ndarray"  # sizes of their clusters
    copies: "np.ndarray"  # how often each is written
    edits: Path | None  # what deduplication removed from them


def plan_shards(
    index: "Index", kept: "list[UnitDocuments]", decision: int, upsample: dict[int, int]
) -> Iterator[list[ShardRows]]:
    """The documents with a decision, in order, in shards of SHARD_BYTES of text."""
    import numpy as np

    from pipeline.data.dedup.document_index import num_copies

    total, shard, current = 0, [], 0  # `current`: how many times SHARD_BYTES come before the shard
    for part in kept:
        is_chosen = index.decision[part.documents] == decision
        documents, rows = part.documents[is_chosen], part.rows[is_chosen]
        if not len(documents):
            continue
        clusters = np.asarray(index.cluster[documents])
        copies = num_copies(clusters, upsample)
        sizes = index.size[documents] * copies
        shard_of = (total + np.cumsum(sizes) - sizes) // SHARD_BYTES
        total += int(sizes.sum())
        source = index.sources[int(index.source[documents[0]])]
        for number in np.unique(shard_of).tolist():
            if number != current and shard:
                yield shard
                shard = []
            current = number
            mine = shard_of == number
            shard.append(ShardRows(source, part.path, rows[mine], clusters[mine], copies[mine], part.edits))
    if shard:
        yield shard


def write_shard(parts: list[ShardRows], path: Path, with_addresses: bool) -> None:
    """Gather rows of units into one shard."""
    import pyarrow
    import pyarrow.parquet

    buffer = pyarrow.BufferOutputStream()
    shard = pyarrow.concat_tables([_table(part, with_addresses) for part in parts]).combine_chunks()
    pyarrow.parquet.write_table(
        shard, buffer, compression="zstd", row_group_size=1 << 14, use_dictionary=["source"], write_statistics=False
    )
    faults.point("save")
    write_atomic(path, buffer.getvalue())


def _table(part: ShardRows, with_addresses: bool):
    import numpy as np
    import pyarrow

    from pipeline.data.dedup.exact_substring import UnitDocuments, texts_of

    unit = unit_files.read(part.unit, ["text", "id", "language", "address"]).take(part.rows)
    text = unit["text"]
    if part.edits:
        text = pyarrow.chunked_array([texts_of(UnitDocuments(part.unit, part.rows, part.rows, part.edits))])
    columns = {
        "text": text,
        "source": pyarrow.array([part.source] * len(part.rows)),
        "id": unit["id"],
        "cluster": pyarrow.array(part.clusters, pyarrow.int32()),
        "language": unit["language"].cast(pyarrow.string()),
    }
    if with_addresses:
        columns["address"] = unit["address"]
    table = pyarrow.table(columns)
    repeated = np.repeat(np.arange(len(part.rows)), part.copies)
    return table.take(repeated) if len(repeated) > len(part.rows) else table


# ---- shards of an earlier output -------------------------------------------------------------------------------------


def require_addresses(shard: Path) -> None:
    """Raises UserError if a shard of an earlier output has no addresses."""
    import pyarrow.parquet

    if "address" not in pyarrow.parquet.read_schema(shard).names:
        raise UserError(
            f"dedup.url: {shard} has no addresses to compare with, because it was made without dedup.url; clean the"
            " earlier sources again with dedup.url, or remove it here"
        )


def sign_shard(shard: Path, path: Path, dedup: Dedup) -> None:
    """Write hashes and signatures of the documents of a published shard, for comparison with new documents."""
    import pyarrow
    import pyarrow.parquet

    from pipeline.data.dedup.minhash import sign_texts

    columns: dict[str, list] = {"id": [], "size": [], "hash": [], "signature": [], "address": []}
    needed = ["text", "id", *(["address"] if dedup.url else [])]
    with pyarrow.parquet.ParquetFile(shard) as opened:
        for batch in opened.iter_batches(batch_size=64, columns=needed, use_threads=False):
            texts = batch.column("text").to_pylist()
            nothing = [None] * len(texts)
            encoded = [text.encode() for text in texts]
            columns["id"] += batch.column("id").to_pylist()
            columns["size"] += map(len, encoded)
            columns["hash"] += [hashlib.blake2b(raw, digest_size=16).digest() for raw in encoded]
            columns["address"] += batch.column("address").to_pylist() if dedup.url else nothing
            if dedup.near:
                columns["signature"] += [row.tobytes() for row in sign_texts(texts, dedup.near)]
            else:
                columns["signature"] += nothing
    types = {
        "id": pyarrow.string(),
        "size": pyarrow.int64(),
        "hash": pyarrow.binary(16),
        "signature": pyarrow.binary(),
        "address": pyarrow.binary(16),
    }
    table = pyarrow.table({name: pyarrow.array(values, types[name]) for name, values in columns.items()})
    unit_files.write(table, path, compression="none", write_statistics=False)
