"""Repeated text within documents that are not duplicates: lines, and runs of tokens, that occurred earlier in the kept
documents of the entire corpus. The first occurrence stays.

Lines: the hash of every line that is long enough is sorted together with its position. Runs: exact, as with a suffix
array (Lee et al., 2022), but in bounded memory and 1.2 bytes of disk per byte of text: of a run of n tokens at least
one of its windows of n / 2 is chosen by winnowing (Schleimer, Wilkerson & Aiken, 2003), so a run can only be repeated
where a chosen window is; only the windows of n tokens around those are hashed and sorted. Hashes have 64 bits: a false
repeat is expected once in 10**19 / N**2 corpora of N windows.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.core.files import write_atomic
from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.process_pool import Pool
from pipeline.data.cleaning.token_hashes import line_tokens, span_tokens, windows
from pipeline.data.dedup.external_sort import grouped_by_key, run_starts

BATCH_CHARACTERS = 1 << 18  # hashed at a time
SHIFT = np.uint64(32)  # a position is document << 32 | line or token
NO_HASH = ~np.uint64(0)


@dataclass(frozen=True)
class UnitDocuments:
    """The kept documents of one unit: rows of its file and their numbers in the index; `edits` is the file of what an
    earlier pass made of some of them. Or, if `is_published`, those of a shard of an earlier output.

    A document's place among all documents, where those of an earlier output come first, is its number plus `shift`.
    """

    path: Path
    rows: np.ndarray
    documents: np.ndarray
    edits: Path | None = None
    shift: int = 0
    is_published: bool = False

    @property
    def places(self) -> np.ndarray:
        return self.documents + self.shift


def texts_of(part: UnitDocuments) -> list[str]:
    """The texts of documents, after earlier passes."""
    if part.is_published:
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(part.path) as opened:
            return opened.read(["text"], use_threads=False)["text"].to_pylist()
    texts = unit_files.read(part.path, ["text"]).take(part.rows)["text"].to_pylist()
    if part.edits:
        edits = unit_files.read(part.edits, ["row", "text"])
        index_of_row = {row: index for index, row in enumerate(part.rows.tolist())}
        for row, text in zip(edits["row"].to_pylist(), edits["text"].to_pylist(), strict=True):
            if row in index_of_row:  # a shard may begin within a unit, and documents that were emptied are in none
                texts[index_of_row[row]] = text
    return texts


def remove_repeats(
    parts: list[UnitDocuments], pool: Pool, folder: Path, lines: int | None, runs: int | None
) -> list[UnitDocuments]:
    """Remove repeated lines of `lines` tokens or more, then repeated runs of `runs` tokens, from documents, in their
    order; those of an earlier output stay as they are. Returns the documents with their edits."""
    if lines:
        hashes = _map(pool, parts, folder / "lines", _hash_lines, lines)
        repeats = _positions_of_repeats(hashes, folder / "lines")
        parts = _edit(pool, parts, folder / "without-lines", _cut_lines, repeats, lines)
    if runs:
        hashes = _map(pool, parts, folder / "chosen", _choose_windows, runs)
        shared = _positions_of_shared(hashes, folder / "chosen")
        hashes = _map(pool, parts, folder / "windows", _hash_windows, runs, shared)
        repeats = _positions_of_repeats(hashes, folder / "windows")
        parts = _edit(pool, parts, folder / "without-runs", _cut_runs, repeats, runs)
    return parts


def _map(pool: Pool, parts: list[UnitDocuments], folder: Path, function: Callable, *arguments) -> list[Path]:
    """One file per part, made by `function(part, path, *arguments)` if an earlier run has not made it."""
    paths = [folder / f"{number:08d}" for number in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        is_edit_of_published = part.is_published and function in (_cut_lines, _cut_runs)
        if not path.exists() and not is_edit_of_published:
            pool.submit(function, part, path, *arguments)
    pool.drain()
    return paths


def _edit(pool: Pool, parts: list[UnitDocuments], folder: Path, function: Callable, *arguments) -> list[UnitDocuments]:
    paths = _map(pool, parts, folder, function, *arguments)
    return [part if part.is_published else replace(part, edits=path) for part, path in zip(parts, paths, strict=True)]


# ---- in the stage's process: what occurred earlier -------------------------------------------------------------------


def _grouped_hashes(paths: list[Path], folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(position, whether it is the first with its hash, number with its hash) of all hashes, part by part."""
    total = sum(path.stat().st_size for path in paths if path.exists()) // 16
    for part in grouped_by_key(map(_load, paths), total, folder / "parts"):
        order = np.lexsort((part[:, 1], part[:, 0]))
        starts = run_starts(part[order, 0])
        number = np.bincount(starts, minlength=len(order))[starts]
        yield part[order, 1], starts == np.arange(len(order)), number


