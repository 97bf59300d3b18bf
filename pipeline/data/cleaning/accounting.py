"""The account of every record: rejected/ and report.json, made from the outcomes of all units."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core.files import write_json
from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.flow_report import FlowReport
from pipeline.data.cleaning.outcomes import COLUMNS
from pipeline.data.cleaning.rule_report import RuleReport
from pipeline.data.dedup.document_index import DUPLICATE_REASONS, HELDOUT, TRAIN, num_copies

if TYPE_CHECKING:
    from pipeline.data.cleaning.steps import Steps
    from pipeline.data.dedup.document_index import Index

NEEDED = [name for name in COLUMNS if name not in ("text", "size", "hash", "address", "signature")]
_FINAL_REASONS = np.array(["train", "heldout", *(reason for _, reason in sorted(DUPLICATE_REASONS.items()))], object)


def _nothing_dropped() -> dict[str, dict[str, int]]:
    """Status -> reason -> number of records."""
    return {"not selected": {}, "bad": {}, "filtered": {}, "duplicates": {}}


@dataclass
class _SourceCounts:
    """Counts of one source, as in report.json. Every record is in exactly one of `dropped`, train and heldout."""

    read: int = 0
    documents_in: int = 0
    bytes_in: int = 0
    bytes_lost: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=_nothing_dropped)
    splits: Counter = field(default_factory=Counter)
    pages: Counter = field(default_factory=Counter)

    def drop(self, status: str, reason: str) -> None:
        self.dropped[status][reason] = self.dropped[status].get(reason, 0) + 1

    def report(self, edits: dict[str, int]) -> dict[str, Any]:
        keys = ("train_documents", "train_bytes", "train_copies", "heldout_documents", "heldout_bytes")
        report = {
            "read": self.read,
            "documents_in": self.documents_in,
            "bytes_in": self.bytes_in,
            "bytes_lost": self.bytes_lost,
            **self.dropped,
            **{key: self.splits[key] for key in keys},
            **edits,
        }
        if self.pages["pages"]:
            keys = ("pages", "characters_shown", "characters_extracted")
            share = self.pages["characters_extracted"] / max(1, self.pages["characters_shown"])
            report["extraction"] = {**{key: self.pages[key] for key in keys}, "share": round(share, 4)}
        return report


def account(
    units: dict[str, list[Path]],
    index: "Index",
    edited: dict[str, dict[str, int]],
    upsample: dict[int, int],
    folder: Path,
    steps: "Steps",
) -> dict:
    """Write rejected/ and report.json; returns the report. `edited`: per source, from document_index.apply_edits."""
    return _Account(units, index, upsample, folder, steps).write(edited)


class _Account:
    def __init__(
        self, units: dict[str, list[Path]], index: "Index", upsample: dict[int, int], folder: Path, steps: "Steps"
    ):
        self.units, self.index, self.upsample = units, index, upsample
        self.folder, self.steps = folder, steps
        self.rules, self.flow = RuleReport(steps), FlowReport(index, units)
        self.matched: dict[str, dict] = {}  # evaluation set -> documents that have text of it, and its items

    def write(self, edited: dict[str, dict[str, int]]) -> dict:
        import zstandard

        (self.folder / "rejected").mkdir(exist_ok=True)
        sources = {}
        for name in self.units:
            counts = _SourceCounts()
            rejected = self.folder / "work" / f"{name}.jsonl.zst"
            with open(rejected, "wb") as handle, zstandard.ZstdCompressor().stream_writer(handle) as stream:
                for entry in self._account_source(name, counts):
                    stream.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
            rejected.replace(self.folder / "rejected" / rejected.name)
            sources[name] = counts.report(edited[name])
        report = {"sources": sources, "total": _total(sources), "rules": self.rules.report()}
        report["funnel"] = self.flow.report()
        assert report["rules"]["rejected"] + report["total"]["nothing_left"] == report["total"]["filtered_documents"]
        if self.steps.decontaminate:
            sets = json.loads((self.folder / "work" / "evaluation.json").read_text())
            report["decontamination"] = _decontamination(sets, self.matched)
        write_json(self.folder / "report.json", report)
        return report

    def _account_source(self, name: str, counts: _SourceCounts) -> Iterator[dict]:
        """The entries of rejected/ of one source."""
        index = self.index
        columns = [*NEEDED, "text"] if self.steps.keep_rejected == "full" else NEEDED
        for unit, path in enumerate(self.units[name]):
            rows = index.rows[name][unit]
            outcomes = unit_files.with_file_lines(
                unit_files.read(path, columns).slice(0, rows), index.lines[name][unit]
            )
            self.rules.add(name, outcomes)
            self._count_matches(outcomes)
            self._count_records(outcomes, counts)
            yield from self._account_unit(name, outcomes, index.begins[name][unit], counts)

    def _account_unit(self, name: str, outcomes, first_document: int, counts: _SourceCounts) -> Iterator[dict]:
        status, reason = (np.array(outcomes[key].to_pylist(), object) for key in ("status", "reason"))
        is_ok = status == "ok"
        document = first_document + np.cumsum(is_ok) - 1  # number in the index, of rows that are ok
        documents = slice(first_document, first_document + int(is_ok.sum()))
        decision = np.asarray(self.index.decision[documents])
        self._count_splits(documents, decision, counts)
        is_dropped = ~is_ok
        is_dropped[is_ok] = decision > HELDOUT
        status[is_ok] = np.where(decision <= HELDOUT, "kept", "duplicates")
        reason[is_ok] = _FINAL_REASONS[decision]
        self.flow.add(name, outcomes, status, reason, document)
        dropped = np.flatnonzero(is_dropped)
        for i, row in zip(dropped.tolist(), outcomes.take(dropped).to_pylist(), strict=True):
            counts.drop(status[i], reason[i])
            if status[i] == "not selected":  # as the recipe says; counted, not listed
                continue
            entry = {
                "place": row["place"],
                "id": row["id"],
                "status": status[i],
                "reason": reason[i],
                "value": self.rules.failing_value(row),
                "excerpt": row["excerpt"],
            }
            if self.steps.keep_rejected == "full":
                text = row["text"] if is_ok[i] else row["whole"]
                if text is not None:
                    entry["text"] = text
            if is_ok[i] and self.index.original[document[i]] != document[i]:
                entry["of"] = self.index.id_text(self.index.original[document[i]])
            yield entry

    def _count_records(self, outcomes, counts: _SourceCounts) -> None:
        import pyarrow.compute

        counts.read += len(outcomes)
        counts.documents_in += int(outcomes["counted"].to_numpy().sum())
        counts.bytes_in += int(outcomes["bytes"].to_numpy().sum())
        counts.bytes_lost += int(outcomes["lost"].to_numpy().sum())
        counts.pages["pages"] += len(outcomes) - outcomes["shown"].null_count
        counts.pages["characters_shown"] += pyarrow.compute.sum(outcomes["shown"]).as_py() or 0
        counts.pages["characters_extracted"] += pyarrow.compute.sum(outcomes["extracted"]).as_py() or 0

    def _count_splits(self, documents: slice, decision: np.ndarray, counts: _SourceCounts) -> None:
        size = self.index.size[documents]
        for split, value in (("train", TRAIN), ("heldout", HELDOUT)):
            counts.splits[f"{split}_documents"] += int((decision == value).sum())
            counts.splits[f"{split}_bytes"] += int(size[decision == value].sum())
        copies = num_copies(self.index.cluster[documents][decision == TRAIN], self.upsample)
        counts.splits["train_copies"] += int((copies - 1).sum())

    def _count_matches(self, outcomes) -> None:
        for match in filter(None, outcomes["matched"].to_pylist()):
            name, items = json.loads(match)
            entry = self.matched.setdefault(name, {"documents": 0, "items": set()})
            entry["documents"] += 1
            entry["items"].update(items)


def _decontamination(sets: dict[str, dict], matched: dict[str, dict]) -> dict:
    """Per evaluation set its numbers from decontaminate.build_runs, how many documents were dropped for it, and how
    many of its items they contain."""
    report = {}
    for name, numbers in sets.items():
        match = matched.get(name, {"documents": 0, "items": ()})
        report[name] = {**numbers, "documents": match["documents"], "items_found": len(match["items"])}
    return report


def _total(sources: dict[str, dict]) -> dict[str, int]:
    """Sums over sources. Every record that was read is in exactly one of the counts of DESTINATIONS."""
    total: dict[str, int] = {}
    for counts in sources.values():
        flat = {key: value for key, value in counts.items() if isinstance(value, int)}
        flat["not_selected"] = sum(counts["not selected"].values())
        flat["bad_records"] = sum(counts["bad"].values())
        flat["filtered_documents"] = sum(counts["filtered"].values())
        flat["nothing_left"] = counts["filtered"].get("nothing_left", 0)
        flat["duplicates_exact"] = counts["duplicates"].get("exact", 0)
        flat["duplicates_near"] = counts["duplicates"].get("near", 0)
        flat["duplicates_url"] = counts["duplicates"].get("url", 0)
        flat["repeated_text"] = counts["duplicates"].get("repeated text", 0)
        assert flat["read"] == sum(flat[key] for key in DESTINATIONS)
        for key, value in flat.items():
            total[key] = total.get(key, 0) + value
    total["documents_out"] = total["train_documents"] + total["heldout_documents"]
    total["bytes_out"] = total["train_bytes"] + total["heldout_bytes"]
    return total


DESTINATIONS = (
    "not_selected",
    "bad_records",
    "filtered_documents",
    "duplicates_exact",
    "duplicates_near",
    "duplicates_url",
    "repeated_text",
    "train_documents",
    "heldout_documents",
)
