"""Clean: named sources of raw text -> normalised, filtered, deduplicated documents in parquet shards, split into train
and heldout.

    python pipeline/clean.py recipes/quickstart.yaml

Reads sources in units of a few megabytes, spread over `workers` processes; each unit's outcome is published at once in
work/, so that a killed run loses the units in flight and no more. Then duplicates are found over all units, and the
shards are written:

    train/part-00000.parquet, heldout/part-00000.parquet    columns text, source, id, cluster (how many documents were
                                                            like it, itself included), language (if it was asked for),
                                                            address (a hash of it, with dedup.url)
    rejected/SOURCE.jsonl.zst                               every record that is in neither: place, reason, how it
                                                            begins (keep_rejected: full has its whole text)
    report.json                                             counts by source and reason; read = kept + each rejection

The result depends on the content of the sources and the recipe alone, not on workers, unit size, order of completion or
interruptions.
"""

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, ExternalFiles, Name, PlannedInput, SourceBlock, StageConfig
from pipeline.core.errors import Absent, UserError
from pipeline.core.files import write_json
from pipeline.core.output import Output
from pipeline.core.terminal import many, say
from pipeline.core.tracking import Progress
from pipeline.data.cleaning import accounting, unit_files, work_units
from pipeline.data.cleaning.blocklist import Block
from pipeline.data.cleaning.classifiers import Perplexity, Quality
from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.language import Language
from pipeline.data.cleaning.pii import Mask
from pipeline.data.cleaning.process_pool import Pool, keep_arrays
from pipeline.data.cleaning.rules import Rules
from pipeline.data.cleaning.text_repair import Repair
from pipeline.data.dedup import decontaminate
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.data.dedup.minhash import Dedup
from pipeline.data.sources import source_checks
from pipeline.data.sources.sources import Source, files

if TYPE_CHECKING:
    from pipeline.data.cleaning.steps import Steps

VERSION = 13
INPUTS: dict[str, tuple[str, ...]] = {"earlier?": ("clean",)}
SHARD_BYTES = 32 << 20  # of text: one shard is held in memory while it is written


