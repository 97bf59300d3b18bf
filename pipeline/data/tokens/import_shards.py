"""Token shards made elsewhere, as sources of stage `pack`: Megatron's .bin/.idx, datatrove's .ds, and numpy arrays or
plain memory maps.

    shard = open_shard(path, Shards(path=...), eos_id=2)     # checked: an index that does not fit its data is refused
    documents_in(shard, 0, 1_000_000)                        # where documents begin and end, of those that begin in
                                                             # this stretch

A document is what the index says, and a file without one is cut after each end-of-document token. One in the middle of
an indexed document cuts it, too: our form has it at the end alone.
"""

import glob
import os
import struct
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core.config import EXECUTION, Strict, identity
from pipeline.core.errors import Absent, UserError
from pipeline.core.files import hashes
from pipeline.core.fingerprint import Recorded
from pipeline.core.seeds import splitmix64
from pipeline.core.terminal import many
from pipeline.data.sources.globs import find
from pipeline.data.tokens.store import DamagedArray, mapped_array

# megatron/core/datasets/indexed_dataset.py, DType
MEGATRON = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
SUFFIXES = {"megatron": ".bin", "datatrove": ".ds", "numpy": ".npy"}
BESIDE = (".idx", ".index", ".metadata", ".loss")  # what stands beside token files and is none
UNIT_TOKENS = 2**23  # of a unit of work


class Shards(Strict):
    """Tokens that another tool wrote, with this recipe's tokenizer."""

    path: Annotated[str | list[str], EXECUTION]
    """A file, a folder, a glob, or a list of them: .bin (its .idx beside it), .ds (its .ds.index beside it), .npy,
    or any file of plain numbers with `dtype`."""
    format: Literal["megatron", "datatrove", "numpy"] | None = None
    """By default from what is there: .bin with an .idx beside it, .ds, else numpy."""
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None
    """Of numpy files without a header, which say nothing of it themselves (nanoGPT's and OLMo's are such)."""
    holdout: float = Field(0.01, ge=0, lt=1)
    """Share of the documents, chosen by their place, that is never trained on."""


class Shard(NamedTuple):
    """One file, memory-mapped."""

    path: Path
    tokens: np.ndarray
    ends: np.ndarray | None
    """Where documents end by its index, int64, ascending; None: it has none."""


def files(source: Shards, name: str) -> list[Path]:
    """The files of a source in order, without their indexes. Raises UserError if there is none."""
    where, found = f"shards.{name}.path", []
    for path in [source.path] if isinstance(source.path, str) else source.path:
        place = Path(path).expanduser()
        suffixes = [SUFFIXES[source.format]] if source.format else list(SUFFIXES.values())
        if place.is_dir():
            here = [file for _, file in find(f"{glob.escape(str(place))}/*", where) if file.suffix in suffixes]
        else:
            here = [file for _, file in find(path, where) if file.suffix not in BESIDE]
        if not here:
            raise UserError(f"{where}: {path}: has no file that ends in {', '.join(suffixes)}")
        found += here
    twice = len(found) - len(set(map(os.path.realpath, found)))
    if twice:
        raise UserError(f"{where}: names {many(twice, 'file')} twice; each is read once")
    return found


def companions(path: Path, source: Shards) -> list[Path]:
    """The file and its index: what decides what is read."""
    kind = kind_of(path, source)
    beside = {"megatron": path.with_suffix(".idx"), "datatrove": Path(f"{path}.index")}.get(kind)
    return [path, beside] if beside else [path]


def identify(shards: dict[str, Shards], cache: Path, recorded: Recorded | None = None) -> dict:
    """What decides the content of shards, as JSON: what the files hold, their order and their names, which
    documents' ids have; not where they stand. Shards that are not on this machine count as `recorded` has them, or
    raise Absent."""
    value = {}
    with hashes(cache) as sha256:
        for name, source in sorted(shards.items()):
            try:
                listed = [
                    [path.name, *(sha256(part) for part in companions(path, source) if part.is_file())]
                    for path in files(source, name)
                ]
            except Absent:
                if recorded is None or not recorded.has(name):
                    raise
                listed = recorded.take(name, f"shards.{name}")
            value[name] = {**identity(source), "files": listed}
    return value


