"""Repeated text within documents that are no duplicates: lines, and runs of tokens, that stood before in the kept
documents of the whole corpus. The first stays.

Lines: the hash of every long enough line is sorted together with its position. Runs: exact, as with a suffix array (Lee
et al., 2022), but in bounded memory and 1.2 bytes of disk for a byte of text: of a run of n tokens at least one of its
windows of n / 2 is chosen by winnowing (Schleimer, Wilkerson & Aiken, 2003), so a run can only be repeated where a
chosen window is; only the windows of n tokens around those are hashed and sorted. Hashes have 64 bits: a false repeat
is expected once in 10**19 / N**2 corpora of N windows.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.core.files import write_atomic
from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.text_arrays import line_tokens, normalise, span_tokens, windows
from pipeline.data.dedup.external_sort import runs as begins_of
from pipeline.data.dedup.external_sort import together

BATCH = 1 << 18  # characters hashed at a time
SHIFT = np.uint64(32)  # a position is document << 32 | line or token


@dataclass(frozen=True)
class Piece:
    """The kept documents of one unit: rows of its file and their numbers in the index; `edits` holds what an earlier
    pass made of some of them. Or, `published`, those of a shard of an earlier output.

    `shift` leads from the number of a document to its place among all, where an earlier output comes first.
    """

    path: Path
    rows: np.ndarray
    documents: np.ndarray
    edits: Path | None = None
    shift: int = 0
    published: bool = False

    @property
    def places(self) -> np.ndarray:
        return self.documents + self.shift


def texts_of(piece: Piece) -> list[str]:
    if piece.published:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(piece.path) as opened:
            return opened.read(["text"], use_threads=False)["text"].to_pylist()
    texts = unit_files.read(piece.path, ["text"]).take(piece.rows)["text"].to_pylist()
    if piece.edits:
        changed = unit_files.read(piece.edits, ["row", "text"])
        place = {row: at for at, row in enumerate(piece.rows.tolist())}
        for row, text in zip(changed["row"].to_pylist(), changed["text"].to_pylist(), strict=True):
            if row in place:  # a shard may begin within a unit, and what was emptied is in none
                texts[place[row]] = text
    return texts


def edit(pieces: list[Piece], pool, folder: Path, lines: int | None, length: int | None) -> list[Piece]:
    """Take repeated lines, then repeated runs of `length` tokens out of the documents of `pieces`, in their order;
    those of an earlier output stay as they are. Returns them with their edits."""
    if lines:
        found = _map(pool, pieces, folder / "lines", _hash_lines, lines)
        again = _again(found, folder / "lines")
        pieces = _edited(pool, pieces, folder / "without-lines", _cut_lines, again, lines)
    if length:
        found = _map(pool, pieces, folder / "chosen", _choose_windows, length)
        shared = _shared(found, folder / "chosen")
        found = _map(pool, pieces, folder / "windows", _hash_windows, length, shared)
        again = _again(found, folder / "windows")
        pieces = _edited(pool, pieces, folder / "without-runs", _cut_runs, again, length)
    return pieces


def _map(pool, pieces: list[Piece], folder: Path, function: Callable, *arguments) -> list[Path]:
    """One file for each piece, made by `function(piece, path, *arguments)` where a former run has not made it."""
    paths = [folder / f"{number:08d}" for number in range(len(pieces))]
    for number, (piece, path) in enumerate(zip(pieces, paths, strict=True)):
        if not path.exists() and not (piece.published and function in (_cut_lines, _cut_runs)):
            pool.submit(lambda *_: None, number, 0, function, piece, path, *arguments)
    pool.drain()
    return paths


def _edited(pool, pieces: list[Piece], folder: Path, function: Callable, *arguments) -> list[Piece]:
    paths = _map(pool, pieces, folder, function, *arguments)
    return [piece if piece.published else replace(piece, edits=path) for piece, path in zip(pieces, paths, strict=True)]


# ---- in the parent: what stood before --------------------------------------------------------------------------------


def _grouped(paths: list[Path], folder: Path):
    """(position, first of its hash?, number with its hash) of all hashes, part by part."""
    total = sum(path.stat().st_size for path in paths if path.exists()) // 16
    for found in together(map(_loaded, paths), total, folder / "parts"):
        order = np.lexsort((found[:, 1], found[:, 0]))
        begins = begins_of(found[order, 0])
        yield found[order, 1], begins == np.arange(len(order)), np.bincount(begins, minlength=len(order))[begins]


def _collected(parts, path: Path) -> Path:
    """Positions in one sorted file."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part, np.uint64).tobytes())
    if path.stat().st_size:
        np.memmap(path, np.uint64, "r+").sort()
    return path


