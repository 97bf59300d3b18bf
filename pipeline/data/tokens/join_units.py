"""The shards of stage pack, joined from its units in the order of the input."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np

from pipeline.data.tokens.pack_units import Unit, meta_of

SHARD_TOKENS = 2**28  # a shard ends with the unit that reaches this: 0.5 GB of uint16


def write_shards(units: list[Unit], folder: Path, split: str, dtype) -> dict[str, list[dict]]:
    """Write the shards of a split from its units. Returns source -> shards, as index.json lists them."""
    metas = [meta_of(unit.output)["sources"] for unit in units]
    sources = sorted({source for meta in metas for source in meta})
    (folder / split).mkdir(exist_ok=True)
    index: dict[str, list[dict]] = {}
    for source in sources:
        parts = []  # (unit, number of the source in the unit, counts)
        for unit, meta in zip(units, metas, strict=True):
            if source in meta:
                parts.append((unit, sorted(meta).index(source), meta[source]))
        index[source] = []
        for number, shard in enumerate(grouped(parts)):
            entry = {"file": f"{split}/{quote(source, safe='')}-{number:05d}"}
            for key in ("tokens", "documents", "bytes", "id_bytes"):
                entry[key] = sum(counts[key] for _, _, counts in shard)
            _write_shard(folder, entry, shard, dtype)
            index[source].append(entry)
    return index


def _write_shard(folder: Path, entry: dict, shard: list[tuple], dtype) -> None:
    layout = {
        "tokens": (dtype, (entry["tokens"],)),
        "documents": (np.int64, (entry["documents"], 2)),
        "ids": (np.uint8, (entry["id_bytes"],)),
        "id_ends": (np.int64, (entry["documents"],)),
    }
    arrays = {}
    for name, (kind, shape) in layout.items():
        path = folder / f"{entry['file']}.{name}.npy"
        arrays[name] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
    token = document = id_byte = 0
    for unit, number, counts in shard:
        rows = slice(document, document + counts["documents"])
        with np.load(unit.output) as part:
            arrays["tokens"][token : token + counts["tokens"]] = part[f"tokens{number}"]
            arrays["documents"][rows] = part[f"documents{number}"] + [token, 0]
            arrays["ids"][id_byte : id_byte + counts["id_bytes"]] = part[f"ids{number}"]
            arrays["id_ends"][rows] = part[f"id_ends{number}"] + id_byte
        token += counts["tokens"]
        document += counts["documents"]
        id_byte += counts["id_bytes"]
    for array in arrays.values():
        array.flush()


def grouped(parts: list[tuple]) -> Iterator[list[tuple]]:
    """The parts of one source, grouped into shards."""
    shard, num_tokens = [], 0
    for part in parts:
        shard.append(part)
        num_tokens += part[2]["tokens"]
        if num_tokens >= SHARD_TOKENS:
            yield shard
            shard, num_tokens = [], 0
    if shard:
        yield shard
