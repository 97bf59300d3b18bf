"""Clean: named sources of raw text -> normalised, filtered, deduplicated documents in parquet shards, split into train and heldout.

    python pipeline/clean.py recipes/quickstart.yaml

Reads sources in units of a few megabytes, spread over `workers` processes; each unit's outcome is published at once in work/, so that a
killed run loses the units in flight and no more. Then duplicates are found over all units, and the shards are written:

    train/part-00000.parquet, heldout/part-00000.parquet    columns text, source, id
    rejected/SOURCE.jsonl.zst                               every record that is in neither: place, reason, how it begins
    report.json                                             counts by source and reason; read = kept + each rejection

The result depends on the content of the sources and the recipe alone, not on workers, unit size, order of completion or interruptions.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pipeline import faults
from pipeline.artifact import Artifact, Output, write_atomic, write_json
from pipeline.data import sources as reading
from pipeline.data.filters import Filters
from pipeline.data.pool import Pool
from pipeline.data.sources import Bad, Chunk, MissingField, Source
from pipeline.errors import UserError
from pipeline.recipe import EXECUTION, StageConfig, Strict
from pipeline.seeds import derive
from pipeline.tracking import Progress

VERSION = 1
INPUTS: dict[str, tuple[str, ...]] = {}
SHARD_BYTES = 64 << 20  # of text: one shard is held in memory while it is written
BATCH_CHARACTERS = 1 << 18  # texts hashed at a time: numpy's arrays of a batch then stay in the cache (1 << 22: half the speed)
OUTCOME = ("place", "id", "status", "reason", "excerpt", "text", "bytes", "size", "hash", "signature", "counted")
TRAIN, HELDOUT, EXACT, NEAR = range(4)


class Dedup(Strict):
    """Exact duplicates always go; near duplicates by MinHash (see pipeline/data/dedup.py)."""

    near: bool = True
    """Also remove documents that are nearly equal to another one."""
    similarity: float = Field(0.7, gt=0, le=1)
    """Estimated Jaccard similarity of runs of five tokens from which two documents are near duplicates."""


class Config(StageConfig):
    sources: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Source] = Field(min_length=1)
    """Name -> where its records come from. The names come back in the mixture of `pretrain` and in every report."""
    filters: Filters = Filters()
    """Which documents are left out."""
    dedup: Dedup = Dedup()
    """What counts as a duplicate."""
    holdout: float = Field(0.01, ge=0, lt=1)
    """Share of documents held out for evaluation, chosen by hash after deduplication, so that no held-out text has a duplicate in training."""
    max_bad: Annotated[float, EXECUTION] = Field(0.05, ge=0, le=1)
    """Largest share of unreadable records that a source may have; more of them end the stage, for then the source is not what the recipe says."""
    workers: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Processes; by default the cores of this machine."""
    unit_bytes: Annotated[int, EXECUTION] = Field(4 << 20, ge=1024)
    """Raw bytes of one unit of work: what a killed run may lose, for each worker."""


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict[str, Any]:
    from pipeline.data.dedup import MAKER

    work = output.path / "work" / f"{MAKER}-{config.unit_bytes}"
    units = _clean_units(config, work, output)
    index = _index(config, units, output.path / "work")
    _deduplicate(config, index)
    report = _account(config, units, index, output.path)
    for name, counts in report["sources"].items():
        bad = sum(counts["bad"].values())
        if bad > config.max_bad * counts["read"]:
            most = max(counts["bad"], key=counts["bad"].get)
            raise UserError(
                f"sources.{name}: {bad} of {counts['read']} records are bad ({bad / counts['read']:.1%}, most often {most!r}), more than max_bad {config.max_bad:g}; "
                f"look into {output.path / 'rejected' / name}.jsonl.zst, then mend the source or raise max_bad"
            )
    total = report["total"]
    for split, needed in (("train", True), ("heldout", config.holdout > 0)):
        if needed and not total[f"{split}_documents"]:
            raise UserError(f"no document is left for {split}: {total['read']} read, {total['train_documents'] + total['heldout_documents']} kept, holdout {config.holdout:g}; see {output.path / 'report.json'}, then ease filters or change holdout")
    _write_shards(config, units, index, output)
    return {**total, "by_source": report["sources"], "summary": _summary(config, total)}


