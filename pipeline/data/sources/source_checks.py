"""When cleaning ends with an error: a source that is not what the recipe says, or of which nothing is left."""

from collections import Counter
from pathlib import Path

from pipeline.core.errors import Problems, UserError
from pipeline.core.terminal import plural, say
from pipeline.data.sources import records as reading
from pipeline.data.sources.csv_files import REPEATED
from pipeline.data.sources.formats import Bad, FieldNames, Skipped
from pipeline.data.sources.json_files import BROKEN
from pipeline.data.sources.line_chunks import WITHOUT_MARK
from pipeline.data.sources.sources import Source, chunks, needed_fields
from pipeline.data.sources.templates import MissingField, fields_of, look_up

LOOKED_AT = 1000  # records that are searched for a list


def first_record(source: Source, name: str, needed: FieldNames, key: str = "sources") -> reading.Record:
    """The first good record of a source in the block `key` of the recipe. Raises UserError if it has none, or if its
    lines cannot be told apart, before any work is done."""
    first_bad, bad, not_selected = None, 0, Counter()
    first, num_texts = None, 0  # of records whose text is one text although `join` is given
    for chunk in chunks(source, name, key=key, needed=needed):
        if chunk.kind in ("line", "paragraph") and b"\r" in chunk.data and b"\n" not in chunk.data:
            raise UserError(
                f"{key}.{name}: {chunk.file} ends its lines with carriage returns alone, so that it would be one record"
                f" with sample_by: {chunk.kind}; convert them to newlines (tr '\\r' '\\n')"
            )
        for item in reading.parse(chunk):
            if isinstance(item, Skipped):
                not_selected[item.reason] += 1
                continue
            if isinstance(item, reading.Record):
                deselected_by = reading.deselected_by(source, item)
                if deselected_by:
                    not_selected[deselected_by] += 1
                    continue
                try:
                    reading.text_of(source, item)
                    if not is_join_given(source) or has_list(fields_of(source.text), item.fields):
                        return first or item
                    first, num_texts = first or item, num_texts + 1
                    if num_texts == LOOKED_AT:
                        refuse_join(source, f"{key}.{name}", fields_of(source.text), num_texts)
                    continue
                except MissingField as error:
                    item = Bad(item.place, str(error).removeprefix(f"{item.place}: "))
            first_bad = first_bad or item
            bad += 1
    if first is not None:
        refuse_join(source, f"{key}.{name}", fields_of(source.text), num_texts)
    raise UserError(f"{key}.{name}: {_why_none(source, first_bad, bad, not_selected)}")


def is_join_given(source: Source) -> bool:
    return source.join != Source.model_fields["join"].default


def has_list(names: set[str], fields: dict) -> bool:
    """Whether one of these fields of a record is a list, whose items `join` separates."""
    for name in names:
        try:
            if isinstance(look_up(fields, name), list):
                return True
        except KeyError:
            continue
    return False


def refuse_join(source: Source, where: str, names: set[str], looked_at: int) -> None:
    """Raise UserError for a `join` that separates nothing."""
    raise UserError(
        f"{where}: join: {source.join!r} separates the items of a list, and {', '.join(sorted(names))} held no list in"
        f" {plural(looked_at, 'record')}; remove join, or name the field that is a list"
    )


def check_first_records(blocks: dict[str, dict[str, Source]]) -> None:
    """Read the first record of every source that is on this machine. blocks: key of the recipe -> name -> source.
    Raises UserError with all sources that have no good record."""
    problems = Problems()
    for key, block in blocks.items():
        for name, source in block.items():
            if source.is_here():
                with problems.gather():
                    first_record(source, name, needed_fields(source), key)
    problems.refuse()


