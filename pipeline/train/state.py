"""The state of a training run on disk, in a form that is independent of how the run was laid out.

    model-00000.safetensors    what process 0 wrote: flat fragments of parameters and moments, in safetensors' layout
    model.json                 steps made, optimizer, and the layout that wrote it

A fragment is called `exp_avg/model.layers.0.mlp.up_proj.weight@4096`: its kind (weight, exp_avg, exp_avg_sq,
momentum_buffer, buffer), the parameter's name in the whole model, and the index of its first element. A reader asks for
any range of elements, which is assembled from the fragments, so a run resumes in any layout. Some columns of a matrix
are one fragment too, `weight/model.layers.0.mlp.down_proj.weight@512:512/1024`: rows of 512 elements that begin 1,024
apart. Full shapes are in the metadata of each file. Nothing is pickled.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.core import accelerators
from pipeline.core.errors import UserError
from pipeline.core.terminal import plural

FORMAT = 2  # 2: fragments of rows that are not one after another; written only where there are such
CHUNK = 16 << 20  # bytes hashed and written at a time
DTYPES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    # of buffers
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Rows(NamedTuple):
    """Rows of `width` elements, each `stride` elements after the one before: a part of the columns of a matrix."""

    width: int
    stride: int


class Fragment(NamedTuple):
    """Elements start to start + len(values) of a tensor, or rows of which the first begins at start. `values` is a flat
    view of live memory, or a copy."""

    kind: str
    name: str
    start: int
    values: torch.Tensor
    rows: Rows | None = None

    @property
    def key(self) -> str:
        rows = f":{self.rows.width}/{self.rows.stride}" if self.rows else ""
        return f"{self.kind}/{self.name}@{self.start}{rows}"


def format_of(fragments: list[Fragment]) -> int:
    """The format that a reader of these fragments has to know."""
    return FORMAT if any(fragment.rows for fragment in fragments) else 1


class Part(NamedTuple):
    """What one process writes of one engine: fragments, {parameter: shape and number of updates} of the parameters they
    belong to, and the content of the small JSON file."""

    fragments: list[Fragment]
    parameters: dict[str, dict]
    summary: dict

    @property
    def bytes(self) -> int:
        return sum(fragment.values.nbytes for fragment in self.fragments)


class Cancelled(Exception):
    """Writing was abandoned, because the run ends."""


def share(fragments: list[Fragment], rank: int, world: int) -> list[Fragment]:
    """This process's part of fragments that all of `world` processes hold: all elements in sequence, cut into equal
    ranges."""
    if world == 1:
        return fragments
    total = sum(fragment.values.numel() for fragment in fragments)
    first, last = total * rank // world, total * (rank + 1) // world
    own, position = [], 0
    for fragment in fragments:
        length = fragment.values.numel()
        low, high = max(first - position, 0), min(last - position, length)
        if low < high:
            own.append(fragment._replace(start=fragment.start + low, values=fragment.values[low:high]))
        position += length
    return own


class Copier:
    """Copies fragments into memory that it keeps, so that the second copy faults in no new pages. With a GPU the memory
    is pinned."""

    def __init__(self):
        self.layout: list = []
        self.copies: list[torch.Tensor] = []

    def copy(self, fragments: list[Fragment]) -> list[Fragment]:
        layout = [(*fragment[:3], fragment.values.dtype, fragment.values.numel()) for fragment in fragments]
        if layout != self.layout:
            self.layout, self.copies = layout, _allocate(fragments)
        with torch.no_grad():
            torch._foreach_copy_(self.copies, [fragment.values for fragment in fragments], non_blocking=True)
        for device in {fragment.values.device for fragment in fragments}:
            accelerators.synchronize(device)
        return [fragment._replace(values=copy) for fragment, copy in zip(fragments, self.copies, strict=True)]


def _allocate(fragments: list[Fragment]) -> list[torch.Tensor]:
    """One block of memory with a place for each fragment, each aligned to 8 bytes."""
    sizes = [-(-fragment.values.nbytes // 8) * 8 for fragment in fragments]
    on_gpu = any(fragment.values.is_cuda for fragment in fragments)
    memory = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
    places, offset = [], 0
    for fragment, size in zip(fragments, sizes, strict=True):
        places.append(memory[offset : offset + fragment.values.nbytes].view(fragment.values.dtype))
        offset += size
    return places


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(path: Path, part: Part, cancelled: Callable[[], bool] = lambda: False) -> dict:
    """Write a safetensors file, hashed on the way and synced. Returns {sha256, size}. Raises OSError, or Cancelled
    when `cancelled()` turns true."""
    # widest elements first, so that each fragment is aligned to its element size
    fragments = sorted(part.fragments, key=lambda fragment: -fragment.values.element_size())
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as handle:
        for data in (_header(fragments, part.parameters), *(_bytes(fragment.values) for fragment in fragments)):
            for start in range(0, len(data), CHUNK):
                if cancelled():
                    raise Cancelled
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                written = 0
                while written < len(chunk):
                    written += handle.write(chunk[written:])
                size += len(chunk)
        os.fsync(handle.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def _header(fragments: list[Fragment], parameters: dict[str, dict]) -> bytes:
    metadata = {"format": "alma", "version": str(FORMAT), "parameters": json.dumps(parameters)}
    entries: dict = {"__metadata__": metadata}
    offset = 0
    for fragment in fragments:
        end = offset + fragment.values.nbytes
        entries[fragment.key] = {
            "dtype": DTYPES[fragment.values.dtype],
            "shape": [fragment.values.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(entries, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.detach().cpu().contiguous().view(torch.uint8).numpy())


# ---- reading ---------------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Elements start to stop of a tensor: in which file, and at which byte of it."""

    start: int
    stop: int
    path: Path
    offset: int
    dtype: str
    rows: Rows | None = None
    """If it is rows of a matrix; `stop` is then start + their number of elements."""

    def in_ranges(self) -> list["_Piece"]:
        """The same as pieces without `rows`."""
        if self.rows is None:
            return [self]
        width, stride = self.rows
        size = TORCH_DTYPES[self.dtype].itemsize
        count = (self.stop - self.start) // width
        firsts = [self.start + row * stride for row in range(count)]
        return [
            self._replace(start=first, stop=first + width, offset=self.offset + row * width * size, rows=None)
            for row, first in enumerate(firsts)
        ]


