"""The account of every record: rejected/ and report.json, out of the outcomes of all units."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.files import write_json
from pipeline.data.cleaning import unit_files
from pipeline.data.cleaning.work_units import OUTCOME

if TYPE_CHECKING:
    from pipeline.data.cleaning.steps import Steps
    from pipeline.data.dedup.document_index import Index

ACCOUNTED = [key for key in OUTCOME if key not in ("text", "size", "hash", "address", "signature")]


def account(
    units: dict[str, list[Path]],
    index: "Index",
    edited: dict[str, dict[str, int]],
    upsample: dict[int, int],
    folder: Path,
    steps: "Steps",
) -> dict:
    """Write rejected/ and report.json; returns the report. Every record is in exactly one of its counts. `edited`
    are those of index.take_over."""
    import numpy as np
    import pyarrow.compute
    import zstandard

    from pipeline.data.cleaning.flow_report import Funnel
    from pipeline.data.cleaning.rule_report import Rejections
    from pipeline.data.dedup.document_index import HELDOUT, REASONS, TRAIN, times

    report: dict[str, Any] = {"sources": {}}
    rejections, funnel, matched = Rejections(steps), Funnel(index, units), {}
    fates = np.array(["train", "heldout", *(REASONS[fate] for fate in sorted(REASONS))], object)
    (folder / "rejected").mkdir(exist_ok=True)
    for name, paths in units.items():
        counts: dict[str, Any] = {"not selected": {}, "bad": {}, "filtered": {}, "duplicates": {}}
        read = records = size = lost = 0
        extraction = {"pages": 0, "characters_shown": 0, "characters_extracted": 0}
        splits = dict.fromkeys(
            ("train_documents", "train_bytes", "train_copies", "heldout_documents", "heldout_bytes"), 0
        )
        ledger = folder / "work" / f"{name}.jsonl.zst"
        with open(ledger, "wb") as handle, zstandard.ZstdCompressor().stream_writer(handle) as packed:
            for path, rows, at, before in zip(
                paths, index.rows[name], index.begins[name], index.lines[name], strict=True
            ):
                columns = [*ACCOUNTED, "text"] if steps.keep_rejected == "full" else ACCOUNTED
                outcome = unit_files.at_lines(unit_files.read(path, columns).slice(0, rows), before)
                rejections.add(name, outcome)
                _count_matched(matched, outcome)
                read += rows
                records += int(outcome["counted"].to_numpy().sum())
                size += int(outcome["bytes"].to_numpy().sum())
                lost += int(outcome["lost"].to_numpy().sum())
                extraction["pages"] += len(outcome) - outcome["shown"].null_count
                extraction["characters_shown"] += pyarrow.compute.sum(outcome["shown"]).as_py() or 0
                extraction["characters_extracted"] += pyarrow.compute.sum(outcome["extracted"]).as_py() or 0
                ok = outcome["status"].to_numpy() == "ok"
                document = at + np.cumsum(ok) - 1
                here = slice(at, at + int(ok.sum()))
                fate = np.asarray(index.fate[here])
                for split, wanted in (("train", TRAIN), ("heldout", HELDOUT)):
                    splits[f"{split}_documents"] += int((fate == wanted).sum())
                    splits[f"{split}_bytes"] += int(index.size[here][fate == wanted].sum())
                splits["train_copies"] += int((times(index.cluster[here][fate == TRAIN], upsample) - 1).sum())
                left_out = ~ok
                left_out[ok] = fate > HELDOUT
                status, reason = (np.array(outcome[key].to_pylist(), object) for key in ("status", "reason"))
                status[ok], reason[ok] = np.where(fate <= HELDOUT, "kept", "duplicates"), fates[fate]
                funnel.add(name, outcome, status, reason, document)
                chosen = np.flatnonzero(left_out)
                for i, row in zip(chosen.tolist(), outcome.take(chosen).to_pylist(), strict=True):
                    entry = {
                        "place": row["place"],
                        "id": row["id"],
                        "status": status[i],
                        "reason": reason[i],
                        "value": rejections.tripped(row),
                        "excerpt": row["excerpt"],
                    }
                    if steps.keep_rejected == "full":
                        text = row["text"] if ok[i] else row["whole"]
                        if text is not None:
                            entry["text"] = text
                    if ok[i]:
                        entry |= _of_duplicate(index, document[i])
                    counts[entry["status"]][entry["reason"]] = counts[entry["status"]].get(entry["reason"], 0) + 1
                    if entry["status"] != "not selected":  # the recipe asked for it; counted, and not kept aside
                        packed.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        ledger.replace(folder / "rejected" / ledger.name)
        report["sources"][name] = {
            "read": read,
            "documents_in": records,
            "bytes_in": size,
            "bytes_lost": lost,
            **counts,
            **splits,
            **edited[name],
        }
        if extraction["pages"]:
            share = extraction["characters_extracted"] / max(1, extraction["characters_shown"])
            report["sources"][name]["extraction"] = {**extraction, "share": round(share, 4)}
    _total(report)
    report["rules"], report["funnel"] = rejections.report(), funnel.report()
    assert report["rules"]["rejected"] + report["total"]["nothing_left"] == report["total"]["filtered_documents"]
    if steps.decontaminate:
        known = json.loads((folder / "work" / "evaluation.json").read_text())
        report["decontamination"] = _decontamination(known, matched)
    write_json(folder / "report.json", report)
    return report


def _count_matched(matched: dict[str, dict], outcome) -> None:
    """Add a unit's documents that have text of an evaluation set, and which of its items."""
    for evaluation, items in map(json.loads, filter(None, outcome["matched"].to_pylist())):
        entry = matched.setdefault(evaluation, {"documents": 0, "items_found": set()})
        entry["documents"] += 1
        entry["items_found"].update(items)


def _of_duplicate(index: "Index", document: int) -> dict:
    """The id of the document that was kept in place of this one, if it is another."""
    original = index.original[document]
    if original == document:
        return {}
    return {"of": "{:016x}{:016x}".format(*index.id[original].tolist())}


def _decontamination(known: dict[str, dict], matched: dict[str, dict]) -> dict:
    """Evaluation set -> what is known of it, documents that were dropped for it, and how many of its items they had."""
    report = {}
    for name, numbers in known.items():
        found = matched.get(name, {"documents": 0, "items_found": ()})
        report[name] = {**numbers, **found, "items_found": len(found["items_found"])}
    return report


def _total(report: dict) -> None:
    total: dict[str, int] = {}
    for counts in report["sources"].values():
        flat = {
            **{key: value for key, value in counts.items() if isinstance(value, int)},
            "not_selected": sum(counts["not selected"].values()),
            "bad_records": sum(counts["bad"].values()),
            "filtered_documents": sum(counts["filtered"].values()),
            "nothing_left": counts["filtered"].get("nothing_left", 0),
            "duplicates_exact": counts["duplicates"].get("exact", 0),
            "duplicates_near": counts["duplicates"].get("near", 0),
            "duplicates_url": counts["duplicates"].get("url", 0),
            "repeated_text": counts["duplicates"].get("repeated text", 0),
        }
        fates = (
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
        assert flat["read"] == sum(flat[key] for key in fates)
        for key, value in flat.items():
            total[key] = total.get(key, 0) + value
    total["documents_out"] = total["train_documents"] + total["heldout_documents"]
    total["bytes_out"] = total["train_bytes"] + total["heldout_bytes"]
    report["total"] = total
