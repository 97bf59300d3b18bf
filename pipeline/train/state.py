"""The state of a training run on disk, in a form that does not know how the run was laid out.

    model-00000.safetensors    what process 0 wrote: flat pieces of parameters and moments, in safetensors' own layout
    model.json                 steps made, optimizer, and who wrote it

A piece is called `exp_avg/model.layers.0.mlp.up_proj.weight@4096`: what it is (weight, exp_avg, exp_avg_sq,
momentum_buffer, buffer), the parameter's name in the whole model, and at which of its elements it begins. Who reads
asks for any range of elements and gets it pieced together, so that a run goes on in any layout. Full shapes stand in
the metadata of each file. Nothing is pickled.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from pipeline.core.errors import UserError

FORMAT = 1
CHUNK = 16 << 20  # bytes hashed and written at a time
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16"}
DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # of buffers


class Fragment(NamedTuple):
    """Elements start to start + len(values) of a tensor. `values` is a flat view of live memory, or a copy."""

    kind: str
    name: str
    start: int
    values: torch.Tensor

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}@{self.start}"


class Part(NamedTuple):
    """What one process writes of one engine: its pieces, {parameter: shape and number of updates} of what they
    belong to, and the content of the small JSON file."""

    fragments: list[Fragment]
    parameters: dict[str, dict]
    summary: dict

    @property
    def bytes(self) -> int:
        return sum(fragment.values.nbytes for fragment in self.fragments)


class Cancelled(Exception):
    """Writing was given up, because the run ends."""


def share(fragments: list[Fragment], rank: int, world: int) -> list[Fragment]:
    """This process's part of pieces that all of `world` processes hold: the elements in a row, cut into equal
    ranges."""
    if world == 1:
        return fragments
    total = sum(fragment.values.numel() for fragment in fragments)
    first, last = total * rank // world, total * (rank + 1) // world
    mine, at = [], 0
    for fragment in fragments:
        low, high = max(first - at, 0), min(last - at, fragment.values.numel())
        if low < high:
            mine.append(fragment._replace(start=fragment.start + low, values=fragment.values[low:high]))
        at += fragment.values.numel()
    return mine


class Copier:
    """Copies pieces into memory that it keeps: the second copy touches no new page. On a GPU the memory is pinned."""

    def __init__(self):
        self.layout: list = []
        self.places: list[torch.Tensor] = []

    def copy(self, fragments: list[Fragment]) -> list[Fragment]:
        layout = [(*fragment[:3], fragment.values.dtype, fragment.values.numel()) for fragment in fragments]
        if layout != self.layout:
            on_gpu = any(fragment.values.is_cuda for fragment in fragments)
            memory = torch.empty(
                sum(-(-fragment.values.nbytes // 8) * 8 for fragment in fragments), dtype=torch.uint8, pin_memory=on_gpu
            )
            self.layout, self.places, at = layout, [], 0
            for fragment in fragments:
                self.places.append(memory[at : at + fragment.values.nbytes].view(fragment.values.dtype))
                at += -(-fragment.values.nbytes // 8) * 8
        with torch.no_grad():
            torch._foreach_copy_(self.places, [fragment.values for fragment in fragments], non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return [Fragment(*fragment[:3], place) for fragment, place in zip(fragments, self.places, strict=True)]


def write(path: Path, part: Part, cancelled: Callable[[], bool] = lambda: False) -> dict:
    """Write a safetensors file, hashed on the way and synced. Returns {sha256, size}. Raises OSError, or Cancelled
    when `cancelled()` turns true."""
    entries: dict = {
        "__metadata__": {"format": "alma", "version": str(FORMAT), "parameters": json.dumps(part.parameters)}
    }
    # so that each piece is aligned to its own size
    fragments = sorted(part.fragments, key=lambda fragment: -fragment.values.element_size())
    at = 0
    for fragment in fragments:
        end = at + fragment.values.nbytes
        entries[fragment.key] = {
            "dtype": DTYPES[fragment.values.dtype],
            "shape": [fragment.values.numel()],
            "data_offsets": [at, end],
        }
        at = end
    header = json.dumps(entries, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    digest, size = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as handle:
        for data in (len(header).to_bytes(8, "little") + header, *(_bytes(fragment.values) for fragment in fragments)):
            for begin in range(0, len(data), CHUNK):
                if cancelled():
                    raise Cancelled
                piece = data[begin : begin + CHUNK]
                digest.update(piece)
                done = 0
                while done < len(piece):
                    done += handle.write(piece[done:])
                size += len(piece)
        os.fsync(handle.fileno())
    return {"sha256": digest.hexdigest(), "size": size}


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.detach().cpu().contiguous().view(torch.uint8).numpy())


class Reader:
    """The pieces of one engine in a checkpoint folder, by their place in the whole model.

    steps, layout, optimizer: what the run had made and how. parameters: {name: {shape, updates}}. Raises UserError for
    a folder that holds no state of `name`.
    """

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        summary = folder / f"{name}.json"
        if not summary.is_file():
            if (folder / f"{name}-state.pt").exists() or (folder / f"{name}-layout.json").exists():
                raise UserError(
                    f"{folder}: was written by an earlier alma as a pickle, which this one does not read; give"
                    " --restart to begin anew"
                )
            raise UserError(f"{folder}: holds no training state called {name} ({summary.name} is missing)")
        known = json.loads(summary.read_text(encoding="utf-8"))
        if known["format"] > FORMAT:
            raise UserError(
                f"{folder}: written by a newer alma (format {known['format']}, this one reads {FORMAT}); update alma"
            )
        self.steps, self.optimizer, self.layout = known["steps"], known["optimizer"], known["layout"]
        self.parameters: dict[str, dict] = {}
        # (kind, name) -> [(start, stop, file, offset, dtype)]
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Path, int, str]]] = {}
        for path in sorted(folder.iterdir()):
            if re.fullmatch(rf"{re.escape(name)}-\d+\.safetensors", path.name):
                self._index(path)
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[:2])

    def _index(self, path: Path) -> None:
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
        self.parameters |= json.loads(header.pop("__metadata__")["parameters"])
        for key, entry in header.items():
            place, _, start = key.rpartition("@")
            kind, _, name = place.partition("/")
            first = int(start)
            self.pieces.setdefault((kind, name), []).append(
                (first, first + entry["shape"][0], path, 8 + length + entry["data_offsets"][0], entry["dtype"])
            )

    def has(self, kind: str, name: str) -> bool:
        return (kind, name) in self.pieces

    def read(self, kind: str, name: str, start: int, numel: int) -> torch.Tensor:
        """Elements start to start + numel, flat, on the CPU. Raises UserError if some of them are in no file."""
        pieces = self.pieces.get((kind, name), [])
        dtype = next((known for known, word in DTYPES.items() if pieces and word == pieces[0][4]), torch.float32)
        found = torch.empty(numel, dtype=dtype)
        view, at = memoryview(found.view(torch.uint8).numpy()), start
        size = found.element_size()
        for first, stop, path, offset, _ in pieces:
            if stop <= at or first > at:
                continue
            take = min(stop, start + numel) - at
            if take <= 0:
                break
            _read_exactly(path, offset + (at - first) * size, view[(at - start) * size : (at - start + take) * size])
            at += take
        if at < start + numel:
            stop = min([start + numel, *(first for first, *_ in pieces if first > at)])
            raise UserError(
                f"{self.folder}: {kind} of {name} lacks the elements {at} to {stop}; the checkpoint is not whole,"
                " remove it to go on from the one before"
            )
        return found

    def fill(self, fragment: Fragment) -> None:
        """Read a piece into live memory. A moment that was never updated is zero."""
        moment = fragment.kind not in ("weight", "buffer")
        with torch.no_grad():
            if (
                moment
                and not self.has(fragment.kind, fragment.name)
                and not self.parameters.get(fragment.name, {}).get("updates")
            ):
                fragment.values.zero_()
            elif fragment.values.numel():
                fragment.values.copy_(self.read(fragment.kind, fragment.name, fragment.start, fragment.values.numel()))

    def compare(self, shapes: dict[str, list[int]], optimizer: str) -> None:
        """Raise UserError if this is the state of another model or optimizer, naming the first difference."""
        advice = "go on with the recipe that made it, or give --restart"
        for name, shape in shapes.items():
            if name not in self.parameters:
                raise UserError(f"{self.folder}: is of another model: it has no {name}; {advice}")
            if self.parameters[name]["shape"] != list(shape):
                raise UserError(
                    f"{self.folder}: is of another model: {name} is {self.parameters[name]['shape']} there and"
                    f" {list(shape)} here; {advice}"
                )
        if extra := [name for name in self.parameters if name not in shapes]:
            raise UserError(f"{self.folder}: is of another model: it has {extra[0]}, this one has not; {advice}")
        if self.optimizer != optimizer:
            made = (
                f"{self.folder}: was saved with optimizer.kind: {self.optimizer}, whose moments are of no use to"
                f" {optimizer}"
            )
            raise UserError(f"{made}; {advice}, or begin from its weights alone (inputs.model)")

    def changed(self, layout: dict) -> str:
        """In words, what is another layout than the one that wrote this; empty if none is."""
        return "" if self.layout == layout else f"saved by {describe(self.layout)}, goes on with {describe(layout)}"


def _read_exactly(path: Path, offset: int, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as handle:
        handle.seek(offset)
        done = 0
        while done < len(view):
            count = handle.readinto(view[done:])
            if not count:
                raise UserError(
                    f"{path}: ends before its data do; the checkpoint is damaged, remove it to go on from the one"
                    " before"
                )
            done += count


def describe(layout: dict) -> str:
    """`2 processes with zero 3 and offload`."""
    count = layout["processes"]
    words = (
        [f"pipeline {layout['pipeline']}"]
        if layout["pipeline"] > 1
        else [f"zero {layout['zero']}"]
        if layout["zero"] is not None
        else []
    )
    words += ["offload"] if layout["offload"] else []
    return f"{count} process{'es' if count > 1 else ''}" + (f" with {' and '.join(words)}" if words else "")