def kind_of(path: Path, source: Shards) -> str:
    if source.format:
        return source.format
    if path.suffix == ".ds":
        return "datatrove"
    return "megatron" if path.suffix == ".bin" and path.with_suffix(".idx").is_file() else "numpy"


def open_shard(path: Path, source: Shards) -> Shard:
    """Raises UserError, with the file, for what is damaged, does not fit together, or is no array of token ids."""
    kind = kind_of(path, source)
    if source.dtype and kind != "numpy":
        raise UserError(
            f"{path}: dtype: {source.dtype} is for numpy files without a header; {kind} says its own, leave dtype out"
        )
    try:
        shard = {"megatron": _megatron, "datatrove": _datatrove, "numpy": _numpy}[kind](path, source)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing; {kind} files have it beside their tokens") from None
    if shard.ends is not None and len(shard.ends) and (shard.ends[0] < 0 or (np.diff(shard.ends) < 0).any()):
        raise UserError(f"{path}: the document ends of its index do not ascend; it does not fit these tokens")
    if shard.ends is not None and (int(shard.ends[-1]) if len(shard.ends) else 0) != len(shard.tokens):
        last = int(shard.ends[-1]) if len(shard.ends) else 0
        raise UserError(
            f"{path}: its index ends at token {last}, the file has {len(shard.tokens)}; they do not fit together"
        )
    return shard


def _mapped(path: Path, dtype) -> np.ndarray:
    size, item = path.stat().st_size, np.dtype(dtype).itemsize
    if size % item:
        kind = f"{np.dtype(dtype).name} ({item} bytes each)"
        raise UserError(
            f"{path}: has {size} bytes, which are no whole number of {kind}; it was cut off, or is of another type"
        )
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)