class Config(StageConfig):
    KEPT = "finished units are kept"

    sources: dict[Name, Source] = Field(min_length=1)
    """Name -> where its records come from. The names come back in the mixture of `pretrain` and in every report."""
    filters: Filters = Filters()
    """Which documents are left out: few rules with the same numbers for every language."""
    language: Language = Language()
    """Which languages are kept."""
    rules: Rules = Rules()
    """Published quality rules: Gopher, C4, FineWeb; off unless named."""
    repair: Repair = Repair()
    """Mending of wrong encodings and forms of characters; off unless named."""
    block: Block = Block()
    """Lists of phrases and addresses that leave a document out."""
    mask: Mask = Mask()
    """Personal data and secrets that are replaced; none unless named."""
    examples: dict[str, Source] = {}
    """Sources that train the two models below and are no part of the corpus."""
    quality: Quality = Quality()
    """A classifier trained from examples."""
    perplexity: Perplexity = Perplexity()
    """A language model trained from examples."""
    dedup: Dedup = Dedup()
    """What counts as a duplicate, which one stays, and what repeated text is taken out. `inputs: {earlier: FOLDER}`
    compares with an earlier output of clean, too."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.01, ge=0, lt=1)
    """Share of documents held out for evaluation, chosen by hash after deduplication, so that no held-out text has a
    duplicate in training."""
    keep_rejected: Literal["excerpt", "full"] = "excerpt"
    """What rejected/ holds of a document that is left out: its first 200 characters, or beside them its whole text,
    normalised and masked like the text of the shards, so that a rejection can be judged. Of what could not be
    parsed it is the beginning in both."""
    max_bad: Annotated[float, EXECUTION] = Field(0.05, ge=0, le=1)
    """Largest share of unreadable records that a source may have (of its pages, not counting the requests and images of
    a web archive); more of them end the stage, for then the source is not what the recipe says."""
    workers: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Processes; by default the cores of this machine, or of the Ray cluster."""
    executor: Annotated[Literal["local", "slurm", "ray"], EXECUTION] = "local"
    """What runs the work: processes of this machine, an array job of `workers` tasks, or a Ray cluster (pip install
    'alma[ray]'). The run's folder must then be on a shared file system."""
    unit_bytes: Annotated[int, EXECUTION] = Field(4 << 20, ge=1024)
    """Raw bytes of one unit of work: what a killed run may lose, for each worker."""

    @model_validator(mode="after")
    def nothing_idle(self):
        trained = {
            "quality.good": self.quality.good,
            "quality.bad": self.quality.bad,
            "perplexity.like": self.perplexity.like,
        }
        for key, names in trained.items():
            for name in names:
                if name not in self.examples:
                    has = ", ".join(self.examples) or "none"
                    raise ValueError(f"{key}: there is no example source {name!r}; `examples` has {has}")
        used = {name for names in trained.values() for name in names}
        for name in self.examples:
            if name not in used:
                raise ValueError(
                    f"examples.{name}: no model is trained from it; name it in quality.good, quality.bad or"
                    " perplexity.like, or leave it out"
                )
        return self

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        return [
            SourceBlock("sources", lambda config: config.sources),
            decontaminate.SETS,
            SourceBlock("examples", lambda config: config.examples, group="@examples", drop_key=False),
            ExternalFiles("block", cls.block_lists, entry="@lists", drop_key=False),
        ]

    def block_lists(self) -> list[Path]:
        """The user's own block lists. Raises Absent if one does not exist."""
        lists = [Path(path).expanduser() for path in (*self.block.words, *self.block.urls) if path != "spam"]
        for path in lists:
            if not path.is_file():
                raise Absent(
                    f"block: {path} does not exist (in {Path.cwd()}); give a file with one entry per line, or spam"
                )
        return lists

    def planned_sources(self, inputs: dict[str, PlannedInput]) -> list[str]:
        return list(self.sources)

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        blocks = {"sources": self.sources, "examples": self.examples}
        if self.decontaminate:
            blocks["decontaminate.sets"] = self.decontaminate.sets
        source_checks.check_first_records(blocks)


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict[str, Any]:
    for name in config.dedup.prefer:
        if name not in config.sources:
            raise UserError(f"dedup.prefer: there is no source {name!r}; sources are {', '.join(config.sources)}")
    if config.dedup.keep == "quality" and not config.quality.good:
        raise UserError(
            "dedup.keep: quality takes the best score of a cluster, and no classifier is trained; give quality: {good:"
            " [...], bad: [...]}, or another keep"
        )
    work, firsts = output.path / "work", []
    for name, source in config.sources.items():
        if not any(work.glob(f"*/{name}/*")):  # a resumed run has seen that there is something to read
            firsts.append(
                source_checks.first_record(source, name, work_units.fields_needed(source, config.dedup, config.block))
            )
    for key, template in (
        ("dedup.url", config.dedup.url),
        ("block.url", config.block.url if config.block.urls else None),
    ):
        if template and firsts and all(work_units.url_of(template, record) is None for record in firsts):
            say(
                f"WARNING {key}: {template!r} is in the first record of no source (the first has"
                f" {', '.join(firsts[0].fields)}); records without it are taken for having no address"
            )
    if config.quality.good or config.perplexity.like:
        from pipeline.data.cleaning import classifiers

        classifiers.train(config.examples, config.quality, config.perplexity, output.path / "models")
    found: Counter[Path] = Counter()
    while True:
        try:
            return _run(config, inputs, output, work)
        except unit_files.Torn as torn:
            # What a disk lost or somebody touched is made again, and never taken for an empty file.
            found[torn.path] += 1
            torn.path.unlink(missing_ok=True)
            (torn.path.parent / "complete.json").unlink(missing_ok=True)
            if found[torn.path] == 3:
                raise UserError(
                    f"{torn.path}: {torn.why}, for the third time; look at the disk and its free room, then run the"
                    " same command again"
                ) from None
            say(f"WARNING {torn.path}: {torn.why}; it is made again")


def _run(config: Config, inputs: dict[str, Artifact], output: Output, work: Path) -> dict[str, Any]:
    if config.decontaminate and not (work / "evaluation.json").exists():
        runs, report = decontaminate.build(config.decontaminate)
        decontaminate.save(runs, work / "evaluation")
        write_json(work / "evaluation.json", report)
    with Pool(config.workers, config.executor, work / "tasks") as pool:
        done = _clean(config, work, pool, output)
        earlier = _sign(inputs["earlier"], config.dedup, work / "earlier", pool) if "earlier" in inputs else []
        index, pieces, edited = _compare(config, done, earlier, work, pool)
        report = accounting.account(done, index, edited, config.dedup.upsample, output.path, _steps(config, work))
        source_checks.check_counts(report, config.sources, config.max_bad, config.holdout, output.path)
        _write_shards(config, index, pieces, pool, output)
    return {**report["total"], "by_source": report["sources"], "summary": _summary(config, report)}


