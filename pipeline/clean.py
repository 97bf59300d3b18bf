"""Clean: named sources of raw text -> normalised, filtered, deduplicated documents in parquet shards, split into train
and heldout.

    python pipeline/clean.py recipes/quickstart.yaml

Reads sources in units of a few megabytes, spread over `workers` processes. The outcome of each unit is published at
once in work/, so that a killed run loses only the units that were being cleaned. Then duplicates are found over all
units, and the shards are written:

    train/part-00000.parquet, heldout/part-00000.parquet    columns text, source, id, cluster (number of similar
                                                            documents, itself included), language (if it is detected),
                                                            address (its hash, with dedup.url)
    rejected/SOURCE.jsonl.zst                               every record that is in neither: place, reason, how it
                                                            begins (keep_rejected: full adds its complete text)
    report.json                                             counts by source and reason; read = kept + each rejection

The result depends only on the content of the sources and on the recipe, not on workers, unit size, order of completion
or interruptions.
"""

import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, ExternalFiles, Name, PlannedInput, SourceBlock, StageConfig
from pipeline.core.errors import Absent, UserError
from pipeline.core.files import write_json
from pipeline.core.output import Output
from pipeline.core.terminal import plural, say
from pipeline.core.tracking import Progress
from pipeline.data.cleaning import outcomes, shards, work_units
from pipeline.data.cleaning.addresses import url_of
from pipeline.data.cleaning.blocklist import Block
from pipeline.data.cleaning.filters import Filters
from pipeline.data.cleaning.language import Language
from pipeline.data.cleaning.perplexity_model import Perplexity
from pipeline.data.cleaning.pii import Mask
from pipeline.data.cleaning.process_pool import Pool
from pipeline.data.cleaning.process_setup import keep_freed_memory, without_pandas
from pipeline.data.cleaning.quality_classifier import Quality
from pipeline.data.cleaning.rules import Rules
from pipeline.data.cleaning.text_repair import Repair
from pipeline.data.cleaning.unit_files import CorruptFile
from pipeline.data.dedup import decontaminate
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.data.dedup.minhash import Dedup
from pipeline.data.sources import source_checks
from pipeline.data.sources.sources import Source, files

if TYPE_CHECKING:
    from pipeline.data.cleaning.steps import Steps
    from pipeline.data.dedup.document_index import Index
    from pipeline.data.dedup.exact_substring import UnitDocuments

VERSION = 16  # 16: single characters, figures, ruby and formulas of pages; C1 controls, latin-1, quotes in tsv
INPUTS: dict[str, tuple[str, ...]] = {"earlier?": ("clean",)}
MAX_DAMAGE = 3  # times that the same intermediate file may be found damaged