def _again(paths: list[Path], folder: Path) -> Path:
    return _collected((positions[~first] for positions, first, _ in _grouped(paths, folder)), folder / "again")


def _shared(paths: list[Path], folder: Path) -> Path:
    return _collected((positions[number > 1] for positions, _, number in _grouped(paths, folder)), folder / "shared")


def _positions(path: Path, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in `documents`, line or token) of the positions in a sorted file."""
    if not len(documents) or not path.stat().st_size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    known = np.memmap(path, np.uint64, "r")
    low, high = np.searchsorted(known, np.array([documents[0], documents[-1] + 1], np.uint64) << SHIFT)
    found = np.asarray(known[low:high])
    place = np.searchsorted(documents, (found >> SHIFT).astype(np.int64))
    return place, (found & np.uint64(0xFFFFFFFF)).astype(np.int64)


# ---- in the workers --------------------------------------------------------------------------------------------------


def _batches(texts: list[str]):
    """(first text, texts), so many at a time that numpy's arrays stay in the cache."""
    begin = size = 0
    for at, text in enumerate(texts, 1):
        size += len(text)
        if size > BATCH or at == len(texts):
            yield begin, texts[begin:at]
            begin, size = at, 0


def _saved(path: Path, parts: list[np.ndarray]) -> None:
    raw = np.concatenate(parts).tobytes() if parts else b""
    write_atomic(path, raw + zlib.crc32(raw).to_bytes(8, "little"))


