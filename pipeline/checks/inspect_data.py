"""`alma inspect data`: the ledger of a data stage as a person reads it. Everything comes out of report.json; row counts
of the published shards are set beside it.

Of a clean stage: the funnel from raw to published by source and language, every rule with its overlaps and what other
thresholds would have done, duplicates and their clusters, evaluation sets, bad input. Of a tuning stage (sft, reward,
dpo, ppo): its sources, reasons with places, and evaluation sets.
"""

import json
import os
import sys

from rich.console import Console
from rich.text import Text

from pipeline.checks.inspect_reasons import bad_input, left_out, one_reason, reasons_of, samples_of
from pipeline.checks.report_tables import PLACES, line_of, percent, titled
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.terminal import many

WIDTH = 100  # columns where the output is no terminal
TUNING = ("sft", "reward", "dpo", "ppo")
STATUS = ("not selected", "bad", "filtered", "duplicates", "kept")


def show(output: Artifact, source: str | None = None, reason: str | None = None, samples: int = 0) -> None:
    """Print the ledger of an output of clean or of a tuning stage. Raises UserError for a source or reason that is
    not in it."""
    report = json.loads((output.path / "report.json").read_text(encoding="utf-8"))
    known = sorted(report.get("sources", {}))
    if source is not None and source not in known:
        raise UserError(f"--source {source}: {output.path} has no such source; it has {', '.join(known)}")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)
    console.print(Text(f"{os.path.relpath(output.path.resolve())}"))
    if "rules" not in report:
        return _tuning(console, report, source, reason, samples)
    if "funnel" not in report:
        raise UserError(
            f"{output.path}: was made by an older version, whose ledger has no funnel; run the stage again with"
            " --restart"
        )
    if reason is not None:
        return one_reason(console, report, output, source, reason, samples or 5)
    _funnel(console, report, source)
    _extraction(console, report["sources"], source)
    if source is None:
        _reconciled(console, report["total"], output)
    left_out(console, report, source)
    if source is None:
        _duplicates(console, report)
        _changed(console, report)
    _evaluation(console, report.get("decontamination"))
    bad_input(console, report["funnel"]["bad"], source, samples)
    if samples:
        for name in reasons_of(report, source):
            samples_of(console, report, output, source, name, samples)
    else:
        console.print(
            "\nmore: --reason NAME (overlaps, other bounds, samples), --samples N (of every reason), --source NAME"
        )


def _extraction(console: Console, sources: dict[str, dict], source: str | None) -> None:
    """How much of what web pages show is in their text."""
    for name, counts in sources.items():
        extraction = counts.get("extraction")
        if extraction and source in (None, name):
            console.print(
                f"extracted from {many(extraction['pages'], 'page')} of {name}: "
                + percent(extraction["characters_extracted"], extraction["characters_shown"])
                + f" of {extraction['characters_shown'] / 1e6:,.1f} M characters that they show"
            )


# ---- from raw to published -------------------------------------------------------------------------------------------


def _funnel(console: Console, report: dict, source: str | None) -> None:
    table = titled(
        "from raw to published",
        "source",
        "language",
        "read",
        "bad",
        "filtered",
        "copies",
        "train",
        "heldout",
        "kept",
        "MB in",
        "MB out",
    )
    sums = [0] * 8
    deselected: dict[str, int] = {}
    for name, languages in report["funnel"]["steps"].items():
        if source not in (None, name):
            continue
        for language, cells in languages.items():
            count = {status: sum(cell[0] for cell in cells.get(status, {}).values()) for status in STATUS}
            split = {key: cells.get("kept", {}).get(key, [0, 0, 0]) for key in ("train", "heldout")}
            read = sum(count.values())
            size = sum(cell[1] for reasons in cells.values() for cell in reasons.values())
            row = [
                read,
                count["bad"],
                count["filtered"],
                count["duplicates"],
                split["train"][0],
                split["heldout"][0],
                size,
                split["train"][2] + split["heldout"][2],
            ]
            for why, cell in cells.get("not selected", {}).items():
                deselected[why] = deselected.get(why, 0) + cell[0]
            sums = [a + b for a, b in zip(sums, row, strict=True)]
            if count["not selected"] == read:  # the recipe asked for it
                continue
            table.add_row(name, language or "?", *_row(row))
    table.add_section()
    table.add_row("all", "", *_row(sums))
    console.print(table)
    if deselected:
        listed = sorted(deselected.items(), key=lambda item: (-item[1], item[0]))
        console.print(
            f"read includes {sum(deselected.values()):,} that the recipe did not select, or that hold no text:"
            f" {', '.join(f'{number:,} {why}' for why, number in listed)}"
        )


def _row(row: list[int]) -> list[str]:
    return [
        *(f"{number:,}" for number in row[:6]),
        percent(row[4] + row[5], row[0]),
        *(f"{size / 1e6:.2f}" for size in row[6:]),
    ]


