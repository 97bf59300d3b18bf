"""`alma inspect data`: the report.json of a data stage for people, and the row counts of the published shards next to
it.

Of a clean stage: counts from raw to published by source and language, every rule with its overlaps and the effect of
other thresholds, duplicates and their clusters, evaluation sets, bad input. Of a finetuning stage (sft, reward, dpo,
kto, ppo): its sources, reasons with places, and evaluation sets.
"""

import json
import os

from rich.console import Console
from rich.text import Text

from pipeline.checks import inspect_reasons, tables
from pipeline.checks.inspect_reasons import PLACES
from pipeline.checks.tables import new_table, one_line, percent
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.terminal import plural

WIDTH = 100  # columns where the output is not a terminal
STATUS = ("not selected", "bad", "filtered", "duplicates", "kept")
MORE = "more: --reason NAME (overlaps, other thresholds, samples), --samples N (of every reason), --source NAME"


def kinds() -> tuple[str, ...]:
    """Kinds of stages that publish such a report: clean, the default, and those that learn from records."""
    from pipeline.train.finetune_config import FinetuneConfig

    return ("clean", *(kind for kind in KINDS if issubclass(module_of(kind).Config, FinetuneConfig)))


def show(output: Artifact, source: str | None = None, reason: str | None = None, samples: int = 0) -> None:
    """Print the report of an output of clean or of a finetuning stage. Raises UserError for a source or reason that is
    not in it."""
    report = json.loads((output.path / "report.json").read_text(encoding="utf-8"))
    sources = sorted(report.get("sources", {}))
    if source is not None and source not in sources:
        raise UserError(f"--source {source}: {output.path} has no such source; it has {', '.join(sources)}")
    console = tables.console(WIDTH)
    console.print(Text(f"{os.path.relpath(output.path.resolve())}"))
    if "rules" not in report:
        _finetuning(console, report, source, reason, samples)
        return
    if "funnel" not in report:
        raise UserError(
            f"{output.path}: was written by an older version, whose report has no counts by step; run the stage again"
            " with --restart"
        )
    if reason is not None:
        inspect_reasons.one_reason(console, report, output, source, reason, samples or 5)
        return
    _funnel(console, report, source)
    _extraction(console, report["sources"], source)
    if source is None:
        _reconciled(console, report["total"], output)
    inspect_reasons.dropped(console, report, source)
    if source is None:
        _duplicates(console, report)
        _changed(console, report)
    _evaluation(console, report.get("decontamination"))
    inspect_reasons.bad_input(console, report["funnel"]["bad"], source, samples)
    if not samples:
        console.print(f"\n{MORE}")
        return
    for name in inspect_reasons.reasons_of(report, source):
        inspect_reasons.samples_of(console, report, output, source, name, samples)


def _extraction(console: Console, sources: dict[str, dict], source: str | None) -> None:
    """Which share of the characters that web pages show is in their text."""
    for name, counts in sources.items():
        extraction = counts.get("extraction")
        if extraction and source in (None, name):
            share = percent(extraction["characters_extracted"], extraction["characters_shown"])
            console.print(
                f"extracted from {plural(extraction['pages'], 'page')} of {name}: {share} of"
                f" {extraction['characters_shown'] / 1e6:,.1f} M characters that they show"
            )


# ---- from raw to published -------------------------------------------------------------------------------------------


def _funnel(console: Console, report: dict, source: str | None) -> None:
    columns = ("source", "language", "read", "bad", "filtered", "copies", "train", "heldout", "kept", "MB in", "MB out")
    table = new_table(*columns, text=("source", "language"), title="from raw to published")
    totals = [0] * 8
    num_not_selected: dict[str, int] = {}
    for name, languages in report["funnel"]["steps"].items():
        if source not in (None, name):
            continue
        for language, cells in languages.items():
            not_selected = {reason: cell[0] for reason, cell in cells.get("not selected", {}).items()}
            for reason, number in not_selected.items():
                num_not_selected[reason] = num_not_selected.get(reason, 0) + number
            numbers = _funnel_numbers(cells)
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
            if sum(not_selected.values()) < numbers[0]:  # else the recipe did not select any of them
                table.add_row(name, language or "?", *_funnel_cells(numbers))
    table.add_section()
    table.add_row("all", "", *_funnel_cells(totals))
    console.print(table)
    if num_not_selected:
        by_number = sorted(num_not_selected.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in by_number)
        console.print(
            f"read includes {sum(num_not_selected.values()):,} that the recipe did not select, or that have no text:"
            f" {reasons}"
        )


def _funnel_numbers(cells: dict[str, dict[str, list[int]]]) -> list[int]:
    """read, bad, filtered, duplicates, train, heldout, bytes in, bytes out. A cell is documents, bytes read, bytes
    published."""
    documents = {}
    for status in STATUS:
        documents[status] = sum(cell[0] for cell in cells.get(status, {}).values())
    train, heldout = (cells.get("kept", {}).get(split, [0, 0, 0]) for split in ("train", "heldout"))
    bytes_in = sum(cell[1] for reasons in cells.values() for cell in reasons.values())
    dropped = [documents[status] for status in ("bad", "filtered", "duplicates")]
    return [sum(documents.values()), *dropped, train[0], heldout[0], bytes_in, train[2] + heldout[2]]