def _loaded(path: Path) -> np.ndarray:
    """(hash, position), uint64 [n, 2]. Raises outcomes.Torn."""
    raw = path.read_bytes() if path.exists() else b""
    if len(raw) % 16 != 8 or zlib.crc32(raw[:-8]).to_bytes(8, "little") != raw[-8:]:
        raise unit_files.Torn(path, "is damaged" if path.exists() else "is missing")
    return np.frombuffer(raw, np.uint64, (len(raw) - 8) // 8).reshape(-1, 2)


def _hash_lines(piece: Piece, path: Path, least: int) -> None:
    parts = []
    for begin, texts in _batches(texts_of(piece)):
        hashes, owner, line, number = line_tokens(texts)
        long = number >= least
        parts.append(
            np.column_stack((hashes, piece.places[begin + owner].astype(np.uint64) << SHIFT | line.astype(np.uint64)))[
                long
            ]
        )
    _saved(path, parts)


def _choose_windows(piece: Piece, path: Path, length: int) -> None:
    size, span = length // 2, length - length // 2 + 1
    parts = []
    for begin, texts in _batches(texts_of(piece)):
        starts, _, bounds, hashes = span_tokens(texts)
        hashed, valid = windows(hashes, bounds, size)
        hashed = np.where(valid, hashed, ~np.uint64(0))
        least = _sliding(hashed, span, np.minimum, ~np.uint64(0))
        chosen = valid & (_sliding(least[::-1], span, np.maximum, np.uint64(0))[::-1] == hashed)
        parts.append(np.column_stack((hashed, _place(piece, begin, bounds, len(starts))))[chosen])
    _saved(path, parts)


def _hash_windows(piece: Piece, path: Path, length: int, shared: Path) -> None:
    span = length - length // 2 + 1
    place, token = _positions(shared, piece.places)
    parts = []
    for begin, texts in _batches(texts_of(piece)):
        starts, _, bounds, hashes = span_tokens(texts)
        near = np.zeros(len(starts), np.uint64)
        here = (place >= begin) & (place < begin + len(texts))
        near[bounds[place[here] - begin] + token[here]] = 1
        hashed, valid = windows(hashes, bounds, length)
        wanted = valid & (_sliding(near, span, np.maximum, np.uint64(0)) > 0)
        parts.append(np.column_stack((hashed, _place(piece, begin, bounds, len(starts))))[wanted])
    _saved(path, parts)


def _place(piece: Piece, begin: int, bounds: np.ndarray, number: int) -> np.ndarray:
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return piece.places[begin + owner].astype(np.uint64) << SHIFT | (np.arange(number) - bounds[owner]).astype(
        np.uint64
    )


def _sliding(values: np.ndarray, width: int, operation, neutral) -> np.ndarray:
    """operation.reduce(values[i : i + width]) of each i; beyond the end is `neutral`."""
    found = np.concatenate((values, np.full(width, neutral, values.dtype)))
    size = 1
    while 2 * size <= width:
        found = operation(found[:-size], found[size:])
        size *= 2
    rest = width - size
    return operation(found[: len(values)], found[rest : rest + len(values)])


def _cut_lines(piece: Piece, path: Path, again: Path, least: int) -> None:
    place, line = _positions(again, piece.places)
    texts = texts_of(piece)
    changed = {}
    for at in np.unique(place).tolist():
        gone = set(line[place == at].tolist())
        changed[at] = normalise(
            "\n".join(text for number, text in enumerate(texts[at].split("\n")) if number not in gone)
        )
    _write_edits(piece, path, texts, changed)


def _cut_runs(piece: Piece, path: Path, again: Path, length: int) -> None:
    place, token = _positions(again, piece.places)
    texts = texts_of(piece)
    changed = {}
    for at in np.unique(place).tolist():
        starts, ends, _, _ = span_tokens([texts[at]])
        marks = np.zeros(len(starts) + 1, np.int64)
        first = token[place == at]
        marks[first] += 1
        np.subtract.at(marks, first + length, 1)
        gone = np.cumsum(marks[:-1]) > 0
        changed[at] = _without(texts[at], starts, ends, gone)
    _write_edits(piece, path, texts, changed)


def _without(text: str, starts: np.ndarray, ends: np.ndarray, gone: np.ndarray) -> str:
    """The text without the tokens that are gone, and without what stands between a run of them and the next token on
    its line."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], gone, [False]))))
    kept, at = [], 0
    for first, after in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        kept.append(text[at : starts[first]])
        at = int(starts[after]) if after < len(starts) else len(text)
        newline = text.find("\n", ends[after - 1], at)
        at = newline if newline >= 0 else at
    return normalise("".join([*kept, text[at:]]))


def _write_edits(piece: Piece, path: Path, texts: list[str], changed: dict[int, str]) -> None:
    """All changed texts of the unit, those of an earlier pass included."""
    import pyarrow

    if piece.edits:
        before = unit_files.read(piece.edits, ["row"])["row"].to_numpy()
        for at in np.searchsorted(piece.rows, before).tolist():
            changed.setdefault(at, texts[at])
    order = sorted(changed)
    numbers = np.diff(span_tokens([changed[at] for at in order])[2]) if order else np.zeros(0, np.int64)
    columns = {
        "row": pyarrow.array(piece.rows[order] if order else [], pyarrow.int32()),
        "text": pyarrow.array([changed[at] for at in order], pyarrow.string()),
        "size": pyarrow.array([len(changed[at].encode()) for at in order], pyarrow.int64()),
        "tokens": pyarrow.array(numbers, pyarrow.int64()),
    }
    unit_files.write(pyarrow.table(columns), path, compression="lz4")
