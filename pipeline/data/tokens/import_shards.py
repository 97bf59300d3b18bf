"""Token files that other tools wrote, as sources of stage `pack`: Megatron's .bin/.idx, datatrove's .ds, and numpy
arrays or plain memory maps.

    shard = open_shard(path, Shards(path=...))               # checked: an index that does not fit its data is refused
    first, ends = documents_in(shard, 0, 1_000_000, eos_id)  # the documents that begin in this range

A document is what the index says; a file without an index is cut after each end-of-document token. Such a token in the
middle of an indexed document cuts it as well, because in our form it is only at the end of a document.
"""

import glob
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core.config import EXECUTION, ExternalSource
from pipeline.core.errors import UserError
from pipeline.core.seeds import splitmix64
from pipeline.core.terminal import plural
from pipeline.data.sources.globs import find
from pipeline.data.tokens.store import DamagedArray, mapped_array

# megatron/core/datasets/indexed_dataset.py, DType
MEGATRON = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
MEGATRON_HEADER = 34  # bytes: magic, version, dtype, sequences, documents
SUFFIXES = {"megatron": ".bin", "datatrove": ".ds", "numpy": ".npy"}
COMPANIONS = (".idx", ".index", ".metadata", ".loss")  # suffixes of files next to token files
UNIT_TOKENS = 2**23  # per unit of work


class Shards(ExternalSource):
    """Token files that another tool wrote, with this recipe's tokenizer."""

    path: Annotated[str | list[str], EXECUTION]
    """A file, a folder, a glob, or a list of them: .bin (with its .idx), .ds (with its .ds.index), .npy, or any file of
    plain numbers with `dtype`."""
    format: Literal["megatron", "datatrove", "numpy"] | None = None
    """By default from the files: .bin with an .idx is megatron, .ds is datatrove, all else is numpy."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Type of numpy files without a header (nanoGPT's and OLMo's are such)."""
    holdout: float = Field(0.01, ge=0, lt=1)
    """Share of the documents that is held out, chosen by their place."""

    def content(self, where: str, sha256: Callable[[Path], str]) -> list[list[str]]:
        """Name of each file and sha256 of the file and its index. Names and order count, because ids of documents
        contain them; folders do not."""
        listed = []
        for path in files(self, where.removeprefix("shards.")):
            digests = [sha256(part) for part in companions(path, self) if part.is_file()]
            listed.append([path.name, *digests])
        return listed


class Shard(NamedTuple):
    """One file, memory-mapped."""

    path: Path
    tokens: np.ndarray
    ends: np.ndarray | None
    """Where documents end by the index, int64, ascending; None: there is no index."""


# ---- files -----------------------------------------------------------------------------------------------------------


def files(source: Shards, name: str) -> list[Path]:
    """The token files of a source in order, without their indexes. Raises UserError if there is none."""
    key = f"shards.{name}.path"
    suffixes = [SUFFIXES[source.format]] if source.format else list(SUFFIXES.values())
    result = []
    for path in [source.path] if isinstance(source.path, str) else source.path:
        place = Path(path).expanduser()
        if place.is_dir():
            entries = [file for _, file in find(f"{glob.escape(str(place))}/*", key)]
            token_files = [file for file in entries if file.suffix in suffixes]
        else:
            entries = [file for _, file in find(path, key)]
            token_files = [file for file in entries if file.suffix not in COMPANIONS]
        if not token_files:
            raise UserError(
                f"{key}: {path}: has no file that ends in {', '.join(suffixes)}; give a path with such files"
            )
        result += token_files
    num_duplicates = len(result) - len(set(map(os.path.realpath, result)))
    if num_duplicates:
        raise UserError(f"{key}: names {plural(num_duplicates, 'file')} twice; name each file once")
    return result


def companions(path: Path, source: Shards) -> list[Path]:
    """A token file and its index: what decides which tokens and documents are read."""
    kind = kind_of(path, source)
    if kind == "megatron":
        return [path, path.with_suffix(".idx")]
    if kind == "datatrove":
        return [path, Path(f"{path}.index")]
    return [path]


def kind_of(path: Path, source: Shards) -> str:
    if source.format:
        return source.format
    if path.suffix == ".ds":
        return "datatrove"
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return "megatron"
    return "numpy"