class Config(StageConfig):
    KEPT = "finished units are kept"

    sources: dict[Name, Source] = Field(min_length=1)
    """Name -> where its records come from. The names are used in the mixture of `pretrain` and in every report."""
    filters: Filters = Filters()
    """Which documents are dropped: few rules with the same numbers for every language."""
    language: Language = Language()
    """Which languages are kept."""
    rules: Rules = Rules()
    """Published quality rules: Gopher, C4, FineWeb; off unless named."""
    repair: Repair = Repair()
    """Repair of wrong encodings and forms of characters; off unless named."""
    block: Block = Block()
    """Lists of phrases and addresses for which documents are dropped."""
    mask: Mask = Mask()
    """Personal data and secrets that are replaced; none unless named."""
    examples: dict[str, Source] = {}
    """Sources from which the two models below are trained; they are not part of the corpus."""
    quality: Quality = Quality()
    """A classifier trained from examples."""
    perplexity: Perplexity = Perplexity()
    """A language model trained from examples."""
    dedup: Dedup = Dedup()
    """What counts as a duplicate, which one is kept, and which repeated text is removed. `inputs: {earlier: FOLDER}`
    compares with an earlier output of clean, too."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.01, ge=0, lt=1)
    """Share of documents held out for evaluation, chosen by hash after deduplication, so that no held-out text has a
    duplicate in training."""
    keep_rejected: Literal["excerpt", "full"] = "excerpt"
    """What rejected/ holds of a document that is dropped: its first 200 characters, or its complete text as well,
    normalised and masked like the text of the shards, so that a rejection can be reviewed. Of records that could not
    be parsed it holds the beginning in both cases."""
    max_bad: Annotated[float, EXECUTION] = Field(0.05, ge=0, le=1)
    """Largest share of unreadable records that a source may have (of its pages, not counting the requests and images of
    a web archive); with more the stage fails, because the source is not what the recipe says."""
    workers: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Processes; by default the cores of this machine, or of the Ray cluster."""
    executor: Annotated[Literal["local", "slurm", "ray"], EXECUTION] = "local"
    """What runs the work: processes of this machine, an array job of `workers` tasks, or a Ray cluster (pip install
    'alma[ray]'). With the latter two the run's folder must be on a shared file system."""
    unit_bytes: Annotated[int, EXECUTION] = Field(4 << 20, ge=1024)
    """Raw bytes of one unit of work: what a killed run may lose, per worker."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        uses = {
            "quality.good": self.quality.good,
            "quality.bad": self.quality.bad,
            "perplexity.like": self.perplexity.like,
        }
        for key, names in uses.items():
            for name in names:
                if name not in self.examples:
                    available = ", ".join(self.examples) or "none"
                    raise ValueError(f"{key}: there is no example source {name!r}; `examples` has {available}")
        used = {name for names in uses.values() for name in names}
        for name in self.examples:
            if name not in used:
                raise ValueError(
                    f"examples.{name}: no model is trained from it; name it in quality.good, quality.bad or"
                    " perplexity.like, or remove it"
                )
        return self

    @model_validator(mode="after")
    def _valid_dedup(self):
        for name in self.dedup.prefer:
            if name not in self.sources:
                raise ValueError(f"dedup.prefer: there is no source {name!r}; sources are {', '.join(self.sources)}")
        if self.dedup.keep == "quality" and not self.quality.good:
            raise ValueError(
                "dedup.keep: quality takes the best score of a cluster, but no classifier is trained; give quality:"
                " {good: [...], bad: [...]}, or another keep"
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
    work = output.path / "work"
    _check_sources(config, work)
    _train_models(config, output.path / "models")
    damage: Counter[Path] = Counter()
    while True:
        try:
            return _run(config, inputs, output, work)
        except CorruptFile as corrupt:
            # Intermediate files that were lost or changed are recomputed, and never treated as empty.
            damage[corrupt.path] += 1
            corrupt.path.unlink(missing_ok=True)
            (corrupt.path.parent / "complete.json").unlink(missing_ok=True)
            if damage[corrupt.path] == MAX_DAMAGE:
                raise UserError(
                    f"{corrupt.path}: {corrupt.why}, for the third time; check the disk and its free space, then run"
                    " the same command again"
                ) from None
            say(f"WARNING {corrupt.path}: {corrupt.why}; it is recomputed")


def _run(config: Config, inputs: dict[str, Artifact], output: Output, work: Path) -> dict[str, Any]:
    from pipeline.data.cleaning import accounting

    if config.decontaminate and not (work / "evaluation.json").exists():
        runs, report = decontaminate.build_runs(config.decontaminate)
        decontaminate.save_runs(runs, work / "evaluation")
        write_json(work / "evaluation.json", report)
    with Pool(config.workers, config.executor, work / "tasks") as pool:
        units = _clean(config, work, pool, output)
        earlier = []
        if "earlier" in inputs:
            earlier = _sign(inputs["earlier"], config.dedup, work / "earlier", pool)
        index, kept, edited = _deduplicate(config, units, earlier, work, pool)
        report = accounting.account(units, index, edited, config.dedup.upsample, output.path, _steps(config, work))
        source_checks.check_counts(report, config.sources, config.max_bad, config.holdout, output.path)
        _write_shards(config, index, kept, pool, output)
    return {**report["total"], "by_source": report["sources"], "summary": _summary(config, report)}


# ---- before the work -------------------------------------------------------------------------------------------------


def _check_sources(config: Config, work: Path) -> None:
    """Raise UserError for a source without a good record, and warn about templates of addresses that match none."""
    first_records = []
    for name, source in config.sources.items():
        if not any(work.glob(f"*/{name}/*")):  # a resumed run has read the source before
            needed = work_units.fields_to_read(source, config.dedup, config.block)
            first_records.append(source_checks.first_record(source, name, needed))
    if not first_records:
        return
    templates = {"dedup.url": config.dedup.url, "block.url": config.block.url if config.block.urls else None}
    for key, template in templates.items():
        if template and all(url_of(template, record) is None for record in first_records):
            say(
                f"WARNING {key}: {template!r} is not in the first record of any source (the first has"
                f" {', '.join(first_records[0].fields)}); records without it are treated as having no address"
            )


def _train_models(config: Config, folder: Path) -> None:
    from pipeline.data.cleaning import perplexity_model, quality_classifier

    quality_classifier.train(config.examples, config.quality, folder)
    perplexity_model.train(config.examples, config.perplexity, folder)


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


# ---- units -----------------------------------------------------------------------------------------------------------


def _clean(config: Config, work: Path, pool: Pool, output: Output) -> dict[str, list[Path]]:
    """Clean the units of every source that an earlier run has not cleaned. Returns the files of the units by source, in
    order."""
    folder = work / f"units-{config.unit_bytes}"
    sizes = {name: _size(source, name) for name, source in config.sources.items()}
    with Progress("clean", sum(sizes.values()), "B", is_main=output.is_main) as bar:
        for name in sorted(config.sources):
            if not (folder / name / "complete.json").exists():
                progress = _SourceProgress(name, sizes[name], bar, output)
                _clean_source(config, name, folder / name, pool, progress, _steps(config, work))
        pool.drain()
    units = {}
    for name in sorted(config.sources):
        complete = folder / name / "complete.json"
        if not complete.exists():
            write_json(complete, {"units": len(list((folder / name).glob("*.parquet")))})
        number = json.loads(complete.read_text())["units"]
        units[name] = [folder / name / f"{i:08d}.parquet" for i in range(number)]
    return units


def _clean_source(
    config: Config, name: str, folder: Path, pool: Pool, progress: "_SourceProgress", steps: "Steps"
) -> None:
    """Submit the units of one source. Those of the next source may follow before these are done."""
    from pipeline.data.cleaning.unit_cleaner import clean_unit

    source = config.sources[name]
    folder.mkdir(parents=True, exist_ok=True)
    needed = work_units.fields_to_read(source, config.dedup, config.block)
    for number, unit in enumerate(work_units.cut_units(source, name, config.unit_bytes, needed)):
        if source.limit and progress.records_without_gap() >= source.limit:
            break
        path, weight = folder / f"{number:08d}.parquet", sum(piece.weight for piece in unit)
        if path.exists():
            progress.add(number, weight, outcomes.count_records(path))
        else:
            done = partial(progress.finish, number, weight)
            pool.submit(clean_unit, unit, source, name, steps, path, done=done)


class _SourceProgress:
    """What is done of one source."""

    def __init__(self, name: str, size: int, bar: Progress, output: Output):
        self.name, self.bar, self.output = name, bar, output
        self.bytes_left = size
        self.records: dict[int, int] = {}  # per finished unit, those that count towards `limit`
        self.noted = time.time()

    def add(self, number: int, weight: int, records: int) -> None:
        self.records[number] = records
        step = min(weight, self.bytes_left)  # compressed files decompress to more than their size on disk
        self.bytes_left -= step
        self.bar.update(step, source=self.name)

    def finish(self, number: int, weight: int, records: int) -> None:
        """After a unit was cleaned."""
        self.add(number, weight, records)
        if time.time() - self.noted > 1:  # noting the time writes a file, and units may be small
            self.output.note_time()
            self.noted = time.time()
        faults.point("work")

    def records_without_gap(self) -> int:
        """Records in the units that are finished and have no unfinished unit before them."""
        total = number = 0
        while number in self.records:
            total += self.records[number]
            number += 1
        return total


def _size(source: Source, name: str) -> int:
    """Bytes of a source's files, for the progress bar."""
    return 0 if source.dataset else sum(path.stat().st_size for _, path in files(source, name))