def _positions_of_repeats(paths: list[Path], folder: Path) -> Path:
    grouped = _grouped_hashes(paths, folder)
    return _write_sorted((positions[~is_first] for positions, is_first, _ in grouped), folder / "again")


def _positions_of_shared(paths: list[Path], folder: Path) -> Path:
    grouped = _grouped_hashes(paths, folder)
    return _write_sorted((positions[number > 1] for positions, _, number in grouped), folder / "shared")


def _write_sorted(parts: Iterator[np.ndarray], path: Path) -> Path:
    """Positions in one sorted file."""
    with open(path, "wb") as file:
        for part in parts:
            file.write(np.ascontiguousarray(part, np.uint64).tobytes())
    if path.stat().st_size:
        np.memmap(path, np.uint64, "r+").sort()
    return path


def _read_positions(path: Path, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index in `documents`, line or token) of the positions in a sorted file."""
    if not len(documents) or not path.stat().st_size:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    all_positions = np.memmap(path, np.uint64, "r")
    bounds = np.array([documents[0], documents[-1] + 1], np.uint64) << SHIFT
    low, high = np.searchsorted(all_positions, bounds)
    positions = np.asarray(all_positions[low:high])
    index = np.searchsorted(documents, (positions >> SHIFT).astype(np.int64))
    return index, (positions & np.uint64(0xFFFFFFFF)).astype(np.int64)


# ---- in the workers: hashes ------------------------------------------------------------------------------------------


def _batches(texts: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(index of the first text, texts), as many at a time that numpy's arrays stay in the cache."""
    begin = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size > BATCH_CHARACTERS or end == len(texts):
            yield begin, texts[begin:end]
            begin, size = end, 0


def _save(path: Path, parts: list[np.ndarray]) -> None:
    raw = np.concatenate(parts).tobytes() if parts else b""
    write_atomic(path, raw + zlib.crc32(raw).to_bytes(8, "little"))