# ---- formats ---------------------------------------------------------------------------------------------------------


def open_shard(path: Path, source: Shards) -> Shard:
    """Raises UserError, with the file, for damaged files, an index of other tokens, and arrays that are not token
    ids."""
    kind = kind_of(path, source)
    if source.dtype and kind != "numpy":
        raise UserError(
            f"{path}: dtype: {source.dtype} is for numpy files without a header; {kind} files have their own type,"
            " remove dtype"
        )
    open_file = {"megatron": _megatron, "datatrove": _datatrove, "numpy": _numpy}[kind]
    try:
        shard = open_file(path, source)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing; {kind} files need it next to their tokens") from None
    if shard.ends is None:
        return shard
    if len(shard.ends) and (shard.ends[0] < 0 or (np.diff(shard.ends) < 0).any()):
        raise UserError(f"{path}: the document ends in its index do not ascend; give the index of these tokens")
    last = int(shard.ends[-1]) if len(shard.ends) else 0
    if last != len(shard.tokens):
        raise UserError(
            f"{path}: its index ends at token {last}, the file has {len(shard.tokens)}; give the index of these tokens"
        )
    return shard


def _mapped(path: Path, dtype) -> np.ndarray:
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        raise UserError(
            f"{path}: has {size} bytes, which is not a multiple of {item}, the size of {np.dtype(dtype).name}; it was"
            " truncated, or has another type"
        )
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def _megatron(path: Path, source: Shards) -> Shard:
    """Header (magic, version, dtype, sequences, documents), int32 lengths, int64 byte offsets, int64 first sequence of
    each document, optionally int8 modes."""
    index = path.with_suffix(".idx")
    raw = np.memmap(index, np.uint8, "r") if index.stat().st_size else np.zeros(0, np.uint8)
    header = raw[:MEGATRON_HEADER].tobytes()
    if len(header) < MEGATRON_HEADER or not header.startswith(b"MMIDIDX\x00\x00"):
        raise UserError(
            f"{index}: is not an index of Megatron's indexed data set (it begins with {header[:9]!r}); "
            "the older TNTIDX form has to be converted with Megatron's own tools"
        )
    version, code, num_sequences, num_documents = struct.unpack("<QBQQ", header[9:])
    kind = MEGATRON.get(code, "unknown")
    if version != 1 or kind == "unknown" or kind.startswith("float"):
        raise UserError(
            f"{index}: version {version} and type {code} ({kind}) are not token ids of version 1; write it again with"
            " Megatron's preprocess_data.py"
        )
    lengths_end = MEGATRON_HEADER + 4 * num_sequences
    offsets_end = lengths_end + 8 * num_sequences
    borders_end = offsets_end + 8 * num_documents
    if len(raw) not in (borders_end, borders_end + num_sequences):
        raise UserError(
            f"{index}: has {len(raw)} bytes, but {borders_end} are needed for the {num_sequences} sequences and"
            f" {num_documents} document borders in its header; it was truncated or overwritten"
        )
    lengths = raw[MEGATRON_HEADER:lengths_end].view("<i4")
    offsets = raw[lengths_end:offsets_end].view("<i8")
    borders = raw[offsets_end:borders_end].view("<i8")
    tokens = _mapped(path, np.dtype(kind).newbyteorder("<"))
    ends = np.cumsum(lengths, dtype=np.int64)
    _check_sequences(index, lengths, offsets, (ends - lengths) * tokens.dtype.itemsize)
    _check_borders(index, borders, num_sequences)
    return Shard(path, tokens, np.concatenate([[0], ends])[borders[1:]].astype(np.int64))


def _check_sequences(index: Path, lengths: np.ndarray, offsets: np.ndarray, expected: np.ndarray) -> None:
    wrong = (offsets != expected) | (lengths < 0)
    if wrong.any():
        number = int(np.flatnonzero(wrong)[0])
        raise UserError(
            f"{index}: sequence {number} begins at byte {int(offsets[number])}, but those before it end at byte"
            f" {int(expected[number])}; the index is damaged"
        )


