"""Units of cleaning: a few megabytes of one source, cleaned by one process, with the outcome of every record in one
file."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core import faults
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.data.cleaning import unit_files
from pipeline.data.dedup.minhash import Dedup
from pipeline.data.sources import records as reading
from pipeline.data.sources.byte_ranges import Range, cut_source, read_piece
from pipeline.data.sources.formats import Bad, Chunk, FieldNames, Skipped
from pipeline.data.sources.sources import Source, needed_fields
from pipeline.data.sources.templates import MissingField, render

if TYPE_CHECKING:  # the recipe's models load without numpy
    from pipeline.data.cleaning.blocklist import Block
    from pipeline.data.cleaning.steps import Steps

# A row for each record, in order. `status`: ok, not selected, bad or filtered, with `reason`; `whole`: the text of a
# document that is left out, with keep_rejected: full; `bytes` of the raw and `size` of the normalised text; `lost`:
# bytes of the file that could not be unpacked; `hash` of the text; `address`: hash of its URL; `signature` for near
# duplicates; `counted`: 1 if the record counts towards `limit`; `language`, if it was asked for; of every document that
# could be read, `kind` (which thresholds judge it), `statistics` (float32), `failed` (a bit for each rule; both see
# data/steps.py), `changed` (what was done to its text: JSON) and `matched` (the evaluation set that it has text of, and
# its items: JSON); of a web page, `shown` (characters that it shows) and `extracted` (those in its text).
# Where the unit is a part of a file, lines in `place` count from its beginning; the metadata `lines` has whether that
# is so, and how many lines end in the unit (see outcomes.at_lines).
OUTCOME = (
    "place",
    "id",
    "status",
    "reason",
    "excerpt",
    "text",
    "whole",
    "bytes",
    "size",
    "lost",
    "hash",
    "address",
    "signature",
    "counted",
    "language",
    "kind",
    "statistics",
    "failed",
    "changed",
    "matched",
    "shown",
    "extracted",
)
# texts hashed at a time: numpy's arrays of a batch then stay in the cache (1 << 22: half the speed)
BATCH_CHARACTERS = 1 << 18


def fields_needed(source: Source, dedup: Dedup, block: "Block") -> frozenset[str]:
    """Fields that cleaning looks up in the records of a source."""
    return needed_fields(source, dedup.url, block.url if block.urls else None)


def cut(source: Source, name: str, size: int, needed: FieldNames = None) -> Iterator[list[Range | Chunk]]:
    """Pieces together up to `size` bytes: big files are cut, small ones joined. A part of a file that is not its first
    is a unit of its own, so that all its lines are counted from one place."""
    unit, weight = [], 0
    for piece in cut_source(source, name, size, needed):
        if unit and (weight + piece.weight > size or unit[-1].continued):
            yield unit
            unit, weight = [], 0
        unit.append(piece)
        weight += piece.weight
    if unit:
        yield unit


def clean_unit(unit: list[Range | Chunk], source: Source, name: str, steps: "Steps", path: Path) -> int:
    """Clean one unit and publish its outcome, a row for each record in order. Returns how many records count towards
    `limit`."""
    import pyarrow

    from pipeline.data.cleaning.steps import excerpt, judge, whole

    rows, raw, chunks, lines = [], [], [], 0
    for piece in unit:
        found, number = read_piece(piece, source, name, fields_needed(source, steps.dedup, steps.block))
        chunks, lines = chunks + found, lines + number
    for item in (item for chunk in chunks for item in reading.parse(chunk)):
        row: dict[str, Any] = dict.fromkeys(OUTCOME)
        row.update(place=_valid(item.place), status="ok", bytes=0, lost=0, counted=0)
        rows.append(row)
        if isinstance(item, Bad):
            row.update(status="bad", reason=item.reason, excerpt=excerpt(_valid(item.raw), steps.mask), lost=item.lost)
            continue
        if isinstance(item, Skipped):
            row.update(status="not selected", reason=item.reason)
            continue
        row["id"] = item.id
        if left_out := reading.deselected_by(source, item):
            row.update(status="not selected", reason=left_out)
            continue
        row["counted"] = 1
        try:
            text = reading.text_of(source, item)
            row["bytes"] = len(text) if text.isascii() else len(text.encode())
        except MissingField:
            shown = _valid(json.dumps(item.fields, ensure_ascii=False, default=str))
            row.update(
                status="bad", reason="missing field", excerpt=excerpt(shown, steps.mask), whole=whole(shown, steps)
            )
        except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
            shown = _valid(text)
            row.update(
                status="bad", reason="lone surrogate", excerpt=excerpt(shown, steps.mask), whole=whole(shown, steps)
            )
        else:
            row["address"] = address_of(steps.dedup.url, item)
            row["url"] = url_of(steps.block.url, item) if steps.block.urls else None  # for the block list; not stored
            row["changed"] = item.changed
            if item.visible:
                row.update(shown=item.visible.page, extracted=item.visible.text)
            raw.append((row, text))
    while raw:
        size = number = 0
        while number < len(raw) and size < BATCH_CHARACTERS:
            size, number = size + len(raw[number][1]), number + 1
        judge(raw[:number], steps)
        del raw[:number]
    binary = {
        "hash": pyarrow.binary(16),
        "address": pyarrow.binary(16),
        "signature": pyarrow.binary(),
        "bytes": pyarrow.int64(),
        "size": pyarrow.int64(),
        "lost": pyarrow.int64(),
        "counted": pyarrow.int8(),
    }
    binary |= {"shown": pyarrow.int64(), "extracted": pyarrow.int64()}
    binary |= {"kind": pyarrow.int8(), "statistics": pyarrow.binary(), "failed": pyarrow.int64()}
    columns = {key: pyarrow.array([row[key] for row in rows], binary.get(key, pyarrow.string())) for key in OUTCOME}
    # Three are random bits. Packing the text by a third takes as long as finding its tokens' hashes.
    compression = {key: "none" if key in ("hash", "address", "signature", "text") else "lz4" for key in OUTCOME}
    faults.point("save")
    unit_files.write(
        pyarrow.table(columns).replace_schema_metadata({"lines": json.dumps([unit[0].continued, lines])}),
        path,
        compression=compression,
        use_dictionary=["status", "reason", "language"],
        write_statistics=False,
    )
    return sum(row["counted"] for row in rows)


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def url_of(template: str, record: reading.Record) -> str | None:
    """A record's address by a field or template; None where it has none."""
    try:
        return render(template if "{" in template else "{" + template + "}", record.fields, record.place)
    except MissingField:
        return None


