"""Why documents were dropped, as `alma inspect data` shows it: counts by reason, one reason with its overlaps and the
effect of other thresholds, samples, and bad input."""

import io
import json

from rich.console import Console
from rich.text import Text

from pipeline.checks.tables import new_table, one_line, percent
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.terminal import plural

PLACES = 3  # of each kind of bad input, without --samples
FACTORS = (0.8, 1.25)  # thresholds are shown at these multiples
LEGEND = (
    "{rejected:,} of {documents:,} documents that could be read break a rule. fails: break it, even if another rule is"
    " the reason; alone: break no other;\nx 0.8, x 1.25: how many more or fewer documents all rules would drop with a"
    " threshold lower or higher by this factor (*: of one language)"
)


def _cells_by_reason(report: dict, source: str | None) -> dict[str, dict[str, list[list[int]]]]:
    """Reason -> language -> cells (documents, bytes) of dropped documents, of one source or of all."""
    cells: dict[str, dict[str, list[list[int]]]] = {}
    for name, languages in report["funnel"]["steps"].items():
        if source not in (None, name):
            continue
        for language, statuses in languages.items():
            for status in ("filtered", "duplicates"):
                for reason, cell in statuses.get(status, {}).items():
                    cells.setdefault(reason, {}).setdefault(language or "?", []).append(cell)
    return cells


def reasons_of(report: dict, source: str | None) -> list[str]:
    """All reasons for which documents were dropped, of one source or of all, the most frequent first."""
    counts = {}
    for reason, languages in _cells_by_reason(report, source).items():
        counts[reason] = sum(cell[0] for cells in languages.values() for cell in cells)
    if source is None:
        for reason in report["rules"]["rules"]:
            counts.setdefault(reason, 0)
    return sorted(counts, key=lambda reason: (-counts[reason], reason))


def dropped(console: Console, report: dict, source: str | None) -> None:
    """Counts by reason. A document has one reason, the first in the order of the steps; `fails` counts all documents
    that break the rule, even if another one is the reason."""
    rules = report["rules"]["rules"]
    columns = ["reason", "documents", "share", "MB"]
    if source is None:
        columns += ["fails", "alone", "bound", *(f"x {factor}" for factor in FACTORS), "overlaps most"]
        num_read = report["total"]["read"]
    else:
        columns.append("by language")
        num_read = report["sources"][source]["read"]
    title = "what documents were dropped for"
    table = new_table(*columns, text=("reason", "overlaps most", "by language"), title=title, no_wrap=("reason",))
    cells = _cells_by_reason(report, source)
    for reason in reasons_of(report, source):
        if reason in rules and not rules[reason]["documents"]:
            continue
        by_language = {}
        for language, language_cells in cells.get(reason, {}).items():
            by_language[language] = sum(cell[0] for cell in language_cells)
        num_documents = sum(by_language.values())
        size = sum(cell[1] for language_cells in cells.get(reason, {}).values() for cell in language_cells)
        row = [reason, f"{num_documents:,}", percent(num_documents, num_read), f"{size / 1e6:.2f}"]
        if source is not None:
            row.append(", ".join(f"{language} {number:,}" for language, number in sorted(by_language.items())))
        elif reason in rules:
            row += _rule_cells(rules[reason])
        table.add_row(*row)
    if table.row_count:
        console.print(table)
    if source is None:
        console.print(LEGEND.format(rejected=report["rules"]["rejected"], documents=report["rules"]["documents"]))


def _rule_cells(rule: dict) -> list[str]:
    overlap = ""
    if rule["with"]:
        other = max(rule["with"], key=rule["with"].get)
        overlap = f"{other} {rule['with'][other]:,}"
    return [f"{rule['documents']:,}", f"{rule['alone']:,}", *_around(rule), overlap]