def _check_borders(index: Path, borders: np.ndarray, num_sequences: int) -> None:
    if not len(borders):
        if num_sequences:
            raise UserError(
                f"{index}: has {num_sequences} sequences and no document border; write it again with Megatron's"
                " preprocess_data.py"
            )
        return
    if borders[0] != 0 or borders[-1] != num_sequences or (np.diff(borders) < 0).any():
        raise UserError(
            f"{index}: its document borders go from {int(borders[0])} to {int(borders[-1])}; they must ascend from 0 to"
            f" {num_sequences}, the number of sequences"
        )


def _datatrove(path: Path, source: Shards) -> Shard:
    """Plain uint16 or uint32, and uint64 document ends. The last end and the file's size decide which of the two."""
    if Path(f"{path}.loss").exists():
        raise UserError(
            f"{path}.loss: loss masks are not supported; remove the file to train on every token, or write the tokens"
            " without it"
        )
    ends = _mapped(Path(f"{path}.index"), "<u8").astype(np.int64)
    size = path.stat().st_size
    num_tokens = int(ends[-1]) if len(ends) else 0
    for dtype in ("<u2", "<u4"):
        if num_tokens * np.dtype(dtype).itemsize == size:
            return Shard(path, _mapped(path, dtype), ends)
    raise UserError(
        f"{path}: has {size} bytes, and its index ends at token {num_tokens}: neither 2 nor 4 bytes per token; give"
        " the index of these tokens"
    )


def _numpy(path: Path, source: Shards) -> Shard:
    with open(path, "rb") as handle:
        has_header = handle.read(6) == b"\x93NUMPY"
    if not has_header:
        if source.dtype is None:
            raise UserError(
                f"{path}: has no numpy header, so the type of its numbers is unknown; give dtype: uint16 (or uint32,"
                " int32, int64)"
            )
        return Shard(path, _mapped(path, np.dtype(source.dtype).newbyteorder("<")), None)
    try:
        tokens = mapped_array(path)
    except DamagedArray as error:
        raise UserError(f"{path}: cannot be read as a numpy array ({error}); write it again") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise UserError(
            f"{path}: has type {tokens.dtype} and shape {list(tokens.shape)}; expected one row of token ids, such as"
            " uint16"
        )
    if source.dtype and tokens.dtype != np.dtype(source.dtype):
        raise UserError(
            f"{path}: its header says {tokens.dtype}, the recipe says dtype: {source.dtype}; remove dtype from the"
            " recipe"
        )
    return Shard(path, tokens, None)


# ---- documents -------------------------------------------------------------------------------------------------------


def documents_in(shard: Shard, begin: int, end: int, eos_id: int) -> tuple[int, np.ndarray]:
    """The documents that begin in begin .. end: the first token of the first one, and where each ends (int64). An
    empty document of an index ends where the one before it ends."""
    first, last = _document_begin(shard, begin, eos_id), _document_begin(shard, end, eos_id)
    if first >= last:
        return first, np.zeros(0, np.int64)
    cuts = np.flatnonzero(shard.tokens[first:last] == eos_id) + first + 1
    if shard.ends is None:
        is_closed = len(cuts) and cuts[-1] == last
        return first, cuts if is_closed else np.append(cuts, last)
    # empty documents at the very beginning of the file belong to the first range
    begin_index = np.searchsorted(shard.ends, first, side="right" if first else "left")
    end_index = np.searchsorted(shard.ends, last, side="right")
    indexed = shard.ends[begin_index:end_index]
    return first, np.sort(np.concatenate([indexed, np.setdiff1d(cuts, indexed)]))


def _document_begin(shard: Shard, place: int, eos_id: int) -> int:
    """The first token at or after `place` at which a document begins; the end of the file if there is none."""
    if place <= 0:
        return 0
    if place >= len(shard.tokens):
        return len(shard.tokens)
    if shard.ends is not None:
        return int(shard.ends[np.searchsorted(shard.ends, place)])
    for start in range(place - 1, len(shard.tokens), 2**20):
        eos_places = np.flatnonzero(shard.tokens[start : start + 2**20] == eos_id)
        if len(eos_places):
            return start + int(eos_places[0]) + 1
    return len(shard.tokens)


def held_out(places: np.ndarray, key: int, share: float) -> np.ndarray:
    """bool: which documents, given by their first tokens, are held out."""
    if not share:
        return np.zeros(len(places), bool)
    return splitmix64(places.astype(np.uint64) ^ np.uint64(key)) < np.uint64(int(share * 2**64))