def _sign(earlier: Artifact, dedup: Dedup, folder: Path, pool: Pool) -> list[tuple[Path, Path]]:
    """The shards of an earlier output, and their signatures, made from their texts: fifteen times cheaper than
    cleaning, and nothing has to be kept for it."""
    made = []
    for shard in sorted(earlier.path.glob("*/part-*.parquet")):
        made.append((shard, folder / f"{shard.parent.name}-{shard.name}"))
        if dedup.url:
            work_units.refuse_without_addresses(shard)
        if not made[-1][1].exists():
            pool.submit(lambda *_: faults.point("work"), len(made), 0, work_units.sign_shard, *made[-1], dedup)
    pool.drain()
    return made


def _compare(config: Config, done: dict[str, list[Path]], earlier: list[tuple[Path, Path]], work: Path, pool: Pool):
    """All documents with one another: the index with their fates, the pieces that are kept, and what was taken out
    of them."""
    from pipeline.data.cleaning.steps import columns
    from pipeline.data.dedup import decisions, document_index, exact_substring

    near, scratch = config.dedup.near, work / "index"
    score = columns(_steps(config, work)).index("quality") if config.dedup.keep == "quality" else None
    found = document_index.build(
        config.sources, done, [signed for _, signed in earlier], near.bands * near.rows if near else 0, scratch, score
    )
    decisions.decide(found, config.dedup, holdout=config.holdout, seed=config.seed, scratch=scratch)
    before = document_index.before(found, [shard for shard, _ in earlier])
    pieces = exact_substring.edit(
        before + document_index.kept(found, done),
        pool,
        work / f"repeats-{config.unit_bytes}",
        config.dedup.lines,
        config.dedup.runs,
    )[len(before) :]
    return found, pieces, document_index.take_over(found, pieces, config.filters.min_tokens)


def _summary(config: Config, report: dict) -> dict[str, str]:
    total = report["total"]
    kept = total["train_documents"] + total["heldout_documents"]
    return {
        "input": (
            f"{total['bytes_in'] / 1e6:.1f} MB, {many(total['documents_in'], 'document')},"
            f" {many(len(config.sources), 'source')}"
        ),
        "output": f"{total['bytes_out'] / 1e6:.1f} MB, {many(kept, 'document')}"
        f" ({total['heldout_documents']} held out)",
        "measure": (
            f"left out: {total['filtered_documents']} filtered, {total['duplicates_exact'] + total['duplicates_url']} +"
            f" {total['duplicates_near']} duplicates, {total['bad_records']} bad"
        )
        + _extracted(report["sources"]),
    }


def _extracted(sources: dict[str, dict]) -> str:
    """How much of the text of web pages extraction kept, for the summary; by source where there are several."""
    shares = {name: counts["extraction"] for name, counts in sources.items() if "extraction" in counts}
    if not shares:
        return ""
    shown = sum(entry["characters_shown"] for entry in shares.values())
    extracted = sum(entry["characters_extracted"] for entry in shares.values())
    by_source = ", ".join(f"{name} {entry['share']:.0%}" for name, entry in shares.items())
    return f"; of the text of pages {extracted / max(1, shown):.0%} extracted" + (
        f" ({by_source})" if len(shares) > 1 else ""
    )


# ---- units -----------------------------------------------------------------------------------------------------------


def _clean(config: Config, work: Path, pool: Pool, output: Output) -> dict[str, list[Path]]:
    """Clean every source, unit by unit, where a former run has not done it. Returns the files of the units by
    source, in order."""
    folder = work / f"units-{config.unit_bytes}"
    sizes = {name: _size(source, name) for name, source in config.sources.items()}
    with Progress("clean", sum(sizes.values()), "B", is_main=output.is_main) as bar:
        for name in sorted(config.sources):
            if not (folder / name / "complete.json").exists():
                _clean_source(config, name, folder / name, pool, bar, sizes[name], output)
        pool.drain()
    done = {}
    for name in sorted(config.sources):
        complete = folder / name / "complete.json"
        if not complete.exists():
            write_json(complete, {"units": len(list((folder / name).glob("*.parquet")))})
        done[name] = [folder / name / f"{i:08d}.parquet" for i in range(json.loads(complete.read_text())["units"])]
    return done