class Reader:
    """The fragments of one engine in a checkpoint folder, by their position in the whole model.

    steps, layout, optimizer: how many steps the run had made, and how. parameters: {name: {shape, updates}}. Raises
    UserError for a folder without a state of `name`.

    With `gather` (an all_gather_object) the `world` processes that create it together read the header of each file
    once, not once each, and afterwards each opens only the files that hold what it asks for. Collective then.
    """

    def __init__(
        self, folder: Path, name: str, rank: int = 0, world: int = 1, gather: Callable[[dict], list[dict]] | None = None
    ):
        self.folder = folder
        summary = _read_summary(folder, name)
        self.steps, self.optimizer, self.layout = summary["steps"], summary["optimizer"], summary["layout"]
        self.parameters: dict[str, dict] = {}
        self.pieces: dict[tuple[str, str], list[_Piece]] = {}  # by (kind, name)
        self.ranges: tuple[tuple[str, str] | None, list[_Piece]] = (None, [])
        pattern = re.compile(rf"{re.escape(name)}-\d+\.safetensors")
        files = sorted(path.name for path in folder.iterdir() if pattern.fullmatch(path.name))
        own = {file: _read_header(folder / file) for file in files[rank::world]}
        for headers in gather(own) if gather else [own]:
            for file, (length, header) in headers.items():
                self._index(folder / file, length, json.loads(header))
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: (piece.start, piece.stop))

    def _index(self, path: Path, length: int, header: dict) -> None:
        self.parameters |= json.loads(header.pop("__metadata__")["parameters"])
        for key, entry in header.items():
            tensor, _, place = key.rpartition("@")
            start, _, rows = place.partition(":")
            kind, _, name = tensor.partition("/")
            stop = int(start) + entry["shape"][0]
            offset = 8 + length + entry["data_offsets"][0]
            width_and_stride = Rows(*map(int, rows.split("/"))) if rows else None
            piece = _Piece(int(start), stop, path, offset, entry["dtype"], width_and_stride)
            self.pieces.setdefault((kind, name), []).append(piece)

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self.pieces

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements start to start + numel, flat, on the CPU. Raises UserError if some of them are in no file."""
        pieces = self._ranges(kind, name)
        dtype = TORCH_DTYPES.get(pieces[0].dtype, torch.float32) if pieces else torch.float32
        values = torch.empty(numel, dtype=dtype)
        view, size = memoryview(values.view(torch.uint8).numpy()), values.element_size()
        position, end = start, start + numel
        for piece in pieces:
            if piece.stop <= position or piece.start > position:
                continue
            count = min(piece.stop, end) - position
            if count <= 0:
                break
            target = view[(position - start) * size : (position - start + count) * size]
            _read_exactly(piece.path, piece.offset + (position - piece.start) * size, target)
            position += count
        if position < end:
            stop = min([end, *(piece.start for piece in pieces if piece.start > position)])
            raise UserError(
                f"{self.folder}: {kind} of {name} lacks the elements {position} to {stop}; the checkpoint is"
                " incomplete,"
                " remove it to resume from the one before"
            )
        return values

    def _ranges(self, kind: str, name: str) -> list[_Piece]:
        """The pieces of a tensor without those of rows, in their order. Those of the last tensor are kept."""
        if self.ranges[0] != (kind, name):
            pieces = [part for piece in self.pieces.get((kind, name), []) for part in piece.in_ranges()]
            self.ranges = (kind, name), sorted(pieces, key=lambda piece: (piece.start, piece.stop))
        return self.ranges[1]

    def _read_rows(self, kind: str, name: str, start: int, numel: int, rows: Rows) -> torch.Tensor:
        """Rows of which the first begins at start, flat: at once if they were saved together, or all of the matrix from
        the first to the last."""
        for piece in self.pieces.get((kind, name), []):
            if (piece.start, piece.stop, piece.rows) == (start, start + numel, rows):
                values = torch.empty(numel, dtype=TORCH_DTYPES[piece.dtype])
                _read_exactly(piece.path, piece.offset, memoryview(values.view(torch.uint8).numpy()))
                return values
        count = numel // rows.width
        span = self.read(kind, name, start, (count - 1) * rows.stride + rows.width)
        return span.as_strided((count, rows.width), (rows.stride, 1)).flatten()

    def fill(self, fragment: Fragment) -> None:
        """Read a fragment into live memory. A moment that was never updated is zero."""
        kind, name, start, values, rows = fragment
        is_moment = kind not in ("weight", "buffer")
        with torch.no_grad():
            if is_moment and not self.has(kind, name) and not self.parameters.get(name, {}).get("updates"):
                values.zero_()
            elif values.numel():
                read = functools.partial(self._read_rows, rows=rows) if rows else self.read
                values.copy_(read(kind, name, start, values.numel()))

    def compare(self, shapes: dict[str, list[int]], optimizer: str) -> None:
        """Raise UserError if this is the state of another model or optimizer, naming the first difference."""
        advice = "resume with the recipe that made it, or start again with --restart"
        for name, shape in shapes.items():
            if name not in self.parameters:
                raise UserError(f"{self.folder}: is of another model: it has no {name}; {advice}")
            saved_shape = self.parameters[name]["shape"]
            if saved_shape != list(shape):
                raise UserError(
                    f"{self.folder}: is of another model: {name} is {saved_shape} there and {list(shape)} here;"
                    f" {advice}"
                )
        extra = [name for name in self.parameters if name not in shapes]
        if extra:
            raise UserError(f"{self.folder}: is of another model: it has {extra[0]}, this one does not; {advice}")
        if self.optimizer != optimizer:
            raise UserError(
                f"{self.folder}: was saved with optimizer.kind: {self.optimizer}, whose moments cannot be used by"
                f" {optimizer}; {advice}, or start from its weights only (inputs.model)"
            )

    def changed(self, layout: dict) -> str:
        """The difference between the layout that wrote this and `layout`, in words; empty if there is none."""
        if self.layout == layout:
            return ""
        return f"saved with {describe(self.layout)}; now {describe(layout)}"


def _read_header(path: Path) -> tuple[int, bytes]:
    """(its length, a JSON object) of a safetensors file."""
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        return length, handle.read(length)


def _read_summary(folder: Path, name: str) -> dict:
    path = folder / f"{name}.json"
    if not path.is_file():
        if (folder / f"{name}-state.pt").exists() or (folder / f"{name}-layout.json").exists():
            raise UserError(
                f"{folder}: was written as a pickle by an earlier alma, which this one does not read; start again with"
                " --restart"
            )
        raise UserError(f"{folder}: has no training state called {name} ({path.name} is missing)")
    summary = json.loads(path.read_text(encoding="utf-8"))
    if summary["format"] > FORMAT:
        raise UserError(
            f"{folder}: written by a newer alma (format {summary['format']}, this one reads {FORMAT}); update alma"
        )
    return summary


def _read_exactly(path: Path, offset: int, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as handle:
        handle.seek(offset)
        done = 0
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise UserError(
                    f"{path}: ends before its data do; the checkpoint is damaged, remove it to resume from the one"
                    " before"
                )
            done += count


def describe(layout: dict) -> str:
    """`2 processes with zero 3 and offload`."""
    details = []
    if layout["pipeline"] > 1:
        details.append(f"pipeline {layout['pipeline']}")
    elif layout["zero"] is not None:
        details.append(f"zero {layout['zero']}")
    if layout.get("shard"):
        copies = f" of {layout['copies']} copies" if "copies" in layout else ""
        details.append(f"shard {layout['shard']}{copies}")
    if layout.get("tensor"):
        details.append(f"tensor {layout['tensor']}")
    if layout.get("context"):
        details.append(f"context {layout['context']}")
    if layout["offload"]:
        details.append("offload")
    processes = plural(layout["processes"], "process/processes")
    return f"{processes} with {' and '.join(details)}" if details else processes
