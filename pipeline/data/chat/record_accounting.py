"""The account of a tuning stage: what became of each record, as report.json has it. Stage clean has its own
(pipeline/data/cleaning/accounting.py)."""

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


# Held-out files of the key `evaluate` are named evaluate.NAME among the sources of a stage.
EVALUATE = "evaluate."


def key_of(source: str) -> str:
    """The key of a source in its stage."""
    return source if source.startswith(EVALUATE) else f"sources.{source}"


class Ledger:
    """What became of each record of each source, and which items of evaluation sets were found."""

    def __init__(self):
        self.sources: dict[str, dict] = {}
        self.evaluation: dict[str, dict] = {}
        self.advice: dict[str, str] = {}  # reason -> what to do about it
        self.absent: dict[str, list[str]] = {}  # source -> fields of its key `ignore` that no record has

    def report(self) -> dict:
        """JSON: `sources`, and with evaluation sets `decontamination`, as in the report of clean."""
        report = {"sources": self.sources}
        if self.evaluation:
            report["decontamination"] = self.evaluation
        return report

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
        """Print how the records of each source were read."""
        for name, entry in self.sources.items():
            formats = entry.get("formats", {})
            used = plural(sum(formats.values()), "record", ",")
            read = ", ".join(f"{count:,} as {format}" for format, count in formats.items())
            if len(formats) == 1:
                read = f"as {next(iter(formats))}"
            present = ", ".join(f"{feature} in {count:,}" for feature, count in entry.get("with", {}).items())
            say(f"{key_of(name)}: {used} read {read}{f'; {present}' if present else ''}")

    def reject(self, source: str, place: str, reason: str, advice: str = "") -> None:
        """Count a record that is dropped, with what the user can do about it."""
        if advice:
            self.advice[reason] = advice
        entry = self.sources[source]["rejected"].setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < PLACES:
            entry["first"].append(place)

    def why(self, source: str, bad: bool = False) -> str:
        """The three most frequent reasons, with a place each; with `bad`, of those that mean a bad record."""
        reasons = []
        for reason, entry in self._by_frequency(source):
            if not bad or _expected_advice(reason) is None:
                reasons.append(f"{entry['count']} x {reason} (first: {entry['first'][0]})")
        return "; ".join(reasons[:3])

    def _by_frequency(self, source: str) -> list[tuple[str, dict]]:
        """Reasons of a source and their counts, the most frequent first."""
        return sorted(self.sources[source]["rejected"].items(), key=lambda item: -item[1]["count"])

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
                    f"{key_of(name)}: none of its {plural(entry['records'], 'record')} can be used: {self.why(name)}"
                )
        train, heldout = self.total("train"), self.total("heldout")
        if not heldout or not train:
            raise UserError(
                f"sources: holdout: {holdout} leaves {train} rows to train on and {heldout} to measure on; give more"
                " records or another holdout"
            )

    def names(self) -> list[str]:
        """The sources to train on, in order, and then the held-out files."""
        return sorted(self.sources, key=lambda name: name.startswith(EVALUATE))

    def total(self, key: str) -> int:
        return sum(entry[key] for entry in self.sources.values())

    def rejected(self) -> int:
        return sum(reason["count"] for entry in self.sources.values() for reason in entry["rejected"].values())

    def judge(self, max_bad: float, report: Path | None = None) -> None:
        """Warn of every reason that takes a notable share of a source. `report` is the file with all places. Raises
        UserError for a source of which more than `max_bad` cannot be used."""
        self.say_formats()
        for name, entry in self.sources.items():
            records = entry["records"]
            if absent := self.absent.get(name):
                say(f"WARNING {key_of(name)}.ignore: no record has {', '.join(absent)}; remove or correct the name")
            num_bad = 0
            for reason, rejected in self._by_frequency(name):
                if _expected_advice(reason) is None:
                    num_bad += rejected["count"]
                if rejected["count"] > NOTABLE * records:
                    self._warn(name, reason, rejected, records)
            if num_bad > max_bad * records:
                places = f" (all places: {report})" if report else ""
                raise UserError(
                    f"{key_of(name)}: {num_bad} of {plural(records, 'record')} cannot be used"
                    f" ({num_bad / records:.1%}), more than max_bad {max_bad:g}: {self.why(name, bad=True)}; fix the"
                    f" source, exclude such records with `where`, or raise max_bad{places}"
                )

    def _warn(self, source: str, reason: str, rejected: dict, records: int) -> None:
        advice = _expected_advice(reason) or self.advice.get(reason)
        if advice is None:
            advice = "fix the source, or exclude such records with `where`"
        count = rejected["count"]
        say(
            f"WARNING {key_of(source)}: {count:,} of {plural(records, 'record', ',')} ({count / records:.0%}) dropped:"
            f" {reason} (first: {rejected['first'][0]}); {advice}"
        )


def _expected_advice(reason: str) -> str | None:
    """What the user can do about a reason that does not mean a bad record; None for any other reason."""
    for start, advice in EXPECTED.items():
        if reason.startswith(start):
            return advice
    return None