def _fault_point(result: Any) -> None:
    faults.point("work")


# ---- duplicates ------------------------------------------------------------------------------------------------------


def _sign(earlier: Artifact, dedup: Dedup, folder: Path, pool: Pool) -> list[tuple[Path, Path]]:
    """(shard, file of its signatures) of an earlier output. Signatures are computed from the texts: that is fifteen
    times cheaper than cleaning, and nothing has to be stored for it."""
    signed = []
    for shard in sorted(earlier.path.glob("*/part-*.parquet")):
        path = folder / f"{shard.parent.name}-{shard.name}"
        signed.append((shard, path))
        if dedup.url:
            shards.require_addresses(shard)
        if not path.exists():
            pool.submit(shards.sign_shard, shard, path, dedup, done=_fault_point)
    pool.drain()
    return signed


def _deduplicate(
    config: Config, units: dict[str, list[Path]], earlier: list[tuple[Path, Path]], work: Path, pool: Pool
) -> "tuple[Index, list[UnitDocuments], dict[str, dict[str, int]]]":
    """Compare all documents with each other. Returns the index with a decision for each, the documents that are kept,
    and how much was removed from them per source."""
    from pipeline.data.cleaning.steps import statistic_names
    from pipeline.data.dedup import decisions, document_index, exact_substring

    near, scratch = config.dedup.near, work / "index"
    width = near.bands * near.rows if near else 0
    score = statistic_names(_steps(config, work)).index("quality") if config.dedup.keep == "quality" else None
    signatures = [path for _, path in earlier]
    index = document_index.build(config.sources, units, signatures, width, scratch, score)
    decisions.decide(index, config.dedup, holdout=config.holdout, seed=config.seed, scratch=scratch)
    published = document_index.earlier_documents(index, [shard for shard, _ in earlier])
    edited = exact_substring.remove_repeats(
        published + document_index.kept_documents(index, units),
        pool,
        work / f"repeats-{config.unit_bytes}",
        config.dedup.lines,
        config.dedup.runs,
    )
    kept = edited[len(published) :]
    return index, kept, document_index.apply_edits(index, kept, config.filters.min_tokens)


