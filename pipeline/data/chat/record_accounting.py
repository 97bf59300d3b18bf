"""The ledger of a tuning stage: what became of each record, as report.json has it. Clean has its own, ledger.py."""

from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.terminal import plural, say

PLACES = 20  # of each reason are named in report.json
NOTABLE = 0.03  # share of a source's records above which a reason is worth a warning

# Reasons, by how they begin, that do not mean that a record is bad, and what the user can do about each.
EXPECTED = {
    "duplicate": "each text is used once; nothing to do unless the source should have no copies",
    "its prompt is held out": "a smaller `holdout` leaves more of such rows for training",
    "near duplicate of a held-out row": "a smaller `holdout` leaves more of such rows for training",
    "has text of the evaluation set": "nothing to do: `decontaminate` asks for it",
    "longer than": "raise sequence_length if the model has room",
    "its answers begin after sequence_length": "raise sequence_length if the model has room",
}


class Ledger:
    """What became of each record of each source, and what was found of evaluation sets."""

    def __init__(self):
        self.sources: dict[str, dict] = {}
        self.evaluation: dict[str, dict] = {}
        self.advice: dict[str, str] = {}  # reason -> what to do about it

    def report(self) -> dict:
        """JSON: `sources`, and with evaluation sets `decontamination`, as in the report of clean."""
        return {"sources": self.sources, **({"decontamination": self.evaluation} if self.evaluation else {})}

    def count(self, source: str, key: str) -> None:
        entry = self.sources.setdefault(source, {"records": 0, "rejected": {}, "train": 0, "heldout": 0})
        entry[key] += 1

    def note(self, source: str, format: str, features: list[str]) -> None:
        """Count the format that a record was recognised to have, and what it has besides texts."""
        entry = self.sources[source]
        formats = entry.setdefault("formats", {})
        formats[format] = formats.get(format, 0) + 1
        for feature in features:
            present = entry.setdefault("with", {})
            present[feature] = present.get(feature, 0) + 1

    def say_formats(self) -> None:
        """Say how the records of each source were read."""
        for name, entry in self.sources.items():
            formats = entry.get("formats", {})
            used = plural(sum(formats.values()), "record", ",")
            read = ", ".join(f"{count:,} as {format}" for format, count in formats.items())
            if len(formats) == 1:
                read = f"as {next(iter(formats))}"
            present = ", ".join(f"{feature} in {count:,}" for feature, count in entry.get("with", {}).items())
            say(f"sources.{name}: {used} read {read}{f'; {present}' if present else ''}")

    def reject(self, source: str, place: str, reason: str, advice: str = "") -> None:
        """Count a record that is left out, with what the user can do about it."""
        if advice:
            self.advice[reason] = advice
        entry = self.sources[source]["rejected"].setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < PLACES:
            entry["first"].append(place)

    def why(self, source: str, bad: bool = False) -> str:
        """The three most frequent reasons, with a place each; with `bad`, of those that mean a bad record."""
        rejected = self.sources[source]["rejected"]
        if bad:
            rejected = {reason: found for reason, found in rejected.items() if not reason.startswith(tuple(EXPECTED))}
        return "; ".join(
            f"{entry['count']} x {reason} (first: {entry['first'][0]})"
            for reason, entry in sorted(rejected.items(), key=lambda item: -item[1]["count"])[:3]
        )

    def keep(self, rows: list, split: str, reasons: list[str | None]) -> list:
        """Rows whose reason is None; the others are rejected, and each source must have something left in the end
        (`check`)."""
        kept = []
        for row, reason in zip(rows, reasons, strict=True):
            if reason is None:
                kept.append(row)
                self.count(row.source, split)
            else:
                self.reject(row.source, row.place, reason)
        return kept

    def withdraw(self, row, split: str, reason: str) -> None:
        """Reject a row that was kept."""
        self.sources[row.source][split] -= 1
        self.reject(row.source, row.place, reason)

    def check(self, holdout: float) -> None:
        """Raise UserError if a source gives nothing, or if nothing is held out or left."""
        for name, entry in self.sources.items():
            assert entry["records"] == entry["train"] + entry["heldout"] + sum(
                reason["count"] for reason in entry["rejected"].values()
            ), f"{name}: a record is not accounted for"
            if not entry["train"] + entry["heldout"]:
                raise UserError(
                    f"sources.{name}: none of its {plural(entry['records'], 'record')} can be used: {self.why(name)}"
                )
        train, heldout = self.total("train"), self.total("heldout")
        if not heldout or not train:
            raise UserError(
                f"sources: holdout: {holdout} leaves {train} rows to train on and {heldout} to measure on; give more"
                " records or another holdout"
            )

    def total(self, key: str) -> int:
        return sum(entry[key] for entry in self.sources.values())

    def rejected(self) -> int:
        return sum(reason["count"] for entry in self.sources.values() for reason in entry["rejected"].values())

    def judge(self, max_bad: float, report: Path | None = None) -> None:
        """Warn of every reason that takes a notable share of a source. `report` is the file with all places. Raises
        UserError for a source of which more than `max_bad` cannot be used."""
        self.say_formats()
        for name, entry in self.sources.items():
            bad = 0
            for reason, found in sorted(entry["rejected"].items(), key=lambda item: -item[1]["count"]):
                advice = next((todo for start, todo in EXPECTED.items() if reason.startswith(start)), None)
                bad += found["count"] if advice is None else 0
                if found["count"] > NOTABLE * entry["records"]:
                    advice = (
                        advice or self.advice.get(reason) or "mend the source, or leave such records out by `where`"
                    )
                    say(
                        f"WARNING sources.{name}: {found['count']:,} of {plural(entry['records'], 'record', ',')}"
                        f" ({found['count'] / entry['records']:.0%}) left out: {reason} (first: {found['first'][0]});"
                        f" {advice}"
                    )
            if bad > max_bad * entry["records"]:
                places = f" (all places: {report})" if report else ""
                raise UserError(
                    f"sources.{name}: {bad} of {plural(entry['records'], 'record')} cannot be used"
                    f" ({bad / entry['records']:.1%}), more than max_bad {max_bad:g}: {self.why(name, bad=True)}; mend"
                    f" the source, leave such records out with `where`, or raise max_bad{places}"
                )
