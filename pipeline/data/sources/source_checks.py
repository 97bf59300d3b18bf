"""When cleaning ends with a sentence: a source that is not what the recipe says, or of which nothing is left."""

from collections import Counter
from pathlib import Path

from pipeline.core.chain import say
from pipeline.core.errors import UserError
from pipeline.core.plural import many
from pipeline.data.sources import records as reading
from pipeline.data.sources.csv_parquet import REPEATED
from pipeline.data.sources.formats import WITHOUT_MARK, Asked, Bad, Passed
from pipeline.data.sources.json_files import BROKEN
from pipeline.data.sources.sources import Source, chunks
from pipeline.data.sources.templates import MissingField


def first_record(source: Source, name: str, asked: Asked, key: str = "sources") -> reading.Record:
    """The first good record of a source, which stands in the block `key` of the recipe. Refuses one that has none,
    before any work is done."""
    first, bad, left_out = None, 0, Counter()
    for item in (item for chunk in chunks(source, name, key=key, asked=asked) for item in reading.parse(chunk)):
        if isinstance(item, Passed):
            left_out[item.reason] += 1
            continue
        if not isinstance(item, Bad):
            if why := reading.deselected(source, item):
                left_out[why] += 1
                continue
            try:
                reading.text_of(source, item)
                return item
            except MissingField as error:
                item = Bad(item.place, str(error).removeprefix(f"{item.place}: "))
        first, bad = first or item, bad + 1
    if left_out.keys() & {"where", "part"}:
        raise UserError(
            f"{key}.{name}: has no record that `where` and `part` select, among {left_out.total()}; change one of the"
            " two"
        )
    if left_out and first is None:
        raise UserError(
            f"{key}.{name}: has no page among its {many(left_out.total(), 'record')}"
            f" ({', '.join(f'{number} x {why}' for why, number in left_out.most_common(3))}); give WARC files of"
            " responses with HTML, or WET files"
        )
    if first is None:
        raise UserError(f"{key}.{name}: has no record; look at its files, `format` and `records`")
    raise UserError(
        f"{key}.{name}: none of its {many(bad, 'record')} is good; the first: {first.place}:"
        f" {first.reason}{f' ({first.raw[:80]!r})' if first.raw else ''}{reading.other_encoding(source, first.reason)}"
    )


def refuse(report: dict, sources: dict[str, Source], max_bad: float, holdout: float, folder: Path) -> None:
    """Too much of a source was unreadable, or nothing is left. The rejected records stay for reading, in the output
    `folder`. Raises UserError."""
    for name, counts in report["sources"].items():
        damaged = sum(number for reason, number in counts["bad"].items() if reason.startswith(("damaged .", ".zst")))
        if damaged:  # so is each of these
            say(
                f"WARNING sources.{name}: {counts['bytes_lost']:,} bytes of its compressed files could not be read, in"
                f" {many(damaged, 'place')}; records are lost there: fetch again (places:"
                f" {folder / 'rejected' / name}.jsonl.zst)"
            )
        for reason, number in counts["bad"].items():
            if reason.startswith("truncated ."):  # one bad record, behind which any number of good ones may be lost
                say(
                    f"WARNING sources.{name}: {number} file{'s end' if number > 1 else ' ends'} early ({reason}); what"
                    f" follows is lost: fetch again (places: {folder / 'rejected' / name}.jsonl.zst)"
                )
            if reason in (WITHOUT_MARK.format("utf-16"), WITHOUT_MARK.format("utf-32")):
                say(f"WARNING sources.{name}: {many(number, 'file')} cannot be read: {reason}")
            if reason == BROKEN:
                say(
                    f"WARNING sources.{name}: {many(number, 'json file')} {'is' if number == 1 else 'are'} malformed;"
                    f" what follows the fault is lost (places: {folder / 'rejected' / name}.jsonl.zst)"
                )
            if reason == REPEATED:  # one bad record, too, for a file of any size
                say(
                    f"WARNING sources.{name}: {many(number, 'file')} {'has' if number == 1 else 'have'}"
                    " two columns of one name, so that no row of it is read: rename one of them (places:"
                    f" {folder / 'rejected' / name}.jsonl.zst)"
                )
    for name, counts in report["sources"].items():
        bad = sum(counts["bad"].values())
        # What is passed over by its kind, as two thirds of a web archive are, makes damaged pages no fewer.
        passed = sum(number for why, number in counts["not selected"].items() if why not in ("where", "part"))
        records = counts["read"] - passed
        if bad > max_bad * records:
            most = max(counts["bad"], key=counts["bad"].get)
            raise UserError(
                f"sources.{name}: {bad} of {many(records, 'record')} {'is' if bad == 1 else 'are'} bad"
                f" ({bad / records:.1%}, most often:"
                f" {most}), more than max_bad {max_bad:g}; look into"
                f" {folder / 'rejected' / name}.jsonl.zst, then mend the source or raise max_bad"
                f"{reading.other_encoding(sources[name], most)}"
            )
        if counts["read"] and not counts["train_documents"] + counts["heldout_documents"] + sum(
            counts["duplicates"].values()
        ):
            most = max(counts["filtered"], key=counts["filtered"].get, default="not selected")
            raise UserError(
                f"sources.{name}: nothing is left of its {many(counts['read'], 'record')} (most often: {most}); "
                f"look into {folder / 'rejected' / name}.jsonl.zst, then change its `text` or `filters`"
            )
    total = report["total"]
    if not total["train_documents"] or holdout and not total["heldout_documents"]:
        split = "heldout" if total["train_documents"] else "train"
        raise UserError(
            f"no document is left for {split}: {total['read']} read, {total['documents_out']} kept, holdout"
            f" {holdout:g}; see {folder / 'report.json'}, then ease `filters` or change `holdout`"
        )