def _megatron(path: Path, source: Shards) -> Shard:
    """Header (magic, version, dtype, sequences, documents), int32 lengths, int64 byte offsets, int64 first sequence
    of each document, perhaps int8 modes."""
    place = path.with_suffix(".idx")
    raw = np.memmap(place, np.uint8, "r") if place.stat().st_size else np.zeros(0, np.uint8)
    head = raw[:34].tobytes()
    if len(head) < 34 or not head.startswith(b"MMIDIDX\x00\x00"):
        raise UserError(
            f"{place}: is no index of Megatron's indexed data set (it begins with {head[:9]!r}); "
            "the older TNTIDX form has to be converted with Megatron's own tools"
        )
    version, code, sequences, documents = struct.unpack("<QBQQ", head[9:])
    if version != 1 or MEGATRON.get(code, "float").startswith("float"):
        kind = MEGATRON.get(code, "unknown")
        raise UserError(
            f"{place}: version {version} and type {code} ({kind}) are not token ids of version 1; write it again with"
            " Megatron's preprocess_data.py"
        )
    wanted = 34 + 12 * sequences + 8 * documents
    if len(raw) not in (wanted, wanted + sequences):
        raise UserError(
            f"{place}: has {len(raw)} bytes, {wanted} are needed for the {sequences} sequences and {documents} document"
            " borders that it announces; it was cut off or overwritten"
        )
    lengths = raw[34 : 34 + 4 * sequences].view("<i4")
    offsets = raw[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    borders = raw[34 + 12 * sequences : wanted].view("<i8")
    tokens = _mapped(path, np.dtype(MEGATRON[code]).newbyteorder("<"))
    ends = np.cumsum(lengths, dtype=np.int64)
    expected = (ends - lengths) * tokens.dtype.itemsize
    if (lengths < 0).any() or not np.array_equal(offsets, expected):
        wrong = int(np.flatnonzero((offsets != expected) | (lengths < 0))[0])
        begins, ends_at = int(offsets[wrong]), int(expected[wrong])
        raise UserError(
            f"{place}: sequence {wrong} begins at byte {begins}, those before it end at {ends_at}; the index does not"
            " fit itself"
        )
    if documents and (borders[0] != 0 or borders[-1] != sequences or (np.diff(borders) < 0).any()):
        raise UserError(
            f"{place}: its document borders run from {int(borders[0])} to {int(borders[-1])} over {sequences}"
            " sequences; they must ascend from 0 to their number"
        )
    if not documents and sequences:
        raise UserError(
            f"{place}: has {sequences} sequences and no document border; write it again with Megatron's"
            " preprocess_data.py"
        )
    return Shard(path, tokens, np.concatenate([[0], ends])[borders[1:]].astype(np.int64))


def _datatrove(path: Path, source: Shards) -> Shard:
    """Plain uint16 or uint32, and uint64 document ends. Which of the two follows from the last end and the file's
    size."""
    if Path(f"{path}.loss").exists():
        raise UserError(
            f"{path}.loss: loss masks are not read; take it away to train on every token, or write the tokens"
            " without it"
        )
    ends = _mapped(Path(f"{path}.index"), "<u8").astype(np.int64)
    size, total = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    for dtype in ("<u2", "<u4"):
        if total * np.dtype(dtype).itemsize == size:
            return Shard(path, _mapped(path, dtype), ends)
    raise UserError(
        f"{path}: has {size} bytes, its index ends at token {total}: neither 2 nor 4 bytes each; they do not fit"
        " together"
    )


def _numpy(path: Path, source: Shards) -> Shard:
    with open(path, "rb") as handle:
        headed = handle.read(6) == b"\x93NUMPY"
    if not headed:
        if source.dtype is None:
            raise UserError(
                f"{path}: has no numpy header, so that nothing says what its numbers are; give dtype: uint16 (or"
                " uint32, int32, int64)"
            )
        return Shard(path, _mapped(path, np.dtype(source.dtype).newbyteorder("<")), None)
    try:
        tokens = mapped_array(path)
    except DamagedArray as error:
        raise UserError(f"{path}: cannot be read as a numpy array ({error}); write it again") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise UserError(
            f"{path}: holds {tokens.dtype} {list(tokens.shape)}; expected one row of token ids, such as uint16"
        )
    if source.dtype and tokens.dtype != np.dtype(source.dtype):
        raise UserError(f"{path}: its header says {tokens.dtype}, the recipe dtype: {source.dtype}; leave dtype out")
    return Shard(path, tokens, None)


# ---- documents -------------------------------------------------------------------------------------------------------


def documents_in(shard: Shard, begin: int, end: int, eos_id: int) -> tuple[int, np.ndarray]:
    """The documents that begin in begin .. end: the first token of the first, and where each ends (int64). Empty
    ones among an index's stand there twice."""
    first, last = _border(shard, begin, eos_id), _border(shard, end, eos_id)
    if first >= last:
        return first, np.zeros(0, np.int64)
    cuts = np.flatnonzero(shard.tokens[first:last] == eos_id) + first + 1
    if shard.ends is None:
        return first, cuts if len(cuts) and cuts[-1] == last else np.append(cuts, last)
    inside = shard.ends[
        np.searchsorted(shard.ends, first, side="right" if first else "left") : np.searchsorted(
            shard.ends, last, side="right"
        )
    ]
    return first, np.sort(np.concatenate([inside, np.setdiff1d(cuts, inside)]))


def _border(shard: Shard, place: int, eos_id: int) -> int:
    """The first token at or behind `place` with which a document of the file begins; its end if there is none."""
    if place <= 0:
        return 0
    if place >= len(shard.tokens):
        return len(shard.tokens)
    if shard.ends is not None:
        return int(shard.ends[np.searchsorted(shard.ends, place)])
    for start in range(place - 1, len(shard.tokens), 2**20):
        found = np.flatnonzero(shard.tokens[start : start + 2**20] == eos_id)
        if len(found):
            return start + int(found[0]) + 1
    return len(shard.tokens)


def held_out(places: np.ndarray, key: int, share: float) -> np.ndarray:
    """Which documents, given by their first tokens, are held out: bool."""
    return (
        splitmix64(places.astype(np.uint64) ^ np.uint64(key)) < np.uint64(int(share * 2**64))
        if share
        else np.zeros(len(places), bool)
    )