def _funnel_cells(numbers: list[int]) -> list[str]:
    read, *_, train, heldout, bytes_in, bytes_out = numbers
    counts = [f"{number:,}" for number in numbers[:6]]
    return [*counts, percent(train + heldout, read), f"{bytes_in / 1e6:.2f}", f"{bytes_out / 1e6:.2f}"]


def _reconciled(console: Console, total: dict, output: Artifact) -> None:
    """Does the sum of all outcomes equal what was read, and do the shards have the rows that were kept?"""
    outcomes = {
        "not selected": total["not_selected"],
        "bad": total["bad_records"],
        "filtered": total["filtered_documents"],
        "copies": sum(total[key] for key in ("duplicates_exact", "duplicates_near", "duplicates_url")),
        "repeated text": total["repeated_text"],
        "train": total["train_documents"],
        "held out": total["heldout_documents"],
    }
    mark = "=" if sum(outcomes.values()) == total["read"] else "NOT"
    parts = " + ".join(f"{number:,} {name}" for name, number in outcomes.items() if number)
    console.print(f"{mark} read {total['read']:,} = {parts}")
    _count_rows(console, output, "train", total["train_documents"] + total["train_copies"], total["train_copies"])
    _count_rows(console, output, "heldout", total["heldout_documents"], 0)


def _count_rows(console: Console, output: Artifact, split: str, expected: int, num_copies: int) -> None:
    import pyarrow.parquet

    shards = sorted((output.path / split).glob("part-*.parquet"))
    rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in shards)
    mark = "=" if rows == expected else "NOT"
    copies = f", {num_copies:,} of them copies by `upsample`" if num_copies else ""
    console.print(
        f"{mark} {split}: {rows:,} rows in {plural(len(shards), 'shard')}{copies}; {expected:,} by this report"
    )


# ---- duplicates, changes, evaluation sets ----------------------------------------------------------------------------


def _duplicates(console: Console, report: dict) -> None:
    duplicates = report["funnel"]["duplicates"]
    clusters = duplicates["clusters"]  # (smallest size, clusters, documents) by size
    if not any(size > 1 for size, *_ in clusters):
        return
    columns = ("documents in it", "clusters", "documents", "of them kept")
    table = new_table(*columns, text=("documents in it",), title="documents that are alike")
    for number, (smallest, num_clusters, num_documents) in enumerate(clusters):
        sizes = f"{smallest} and more"
        if number + 1 < len(clusters):
            largest = clusters[number + 1][0] - 1
            sizes = f"{smallest}" if largest == smallest else f"{smallest} to {largest}"
        table.add_row(sizes, f"{num_clusters:,}", f"{num_documents:,}", percent(num_clusters, num_documents))
    console.print(table)
    for cluster in duplicates["largest"][:PLACES]:
        place = cluster.get("place", cluster["id"])
        console.print(Text(f"  {cluster['documents']:,} documents like {cluster['source']} {place}"))
        if cluster.get("excerpt"):
            console.print(one_line(cluster["excerpt"], console.width))


def _changed(console: Console, report: dict) -> None:
    total = report["total"]
    bytes_read = 0
    for languages in report["funnel"]["steps"].values():
        for cells in languages.values():
            bytes_read += sum(cell[1] for cell in cells.get("kept", {}).values())
    parts = [f"\nkept documents: {bytes_read / 1e6:.2f} MB read, {total['bytes_out'] / 1e6:.2f} MB published"]
    if total.get("edited_documents"):
        parts.append(
            f"repeated text removed from {plural(total['edited_documents'], 'document', ',')},"
            f" {total['removed_bytes'] / 1e6:.2f} MB"
        )
    for name, entry in report["rules"]["changed"].items():
        parts.append(f"{name}: {plural(entry['documents'], 'document', ',')}, {plural(entry['times'], 'time', ',')}")
    console.print("; ".join(parts))


def _evaluation(console: Console, sets: dict | None) -> None:
    if not sets:
        return
    columns = ("set", "items", "of them found", "documents dropped", "items too short to search for")
    table = new_table(*columns, text=("set",), title="evaluation sets found in the text")
    for name, entry in sets.items():
        in_text = f"{entry['items_found']:,} ({percent(entry['items_found'], entry['items'])})"
        table.add_row(name, f"{entry['items']:,}", in_text, f"{entry['documents']:,}", f"{entry['too_short']:,}")
    console.print(table)


# ---- finetuning stages -----------------------------------------------------------------------------------------------


def _finetuning(console: Console, report: dict, source: str | None, reason: str | None, samples: int) -> None:
    entries = {name: entry for name, entry in report["sources"].items() if source in (None, name)}
    columns = ("source", "records", "dropped", "train", "heldout", "sum")
    table = new_table(*columns, text=("source",), title="from records to rows")
    for name, entry in entries.items():
        num_dropped = sum(rejected["count"] for rejected in entry["rejected"].values())
        mark = "=" if entry["records"] == num_dropped + entry["train"] + entry["heldout"] else "NOT"
        numbers = (entry["records"], num_dropped, entry["train"], entry["heldout"])
        table.add_row(name, *(f"{number:,}" for number in numbers), mark)
    console.print(table)
    for name, entry in entries.items():
        by_count = sorted(entry["rejected"].items(), key=lambda item: -item[1]["count"])
        for why, rejected in by_count:
            if reason is None or reason in why:
                places = ", ".join(rejected["first"][: samples or PLACES])
                console.print(Text(f"  {name}: {rejected['count']:,} x {why} (first: {places})"))
    _evaluation(console, report.get("decontamination"))
