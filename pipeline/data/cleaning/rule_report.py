"""The part of the ledger that is about rules: how many documents each rule fails, how rules overlap, what was dropped,
and what other thresholds would have done.

It is computed from the stored outcomes of all units, not while they are made, so it is complete after any number of
interruptions and does not depend on workers.
"""

import json

import numpy as np

from pipeline.data.cleaning import classifiers
from pipeline.data.cleaning import steps as doing

SAMPLES = 5
# What-if: the threshold times these. Bounds of 0 have no other.
SCALES = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)
KINDS = ("en", "zh", "other")


class Rejections:
    """Sums over outcomes; `add` takes them in any order, and `report` is the same."""

    def __init__(self, steps: "doing.Steps"):
        self.models = classifiers.report(steps.models)
        self.names, self.rules = map(list, zip(*doing.reasons(steps), strict=True))
        size = len(self.names)
        self.documents, self.bytes = np.zeros(3, np.int64), np.zeros(3, np.int64)
        self.failed, self.failed_bytes, self.first, self.alone = (np.zeros((size, 3), np.int64) for _ in range(4))
        self.both = np.zeros((size, size), np.int64)
        self.scaled, self.scaled_all = np.zeros((2, size, len(SCALES), 3), np.int64)
        self.samples: list[list[tuple]] = [[] for _ in range(size)]
        self.languages: dict[str, list[int]] = {}
        self.changed: dict[str, list[int]] = {}  # what was done to texts that were kept: documents, times

    def add(self, source: str, outcome) -> None:
        """The outcomes of a unit: pyarrow.Table with place, id, bytes, excerpt, kind, language, statistics, failed,
        changed, matched."""
        judged = np.flatnonzero(outcome["failed"].is_valid().to_numpy())
        if not len(judged):
            return
        chosen = outcome.take(judged)
        masks = chosen["failed"].to_numpy().astype(np.int64)
        failed = (masks[:, None] >> np.arange(len(self.names)) & 1).astype(bool)
        kind, size = chosen["kind"].to_numpy().astype(np.int64), chosen["bytes"].to_numpy().astype(np.int64)
        values = np.frombuffer(b"".join(chosen["statistics"].to_pylist()), np.float32).reshape(len(judged), -1)
        which = np.eye(3, dtype=np.int64)[kind]
        several = failed.sum(1)
        self.documents += which.sum(0)
        self.bytes += size @ which
        self.failed += failed.T.astype(np.int64) @ which
        self.failed_bytes += (failed * size[:, None]).T @ which
        self.alone += (failed & (several == 1)[:, None]).T.astype(np.int64) @ which
        rejected = several > 0
        np.add.at(self.first, (failed.argmax(1)[rejected], kind[rejected]), 1)
        self.both += failed.T.astype(np.int64) @ failed
        for number, rule in enumerate(self.rules):
            if rule is None:
                continue
            others = several - failed[:, number] > 0
            for column, scale in enumerate(SCALES):
                fails = rule.fails(values, kind, scale) if scale != 1 else failed[:, number]
                self.scaled[number, column] += fails @ which
                self.scaled_all[number, column] += (fails | others) @ which
        self._sample(source, chosen, failed)
        for entry in chosen["changed"].filter(_arrow(~rejected)).drop_null().to_pylist():
            for what, times in json.loads(entry).items():
                sums = self.changed.setdefault(what, [0, 0])
                sums[0], sums[1] = sums[0] + 1, sums[1] + times
        for code, number in zip(
            *np.unique([code or "" for code in chosen["language"].to_pylist()], return_counts=True), strict=True
        ):
            entry = self.languages.setdefault(str(code), [0, 0])
            entry[0] += int(number)
        for code in [code or "" for code in chosen["language"].filter(_arrow(rejected)).to_pylist()]:
            self.languages[code][1] += 1

    def _value(self, number: int, entry: dict) -> float | str | None:
        """What tripped a rule: its statistic, the evaluation set, or the language."""
        if self.rules[number]:
            return _plain(np.frombuffer(entry["statistics"], np.float32)[self.rules[number].column])
        return json.loads(entry["matched"])[0] if self.names[number] == "contaminated" else entry["language"]

    def tripped(self, entry: dict) -> float | str | None:
        """The value that tripped the rule which is the reason given for a row (failed, statistics, language,
        matched)."""
        return self._value((entry["failed"] & -entry["failed"]).bit_length() - 1, entry) if entry["failed"] else None

    def _sample(self, source: str, chosen, failed: np.ndarray) -> None:
        """Of each rule the documents with the smallest record ids: a reservoir that is the same whatever the order."""
        ids = np.array(chosen["id"].to_pylist())
        for number in np.flatnonzero(failed.any(0)).tolist():
            rows = candidates(ids, np.flatnonzero(failed[:, number]))
            entries = chosen.select(["place", "excerpt", "statistics", "language", "matched"]).take(rows).to_pylist()
            found = [
                (str(ids[row]), source, entry["place"], self._value(number, entry), entry["excerpt"])
                for row, entry in zip(rows.tolist(), entries, strict=True)
            ]
            self.samples[number] = smallest(self.samples[number], found)

    def report(self) -> dict:
        """JSON: `documents` and `bytes` judged; each rule's counts (documents it fails; of these the ones that no
        other rule fails, and those whose reason it is), shares, samples with the value that tripped it, and for
        thresholds around the recipe's [threshold, documents that this rule would fail, documents that all rules
        together would]."""
        rules = {}
        for number, (name, rule) in enumerate(zip(self.names, self.rules, strict=True)):
            entry = {
                "documents": int(self.failed[number].sum()),
                "bytes": int(self.failed_bytes[number].sum()),
                "alone": int(self.alone[number].sum()),
                "first": int(self.first[number].sum()),
                "share": _share(self.failed[number].sum(), self.documents.sum()),
                "share_bytes": _share(self.failed_bytes[number].sum(), self.bytes.sum()),
                "with": {
                    self.names[other]: int(self.both[number, other])
                    for other in np.flatnonzero(self.both[number]).tolist()
                    if other != number
                },
                "samples": [
                    dict(zip(("id", "source", "place", "value", "excerpt"), sample, strict=True))
                    for sample in self.samples[number]
                ],
            }
            if rule:
                same = "{}" not in rule.key
                entry["thresholds"] = {}
                for column, kind in enumerate(KINDS):
                    bound = rule.bounds[column]
                    if bound != bound or not self.documents[column]:
                        continue
                    key = rule.key.format(kind)
                    part = slice(None) if same else column
                    scales = range(len(SCALES)) if bound else [SCALES.index(1.0)]
                    entry["thresholds"][key] = [
                        [
                            _plain(bound * SCALES[i]),
                            int(self.scaled[number, i, part].sum()),
                            int(self.scaled_all[number, i, part].sum()),
                        ]
                        for i in scales
                    ]
            rules[name] = entry
        rejected = int(self.first.sum())
        return {
            "documents": int(self.documents.sum()),
            "bytes": int(self.bytes.sum()),
            "rejected": rejected,
            "judged_as": {kind: int(self.documents[i]) for i, kind in enumerate(KINDS)},
            "languages": {
                code: {"documents": counts[0], "rejected": counts[1]}
                for code, counts in sorted(self.languages.items(), key=lambda item: (-item[1][0], item[0]))
                if code
            },
            "rules": rules,
            **({"models": self.models} if self.models else {}),
            "changed": {what: {"documents": sums[0], "times": sums[1]} for what, sums in sorted(self.changed.items())},
        }


def candidates(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of some rows whose record ids are among the SAMPLES smallest."""
    return rows[np.isin(ids[rows], np.unique(ids[rows])[:SAMPLES])]


def smallest(samples: list[tuple], found: list[tuple]) -> list[tuple]:
    """Of (id, source, place, ...) those with the smallest ids, one for each id: a reservoir that is the same
    whatever the order, and does not show one copied text five times."""
    best: dict[str, tuple] = {}
    for sample in sorted([*samples, *found], key=lambda sample: sample[:3]):
        best.setdefault(sample[0], sample)
    return list(best.values())[:SAMPLES]


def _share(part, whole) -> float:
    return round(float(part) / max(1, float(whole)), 6)


def _plain(value) -> float | None:
    return None if value != value else float(f"{float(value):.6g}")


def _arrow(mask: np.ndarray):
    import pyarrow

    return pyarrow.array(mask)