def _summary(config: Config, total: dict) -> dict[str, str]:
    kept = total["train_documents"] + total["heldout_documents"]
    return {
        "input": f"{total['bytes_in'] / 1e6:.1f} MB, {total['documents_in']} documents, {len(config.sources)} source{'s' * (len(config.sources) > 1)}",
        "output": f"{total['bytes_out'] / 1e6:.1f} MB, {kept} documents ({total['heldout_documents']} held out)",
        "measure": f"left out: {total['filtered_documents']} filtered, {total['duplicates_exact']} + {total['duplicates_near']} duplicates, {total['bad_records']} bad",
    }


# ---- units -----------------------------------------------------------------------------------------------------------------


def _clean_units(config: Config, work: Path, output: Output) -> dict[str, list[Path]]:
    """Clean every source, unit by unit, where a former run has not done it. Returns the files of the units by source, in order."""
    names = sorted(config.sources)
    todo = [name for name in names if not (work / name / "complete.json").exists()]
    for name in todo:
        if not (work / name).exists():
            _try(config.sources[name], name)
    sizes = {name: _size(config.sources[name], name) for name in names}
    done = sum(sizes[name] for name in names if name not in todo)
    with Progress("clean", sum(sizes.values()), "B", start=done, is_main=output.is_main) as bar, Pool(config.workers) as pool:
        for name in todo:
            _clean_source(config, name, work / name, pool, bar, sizes[name], output)
    return {name: [work / name / f"{i:08d}.parquet" for i in range(json.loads((work / name / "complete.json").read_text())["units"])] for name in names}


def _clean_source(config: Config, name: str, folder: Path, pool: Pool, bar: Progress, size: int, output: Output) -> None:
    source = config.sources[name]
    folder.mkdir(parents=True, exist_ok=True)
    counted: dict[int, int] = {}  # records of each finished unit, for `limit`
    told = [0]

    def finished(number: int, records: int, weight: int) -> None:
        counted[number] = records
        step = min(weight, size - told[0])  # compressed files unpack to more than their size on disk
        told[0] += step
        bar.update(step, source=name)
        output.note_time()
        faults.point("work")

    number = -1
    for number, unit in enumerate(_units(source, name, config.unit_bytes)):
        if source.limit and _prefix(counted) >= source.limit:
            number -= 1
            break
        path = folder / f"{number:08d}.parquet"
        if path.exists():
            counted[number] = _counted(path)
            continue
        pool.submit(finished, number, sum(chunk.weight for chunk in unit), clean_unit, unit, source, config.filters, path)
    pool.drain()
    bar.update(size - told[0], source=name)
    write_json(folder / "complete.json", {"units": number + 1})


def _prefix(counted: dict[int, int]) -> int:
    """Records in the units that are finished without a gap before them."""
    total = number = 0
    while number in counted:
        total, number = total + counted[number], number + 1
    return total


def _counted(path: Path) -> int:
    import pyarrow.compute
    import pyarrow.parquet

    return pyarrow.compute.sum(pyarrow.parquet.read_table(path, columns=["counted"], use_threads=False)["counted"]).as_py() or 0


def _units(source: Source, name: str, size: int) -> Iterator[list[Chunk]]:
    """Chunks together up to `size` bytes: big files are cut, small ones joined."""
    unit, weight = [], 0
    for chunk in reading.chunks(source, name, size):
        if unit and weight + chunk.weight > size:
            yield unit
            unit, weight = [], 0
        unit.append(chunk)
        weight += chunk.weight
    if unit:
        yield unit


def _try(source: Source, name: str) -> None:
    """Refuse a source that has no good record, before any work is done."""
    first, number = None, 0
    for item in reading.read(source, name):
        if not isinstance(item, Bad):
            try:
                reading.text_of(source, item)
                return
            except MissingField as error:
                item = Bad(item.place, str(error), "")
        first, number = first or item, number + 1
    if first is None:
        chosen = " that `where` and `part` select" if source.where or source.part != (0.0, 1.0) else ""
        raise UserError(f"sources.{name}: has no record{chosen}; look at its files, format and `records`")
    raise UserError(f"sources.{name}: none of its {number} records is good; the first: {first.place}: {first.reason.removeprefix(f'{first.place}: ')}{f' ({first.raw[:80]!r})' if first.raw else ''}")


def _size(source: Source, name: str) -> int:
    """Bytes of a source's files, for the progress bar."""
    return 0 if source.dataset else sum(path.stat().st_size for _, path in reading.files(source, name))


