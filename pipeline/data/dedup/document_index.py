"""An index of the documents of all units that passed the filters, one entry each, in arrays on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.cleaning import outcomes, unit_files
from pipeline.data.dedup.exact_substring import UnitDocuments
from pipeline.data.dedup.external_sort import scratch_array
from pipeline.data.sources.sources import Source

TRAIN, HELDOUT, EXACT, NEAR, URL, EMPTIED = range(6)  # decisions
DUPLICATE_REASONS = {EXACT: "exact", NEAR: "near", URL: "url", EMPTIED: "repeated text"}
EARLIER = -1  # the source of documents of an earlier output
# Columns that are filled while units are read: type, and values per document.
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
DECISION_COLUMNS = {"decision": np.uint8, "original": np.int64, "cluster": np.int32}


@dataclass
class Index:
    """One entry per document, in the order of sources, units and rows; those of an earlier output come last, as source
    EARLIER. Arrays of length D."""

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
    rows: dict[str, list[int]]  # how many rows of each unit count; `limit` may end within one
    begins: dict[str, list[int]]  # the first document of each unit
    lines: dict[str, list[int]]  # lines of its file before each unit, if it begins within one
    ends: dict[str, int]  # the document after the last one of each source
    decision: Any  # uint8: TRAIN ... EMPTIED
    original: Any  # int64: the document that is kept for it
    cluster: Any  # int32: documents in its cluster, itself included

    def id_text(self, document: int) -> str:
        """A record id as it is in shards and reports."""
        high, low = self.id[document].tolist()
        return f"{high:016x}{low:016x}"

    @property
    def num_new(self) -> int:
        """Documents that are not of an earlier output."""
        return max(self.ends.values(), default=0)


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
    CorruptFile."""
    builder = _Builder(list(units), width, scratch, score)
    for number, (name, paths) in enumerate(units.items()):
        builder.add_source(number, name, paths, sources[name].limit)
    for number, path in enumerate(earlier):
        table = unit_files.read(path, ["id", "size", "hash", "address", "signature"])
        builder.add(table, EARLIER, number, np.arange(table.num_rows))
    return builder.index()


