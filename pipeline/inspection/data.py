"""`alma inspect data`: the ledger of a data stage as a person reads it. Everything comes out of report.json; row counts
of the published shards are set beside it.

Of a clean stage: the funnel from raw to published by source and language, every rule with its overlaps and what other
thresholds would have done, duplicates and their clusters, evaluation sets, bad input. Of a tuning stage (sft, reward,
dpo, ppo): its sources, reasons with places, and evaluation sets.
"""

import json
import os
import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.plural import many

WIDTH = 100  # columns where the output is no terminal
PLACES = 3  # of each kind of bad input, without --samples
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
        return _reason(console, report, output, source, reason, samples or 5)
    _funnel(console, report, source)
    if source is None:
        _reconciled(console, report["total"], output)
    _left_out(console, report, source)
    if source is None:
        _duplicates(console, report)
        _changed(console, report)
    _evaluation(console, report.get("decontamination"))
    _bad(console, report["funnel"]["bad"], source, samples)
    if samples:
        for name in _reasons(report, source):
            _samples(console, report, output, source, name, samples)
    else:
        console.print(
            "\nmore: --reason NAME (overlaps, other bounds, samples), --samples N (of every reason), --source NAME"
        )


# ---- from raw to published -------------------------------------------------------------------------------------------


def _funnel(console: Console, report: dict, source: str | None) -> None:
    table = _titled(
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
        _percent(row[4] + row[5], row[0]),
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


# ---- reasons ---------------------------------------------------------------------------------------------------------


def _reasons(report: dict, source: str | None) -> list[str]:
    """All reasons for which documents of a source, or of all, were left out or kept aside; those of most documents
    first."""
    found: dict[str, int] = {}
    for name, languages in report["funnel"]["steps"].items():
        for cells in languages.values() if source in (None, name) else ():
            for status in ("filtered", "duplicates"):
                for why, cell in cells.get(status, {}).items():
                    found[why] = found.get(why, 0) + cell[0]
    if source is None:
        for why in report["rules"]["rules"]:
            found.setdefault(why, 0)
    return sorted(found, key=lambda why: (-found[why], why))


def _left_out(console: Console, report: dict, source: str | None) -> None:
    """Counts by reason. A document has one reason, the first in the order of the steps; `fails` counts all that
    break the rule, also behind another."""
    rules, judged = report["rules"]["rules"], report["rules"]["documents"]
    table = _titled(
        "what left documents out",
        "reason",
        "documents",
        "share",
        "MB",
        *(("fails", "alone", "bound", "x 0.8", "x 1.25", "overlaps most") if source is None else ("by language",)),
    )
    for why in _reasons(report, source):
        if why in rules and not rules[why]["documents"]:
            continue
        cells = {}
        for name, languages in report["funnel"]["steps"].items():
            for language, statuses in languages.items() if source in (None, name) else ():
                for status in ("filtered", "duplicates"):
                    if why in statuses.get(status, {}):
                        cells.setdefault(language or "?", []).append(statuses[status][why])
        documents, size = (sum(cell[i] for listed in cells.values() for cell in listed) for i in (0, 1))
        read = report["total"]["read"] if source is None else report["sources"][source]["read"]
        row = [why, f"{documents:,}", _percent(documents, read), f"{size / 1e6:.2f}"]
        if source is not None:
            row.append(
                ", ".join(
                    f"{language} {sum(cell[0] for cell in listed):,}" for language, listed in sorted(cells.items())
                )
            )
        elif why in rules:
            entry = rules[why]
            other = max(entry["with"], key=entry["with"].get, default=None)
            row += [
                f"{entry['documents']:,}",
                f"{entry['alone']:,}",
                *_around(entry),
                f"{other} {entry['with'][other]:,}" if other else "",
            ]
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    if source is None:
        console.print(
            f"{report['rules']['rejected']:,} of {judged:,} documents that could be read fail a rule. fails: break it,"
            " also behind another reason; alone: break no other;"
        )
        console.print(
            "x 0.8, x 1.25: how many more or fewer all rules would leave out with the bound so much lower or higher (*:"
            " of one language)"
        )


def _around(entry: dict) -> tuple[str, str, str]:
    """The bound of a rule (of the language with most documents), and how much more all rules would leave out with
    0.8 and 1.25 times that."""
    curves = entry.get("thresholds")
    if not curves:
        return "", "", ""
    curve = max(curves.values(), key=lambda curve: max(point[1] for point in curve))
    bound, several = curve[len(curve) // 2], "*" if len(curves) > 1 else ""
    around = [
        next(
            (f"{left - bound[2]:+,}" for value, _, left in curve if abs(value - bound[0] * scale) <= 1e-4 * abs(value)),
            "",
        )
        for scale in (0.8, 1.25)
    ]
    return f"{bound[0]:g}{several}", *around


def _reason(console: Console, report: dict, output: Artifact, source: str | None, reason: str, samples: int) -> None:
    """One reason: overlaps, other thresholds, samples."""
    rules = report["rules"]["rules"]
    bad = {why for name, reasons in report["funnel"]["bad"].items() for why in reasons if source in (None, name)}
    known = [*_reasons(report, source), *sorted(bad)]
    if reason not in known:
        raise UserError(
            f"--reason {reason}: nothing was left out for it{f' in {source}' if source else ''}; reasons are"
            f" {', '.join(known) or 'none'}"
        )
    if reason in bad:
        return _bad(
            console,
            {name: {reason: reasons[reason]} for name, reasons in report["funnel"]["bad"].items() if reason in reasons},
            source,
            samples,
        )
    if reason in rules and source is None:
        entry = rules[reason]
        console.print(
            f"\n{reason}: {many(entry['documents'], 'document', ',')} fail{'s' * (entry['documents'] == 1)} it"
            f" ({entry['share']:.2%} of documents,"
            f" {entry['share_bytes']:.2%} of bytes), {entry['alone']:,} of them no other rule; the reason of"
            f" {entry['first']:,}"
        )
        if entry["with"]:
            table = _titled("overlaps", "also fail", "documents", "of those that fail " + reason)
            for other, number in sorted(entry["with"].items(), key=lambda item: -item[1]):
                table.add_row(other, f"{number:,}", _percent(number, entry["documents"]))
            console.print(table)
        for key, curve in (entry.get("thresholds") or {}).items():
            table = _titled(f"{key}: other bounds", "bound", "fail this rule", "left out by all rules", "than now")
            now = curve[len(curve) // 2][2]
            for bound, fails, left in curve:
                table.add_row(
                    f"{bound:g}",
                    f"{fails:,}",
                    f"{left:,}",
                    "now" if left == now and bound == curve[len(curve) // 2][0] else f"{left - now:+,}",
                )
            console.print(table)
    if reason == "near":
        _alike(console, report)
    _samples(console, report, output, source, reason, samples)


def _samples(console: Console, report: dict, output: Artifact, source: str | None, reason: str, number: int) -> None:
    """Documents with the value that tripped the rule; duplicates beside what was kept. Those of the report, then the
    first ones of rejected/."""
    if reason in report["rules"]["rules"]:
        found = report["rules"]["rules"][reason]["samples"]
    else:
        found = report["funnel"]["duplicates"]["samples"].get(reason, [])
    found = [sample for sample in found if source in (None, sample["source"])]
    if number > len(found):
        shown = {(sample["source"], sample["place"]) for sample in found}
        more = _rejected(output, [source] if source else sorted(report["sources"]), reason, number)
        found = [*found, *(sample for sample in more if (sample["source"], sample["place"]) not in shown)]
    if not found:
        return
    console.print(f"\n{reason}: samples", style="bold")
    for sample in found[:number]:
        value = sample.get("value", sample.get("alike"))
        shown = "" if value is None else f"[{value:g}] " if isinstance(value, float | int) else f"[{value}] "
        console.print(Text(f"  {shown}{sample['source']} {sample['place']}"))
        console.print(_line(console, sample["excerpt"]))
        if isinstance(sample.get("of"), dict):
            kept = sample["of"]
            console.print(Text(f"      kept for it: {kept['source']} {kept.get('place', kept['id'])}"))
            if kept.get("excerpt"):
                console.print(_line(console, kept["excerpt"]))


def _rejected(output: Artifact, sources: list[str], reason: str, number: int) -> list[dict]:
    """The first records with a reason in rejected/, read as a stream."""
    import io

    import zstandard

    found: list[dict] = []
    for name in sources:
        with (
            open(output.path / "rejected" / f"{name}.jsonl.zst", "rb") as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as raw,
        ):
            for line in io.TextIOWrapper(raw, encoding="utf-8"):
                if len(found) >= number:
                    return found
                entry = json.loads(line)
                if entry["reason"] == reason:
                    found.append({**entry, "source": name})
    return found


# ---- duplicates, changes, evaluation sets, bad input -----------------------------------------------------------------


def _duplicates(console: Console, report: dict) -> None:
    found = report["funnel"]["duplicates"]
    clusters = [row for row in found["clusters"] if row[0] > 1]
    if not clusters:
        return
    listed = found["clusters"]
    table = _titled("documents that are alike", "documents in it", "clusters", "documents", "of them kept")
    for at, (least, number, members) in enumerate(listed):
        upto = listed[at + 1][0] - 1 if at + 1 < len(listed) else None
        table.add_row(
            f"{least}" if upto == least else f"{least} and more" if upto is None else f"{least} to {upto}",
            f"{number:,}",
            f"{members:,}",
            _percent(number, members),
        )
    console.print(table)
    for entry in found["largest"][:PLACES]:
        console.print(
            Text(f"  {entry['documents']:,} documents like {entry['source']} {entry.get('place', entry['id'])}")
        )
        if entry.get("excerpt"):
            console.print(_line(console, entry["excerpt"]))


def _alike(console: Console, report: dict) -> None:
    curve = report["funnel"]["duplicates"]["alike"]
    table = _titled("near duplicates and what was kept for them", "signatures alike, at least", "documents", "of all")
    total = sum(number for _, number in curve)
    for at, (low, _) in enumerate(curve):
        number = sum(count for _, count in curve[at:])
        if low:
            table.add_row(f"{low:g}", f"{number:,}", _percent(number, total))
    console.print(table)


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
    table = _titled(
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
            f"{entry['items_found']:,} ({_percent(entry['items_found'], entry['items'])})",
            f"{entry['documents']:,}",
            f"{entry['too_short']:,}",
        )
    console.print(table)


def _bad(console: Console, bad: dict, source: str | None, samples: int) -> None:
    rows = [
        (name, why, first)
        for name, reasons in sorted(bad.items())
        if source in (None, name)
        for why, first in sorted(reasons.items())
    ]
    if not rows:
        return
    console.print("\nbad input (rejected/SOURCE.jsonl.zst has all of it)", style="bold")
    for name, why, first in rows:
        console.print(
            Text(f"  {name}: {why}: first at {', '.join(entry['place'] for entry in first[: samples or PLACES])}")
        )
        for entry in first[:samples]:
            if entry["excerpt"]:
                console.print(_line(console, entry["excerpt"]))


# ---- tuning stages ---------------------------------------------------------------------------------------------------


def _tuning(console: Console, report: dict, source: str | None, reason: str | None, samples: int) -> None:
    table = _titled("from records to rows", "source", "records", "left out", "train", "heldout", "sum")
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


# ---- layout ----------------------------------------------------------------------------------------------------------


def _titled(title: str, *columns: str) -> Table:
    """Words to the left, numbers to the right."""
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=title,
        title_justify="left",
        title_style="bold not italic",
        padding=(0, 1, 0, 0),
    )
    words = ("source", "language", "reason", "overlaps most", "by language", "also fail", "set", "documents in it")
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in words else "right",
            overflow="fold",
            no_wrap=column not in words or column == "reason",
        )
    return table


def _line(console: Console, excerpt: str | None) -> Text:
    """An excerpt on one line."""
    line = Text("      " + " ".join((excerpt or "").split()), style="dim")
    line.truncate(console.width, overflow="ellipsis")
    return line


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
