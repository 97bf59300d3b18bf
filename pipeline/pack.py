"""Encode the cleaned documents and pack the tokens into memory-mapped shards.

    python pipeline/pack.py recipes/quickstart.yaml

Reads the outputs of `clean` and `tokenizer`. Writes what pipeline/data/tokens/store.py describes: for each split and
source the documents one after another, each closed by the end-of-document token, with an index of where they end, how
many bytes of text they were, and their ids.

Token files that other tools wrote (`shards`) are taken over into the same form.

The work is cut into units, one for each row group of the input or stretch of a token file
(pipeline/data/tokens/pack_units.py). A unit is published whole into work/, so that a killed run loses the units in
flight; the shards are then joined from the units in the order of the input.
"""

import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, StageConfig
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.processes import cores, kill_workers, signals_held
from pipeline.core.seeds import derive
from pipeline.core.terminal import many, say
from pipeline.core.tracking import Progress
from pipeline.data.sources.arrow_values import open_parquet
from pipeline.data.tokens.documents import check_columns, readable
from pipeline.data.tokens.import_shards import Shards
from pipeline.data.tokens.pack_units import Unit

VERSION = 2  # 2: ids of documents
INPUTS = {"data": ("clean",), "tokenizer": ("tokenizer",)}
KEPT = "finished units are kept"  # of the work of a run that was stopped

SPLITS = ("train", "heldout")
SHARD_TOKENS = 2**28  # a shard ends with the unit that reaches this: 0.5 GB of uint16


