"""The documents of all units that passed the filters, one entry each, in arrays on disk."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.cleaning import unit_files
from pipeline.data.dedup.exact_substring import Piece
from pipeline.data.dedup.external_sort import array
from pipeline.data.sources.sources import Source

TRAIN, HELDOUT, EXACT, NEAR, URL, EMPTIED = range(6)
REASONS = {EXACT: "exact", NEAR: "near", URL: "url", EMPTIED: "repeated text"}  # of those that are left out
COLUMNS = {
    "source": (np.int16, 1),
    "unit": (np.int32, 1),
    "row": (np.int32, 1),
    "size": (np.int64, 1),
    "id": (np.uint64, 2),
    "hash": (np.uint64, 2),
    "address": (np.uint64, 2),
    "score": (np.float32, 1),
}


@dataclass
class Index:
    """One entry for each document, in the order of sources, units and rows; those of an earlier output come last, as
    source -1. Arrays of length D."""

    sources: list[str]  # sorted
    source: Any  # int16: number of its source
    unit: Any  # int32
    row: Any  # int32
    size: Any  # int64: bytes of text
    id: Any  # uint64 [D, 2]
    hash: Any  # uint64 [D, 2]: of the normalised text
    address: Any  # uint64 [D, 2]: of its address; 0 if it has none
    score: Any  # float32: the classifier's, for `keep: quality`; else 0
    signature: Any  # uint32 [D, bands * rows]
    rows: dict[str, list[int]]  # how many rows of each unit count; `limit` may end in the middle of one
    begins: dict[str, list[int]]  # the first document of each unit
    lines: dict[str, list[int]]  # lines of its file before each unit, if it begins within one
    ends: dict[str, int]  # the document after the last one of each source
    fate: Any  # uint8: TRAIN ... EMPTIED
    original: Any  # int64: the document that is kept for it
    cluster: Any  # int32: documents in its cluster, itself included


def build(
    sources: dict[str, Source],
    units: dict[str, list[Path]],
    earlier: list[Path],
    width: int,
    scratch: Path,
    score: int | None = None,
) -> Index:
    """Read the outcomes of all units. `earlier` are signed shards of an earlier output, `width` is that of a
    signature, `score` the column of the statistics that holds the classifier's score, if it is needed. Raises
    outcomes.Torn for a file that is not what was written."""
    names = list(units)
    scratch.mkdir(parents=True, exist_ok=True)
    files = {name: open(scratch / name, "wb") for name in (*COLUMNS, "signature")}
    rows: dict[str, list[int]] = {name: [] for name in names}
    begins: dict[str, list[int]] = {name: [] for name in names}
    lines: dict[str, list[int]] = {name: [] for name in names}
    ends: dict[str, int] = {}
    number = 0

    def add(table, source: int, unit: int, at: np.ndarray) -> int:
        scores = (
            np.frombuffer(b"".join(table["statistics"].to_pylist()), np.float32).reshape(len(at), -1)[:, score]
            if score is not None and source >= 0
            else np.zeros(len(at))
        )
        values = {
            "source": np.full(len(at), source),
            "unit": np.full(len(at), unit),
            "row": at,
            "size": table["size"].to_numpy(),
            "id": _halves(bytes.fromhex("".join(table["id"].to_pylist()))),
            "hash": _halves(_joined(table["hash"], 16)),
            "address": _halves(_joined(table["address"], 16)),
            "score": scores,
        }
        for name, (dtype, _) in COLUMNS.items():
            files[name].write(np.ascontiguousarray(values[name], dtype).tobytes())
        files["signature"].write(_joined(table["signature"], 4 * width))
        return len(at)

    for place, (name, paths) in enumerate(units.items()):
        left, before = sources[name].limit, 0
        for unit, path in enumerate(paths):
            outcome = unit_files.read(
                path,
                [
                    "status",
                    "id",
                    "size",
                    "hash",
                    "address",
                    "signature",
                    "counted",
                    *(["statistics"] if score is not None else []),
                ],
            )
            continued, lines_here = json.loads(outcome.schema.metadata[b"lines"])
            lines[name].append(before if continued else 0)
            before = lines[name][-1] + lines_here
            if left is not None:
                counted = np.cumsum(outcome["counted"].to_numpy())
                outcome = outcome.slice(0, int(np.searchsorted(counted, left)) + 1 if left else 0)
                left = max(0, left - (int(counted[-1]) if len(counted) else 0))
            rows[name].append(outcome.num_rows)
            begins[name].append(number)
            good = np.flatnonzero(outcome["status"].to_numpy() == "ok").astype(np.int32)
            number += add(outcome.take(good), place, unit, good)
        ends[name] = number
    for unit, path in enumerate(earlier):
        table = unit_files.read(path, ["id", "size", "hash", "address", "signature"])
        number += add(table, -1, unit, np.arange(table.num_rows))
    for file in files.values():
        file.close()

    def opened(name: str, dtype, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, dtype) if 0 in shape else np.memmap(scratch / name, dtype, "r+", shape=shape)

    columns = {
        name: opened(name, dtype, (number, several) if several > 1 else (number,))
        for name, (dtype, several) in COLUMNS.items()
    }
    fates = {
        name: array(scratch / name, dtype, number)
        for name, dtype in (("fate", np.uint8), ("original", np.int64), ("cluster", np.int32))
    }
    signature = opened("signature", np.uint32, (number, width))
    return Index(
        sources=names, **columns, signature=signature, rows=rows, begins=begins, lines=lines, ends=ends, **fates
    )


def _joined(column, width: int) -> bytes:
    """Values of a column of bytes one after the other; nulls as zeros."""
    return b"".join(value or bytes(width) for value in column.to_pylist())


def _halves(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)


def kept(index: Index, units: dict[str, list[Path]]) -> list[Piece]:
    """The documents that go into train or heldout, unit by unit."""
    pieces, new = [], max(index.ends.values(), default=0)
    for name, paths in units.items():
        for path, first, after in zip(
            paths, index.begins[name], [*index.begins[name][1:], index.ends[name]], strict=True
        ):
            documents = first + np.flatnonzero(index.fate[first:after] <= HELDOUT)
            if len(documents):
                pieces.append(Piece(path, np.asarray(index.row[documents]), documents, shift=len(index.row) - new))
    return pieces


def before(index: Index, shards: list[Path]) -> list[Piece]:
    """The documents of an earlier output, shard by shard: they stand before all others and are not edited."""
    pieces, new = [], max(index.ends.values(), default=0)
    for number, shard in enumerate(shards):
        documents = new + np.flatnonzero(index.unit[new:] == number)
        pieces.append(Piece(shard, np.asarray(index.row[documents]), documents, shift=-new, published=True))
    return pieces


def take_over(index: Index, pieces: list[Piece], least: int) -> dict[str, dict[str, int]]:
    """New sizes of documents that were edited; those with fewer tokens than `least` are left out. Returns {source:
    {edited_documents, removed_bytes}} of what is kept."""
    sums = {name: {"edited_documents": 0, "removed_bytes": 0} for name in index.sources}
    for piece in pieces:
        if piece.edits is None:
            continue
        edits = unit_files.read(piece.edits, ["row", "size", "tokens"])
        documents = piece.documents[np.searchsorted(piece.rows, edits["row"].to_numpy())]
        if not len(documents):
            continue
        good = edits["tokens"].to_numpy() >= least
        index.fate[documents[~good]] = EMPTIED
        documents, sizes = documents[good], edits["size"].to_numpy()[good]
        entry = sums[index.sources[int(index.source[piece.documents[0]])]]
        entry["edited_documents"] += len(documents)
        entry["removed_bytes"] += int((index.size[documents] - sizes).sum())
        index.size[documents] = sizes
    return sums


def times(cluster: np.ndarray, upsample: dict[int, int]) -> np.ndarray:
    """How often documents with clusters of these sizes are written to train."""
    found = np.ones(len(cluster), np.int64)
    for size in sorted(upsample):
        found[cluster >= size] = upsample[size]
    return found
