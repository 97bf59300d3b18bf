"""The outcomes of all units together: duplicates, the split, and the account of every record."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data.sources import Source
from pipeline.files import write_json
from pipeline.seeds import derive

if TYPE_CHECKING:
    from pipeline.data.steps import Steps

TRAIN, HELDOUT, EXACT, NEAR = range(4)
ACCOUNTED = ("place", "id", "status", "reason", "excerpt", "bytes", "counted", "language", "kind", "statistics", "failed")


@dataclass
class Index:
    """One entry for each document that passed the filters, in the order of sources, units and rows. Arrays of length D."""

    source: Any  # int16: number of its source, in sorted order
    unit: Any  # int32
    row: Any  # int32
    size: Any  # int64: bytes of normalised text
    id: Any  # uint64 [D, 2]
    hash: Any  # uint64 [D, 2]: of the normalised text
    signature: Any  # uint32 [D, 112], memory-mapped
    rows: dict[str, list[int]]  # how many rows of each unit count; `limit` may end in the middle of one
    fate: Any = None  # uint8: TRAIN, HELDOUT, EXACT or NEAR
    original: Any = None  # int64: the document that is kept for it


def build(sources: dict[str, Source], units: dict[str, list[Path]], scratch: Path) -> Index:
    import numpy as np
    import pyarrow.parquet

    from pipeline.data.dedup import BANDS, ROWS

    parts: dict[str, list] = {key: [] for key in ("source", "unit", "row", "size", "id", "hash")}
    rows: dict[str, list[int]] = {}
    with open(scratch / "signatures", "wb") as table:
        for number, (name, paths) in enumerate(units.items()):
            left, rows[name] = sources[name].limit, []
            for unit, path in enumerate(paths):
                outcome = pyarrow.parquet.read_table(path, columns=["status", "id", "size", "hash", "signature", "counted"], use_threads=False)
                if left is not None:
                    counted = np.cumsum(outcome["counted"].to_numpy())
                    outcome = outcome.slice(0, int(np.searchsorted(counted, left)) + 1 if left else 0)
                    left = max(0, left - (int(counted[-1]) if len(counted) else 0))
                rows[name].append(outcome.num_rows)
                good = np.flatnonzero(outcome["status"].to_numpy() == "ok").astype(np.int32)
                chosen = outcome.take(good)
                parts["source"].append(np.full(len(good), number, np.int16))
                parts["unit"].append(np.full(len(good), unit, np.int32))
                parts["row"].append(good)
                parts["size"].append(chosen["size"].to_numpy().astype(np.int64))
                parts["id"].append(np.frombuffer(bytes.fromhex("".join(chosen["id"].to_pylist())), ">u8").astype(np.uint64).reshape(-1, 2))
                parts["hash"].append(np.frombuffer(b"".join(chosen["hash"].to_pylist()), ">u8").astype(np.uint64).reshape(-1, 2))
                table.write(b"".join(chosen["signature"].to_pylist()))
    arrays = {key: np.concatenate(pieces) for key, pieces in parts.items()}
    width = BANDS * ROWS
    signature = np.memmap(scratch / "signatures", np.uint32, "r").reshape(-1, width) if len(arrays["row"]) else np.zeros((0, width), np.uint32)
    return Index(**arrays, signature=signature, rows=rows)


def deduplicate(index: Index, *, near: bool, similarity: float, holdout: float, seed: int) -> None:
    """Give each document its fate. Of a cluster of duplicates the document with the smallest record id is kept, whatever the order in which they were read."""
    import numpy as np

    from pipeline.data.dedup import clusters
    from pipeline.data.text import mixed

    number = len(index.row)
    ranked = np.lexsort((np.arange(number), index.id[:, 1], index.id[:, 0]))  # rank -> document; everything below counts in ranks
    hashes = index.hash[ranked]
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: within a group of equal texts, the smallest rank comes first
    begins = np.concatenate(([True], (hashes[order][1:] != hashes[order][:-1]).any(1)))[:number]
    first = np.empty(number, np.int64)
    first[order] = order[np.maximum.accumulate(np.where(begins, np.arange(number), 0))]
    unique = np.flatnonzero(first == np.arange(number))
    cluster = np.arange(number)
    if near:
        cluster[unique] = unique[clusters(index.signature, ranked[unique], similarity)]
    cluster = cluster[first]
    kept = cluster == np.arange(number)
    fate = np.where(kept, TRAIN, np.where(first == np.arange(number), NEAR, EXACT)).astype(np.uint8)
    # One document of a cluster is kept, so choosing by the hash of its id chooses by cluster, and the choice survives a change of any other source.
    number_of = mixed(index.id[ranked, 0] ^ np.uint64(derive(seed, "holdout"))) >> np.uint64(11)
    fate[kept & (number_of.astype(np.float64) / 2**53 >= 1 - holdout)] = HELDOUT
    index.fate, index.original = np.empty(number, np.uint8), np.empty(number, np.int64)
    index.fate[ranked], index.original[ranked] = fate, ranked[cluster]


def account(units: dict[str, list[Path]], index: Index, folder: Path, steps: "Steps") -> dict:
    """Write rejected/ and report.json; returns the report. Every record is in exactly one of its counts."""
    import numpy as np
    import pyarrow.parquet
    import zstandard

    from pipeline.data.rejections import Rejections

    report: dict[str, Any] = {"sources": {}}
    rejections = Rejections(steps)
    (folder / "rejected").mkdir(exist_ok=True)
    at = 0
    for number, (name, paths) in enumerate(units.items()):
        counts: dict[str, Any] = {"not selected": {}, "bad": {}, "filtered": {}, "duplicates": {}}
        read = records = size = 0
        ledger = folder / "work" / f"{name}.jsonl.zst"
        with open(ledger, "wb") as handle, zstandard.ZstdCompressor().stream_writer(handle) as packed:
            for path, rows in zip(paths, index.rows[name], strict=True):
                outcome = pyarrow.parquet.read_table(path, columns=[*ACCOUNTED], use_threads=False).slice(0, rows)
                rejections.add(name, outcome)
                read, records, size = read + rows, records + int(outcome["counted"].to_numpy().sum()), size + int(outcome["bytes"].to_numpy().sum())
                ok = outcome["status"].to_numpy() == "ok"
                document = at + np.cumsum(ok) - 1
                left_out = ~ok
                left_out[ok] = np.isin(index.fate[at : at + ok.sum()], (EXACT, NEAR))
                at += int(ok.sum())
                chosen = np.flatnonzero(left_out)
                for i, entry in zip(chosen.tolist(), outcome.select(["place", "id", "status", "reason", "excerpt"]).take(chosen).to_pylist(), strict=True):
                    if ok[i]:
                        original = index.id[index.original[document[i]]]
                        entry.update(status="duplicates", reason="exact" if index.fate[document[i]] == EXACT else "near", of=f"{original[0]:016x}{original[1]:016x}")
                    counts[entry["status"]][entry["reason"]] = counts[entry["status"]].get(entry["reason"], 0) + 1
                    if entry["status"] != "not selected":  # the recipe asked for it; counted, and not kept aside
                        packed.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        ledger.replace(folder / "rejected" / ledger.name)
        report["sources"][name] = {"read": read, "documents_in": records, "bytes_in": size, **counts}
        for split, fate in (("train", TRAIN), ("heldout", HELDOUT)):
            chosen = (index.source == number) & (index.fate == fate)
            report["sources"][name].update({f"{split}_documents": int(chosen.sum()), f"{split}_bytes": int(index.size[chosen].sum())})
    _total(report)
    report["rules"] = rejections.report()
    assert report["rules"]["rejected"] + report["total"]["nothing_left"] == report["total"]["filtered_documents"]
    write_json(folder / "report.json", report)
    return report


def _total(report: dict) -> None:
    total: dict[str, int] = {}
    for counts in report["sources"].values():
        flat = {
            **{key: value for key, value in counts.items() if isinstance(value, int)},
            "not_selected": sum(counts["not selected"].values()),
            "bad_records": sum(counts["bad"].values()),
            "filtered_documents": sum(counts["filtered"].values()),
            "nothing_left": counts["filtered"].get("nothing_left", 0),
            "duplicates_exact": counts["duplicates"].get("exact", 0),
            "duplicates_near": counts["duplicates"].get("near", 0),
        }
        fates = ("not_selected", "bad_records", "filtered_documents", "duplicates_exact", "duplicates_near", "train_documents", "heldout_documents")
        assert flat["read"] == sum(flat[key] for key in fates)
        for key, value in flat.items():
            total[key] = total.get(key, 0) + value
    total["documents_out"] = total["train_documents"] + total["heldout_documents"]
    total["bytes_out"] = total["train_bytes"] + total["heldout_bytes"]
    report["total"] = total