def _load(path: Path) -> np.ndarray:
    """(hash, position), uint64 [n, 2]. Raises CorruptFile."""
    if not path.exists():
        raise unit_files.CorruptFile(path, "is missing")
    raw = path.read_bytes()
    if len(raw) % 16 != 8 or zlib.crc32(raw[:-8]).to_bytes(8, "little") != raw[-8:]:
        raise unit_files.CorruptFile(path, "is damaged")
    return np.frombuffer(raw, np.uint64, (len(raw) - 8) // 8).reshape(-1, 2)


def _positions(places: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Of lines, or tokens, with these numbers in the documents at these places, uint64."""
    return places.astype(np.uint64) << SHIFT | numbers.astype(np.uint64)


def _token_positions(part: UnitDocuments, begin: int, bounds: np.ndarray) -> np.ndarray:
    """Of all tokens of the texts from index `begin` on; bounds as from span_tokens."""
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    return _positions(part.places[begin + owner], np.arange(bounds[-1]) - bounds[owner])


def _hash_lines(part: UnitDocuments, path: Path, min_tokens: int) -> None:
    """Hashes of all lines of `min_tokens` or more."""
    rows = []
    for begin, texts in _batches(texts_of(part)):
        hashes, owner, line, num_tokens = line_tokens(texts)
        positions = _positions(part.places[begin + owner], line)
        rows.append(np.column_stack((hashes, positions))[num_tokens >= min_tokens])
    _save(path, rows)


def _choose_windows(part: UnitDocuments, path: Path, length: int) -> None:
    """Hashes of the windows of length / 2 tokens that winnowing chooses: the smallest of each run of `length`."""
    size, span = length // 2, length - length // 2 + 1
    rows = []
    for begin, texts in _batches(texts_of(part)):
        _, _, bounds, tokens = span_tokens(texts)
        hashes, is_complete = windows(tokens, bounds, size)
        hashes = np.where(is_complete, hashes, NO_HASH)
        smallest = _sliding(hashes, span, np.minimum, NO_HASH)
        largest_of_smallest = _sliding(smallest[::-1], span, np.maximum, np.uint64(0))[::-1]
        is_chosen = is_complete & (largest_of_smallest == hashes)
        rows.append(np.column_stack((hashes, _token_positions(part, begin, bounds)))[is_chosen])
    _save(path, rows)


def _hash_windows(part: UnitDocuments, path: Path, length: int, shared: Path) -> None:
    """Hashes of the windows of `length` tokens that contain a chosen window which occurs more than once."""
    span = length - length // 2 + 1
    index, token = _read_positions(shared, part.places)
    rows = []
    for begin, texts in _batches(texts_of(part)):
        _, _, bounds, tokens = span_tokens(texts)
        is_shared = np.zeros(len(tokens), np.uint64)
        here = (index >= begin) & (index < begin + len(texts))
        is_shared[bounds[index[here] - begin] + token[here]] = 1
        hashes, is_complete = windows(tokens, bounds, length)
        is_candidate = is_complete & (_sliding(is_shared, span, np.maximum, np.uint64(0)) > 0)
        rows.append(np.column_stack((hashes, _token_positions(part, begin, bounds)))[is_candidate])
    _save(path, rows)


def _sliding(values: np.ndarray, width: int, operation, neutral) -> np.ndarray:
    """operation.reduce(values[i : i + width]) of each i, with `neutral` after the end."""
    reduced = np.concatenate((values, np.full(width, neutral, values.dtype)))
    size = 1  # of the windows that are reduced already
    while 2 * size <= width:
        reduced = operation(reduced[:-size], reduced[size:])
        size *= 2
    rest = width - size
    return operation(reduced[: len(values)], reduced[rest : rest + len(values)])


# ---- in the workers: removing ----------------------------------------------------------------------------------------


def _cut_lines(part: UnitDocuments, path: Path, repeats: Path, min_tokens: int) -> None:
    index, line = _read_positions(repeats, part.places)
    texts = texts_of(part)
    changed = {}
    for document in np.unique(index).tolist():
        repeated = set(line[index == document].tolist())
        lines = [text for number, text in enumerate(texts[document].split("\n")) if number not in repeated]
        changed[document] = normalise("\n".join(lines))
    _write_edits(part, path, texts, changed)


def _cut_runs(part: UnitDocuments, path: Path, repeats: Path, length: int) -> None:
    index, token = _read_positions(repeats, part.places)
    texts = texts_of(part)
    changed = {}
    for document in np.unique(index).tolist():
        starts, ends, _, _ = span_tokens([texts[document]])
        first = token[index == document]
        depth = np.zeros(len(starts) + 1, np.int64)
        depth[first] += 1
        np.subtract.at(depth, first + length, 1)
        is_repeated = np.cumsum(depth[:-1]) > 0
        changed[document] = _without_tokens(texts[document], starts, ends, is_repeated)
    _write_edits(part, path, texts, changed)


def _without_tokens(text: str, starts: np.ndarray, ends: np.ndarray, is_removed: np.ndarray) -> str:
    """The text without some tokens, and without the characters between a run of them and the next token on its
    line."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], is_removed, [False]))))
    pieces, at = [], 0
    for first, after in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        pieces.append(text[at : starts[first]])
        at = int(starts[after]) if after < len(starts) else len(text)
        newline = text.find("\n", ends[after - 1], at)
        if newline >= 0:
            at = newline
    return normalise("".join([*pieces, text[at:]]))


def _write_edits(part: UnitDocuments, path: Path, texts: list[str], changed: dict[int, str]) -> None:
    """All changed texts of the unit, those of an earlier pass included."""
    import pyarrow

    if part.edits:
        earlier = unit_files.read(part.edits, ["row"])["row"].to_numpy()
        for document in np.searchsorted(part.rows, earlier).tolist():
            changed.setdefault(document, texts[document])
    order = sorted(changed)
    edited = [changed[document] for document in order]
    num_tokens = np.diff(span_tokens(edited)[2]) if order else np.zeros(0, np.int64)
    columns = {
        "row": pyarrow.array(part.rows[order] if order else [], pyarrow.int32()),
        "text": pyarrow.array(edited, pyarrow.string()),
        "size": pyarrow.array([len(text.encode()) for text in edited], pyarrow.int64()),
        "tokens": pyarrow.array(num_tokens, pyarrow.int64()),
    }
    unit_files.write(pyarrow.table(columns), path, compression="lz4")