# ---- output ----------------------------------------------------------------------------------------------------------


def _write_shards(config: Config, index: "Index", kept: "list[UnitDocuments]", pool: Pool, output: Output) -> None:
    from pipeline.data.dedup.document_index import HELDOUT, TRAIN

    for split, decision, upsample in (("train", TRAIN, config.dedup.upsample), ("heldout", HELDOUT, {})):
        folder = output.path / split
        folder.mkdir(exist_ok=True)
        for incomplete in folder.glob(".*.tmp"):
            incomplete.unlink()
        for number, rows in enumerate(shards.plan_shards(index, kept, decision, upsample)):
            path = folder / f"part-{number:05d}.parquet"
            if not path.exists():  # one that exists is of this same fingerprint, so it has this same content
                with_addresses = config.dedup.url is not None
                pool.submit(shards.write_shard, rows, path, with_addresses, done=_fault_point)
    pool.drain()


def _summary(config: Config, report: dict) -> dict[str, str]:
    total = report["total"]
    kept = total["train_documents"] + total["heldout_documents"]
    duplicates = total["duplicates_exact"] + total["duplicates_url"]
    return {
        "input": (
            f"{total['bytes_in'] / 1e6:.1f} MB, {plural(total['documents_in'], 'document')},"
            f" {plural(len(config.sources), 'source')}"
        ),
        "output": (
            f"{total['bytes_out'] / 1e6:.1f} MB, {plural(kept, 'document')} ({total['heldout_documents']} held out)"
        ),
        "measure": (
            f"dropped: {total['filtered_documents']} filtered, {duplicates} + {total['duplicates_near']} duplicates,"
            f" {total['bad_records']} bad{_extracted(report['sources'])}"
        ),
    }


def _extracted(sources: dict[str, dict]) -> str:
    """How much of the text of web pages was extracted, for the summary; by source if there are several."""
    extractions = {name: counts["extraction"] for name, counts in sources.items() if "extraction" in counts}
    if not extractions:
        return ""
    shown = sum(extraction["characters_shown"] for extraction in extractions.values())
    extracted = sum(extraction["characters_extracted"] for extraction in extractions.values())
    text = f"; of the text of pages {extracted / max(1, shown):.0%} extracted"
    if len(extractions) > 1:
        shares = ", ".join(f"{name} {extraction['share']:.0%}" for name, extraction in extractions.items())
        text += f" ({shares})"
    return text


if __name__ == "__main__":
    from pipeline.core.stage import main

    without_pandas()
    keep_freed_memory()
    main("clean")