def _clean_source(
    config: Config, name: str, folder: Path, pool: Pool, bar: Progress, size: int, output: Output
) -> None:
    """Hand out the units of one source. Those of the next source follow while these are still in work."""
    source, steps = config.sources[name], _steps(config, output.path / "work")
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[int, int] = {}  # of each finished unit, for `limit`
    told, noted = [0], [time.time()]

    def tell(weight: int) -> None:
        step = min(weight, size - told[0])  # compressed files unpack to more than their size on disk
        told[0] += step
        bar.update(step, source=name)

    def finished(number: int, counted: int, weight: int) -> None:
        records[number] = counted
        tell(weight)
        if time.time() - noted[0] > 1:  # it writes a file, and units may be small
            output.note_time()
            noted[0] = time.time()
        faults.point("work")

    needed = work_units.fields_needed(source, config.dedup, config.block)
    for number, unit in enumerate(work_units.cut(source, name, config.unit_bytes, needed)):
        if source.limit and _prefix(records) >= source.limit:
            break
        path, weight = folder / f"{number:08d}.parquet", sum(piece.weight for piece in unit)
        if path.exists():
            records[number] = work_units.counted(path)
            tell(weight)
        else:
            pool.submit(finished, number, weight, work_units.clean_unit, unit, source, name, steps, path)


def _steps(config: Config, work: Path) -> "Steps":
    from pipeline.data.cleaning.steps import Steps

    return Steps(
        filters=config.filters,
        rules=config.rules,
        language=config.language,
        repair=config.repair,
        block=config.block,
        mask=config.mask,
        quality=config.quality,
        perplexity=config.perplexity,
        models=work.parent / "models",
        dedup=config.dedup,
        decontaminate=config.decontaminate,
        keep_rejected=config.keep_rejected,
        runs=work / "evaluation" if config.decontaminate else None,
    )


def _prefix(records: dict[int, int]) -> int:
    """Records in the units that are finished without a gap before them."""
    total = number = 0
    while number in records:
        total, number = total + records[number], number + 1
    return total


def _size(source: Source, name: str) -> int:
    """Bytes of a source's files, for the progress bar."""
    return 0 if source.dataset else sum(path.stat().st_size for _, path in files(source, name))


# ---- shards ----------------------------------------------------------------------------------------------------------


def _write_shards(config: Config, index, pieces: list, pool: Pool, output: Output) -> None:
    import numpy as np

    from pipeline.data.dedup.document_index import HELDOUT, TRAIN, times

    for split, fate in (("train", TRAIN), ("heldout", HELDOUT)):
        folder = output.path / split
        folder.mkdir(exist_ok=True)
        for torn in folder.glob(".*.tmp"):
            torn.unlink()
        total, number, shard, place_now = 0, 0, [], None

        def flush() -> None:
            path = folder / f"part-{number:05d}.parquet"
            if not path.exists():  # else it is of this same fingerprint, so with this same content
                pool.submit(
                    lambda *_: faults.point("work"),
                    number,
                    0,
                    work_units.write_shard,
                    shard,
                    path,
                    config.dedup.url is not None,
                )

        for piece in pieces:
            mine = index.fate[piece.documents] == fate
            documents, rows = piece.documents[mine], piece.rows[mine]
            if not len(documents):
                continue
            clusters = np.asarray(index.cluster[documents])
            copies = times(clusters, config.dedup.upsample) if fate == TRAIN else np.ones(len(documents), np.int64)
            sizes = index.size[documents] * copies
            place = (total + np.cumsum(sizes) - sizes) // SHARD_BYTES
            total += int(sizes.sum())
            for at in np.unique(place).tolist():
                if at != place_now and shard:
                    flush()
                    number, shard = number + 1, []
                place_now = at
                part = place == at
                shard.append(
                    work_units.Rows(
                        index.sources[int(index.source[documents[0]])],
                        piece.path,
                        rows[part],
                        clusters[part],
                        copies[part],
                        piece.edits,
                    )
                )
        if shard:
            flush()
    pool.drain()


if __name__ == "__main__":
    from pipeline.core.stage import main

    unit_files.without_pandas()
    keep_arrays()
    main("clean")