class Config(StageConfig):
    """How documents become tokens. What comes out depends on the inputs and `shards` alone."""

    workers: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Processes that encode; by default one for each core."""
    shards: dict[str, Shards] = {}
    """Token files made elsewhere, each a source beside those of the documents, or instead of them: Megatron's
    .bin/.idx, datatrove's .ds, numpy."""

    def optional(self) -> set[str]:
        return {"data"} if self.shards else set()

    @model_validator(mode="after")
    def nothing_idle(self):
        if not self.shards and self.seed:
            raise ValueError(
                f"seed: {self.seed} decides what of `shards` is held out, and there are none; leave it out"
            )
        return self

    @classmethod
    def uses_seed(cls, block: dict) -> bool:
        return bool(block.get("shards"))


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import numpy as np

    from pipeline.data.tokens.pack_units import meta_of
    from pipeline.data.tokens.store import load_tokenizer, token_bytes

    began = time.time()
    folder = inputs["tokenizer"].path
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos token, and a document needs an end; set eos_token in its"
            " tokenizer_config.json"
        )
    sizes = token_bytes(tokenizer)
    if len(sizes) != len(tokenizer):
        raise UserError(
            f"{folder}: has {len(tokenizer):,} tokens with ids up to {len(sizes) - 1:,}, so that some ids have none and"
            f" a model would be built too small; take it over with a stage `tokenizer: {{adopt: {folder}}}`, which"
            " gives each id a token"
        )
    dtype = np.dtype(np.uint16 if len(sizes) <= 2**16 else np.uint32)
    units = list(
        plan(inputs["data"].path if "data" in inputs else None, config, output.path / "work", tokenizer.eos_token_id)
    )
    todo = [unit for unit in units if not unit.output.exists()]

    rows = sum(unit.rows for unit in units)
    with Progress(
        "pack", rows, unit="parts" if config.shards else "documents", start=rows - sum(unit.rows for unit in todo)
    ) as bar:
        for unit in made(todo, config.workers or cores(), folder, tokenizer.eos_token_id, dtype.str):
            bar.update(unit.rows)
            output.note_time()
            faults.point("work")

    metas = {unit.output: meta_of(unit.output) for unit in units}
    for name in config.shards:
        if any(name in meta["sources"] for unit, meta in zip(units, metas.values(), strict=True) if not unit.shards):
            raise UserError(
                f"shards.{name}: the documents of inputs.data have a source of this name; give the shards another one"
            )
    index = {"vocab_size": len(sizes), "eos_id": tokenizer.eos_token_id, "dtype": dtype.name, "splits": {}}
    for split in SPLITS:
        index["splits"][split] = join([unit for unit in units if unit.split == split], output.path, split, dtype)
    bad = [line for meta in metas.values() for line in meta["bad"]]
    if bad:
        write_atomic(output.path / "bad.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad))
    np.save(output.path / "token_bytes.npy", sizes)
    write_json(output.path / "index.json", index)
    if not index["splits"]["train"]:
        empty = "shards: no document with tokens is left for training"
        if "data" in inputs:
            empty = f"inputs.data: {inputs['data'].path}: its split train has no document with text"
        raise UserError(f"{empty}; there is nothing to pack")
    inexact, closed = (sum(meta.get(key, 0) for meta in metas.values()) for key in ("inexact", "closed"))
    if closed:
        say(f"pack: {many(closed, 'document', ',')} of shards had no end-of-document token: one was added to each")
    if inexact:
        say(
            f"pack: the tokens of {many(inexact, 'document')} do not spell their text byte for byte; bits per byte will"
            " spread a document's bytes over its tokens"
        )
    return metrics(index, len(bad), inexact, time.time() - began)


def plan(data: Path | None, config: Config, work: Path, eos_id: int) -> Iterator[Unit]:
    """Units of both splits in the order of the input, shards behind documents. Raises UserError for files that are
    not what they should be."""
    from pipeline.data.tokens import import_shards

    if data:
        yield from _documents(data, work)
    for name, source in sorted(config.shards.items()):
        for number, path in enumerate(import_shards.files(source, name)):
            tokens = len(import_shards.open_shard(path, source).tokens)
            for split in SPLITS:
                for begin in range(0, tokens, import_shards.UNIT_TOKENS):
                    place = f"{number:05d}-{begin // import_shards.UNIT_TOKENS:06d}"
                    output = work / f"{split}-shards-{quote(name, safe='')}-{place}.npz"
                    key = derive(config.seed or 0, "shards", name)
                    yield Unit(
                        split,
                        path,
                        output,
                        1,
                        source=name,
                        shards=source,
                        number=number,
                        begin=begin,
                        end=begin + import_shards.UNIT_TOKENS,
                        key=key,
                    )


def _documents(data: Path, work: Path) -> Iterator[Unit]:
    for split in SPLITS:
        paths = sorted((data / split).glob("part-*.parquet"))
        if not paths and split == "train":
            raise UserError(f"inputs.data: {data}: has no train/part-*.parquet; expected the output of stage clean")
        for path in paths:
            with readable(path), open_parquet(path) as opened:
                check_columns(opened, path)
                for group in range(opened.num_row_groups):
                    yield Unit(
                        split,
                        path,
                        work / f"{split}-{path.stem}-{group:06d}.npz",
                        opened.metadata.row_group(group).num_rows,
                        group,
                    )


# ---- units -----------------------------------------------------------------------------------------------------------


def made(units: list[Unit], workers: int, tokenizer: Path, eos_id: int, dtype: str) -> Iterable[Unit]:
    """Make and publish units, and yield each when it is on disk, in any order."""
    from pipeline.data.tokens import pack_units

    workers = min(workers, len(units))
    if workers <= 1:
        pack_units.prepare(str(tokenizer), eos_id, dtype)
        for unit in units:
            pack_units.make(unit)
            yield unit
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(str(tokenizer), eos_id, dtype)
    ) as pool:
        with signals_held():
            futures = {pool.submit(pack_units.make, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            kill_workers()
            raise UserError(
                f"pack: one of {workers} encoding processes was killed, most often for lack of memory; the same command"
                " goes on from here, with fewer `workers` if it happens again"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(*arguments) -> None:
    from pipeline.core.processes import begin_worker
    from pipeline.data.tokens import pack_units

    begin_worker()
    pack_units.prepare(*arguments)


# ---- joining ---------------------------------------------------------------------------------------------------------


def join(units: list[Unit], folder: Path, split: str, dtype) -> dict[str, list[dict]]:
    """Write the shards of a split from its units. Returns source -> shards, as index.json lists them."""
    import numpy as np

    from pipeline.data.tokens.pack_units import meta_of

    metas = [meta_of(unit.output)["sources"] for unit in units]
    sources = sorted({source for meta in metas for source in meta})
    (folder / split).mkdir(exist_ok=True)
    index: dict[str, list[dict]] = {}
    for source in sources:
        index[source] = []
        parts = [
            (unit, sorted(meta).index(source), meta[source])
            for unit, meta in zip(units, metas, strict=True)
            if source in meta
        ]
        for number, shard in enumerate(shards(parts)):
            file = f"{split}/{quote(source, safe='')}-{number:05d}"
            entry = {
                "file": file,
                **{key: sum(meta[key] for *_, meta in shard) for key in ("tokens", "documents", "bytes", "id_bytes")},
            }
            count = (entry["documents"],)
            shapes = {
                "tokens": (dtype, (entry["tokens"],)),
                "documents": (np.int64, (*count, 2)),
                "ids": (np.uint8, (entry["id_bytes"],)),
                "id_ends": (np.int64, count),
            }
            files = {
                name: np.lib.format.open_memmap(folder / f"{file}.{name}.npy", mode="w+", dtype=kind, shape=shape)
                for name, (kind, shape) in shapes.items()
            }
            token = document = id_byte = 0
            for unit, place, meta in shard:
                rows = slice(document, document + meta["documents"])
                with np.load(unit.output) as made:
                    files["tokens"][token : token + meta["tokens"]] = made[f"tokens{place}"]
                    files["documents"][rows] = made[f"documents{place}"] + [token, 0]
                    files["ids"][id_byte : id_byte + meta["id_bytes"]] = made[f"ids{place}"]
                    files["id_ends"][rows] = made[f"id_ends{place}"] + id_byte
                token += meta["tokens"]
                document += meta["documents"]
                id_byte += meta["id_bytes"]
            for written in files.values():
                written.flush()
            index[source].append(entry)
    return index


def shards(parts: list[tuple]) -> Iterator[list[tuple]]:
    """Units of one source, grouped into shards."""
    shard, size = [], 0
    for part in parts:
        shard.append(part)
        size += part[2]["tokens"]
        if size >= SHARD_TOKENS:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def metrics(index: dict, bad: int, inexact: int, seconds: float) -> dict:
    totals = {
        split: {
            source: {key: sum(shard[key] for shard in found) for key in ("tokens", "documents", "bytes")}
            for source, found in sources.items()
        }
        for split, sources in index["splits"].items()
    }
    count = {
        split: {key: sum(source[key] for source in totals[split].values()) for key in ("tokens", "documents", "bytes")}
        for split in SPLITS
    }
    return {
        "tokens": count["train"]["tokens"],
        "documents": count["train"]["documents"],
        "bytes": count["train"]["bytes"],
        "bytes_per_token": round(count["train"]["bytes"] / count["train"]["tokens"], 4),
        "heldout_tokens": count["heldout"]["tokens"],
        "heldout_documents": count["heldout"]["documents"],
        "heldout_bytes": count["heldout"]["bytes"],
        "sources": totals["train"],
        "heldout_sources": totals["heldout"],
        "dtype": index["dtype"],
        "bad_documents": bad,
        "inexact_documents": inexact,
        "seconds": round(seconds, 3),
        "summary": {
            "input": (
                f"{many(sum(part['documents'] for part in count.values()), 'document', ',')},"
                f" {sum(part['bytes'] for part in count.values()) / 1e6:.1f} MB"
            ),
            "output": f"{count['train']['tokens']:,} tokens, held out {count['heldout']['tokens']:,}",
            "measure": f"{count['train']['bytes'] / count['train']['tokens']:.2f} bytes per token",
        },
    }


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("pack")
