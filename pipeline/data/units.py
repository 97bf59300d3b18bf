"""Units of cleaning: a few megabytes of one source, cleaned by one process, with the outcome of every record in one file."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import faults
from pipeline.data import sources as reading
from pipeline.data.sources import Bad, Chunk, MissingField, Source
from pipeline.files import write_atomic

if TYPE_CHECKING:  # the recipe's models load without numpy
    from pipeline.data.steps import Steps

# A row for each record, in order. `status`: ok, not selected, bad or filtered, with `reason`; `bytes` of the raw and `size` of the normalised text; `hash` of the
# latter; `signature` for near duplicates; `counted`: 1 if the record counts towards `limit`; `language`, if it was asked for; of every document that could be read, `kind`
# (which thresholds judge it), `statistics` (float32, see data/steps.py) and `failed` (a bit for each rule).
OUTCOME = ("place", "id", "status", "reason", "excerpt", "text", "bytes", "size", "hash", "signature", "counted", "language", "kind", "statistics", "failed")
BATCH_CHARACTERS = 1 << 18  # texts hashed at a time: numpy's arrays of a batch then stay in the cache (1 << 22: half the speed)


def cut(source: Source, name: str, size: int) -> Iterator[list[Chunk]]:
    """Chunks together up to `size` bytes: big files are cut, small ones joined."""
    unit, weight = [], 0
    for chunk in reading.chunks(source, name, size):
        if unit and weight + chunk.weight > size:
            yield unit
            unit, weight = [], 0
        unit.append(chunk)
        weight += chunk.weight
    if unit:
        yield unit


def clean_unit(unit: list[Chunk], source: Source, steps: "Steps", path: Path) -> int:
    """Clean one unit and publish its outcome, a row for each record in order. Returns how many records count towards `limit`."""
    import pyarrow
    import pyarrow.parquet

    from pipeline.data.steps import judge

    rows, raw = [], []
    for item in (item for chunk in unit for item in reading.parse(chunk)):
        row = dict.fromkeys(OUTCOME)
        row.update(place=_valid(item.place), status="ok", bytes=0, counted=0)
        rows.append(row)
        if isinstance(item, Bad):
            row.update(status="bad", reason=item.reason, excerpt=_valid(item.raw))
            continue
        row["id"] = item.id
        if left_out := reading.deselected(source, item):
            row.update(status="not selected", reason=left_out)
            continue
        row["counted"] = 1
        try:
            text = reading.text_of(source, item)
            row["bytes"] = len(text.encode())
        except MissingField:
            row.update(status="bad", reason="missing field", excerpt=_valid(json.dumps(item.fields, ensure_ascii=False, default=str)[: reading.EXCERPT]))
        except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
            row.update(status="bad", reason="lone surrogate", excerpt=_valid(text[: reading.EXCERPT]))
        else:
            raw.append((row, text))
    while raw:
        size = number = 0
        while number < len(raw) and size < BATCH_CHARACTERS:
            size, number = size + len(raw[number][1]), number + 1
        judge(raw[:number], steps)
        del raw[:number]
    binary = {"hash": pyarrow.binary(16), "signature": pyarrow.binary(), "bytes": pyarrow.int64(), "size": pyarrow.int64(), "counted": pyarrow.int8()}
    binary |= {"kind": pyarrow.int8(), "statistics": pyarrow.binary(), "failed": pyarrow.int64()}
    columns = {key: pyarrow.array([row[key] for row in rows], binary.get(key, pyarrow.string())) for key in OUTCOME}
    buffer = io.BytesIO()
    compression = {key: "none" if key in ("hash", "signature") else "zstd" for key in OUTCOME}  # the two are random bits
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression=compression, use_dictionary=["status", "reason", "language"])
    faults.point("save")
    write_atomic(path, buffer.getvalue())
    return sum(row["counted"] for row in rows)


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def counted(path: Path) -> int:
    """Records of a finished unit that count towards `limit`."""
    import pyarrow.compute
    import pyarrow.parquet

    return pyarrow.compute.sum(pyarrow.parquet.read_table(path, columns=["counted"], use_threads=False)["counted"]).as_py() or 0


def write_shard(pieces: list[tuple[str, Path, Any]], path: Path) -> None:
    """Gather rows of units, (source, unit file, row numbers) each, into one shard."""
    import pyarrow
    import pyarrow.parquet

    tables = []
    for name, unit, rows in pieces:
        table = pyarrow.parquet.read_table(unit, columns=["text", "id"], use_threads=False).take(rows)
        tables.append(pyarrow.table({"text": table["text"], "source": pyarrow.array([name] * len(rows)), "id": table["id"]}))
    buffer = io.BytesIO()
    shard = pyarrow.concat_tables(tables).combine_chunks()
    pyarrow.parquet.write_table(shard, buffer, compression="zstd", row_group_size=1 << 14, use_dictionary=["source"], write_statistics=False)
    faults.point("save")
    write_atomic(path, buffer.getvalue())