def _reconciled(console: Console, total: dict, output: Artifact) -> None:
    """The sum of all fates beside what was read, and the rows of the shards beside what was kept."""
    fates = {
        "not selected": total["not_selected"],
        "bad": total["bad_records"],
        "filtered": total["filtered_documents"],
        "copies": sum(total[key] for key in ("duplicates_exact", "duplicates_near", "duplicates_url")),
        "repeated text": total["repeated_text"],
        "train": total["train_documents"],
        "held out": total["heldout_documents"],
    }
    summed = sum(fates.values())
    console.print(
        f"{'=' if summed == total['read'] else 'NOT'} read {total['read']:,} ="
        f" {' + '.join(f'{number:,} {name}' for name, number in fates.items() if number)}"
    )
    import pyarrow.parquet

    for split, expected in (
        ("train", total["train_documents"] + total["train_copies"]),
        ("heldout", total["heldout_documents"]),
    ):
        shards = sorted((output.path / split).glob("part-*.parquet"))
        rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in shards)
        copies = (
            f", {total['train_copies']:,} of them copies by `upsample`"
            if split == "train" and total["train_copies"]
            else ""
        )
        console.print(
            f"{'=' if rows == expected else 'NOT'} {split}: {rows:,} rows in {many(len(shards), 'shard')}{copies};"
            f" {expected:,} by this ledger"
        )


# ---- duplicates, changes, evaluation sets ----------------------------------------------------------------------------


def _duplicates(console: Console, report: dict) -> None:
    found = report["funnel"]["duplicates"]
    clusters = [row for row in found["clusters"] if row[0] > 1]
    if not clusters:
        return
    listed = found["clusters"]
    table = titled("documents that are alike", "documents in it", "clusters", "documents", "of them kept")
    for at, (least, number, members) in enumerate(listed):
        upto = listed[at + 1][0] - 1 if at + 1 < len(listed) else None
        table.add_row(
            f"{least}" if upto == least else f"{least} and more" if upto is None else f"{least} to {upto}",
            f"{number:,}",
            f"{members:,}",
            percent(number, members),
        )
    console.print(table)
    for entry in found["largest"][:PLACES]:
        console.print(
            Text(f"  {entry['documents']:,} documents like {entry['source']} {entry.get('place', entry['id'])}")
        )
        if entry.get("excerpt"):
            console.print(line_of(console, entry["excerpt"]))


def _changed(console: Console, report: dict) -> None:
    changed, total = report["rules"]["changed"], report["total"]
    read = sum(
        cell[1]
        for languages in report["funnel"]["steps"].values()
        for cells in languages.values()
        for cell in cells.get("kept", {}).values()
    )
    what = "; ".join(
        f"{name}: {many(entry['documents'], 'document', ',')}, {many(entry['times'], 'time', ',')}"
        for name, entry in changed.items()
    )
    edited = (
        f"; repeated text taken out of {many(total['edited_documents'], 'document', ',')},"
        f" {total['removed_bytes'] / 1e6:.2f} MB"
        if total.get("edited_documents")
        else ""
    )
    console.print(
        f"\nkept documents: {read / 1e6:.2f} MB as they were read, {total['bytes_out'] / 1e6:.2f} MB"
        f" published{edited}{f'; {what}' if what else ''}"
    )


def _evaluation(console: Console, found: dict | None) -> None:
    if not found:
        return
    table = titled(
        "evaluation sets found in the text",
        "set",
        "items",
        "of them found",
        "documents left out",
        "items too short to look for",
    )
    for name, entry in found.items():
        table.add_row(
            name,
            f"{entry['items']:,}",
            f"{entry['items_found']:,} ({percent(entry['items_found'], entry['items'])})",
            f"{entry['documents']:,}",
            f"{entry['too_short']:,}",
        )
    console.print(table)


# ---- tuning stages ---------------------------------------------------------------------------------------------------


def _tuning(console: Console, report: dict, source: str | None, reason: str | None, samples: int) -> None:
    table = titled("from records to rows", "source", "records", "left out", "train", "heldout", "sum")
    for name, entry in report["sources"].items():
        if source in (None, name):
            left = sum(why["count"] for why in entry["rejected"].values())
            mark = "=" if entry["records"] == left + entry["train"] + entry["heldout"] else "NOT"
            table.add_row(
                name, *(f"{number:,}" for number in (entry["records"], left, entry["train"], entry["heldout"])), mark
            )
    console.print(table)
    for name, entry in report["sources"].items():
        for why, count in (
            sorted(entry["rejected"].items(), key=lambda item: -item[1]["count"]) if source in (None, name) else ()
        ):
            if reason is None or reason in why:
                console.print(
                    Text(
                        f"  {name}: {count['count']:,} x {why} (first:"
                        f" {', '.join(count['first'][: samples or PLACES])})"
                    )
                )
    _evaluation(console, report.get("decontamination"))