def _around(rule: dict) -> list[str]:
    """The threshold of a rule (of the language with most documents), and how many more documents all rules would drop
    at each of FACTORS times that."""
    curves = rule.get("thresholds")
    if not curves:
        return [""] * (1 + len(FACTORS))
    curve = max(curves.values(), key=lambda curve: max(fails for _, fails, _ in curve))
    threshold, _, now = curve[len(curve) // 2]
    cells = [f"{threshold:g}{'*' if len(curves) > 1 else ''}"]
    for factor in FACTORS:
        dropped_at = [total for value, _, total in curve if abs(value - threshold * factor) <= 1e-4 * abs(value)]
        cells.append(f"{dropped_at[0] - now:+,}" if dropped_at else "")
    return cells


# ---- one reason ------------------------------------------------------------------------------------------------------


def one_reason(console: Console, report: dict, output: Artifact, source: str | None, reason: str, samples: int) -> None:
    """Overlaps, other thresholds and samples. Raises UserError for a reason that is not in the report."""
    rules = report["rules"]["rules"]
    bad = report["funnel"]["bad"]
    bad_reasons = {why for name, reasons in bad.items() for why in reasons if source in (None, name)}
    reasons = [*reasons_of(report, source), *sorted(bad_reasons)]
    if reason not in reasons:
        raise UserError(
            f"--reason {reason}: nothing was dropped for it{f' in {source}' if source else ''}; reasons are"
            f" {', '.join(reasons) or 'none'}"
        )
    if reason in bad_reasons:
        only_reason = {name: {reason: entries[reason]} for name, entries in bad.items() if reason in entries}
        bad_input(console, only_reason, source, samples)
        return
    if reason in rules and source is None:
        _rule(console, reason, rules[reason])
    if reason == "near":
        _alike(console, report["funnel"]["duplicates"]["alike"])
    samples_of(console, report, output, source, reason, samples)


def _rule(console: Console, name: str, rule: dict) -> None:
    verb = "breaks" if rule["documents"] == 1 else "break"
    console.print(
        f"\n{name}: {plural(rule['documents'], 'document', ',')} {verb} it ({rule['share']:.2%} of documents,"
        f" {rule['share_bytes']:.2%} of bytes), {rule['alone']:,} of them no other rule; the reason of"
        f" {rule['first']:,}"
    )
    if rule["with"]:
        table = new_table(
            "also break", "documents", "of those that break " + name, text=("also break",), title="overlaps"
        )
        for other, number in sorted(rule["with"].items(), key=lambda item: -item[1]):
            table.add_row(other, f"{number:,}", percent(number, rule["documents"]))
        console.print(table)
    for key, curve in (rule.get("thresholds") or {}).items():
        columns = ("bound", "break this rule", "dropped by all rules", "compared with now")
        table = new_table(*columns, text=(), title=f"{key}: other bounds")
        threshold, _, now = curve[len(curve) // 2]
        for bound, fails, total in curve:
            is_current = bound == threshold and total == now
            table.add_row(f"{bound:g}", f"{fails:,}", f"{total:,}", "now" if is_current else f"{total - now:+,}")
        console.print(table)


def _alike(console: Console, histogram: list[tuple[float, int]]) -> None:
    """How similar near duplicates are: `histogram` is (lower limit, documents) of the signatures' similarity."""
    columns = ("signatures alike, at least", "documents", "of all")
    table = new_table(*columns, text=(), title="near duplicates and what was kept for them")
    total = sum(number for _, number in histogram)
    for place, (limit, _) in enumerate(histogram):
        number = sum(count for _, count in histogram[place:])
        if limit:
            table.add_row(f"{limit:g}", f"{number:,}", percent(number, total))
    console.print(table)


# ---- samples ---------------------------------------------------------------------------------------------------------


def samples_of(console: Console, report: dict, output: Artifact, source: str | None, reason: str, number: int) -> None:
    """Dropped documents with the value that broke the rule; duplicates with the document that was kept. The report's
    samples first, then the first ones of rejected/."""
    if reason in report["rules"]["rules"]:
        samples = report["rules"]["rules"][reason]["samples"]
    else:
        samples = report["funnel"]["duplicates"]["samples"].get(reason, [])
    samples = [sample for sample in samples if source in (None, sample["source"])]
    if number > len(samples):
        places = {(sample["source"], sample["place"]) for sample in samples}
        for sample in _rejected(output, [source] if source else sorted(report["sources"]), reason, number):
            if (sample["source"], sample["place"]) not in places:
                samples.append(sample)
    if not samples:
        return
    console.print(f"\n{reason}: samples", style="bold")
    for sample in samples[:number]:
        console.print(Text(f"  {_value_of(sample)}{sample['source']} {sample['place']}"))
        console.print(one_line(sample["excerpt"], console.width))
        original = sample.get("of")
        if isinstance(original, dict):
            place = original.get("place", original["id"])
            console.print(Text(f"      kept for it: {original['source']} {place}"))
            if original.get("excerpt"):
                console.print(one_line(original["excerpt"], console.width))


def _value_of(sample: dict) -> str:
    value = sample.get("value", sample.get("alike"))
    if value is None:
        return ""
    return f"[{value:g}] " if isinstance(value, float | int) else f"[{value}] "


def _rejected(output: Artifact, sources: list[str], reason: str, number: int) -> list[dict]:
    """The first records with a reason in rejected/, read as a stream."""
    import zstandard

    samples: list[dict] = []
    for name in sources:
        with (
            open(output.path / "rejected" / f"{name}.jsonl.zst", "rb") as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as raw,
        ):
            for line in io.TextIOWrapper(raw, encoding="utf-8"):
                if len(samples) >= number:
                    return samples
                record = json.loads(line)
                if record["reason"] == reason:
                    samples.append(record | {"source": name})
    return samples


def bad_input(console: Console, bad: dict, source: str | None, samples: int) -> None:
    """The places of bad records, and `samples` of them with an excerpt."""
    rows = []
    for name, reasons in sorted(bad.items()):
        if source in (None, name):
            rows += [(name, reason, records) for reason, records in sorted(reasons.items())]
    if not rows:
        return
    console.print("\nbad input (rejected/SOURCE.jsonl.zst has all of it)", style="bold")
    for name, reason, records in rows:
        places = ", ".join(record["place"] for record in records[: samples or PLACES])
        console.print(Text(f"  {name}: {reason}: first at {places}"))
        for record in records[:samples]:
            if record["excerpt"]:
                console.print(one_line(record["excerpt"], console.width))
