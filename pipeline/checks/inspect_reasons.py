"""Why documents were left out, as `alma inspect data` shows it: counts by reason, one reason with its overlaps and what
other bounds would have done, samples, and bad input."""

import json

from rich.console import Console
from rich.text import Text

from pipeline.checks.report_tables import PLACES, line_of, percent, titled
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.terminal import many


def reasons_of(report: dict, source: str | None) -> list[str]:
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


def left_out(console: Console, report: dict, source: str | None) -> None:
    """Counts by reason. A document has one reason, the first in the order of the steps; `fails` counts all that
    break the rule, also behind another."""
    rules, judged = report["rules"]["rules"], report["rules"]["documents"]
    table = titled(
        "what left documents out",
        "reason",
        "documents",
        "share",
        "MB",
        *(("fails", "alone", "bound", "x 0.8", "x 1.25", "overlaps most") if source is None else ("by language",)),
    )
    for why in reasons_of(report, source):
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
        row = [why, f"{documents:,}", percent(documents, read), f"{size / 1e6:.2f}"]
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


def one_reason(console: Console, report: dict, output: Artifact, source: str | None, reason: str, samples: int) -> None:
    """One reason: overlaps, other thresholds, samples."""
    rules = report["rules"]["rules"]
    bad = {why for name, reasons in report["funnel"]["bad"].items() for why in reasons if source in (None, name)}
    known = [*reasons_of(report, source), *sorted(bad)]
    if reason not in known:
        raise UserError(
            f"--reason {reason}: nothing was left out for it{f' in {source}' if source else ''}; reasons are"
            f" {', '.join(known) or 'none'}"
        )
    if reason in bad:
        return bad_input(
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
            table = titled("overlaps", "also fail", "documents", "of those that fail " + reason)
            for other, number in sorted(entry["with"].items(), key=lambda item: -item[1]):
                table.add_row(other, f"{number:,}", percent(number, entry["documents"]))
            console.print(table)
        for key, curve in (entry.get("thresholds") or {}).items():
            table = titled(f"{key}: other bounds", "bound", "fail this rule", "left out by all rules", "than now")
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
    samples_of(console, report, output, source, reason, samples)


def samples_of(console: Console, report: dict, output: Artifact, source: str | None, reason: str, number: int) -> None:
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
        console.print(line_of(console, sample["excerpt"]))
        if isinstance(sample.get("of"), dict):
            kept = sample["of"]
            console.print(Text(f"      kept for it: {kept['source']} {kept.get('place', kept['id'])}"))
            if kept.get("excerpt"):
                console.print(line_of(console, kept["excerpt"]))


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


def _alike(console: Console, report: dict) -> None:
    curve = report["funnel"]["duplicates"]["alike"]
    table = titled("near duplicates and what was kept for them", "signatures alike, at least", "documents", "of all")
    total = sum(number for _, number in curve)
    for at, (low, _) in enumerate(curve):
        number = sum(count for _, count in curve[at:])
        if low:
            table.add_row(f"{low:g}", f"{number:,}", percent(number, total))
    console.print(table)


def bad_input(console: Console, bad: dict, source: str | None, samples: int) -> None:
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
                console.print(line_of(console, entry["excerpt"]))