def address_of(template: str | None, record: reading.Record) -> bytes | None:
    """Hash of a record's address without what does not tell pages apart: scheme, `www.`, fragment, closing slash,
    and the case of the host."""
    if not template:
        return None
    try:
        address = render(template if "{" in template else "{" + template + "}", record.fields, record.place).strip()
    except MissingField:
        return None
    address = re.sub(r"^[a-zA-Z][a-zA-Z0-9+.-]*://", "", address.partition("#")[0])
    host, slash, rest = address.partition("/")
    address = (re.sub(r"^www\.", "", host.lower()) + slash + rest).rstrip("/")
    return hashlib.blake2b(address.encode(errors="replace"), digest_size=16).digest() if address else None


def counted(path: Path) -> int:
    """Records of a finished unit that count towards `limit`. Raises outcomes.Torn."""
    import pyarrow.compute

    return pyarrow.compute.sum(unit_files.read(path, ["counted"])["counted"]).as_py() or 0


def refuse_without_addresses(shard: Path) -> None:
    import pyarrow.parquet

    if "address" not in pyarrow.parquet.read_schema(shard).names:
        raise UserError(
            f"dedup.url: {shard} was made without it and has no addresses to compare with; clean the earlier sources"
            " again with dedup.url, or leave it out here"
        )


def sign_shard(shard: Path, path: Path, dedup: Dedup) -> None:
    """Hashes and signatures of a published shard, for comparison with new documents."""
    import pyarrow
    import pyarrow.parquet

    from pipeline.data.dedup.minhash import signed

    columns: dict[str, list] = {"id": [], "size": [], "hash": [], "signature": [], "address": []}
    with pyarrow.parquet.ParquetFile(shard) as opened:
        for batch in opened.iter_batches(
            batch_size=64, columns=["text", "id", *(["address"] if dedup.url else [])], use_threads=False
        ):
            texts = batch.column("text").to_pylist()
            data = [text.encode() for text in texts]
            columns["id"] += batch.column("id").to_pylist()
            columns["size"] += map(len, data)
            columns["address"] += batch.column("address").to_pylist() if dedup.url else [None] * len(texts)
            columns["hash"] += [hashlib.blake2b(raw, digest_size=16).digest() for raw in data]
            columns["signature"] += (
                [row.tobytes() for row in signed(texts, dedup.near)] if dedup.near else [None] * len(texts)
            )
    types = {
        "id": pyarrow.string(),
        "size": pyarrow.int64(),
        "hash": pyarrow.binary(16),
        "signature": pyarrow.binary(),
        "address": pyarrow.binary(16),
    }
    table = pyarrow.table({key: pyarrow.array(values, types[key]) for key, values in columns.items()})
    unit_files.write(table, path, compression="none", write_statistics=False)


@dataclass(frozen=True)
class Rows:
    """Documents of one unit that go into a shard: rows of its file, the sizes of their clusters, and how often each
    is written."""

    source: str
    unit: Path
    rows: Any
    clusters: Any
    times: Any
    edits: Path | None


def write_shard(pieces: list[Rows], path: Path, addresses: bool) -> None:
    """Gather rows of units into one shard."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet

    from pipeline.data.dedup.exact_substring import Piece, texts_of

    tables = []
    for piece in pieces:
        again = np.repeat(np.arange(len(piece.rows)), piece.times)
        table = unit_files.read(piece.unit, ["text", "id", "language", "address"]).take(piece.rows)
        text = (
            pyarrow.chunked_array([texts_of(Piece(piece.unit, piece.rows, piece.rows, piece.edits))])
            if piece.edits
            else table["text"]
        )
        columns = {
            "text": text,
            "source": pyarrow.array([piece.source] * len(piece.rows)),
            "id": table["id"],
            "cluster": pyarrow.array(piece.clusters, pyarrow.int32()),
            "language": table["language"].cast(pyarrow.string()),
        }
        columns |= {"address": table["address"]} if addresses else {}
        tables.append(pyarrow.table(columns).take(again) if len(again) > len(piece.rows) else pyarrow.table(columns))
    buffer = pyarrow.BufferOutputStream()
    shard = pyarrow.concat_tables(tables).combine_chunks()
    pyarrow.parquet.write_table(
        shard, buffer, compression="zstd", row_group_size=1 << 14, use_dictionary=["source"], write_statistics=False
    )
    faults.point("save")
    write_atomic(path, buffer.getvalue())