def clean_unit(unit: list[Chunk], source: Source, filters: Filters, path: Path) -> int:
    """Clean one unit and publish its outcome, a row for each record in order. Returns how many records count towards `limit`."""
    import pyarrow
    import pyarrow.parquet

    rows, raw = [], []
    for item in (item for chunk in unit for item in reading.parse(chunk)):
        row = dict.fromkeys(OUTCOME)
        row.update(place=_valid(item.place), status="ok", bytes=0, counted=0)
        rows.append(row)
        if isinstance(item, Bad):
            row.update(status="bad", reason=item.reason, excerpt=_valid(item.raw))
            continue
        row["id"] = item.id
        if left_out := reading.deselected(source, item):
            row.update(status="not selected", reason=left_out)
            continue
        row["counted"] = 1
        try:
            text = reading.text_of(source, item)
            row["bytes"] = len(text.encode())
        except MissingField:
            row.update(status="bad", reason="missing field", excerpt=_valid(json.dumps(item.fields, ensure_ascii=False, default=str)[: reading.EXCERPT]))
        except UnicodeEncodeError:  # JSON may spell half of a surrogate pair
            row.update(status="bad", reason="lone surrogate", excerpt=_valid(text[: reading.EXCERPT]))
        else:
            raw.append((row, text))
    while raw:
        size = number = 0
        while number < len(raw) and size < BATCH_CHARACTERS:
            size, number = size + len(raw[number][1]), number + 1
        _judge(raw[:number], filters)
        del raw[:number]
    binary = {"hash": pyarrow.binary(16), "signature": pyarrow.binary(), "bytes": pyarrow.int64(), "size": pyarrow.int64(), "counted": pyarrow.int8()}
    columns = {key: pyarrow.array([row[key] for row in rows], binary.get(key, pyarrow.string())) for key in OUTCOME}
    buffer = io.BytesIO()
    compressed = [key for key in OUTCOME if key not in ("hash", "signature")]  # the two are random bits
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer, compression={key: "zstd" if key in compressed else "none" for key in OUTCOME}, use_dictionary=["status", "reason"])
    faults.point("save")
    write_atomic(path, buffer.getvalue())
    return sum(row["counted"] for row in rows)


def _judge(raw: list[tuple[dict, str]], filters: Filters) -> None:
    """Fill in the rows of a batch of texts: text, hash and signature, or why it is left out."""
    from pipeline.data.dedup import signatures
    from pipeline.data.filters import reasons
    from pipeline.data.text import normalise, shingles, tokens

    before = [text for _, text in raw]
    texts = [normalise(text) for text in before]
    hashed = tokens(texts)
    shingled = shingles(hashed)
    verdicts = reasons(before, texts, hashed, shingled, filters)
    for (row, _), text, verdict, signature in zip(raw, texts, verdicts, signatures(*shingled), strict=True):
        row["excerpt"] = text[: reading.EXCERPT]
        if verdict:
            row.update(status="filtered", reason=verdict)
        else:
            data = text.encode()
            row.update(text=text, size=len(data), hash=hashlib.blake2b(data, digest_size=16).digest(), signature=signature.tobytes())