class _Builder:
    """Appends columns to files while units are read."""

    def __init__(self, names: list[str], width: int, scratch: Path, score: int | None):
        self.names, self.width, self.scratch, self.score = names, width, scratch, score
        scratch.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(scratch / name, "wb") for name in (*COLUMNS, "signature")}
        self.rows: dict[str, list[int]] = {name: [] for name in names}
        self.begins: dict[str, list[int]] = {name: [] for name in names}
        self.lines: dict[str, list[int]] = {name: [] for name in names}
        self.ends: dict[str, int] = {}
        self.number = 0

    def add_source(self, source: int, name: str, paths: list[Path], limit: int | None) -> None:
        columns = ["status", "id", "size", "hash", "address", "signature", "counted"]
        if self.score is not None:
            columns.append("statistics")
        left, lines_before = limit, 0
        for unit, path in enumerate(paths):
            table = unit_files.read(path, columns)
            is_continued, lines_here = outcomes.lines_of(table)
            if not is_continued:
                lines_before = 0
            self.lines[name].append(lines_before)
            lines_before += lines_here
            if left is not None:
                counted = np.cumsum(table["counted"].to_numpy())
                num_rows = int(np.searchsorted(counted, left)) + 1 if left else 0
                table = table.slice(0, num_rows)
                left = max(0, left - (int(counted[-1]) if len(counted) else 0))
            self.rows[name].append(table.num_rows)
            self.begins[name].append(self.number)
            good = np.flatnonzero(table["status"].to_numpy() == "ok").astype(np.int32)
            self.add(table.take(good), source, unit, good)
        self.ends[name] = self.number

    def add(self, table, source: int, unit: int, rows: np.ndarray) -> None:
        number = len(rows)
        values = {
            "source": np.full(number, source),
            "unit": np.full(number, unit),
            "row": rows,
            "size": table["size"].to_numpy(),
            "id": _halves(bytes.fromhex("".join(table["id"].to_pylist()))),
            "hash": _halves(_joined(table["hash"], 16)),
            "address": _halves(_joined(table["address"], 16)),
            "score": np.zeros(number),
        }
        if self.score is not None and source != EARLIER:
            statistics = np.frombuffer(b"".join(table["statistics"].to_pylist()), np.float32)
            values["score"] = statistics.reshape(number, -1)[:, self.score] if number else values["score"]
        for name, (dtype, _) in COLUMNS.items():
            self.files[name].write(np.ascontiguousarray(values[name], dtype).tobytes())
        self.files["signature"].write(_joined(table["signature"], 4 * self.width))
        self.number += number

    def index(self) -> Index:
        for file in self.files.values():
            file.close()
        columns = {
            name: self._opened(name, dtype, (self.number, several) if several > 1 else (self.number,))
            for name, (dtype, several) in COLUMNS.items()
        }
        decisions = {
            name: scratch_array(self.scratch / name, dtype, self.number) for name, dtype in DECISION_COLUMNS.items()
        }
        return Index(
            sources=self.names,
            **columns,
            signature=self._opened("signature", np.uint32, (self.number, self.width)),
            rows=self.rows,
            begins=self.begins,
            lines=self.lines,
            ends=self.ends,
            **decisions,
        )

    def _opened(self, name: str, dtype, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(self.scratch / name, dtype, "r+", shape=shape)


def _joined(column, width: int) -> bytes:
    """Values of a column of bytes one after the other; nulls as zeros."""
    return b"".join(value or bytes(width) for value in column.to_pylist())


def _halves(raw: bytes) -> np.ndarray:
    return np.frombuffer(raw, ">u8").astype(np.uint64).reshape(-1, 2)


# ---- documents by unit -----------------------------------------------------------------------------------------------


def kept_documents(index: Index, units: dict[str, list[Path]]) -> list[UnitDocuments]:
    """The documents of train and heldout, unit by unit."""
    num_earlier = len(index.row) - index.num_new
    kept = []
    for name, paths in units.items():
        bounds = [*index.begins[name], index.ends[name]]
        for path, first, after in zip(paths, bounds[:-1], bounds[1:], strict=True):
            documents = first + np.flatnonzero(index.decision[first:after] <= HELDOUT)
            if len(documents):
                kept.append(UnitDocuments(path, np.asarray(index.row[documents]), documents, shift=num_earlier))
    return kept


def earlier_documents(index: Index, shards: list[Path]) -> list[UnitDocuments]:
    """The documents of an earlier output, shard by shard: they come before all others and are not edited."""
    first, earlier = index.num_new, []
    for number, shard in enumerate(shards):
        documents = first + np.flatnonzero(index.unit[first:] == number)
        rows = np.asarray(index.row[documents])
        earlier.append(UnitDocuments(shard, rows, documents, shift=-first, is_published=True))
    return earlier


def apply_edits(index: Index, kept: list[UnitDocuments], min_tokens: int) -> dict[str, dict[str, int]]:
    """Set the new sizes of documents that were edited, and drop those with fewer than `min_tokens` left. Returns
    {source: {edited_documents, removed_bytes}} of those that stay."""
    sums = {name: {"edited_documents": 0, "removed_bytes": 0} for name in index.sources}
    for part in kept:
        if part.edits is None:
            continue
        edits = unit_files.read(part.edits, ["row", "size", "tokens"])
        documents = part.documents[np.searchsorted(part.rows, edits["row"].to_numpy())]
        if not len(documents):
            continue
        stays = edits["tokens"].to_numpy() >= min_tokens
        index.decision[documents[~stays]] = EMPTIED
        documents, sizes = documents[stays], edits["size"].to_numpy()[stays]
        source_sums = sums[index.sources[int(index.source[part.documents[0]])]]
        source_sums["edited_documents"] += len(documents)
        source_sums["removed_bytes"] += int((index.size[documents] - sizes).sum())
        index.size[documents] = sizes
    return sums


def num_copies(cluster: np.ndarray, upsample: dict[int, int]) -> np.ndarray:
    """How often documents with clusters of these sizes are written to train, int64 [N]."""
    copies = np.ones(len(cluster), np.int64)
    for size in sorted(upsample):
        copies[cluster >= size] = upsample[size]
    return copies
