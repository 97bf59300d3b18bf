"""Encode the cleaned documents and pack the tokens into memory-mapped shards.

    python pipeline/pack.py recipes/quickstart.yaml

Reads the outputs of `clean` and `tokenizer`. Writes the folder that pipeline/data/tokens/store.py describes: for each
split and source the documents one after another, each ending with the end-of-document token, with an index of where
they end, their bytes of text, and their ids. Token files of other tools (`shards`) are imported into the same form.

The work is divided into units: a row group of the input, or a range of a token file
(pipeline/data/tokens/pack_units.py). Each unit is published as one file in work/, so a killed run loses only the units
in progress. The shards are then joined from the units in the order of the input.
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
from pipeline.core.config import EXECUTION, PlannedInput, SourceBlock, StageConfig
from pipeline.core.errors import Problems, UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.processes import cores, kill_workers, signals_held
from pipeline.core.seeds import derive
from pipeline.core.terminal import plural, say
from pipeline.core.tracking import Progress
from pipeline.data.sources.arrow_values import open_parquet
from pipeline.data.tokens import import_shards, join_units, pack_units
from pipeline.data.tokens.documents import check_columns, damage_reported
from pipeline.data.tokens.import_shards import Shards
from pipeline.data.tokens.pack_units import Unit

VERSION = 2  # 2: ids of documents
INPUTS = {"data": ("clean",), "tokenizer": ("tokenizer",)}

SPLITS = ("train", "heldout")


class Config(StageConfig):
    """How documents become tokens. The result depends only on the inputs and `shards`."""

    KEPT = "finished units are kept"

    workers: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Encoding processes; by default one per core."""
    shards: dict[str, Shards] = {}
    """Token files of other tools, each a further source besides those of the documents, or instead of them: Megatron's
    .bin/.idx, datatrove's .ds, numpy."""

    def optional(self) -> set[str]:
        return {"data"} if self.shards else set()

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not self.shards and self.seed:
            raise ValueError(
                f"seed: {self.seed} decides which documents of `shards` are held out, and there are none; remove it"
            )
        return self

    @classmethod
    def uses_seed(cls, block: dict) -> bool:
        return bool(block.get("shards"))

    @classmethod
    def external(cls) -> list[SourceBlock]:
        return [SourceBlock("shards", lambda config: config.shards)]

    def planned_sources(self, inputs: dict[str, PlannedInput]) -> list[str] | None:
        documents: list[str] | None = []
        if "data" in inputs:
            data = inputs["data"]
            documents = None if data.config is None else data.config.planned_sources(data.inputs)
        return None if documents is None else [*documents, *self.shards]

    def planned_vocabulary(self, inputs: dict[str, PlannedInput]) -> int | None:
        tokenizer = inputs.get("tokenizer")
        if tokenizer is None or tokenizer.config is None:
            return None
        return tokenizer.config.planned_vocabulary(tokenizer.inputs)

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        problems = Problems()
        for name, source in self.shards.items():
            with problems.gather():
                for path in import_shards.files(source, name)[:1]:
                    import_shards.open_shard(path, source)
        problems.refuse()


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import numpy as np

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    began = time.time()
    folder = inputs["tokenizer"].path
    tokenizer = load_tokenizer(folder)
    token_bytes = _token_bytes(folder, tokenizer)
    eos_id = tokenizer.eos_token_id
    dtype = np.dtype(np.uint16 if len(token_bytes) <= 2**16 else np.uint32)

    data = inputs["data"].path if "data" in inputs else None
    units = list(plan(data, config, output.path / "work"))
    missing = [unit for unit in units if not unit.output.exists()]
    num_rows, num_missing_rows = sum(unit.rows for unit in units), sum(unit.rows for unit in missing)
    num_workers = config.workers or cores()
    bar_unit = "parts" if config.shards else "documents"
    with Progress("pack", num_rows, unit=bar_unit, start=num_rows - num_missing_rows) as bar:
        for unit in processed(missing, num_workers, folder, eos_id, dtype.str):
            bar.update(unit.rows)
            output.note_time()
            faults.point("work")

    metas = {unit.output: pack_units.meta_of(unit.output) for unit in units}
    _check_names(config, units, metas)
    index = {"vocab_size": len(token_bytes), "eos_id": eos_id, "dtype": dtype.name, "splits": {}}
    for split in SPLITS:
        split_units = [unit for unit in units if unit.split == split]
        index["splits"][split] = join_units.write_shards(split_units, output.path, split, dtype)
    bad = [record for meta in metas.values() for record in meta["bad"]]
    if bad:
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in bad]
        write_atomic(output.path / "bad.jsonl", "".join(lines))
    np.save(output.path / "token_bytes.npy", token_bytes)
    write_json(output.path / "index.json", index)
    if not index["splits"]["train"]:
        empty = f"inputs.data: {data}: its split train has no document with text"
        if data is None:
            empty = "shards: none of the documents for training has tokens"
        raise UserError(f"{empty}; there is nothing to pack")
    num_closed = sum(meta.get("closed", 0) for meta in metas.values())
    if num_closed:
        say(
            f"pack: {plural(num_closed, 'document', ',')} of shards had no end-of-document token: one was added to each"
        )
    num_inexact = sum(meta.get("inexact", 0) for meta in metas.values())
    if num_inexact:
        say(
            f"pack: the tokens of {plural(num_inexact, 'document')} do not spell their text byte for byte; bits per"
            " byte will spread a document's bytes over its tokens"
        )
    return metrics(index, len(bad), num_inexact, time.time() - began)