def _why_none(source: Source, first_bad: Bad | None, bad: int, not_selected: Counter) -> str:
    """Why a source has no good record."""
    if not_selected.keys() & {"where", "part"}:
        return f"has no record that `where` and `part` select, among {not_selected.total()}; change one of the two"
    if first_bad is None and not_selected:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in not_selected.most_common(3))
        return (
            f"has no page among its {plural(not_selected.total(), 'record')} ({reasons}); give WARC files of responses"
            " with HTML, or WET files"
        )
    if first_bad is None:
        return "has no record; look at its files, `format` and `records`"
    excerpt = f" ({first_bad.raw[:80]!r})" if first_bad.raw else ""
    return (
        f"none of its {plural(bad, 'record')} is good; the first: {first_bad.place}: {first_bad.reason}{excerpt}"
        f"{reading.encoding_advice(source, first_bad.reason)}"
    )


def check_counts(report: dict, sources: dict[str, Source], max_bad: float, holdout: float, folder: Path) -> None:
    """Print warnings about data that is lost, and raise UserError if too much of a source was unreadable or nothing is
    left. The rejected records stay in the output `folder` for reading."""
    for name, counts in report["sources"].items():
        for warning in _warnings(counts, folder / "rejected" / f"{name}.jsonl.zst"):
            say(f"WARNING sources.{name}: {warning}")
    for name, counts in report["sources"].items():
        _check_source(name, sources[name], counts, max_bad, folder / "rejected" / f"{name}.jsonl.zst")
    total = report["total"]
    if not total["train_documents"] or (holdout and not total["heldout_documents"]):
        split = "heldout" if total["train_documents"] else "train"
        raise UserError(
            f"no document is left for {split}: {total['read']} read, {total['documents_out']} kept, holdout"
            f" {holdout:g}; see {folder / 'report.json'}, then relax `filters` or change `holdout`"
        )


def _warnings(counts: dict, rejected: Path) -> list[str]:
    """Bad records of a source that stand for the rest of a file, and so for any number of good ones."""
    warnings = []
    damaged = sum(number for reason, number in counts["bad"].items() if reason.startswith(("damaged .", ".zst")))
    if damaged:
        warnings.append(
            f"{counts['bytes_lost']:,} bytes of its compressed files could not be read, in"
            f" {plural(damaged, 'place')}; records are lost there: fetch again (places: {rejected})"
        )
    for reason, number in counts["bad"].items():
        if reason.startswith("truncated ."):
            warnings.append(
                f"{number} file{'s end' if number > 1 else ' ends'} early ({reason}); the rest is lost: fetch again"
                f" (places: {rejected})"
            )
        if reason in (WITHOUT_MARK.format("utf-16"), WITHOUT_MARK.format("utf-32")):
            warnings.append(f"{plural(number, 'file')} cannot be read: {reason}")
        if reason == BROKEN:
            warnings.append(
                f"{plural(number, 'json file')} {'is' if number == 1 else 'are'} malformed; everything after the fault"
                f" is lost (places: {rejected})"
            )
        if reason == REPEATED:
            warnings.append(
                f"{plural(number, 'file')} {'has' if number == 1 else 'have'} two columns of one name, so that no row"
                f" of it is read: rename one of them (places: {rejected})"
            )
    return warnings


def _check_source(name: str, source: Source, counts: dict, max_bad: float, rejected: Path) -> None:
    bad = sum(counts["bad"].values())
    # What is skipped by its kind, as two thirds of a web archive are, does not make damaged pages a smaller share.
    skipped = sum(number for reason, number in counts["not selected"].items() if reason not in ("where", "part"))
    records = counts["read"] - skipped
    if bad > max_bad * records:
        most = max(counts["bad"], key=counts["bad"].get)
        raise UserError(
            f"sources.{name}: {bad} of {plural(records, 'record')} {'is' if bad == 1 else 'are'} bad"
            f" ({bad / records:.1%}, most often: {most}), more than max_bad {max_bad:g}; look into {rejected}, then fix"
            f" the source or raise max_bad{reading.encoding_advice(source, most)}"
        )
    kept = counts["train_documents"] + counts["heldout_documents"]
    if counts["read"] and not kept and not counts["duplicates"]:
        most = max(counts["filtered"], key=counts["filtered"].get, default="not selected")
        raise UserError(
            f"sources.{name}: nothing is left of its {plural(counts['read'], 'record')} (most often: {most});"
            f" look into {rejected}, then change its `text` or `filters`"
        )
