"""The ledger of a tuning stage: what became of each record, as report.json has it. Clean has its own, ledger.py."""

from pipeline.errors import UserError
from pipeline.plural import many

PLACES = 20  # of each reason are named in report.json


class Ledger:
    """What became of each record of each source, and what was found of evaluation sets."""

    def __init__(self):
        self.sources: dict[str, dict] = {}
        self.evaluation: dict[str, dict] = {}

    def report(self) -> dict:
        """JSON: `sources`, and with evaluation sets `decontamination`, as in the report of clean."""
        return {"sources": self.sources, **({"decontamination": self.evaluation} if self.evaluation else {})}

    def count(self, source: str, key: str) -> None:
        entry = self.sources.setdefault(source, {"records": 0, "rejected": {}, "train": 0, "heldout": 0})
        entry[key] += 1

    def reject(self, source: str, place: str, reason: str) -> None:
        entry = self.sources[source]["rejected"].setdefault(reason, {"count": 0, "first": []})
        entry["count"] += 1
        if len(entry["first"]) < PLACES:
            entry["first"].append(place)

    def why(self, source: str) -> str:
        """The reasons, most frequent first, with a place each."""
        rejected = self.sources[source]["rejected"]
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

    def check(self, holdout: float) -> None:
        """Raise UserError if a source gives nothing, or if nothing is held out or left."""
        for name, entry in self.sources.items():
            assert entry["records"] == entry["train"] + entry["heldout"] + sum(
                reason["count"] for reason in entry["rejected"].values()
            ), f"{name}: a record is not accounted for"
            if not entry["train"] + entry["heldout"]:
                raise UserError(
                    f"sources.{name}: none of its {many(entry['records'], 'record')} can be used: {self.why(name)}"
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