def _valid(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


# ---- all units together ----------------------------------------------------------------------------------------------------


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


def _index(config: Config, units: dict[str, list[Path]], scratch: Path) -> Index:
    import numpy as np
    import pyarrow.parquet

    parts: dict[str, list] = {key: [] for key in ("source", "unit", "row", "size", "id", "hash")}
    rows: dict[str, list[int]] = {}
    with open(scratch / "signatures", "wb") as table:
        for number, (name, paths) in enumerate(units.items()):
            left, rows[name] = config.sources[name].limit, []
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
    width = 14 * 8
    signature = np.memmap(scratch / "signatures", np.uint32, "r").reshape(-1, width) if len(arrays["row"]) else np.zeros((0, width), np.uint32)
    return Index(**arrays, signature=signature, rows=rows)


def _deduplicate(config: Config, index: Index) -> None:
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
    if config.dedup.near:
        cluster[unique] = unique[clusters(index.signature, ranked[unique], config.dedup.similarity)]
    cluster = cluster[first]
    kept = cluster == np.arange(number)
    fate = np.where(kept, TRAIN, np.where(first == np.arange(number), NEAR, EXACT)).astype(np.uint8)
    # One document of a cluster is kept, so choosing by the hash of its id chooses by cluster, and the choice survives a change of any other source.
    number_of = mixed(index.id[ranked, 0] ^ np.uint64(derive(config.seed, "holdout"))) >> np.uint64(11)
    fate[kept & (number_of.astype(np.float64) / 2**53 >= 1 - config.holdout)] = HELDOUT
    index.fate, index.original = np.empty(number, np.uint8), np.empty(number, np.int64)
    index.fate[ranked], index.original[ranked] = fate, ranked[cluster]


def _account(config: Config, units: dict[str, list[Path]], index: Index, folder: Path) -> dict:
    """Write rejected/ and report.json; returns the report. Every record is in exactly one of its counts."""
    import numpy as np
    import pyarrow.parquet
    import zstandard

    report: dict[str, Any] = {"sources": {}}
    (folder / "rejected").mkdir(exist_ok=True)
    at = 0
    for number, (name, paths) in enumerate(units.items()):
        counts: dict[str, Any] = {"not selected": {}, "bad": {}, "filtered": {}, "duplicates": {}}
        read = records = size = 0
        ledger = folder / "work" / f"{name}.jsonl.zst"
        with open(ledger, "wb") as handle, zstandard.ZstdCompressor().stream_writer(handle) as packed:
            for path, rows in zip(paths, index.rows[name], strict=True):
                outcome = pyarrow.parquet.read_table(path, columns=["place", "id", "status", "reason", "excerpt", "bytes", "counted"], use_threads=False).slice(0, rows)
                read, records, size = read + rows, records + int(outcome["counted"].to_numpy().sum()), size + int(outcome["bytes"].to_numpy().sum())
                ok = outcome["status"].to_numpy() == "ok"
                document = at + np.cumsum(ok) - 1
                left_out = ~ok
                left_out[ok] = np.isin(index.fate[at : at + ok.sum()], (EXACT, NEAR))
                at += int(ok.sum())
                for i in np.flatnonzero(left_out).tolist():
                    entry = {key: outcome[key][i].as_py() for key in ("place", "id", "status", "reason", "excerpt")}
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
            "duplicates_exact": counts["duplicates"].get("exact", 0),
            "duplicates_near": counts["duplicates"].get("near", 0),
        }
        assert flat["read"] == sum(flat[key] for key in ("not_selected", "bad_records", "filtered_documents", "duplicates_exact", "duplicates_near", "train_documents", "heldout_documents"))
        for key, value in flat.items():
            total[key] = total.get(key, 0) + value
    total["documents_out"] = total["train_documents"] + total["heldout_documents"]
    total["bytes_out"] = total["train_bytes"] + total["heldout_bytes"]
    report["total"] = total


# ---- shards ----------------------------------------------------------------------------------------------------------------


def _write_shards(config: Config, units: dict[str, list[Path]], index: Index, output: Output) -> None:
    import numpy as np

    names = list(units)
    with Pool(config.workers) as pool:
        for split, fate in (("train", TRAIN), ("heldout", HELDOUT)):
            folder = output.path / split
            folder.mkdir(exist_ok=True)
            for torn in folder.glob(".*.tmp"):
                torn.unlink()
            chosen = np.flatnonzero(index.fate == fate)
            shard = np.unique((np.cumsum(index.size[chosen]) - index.size[chosen]) // SHARD_BYTES, return_inverse=True)[1]
            for number in range(int(shard.max(initial=-1)) + 1):
                path = folder / f"part-{number:05d}.parquet"
                if path.exists():  # of this same fingerprint, so with this same content
                    continue
                documents = chosen[shard == number]
                cuts = np.flatnonzero(np.diff(index.source[documents]) | np.diff(index.unit[documents])) + 1
                pieces = [(names[index.source[part[0]]], units[names[index.source[part[0]]]][index.unit[part[0]]], index.row[part]) for part in np.split(documents, cuts)]
                pool.submit(lambda *_: faults.point("work"), number, 0, write_shard, pieces, path)
        pool.drain()


def write_shard(pieces: list[tuple[str, Path, Any]], path: Path) -> None:
    """Gather rows of units, (source, unit file, row numbers) each, into one shard."""
    import pyarrow
    import pyarrow.parquet

    tables = []
    for name, unit, rows in pieces:
        table = pyarrow.parquet.read_table(unit, columns=["text", "id"], use_threads=False).take(rows)
        tables.append(pyarrow.table({"text": table["text"], "source": pyarrow.array([name] * len(rows)), "id": table["id"]}))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.concat_tables(tables).combine_chunks(), buffer, compression="zstd", row_group_size=1 << 14, use_dictionary=["source"], write_statistics=False)
    faults.point("save")
    write_atomic(path, buffer.getvalue())


if __name__ == "__main__":
    from pipeline.chain import main

    main("clean")