def _token_bytes(folder: Path, tokenizer):
    """Bytes of each token, int32 [vocabulary]. Raises UserError for a tokenizer whose tokens cannot be packed."""
    from pipeline.data.tokenizer.fast_tokenizer import token_bytes

    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no eos token, and every document ends with one; set eos_token in its"
            " tokenizer_config.json"
        )
    sizes = token_bytes(tokenizer)
    if len(sizes) != len(tokenizer):
        raise UserError(
            f"{folder}: has {len(tokenizer):,} tokens with ids up to {len(sizes) - 1:,}, so some ids have no token and"
            f" a model would be built too small; adopt it in a stage `tokenizer: {{adopt: {folder}}}`, which gives each"
            " id a token"
        )
    return sizes


def _check_names(config: Config, units: list[Unit], metas: dict[Path, dict]) -> None:
    sources = set()
    for unit in units:
        if not unit.shards:
            sources |= set(metas[unit.output]["sources"])
    for name in config.shards:
        if name in sources:
            raise UserError(
                f"shards.{name}: the documents of inputs.data have a source of this name; give the shards another name"
            )


# ---- units -----------------------------------------------------------------------------------------------------------


def plan(data: Path | None, config: Config, work: Path) -> Iterator[Unit]:
    """Units of both splits in the order of the input, shards after documents. Raises UserError for files of another
    kind."""
    if data:
        yield from _document_units(data, work)
    for name, source in sorted(config.shards.items()):
        key = derive(config.seed or 0, "shards", name)
        for file_number, path in enumerate(import_shards.files(source, name)):
            num_tokens = len(import_shards.open_shard(path, source).tokens)
            for split in SPLITS:
                for begin in range(0, num_tokens, import_shards.UNIT_TOKENS):
                    place = f"{file_number:05d}-{begin // import_shards.UNIT_TOKENS:06d}"
                    yield Unit(
                        split,
                        path,
                        work / f"{split}-shards-{quote(name, safe='')}-{place}.npz",
                        rows=1,
                        source=name,
                        shards=source,
                        file_number=file_number,
                        begin=begin,
                        end=begin + import_shards.UNIT_TOKENS,
                        key=key,
                    )


def _document_units(data: Path, work: Path) -> Iterator[Unit]:
    for split in SPLITS:
        paths = sorted((data / split).glob("part-*.parquet"))
        if not paths and split == "train":
            raise UserError(f"inputs.data: {data}: has no train/part-*.parquet; expected the output of stage clean")
        for path in paths:
            with damage_reported(path), open_parquet(path) as table:
                check_columns(table, path)
                for group in range(table.num_row_groups):
                    file = work / f"{split}-{path.stem}-{group:06d}.npz"
                    yield Unit(split, path, file, table.metadata.row_group(group).num_rows, group)


def processed(units: list[Unit], workers: int, tokenizer: Path, eos_id: int, dtype: str) -> Iterable[Unit]:
    """Process units in any order, and yield each when it is on disk."""
    workers = min(workers, len(units))
    if workers <= 1:
        pack_units.prepare(str(tokenizer), eos_id, dtype)
        for unit in units:
            pack_units.process(unit)
            yield unit
        return
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(str(tokenizer), eos_id, dtype)
    ) as pool:
        with signals_held():
            futures = {pool.submit(pack_units.process, unit): unit for unit in units}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool:
            kill_workers()
            raise UserError(
                f"pack: one of {workers} encoding processes was killed, usually for lack of memory; the same command"
                " resumes here; if it happens again, use fewer `workers`"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(*arguments) -> None:
    from pipeline.core.processes import begin_worker

    begin_worker()
    pack_units.prepare(*arguments)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics(index: dict, num_bad: int, num_inexact: int, seconds: float) -> dict:
    by_source, totals = {}, {}
    for split in SPLITS:
        by_source[split] = {source: _sums(shards) for source, shards in index["splits"][split].items()}
        totals[split] = _sums(by_source[split].values())
    train, heldout = totals["train"], totals["heldout"]
    num_documents = train["documents"] + heldout["documents"]
    megabytes = (train["bytes"] + heldout["bytes"]) / 1e6
    return {
        "tokens": train["tokens"],
        "documents": train["documents"],
        "bytes": train["bytes"],
        "bytes_per_token": round(train["bytes"] / train["tokens"], 4),
        "heldout_tokens": heldout["tokens"],
        "heldout_documents": heldout["documents"],
        "heldout_bytes": heldout["bytes"],
        "sources": by_source["train"],
        "heldout_sources": by_source["heldout"],
        "dtype": index["dtype"],
        "bad_documents": num_bad,
        "inexact_documents": num_inexact,
        "seconds": round(seconds, 3),
        "summary": {
            "input": f"{plural(num_documents, 'document', ',')}, {megabytes:.1f} MB",
            "output": f"{train['tokens']:,} tokens, held out {heldout['tokens']:,}",
            "measure": f"{train['bytes'] / train['tokens']:.2f} bytes per token",
        },
    }


def _sums(entries: Iterable[dict]) -> dict[str, int]:
    sums = dict.fromkeys(("tokens", "documents", "bytes"), 0)
    for entry in entries:
        for key in sums:
            sums[key] += entry[key]
    return sums


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("pack")
