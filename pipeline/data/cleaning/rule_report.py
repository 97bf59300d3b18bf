"""The part of report.json that is about rules: how many documents each rule fails, how rules overlap, what was dropped,
and what other thresholds would have done.

It is computed from the stored outcomes of all units, not while they are cleaned, so it is complete after any number of
interruptions and does not depend on the number of workers.
"""

import json
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.cleaning import perplexity_model, quality_classifier
from pipeline.data.cleaning.language import GROUPS
from pipeline.data.cleaning.rules import Rule
from pipeline.data.cleaning.samples import candidate_rows, merge_samples
from pipeline.data.cleaning.steps import Steps, reasons

# Other thresholds are the recipe's times these. Bounds of 0 have no others.
SCALES = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0)


def _per_group() -> np.ndarray:
    return np.zeros(len(GROUPS), np.int64)


def _per_scale() -> np.ndarray:
    return np.zeros((len(SCALES), len(GROUPS)), np.int64)


@dataclass
class _RuleCounts:
    """Documents (or bytes) per group of languages."""

    failed: np.ndarray = field(default_factory=_per_group)
    failed_bytes: np.ndarray = field(default_factory=_per_group)
    alone: np.ndarray = field(default_factory=_per_group)  # that fail no other rule
    first: np.ndarray = field(default_factory=_per_group)  # whose reason the rule is
    # with the threshold times each of SCALES: documents that this rule, or any rule, would fail, [scales, groups]
    scaled: np.ndarray = field(default_factory=_per_scale)
    scaled_any: np.ndarray = field(default_factory=_per_scale)
    samples: list[tuple] = field(default_factory=list)


class RuleReport:
    """Sums over outcomes; `add` takes units in any order, and `report` is the same."""

    def __init__(self, steps: Steps):
        self.models = {}
        if steps.quality.good:
            self.models["quality"] = quality_classifier.describe(steps.models)
        if steps.perplexity.like:
            self.models["perplexity"] = perplexity_model.describe(steps.models)
        self.names, self.rules = map(list, zip(*reasons(steps), strict=True))
        self.counts = [_RuleCounts() for _ in self.names]
        self.documents, self.bytes = _per_group(), _per_group()
        self.both = np.zeros((len(self.names), len(self.names)), np.int64)  # documents that fail two rules
        self.languages: dict[str, list[int]] = {}  # documents, rejected ones
        self.changed: dict[str, list[int]] = {}  # what was done to texts that were kept: documents, times

    def add(self, source: str, outcomes) -> None:
        """The outcomes of a unit: pyarrow.Table with place, id, bytes, excerpt, kind, language, statistics, failed,
        changed, matched."""
        measured = np.flatnonzero(outcomes["failed"].is_valid().to_numpy())
        if not len(measured):
            return
        outcomes = outcomes.take(measured)
        bits = outcomes["failed"].to_numpy().astype(np.int64)
        failed = (bits[:, None] >> np.arange(len(self.names)) & 1).astype(bool)  # [N, rules]
        rejected = failed.any(1)
        group, size = outcomes["kind"].to_numpy().astype(np.int64), outcomes["bytes"].to_numpy().astype(np.int64)
        self._count(failed, group, size)
        statistics = np.frombuffer(b"".join(outcomes["statistics"].to_pylist()), np.float32)
        self._count_other_thresholds(failed, group, statistics.reshape(len(measured), -1))
        self._add_samples(source, outcomes, failed)
        self._count_changes(outcomes["changed"].filter(_arrow(~rejected)).drop_null().to_pylist())
        self._count_languages(outcomes["language"].to_pylist(), rejected)

    def _count(self, failed: np.ndarray, group: np.ndarray, size: np.ndarray) -> None:
        in_group = np.eye(len(GROUPS), dtype=np.int64)[group]  # [N, groups]
        self.documents += in_group.sum(0)
        self.bytes += size @ in_group
        self.both += failed.T.astype(np.int64) @ failed
        num_failed = failed.sum(1)
        first = np.where(num_failed > 0, failed.argmax(1), -1)
        for number, counts in enumerate(self.counts):
            fails = failed[:, number]
            counts.failed += fails @ in_group
            counts.failed_bytes += (fails * size) @ in_group
            counts.alone += (fails & (num_failed == 1)) @ in_group
            counts.first += (first == number) @ in_group

    def _count_other_thresholds(self, failed: np.ndarray, group: np.ndarray, statistics: np.ndarray) -> None:
        in_group = np.eye(len(GROUPS), dtype=np.int64)[group]
        num_failed = failed.sum(1)
        for number, (rule, counts) in enumerate(zip(self.rules, self.counts, strict=True)):
            if rule is None:
                continue
            fails_others = num_failed - failed[:, number] > 0
            for row, scale in enumerate(SCALES):
                fails = failed[:, number] if scale == 1 else rule.fails(statistics, group, scale)
                counts.scaled[row] += fails @ in_group
                counts.scaled_any[row] += (fails | fails_others) @ in_group

    def _add_samples(self, source: str, outcomes, failed: np.ndarray) -> None:
        ids = np.array(outcomes["id"].to_pylist())
        columns = outcomes.select(["place", "excerpt", "statistics", "language", "matched"])
        for number in np.flatnonzero(failed.any(0)).tolist():
            rows = candidate_rows(ids, np.flatnonzero(failed[:, number]))
            samples = []
            for row, entry in zip(rows.tolist(), columns.take(rows).to_pylist(), strict=True):
                samples.append((str(ids[row]), source, entry["place"], self._value(number, entry), entry["excerpt"]))
            counts = self.counts[number]
            counts.samples = merge_samples(counts.samples, samples)

    def _count_changes(self, entries: list[str]) -> None:
        for entry in entries:
            for change, times in json.loads(entry).items():
                sums = self.changed.setdefault(change, [0, 0])
                sums[0] += 1
                sums[1] += times

    def _count_languages(self, codes: list[str | None], rejected: np.ndarray) -> None:
        for code, is_rejected in zip(codes, rejected.tolist(), strict=True):
            sums = self.languages.setdefault(code or "", [0, 0])
            sums[0] += 1
            sums[1] += is_rejected

    def _value(self, number: int, entry: dict) -> float | str | None:
        """The value of a document that a rule fails: its statistic, the evaluation set, or the language."""
        rule = self.rules[number]
        if rule:
            return _json_number(np.frombuffer(entry["statistics"], np.float32)[rule.column])
        return json.loads(entry["matched"])[0] if self.names[number] == "contaminated" else entry["language"]

    def failing_value(self, entry: dict) -> float | str | None:
        """The value that fails the rule which is the reason for a row (failed, statistics, language, matched)."""
        if not entry["failed"]:
            return None
        lowest_bit = entry["failed"] & -entry["failed"]
        return self._value(lowest_bit.bit_length() - 1, entry)

    # ---- report.json -------------------------------------------------------------------------------------------------

    def report(self) -> dict:
        """JSON: `documents` and `bytes` measured; per rule its counts (documents that fail it, those of them that fail
        no other rule, and those whose reason it is), shares, samples with the value that fails it, and for thresholds
        around the recipe's [threshold, documents that this rule would fail, documents that all rules together
        would]."""
        languages = sorted(self.languages.items(), key=lambda item: (-item[1][0], item[0]))
        report = {
            "documents": int(self.documents.sum()),
            "bytes": int(self.bytes.sum()),
            "rejected": int(sum(counts.first.sum() for counts in self.counts)),
            "judged_as": dict(zip(GROUPS, self.documents.tolist(), strict=True)),
            "languages": {
                code: {"documents": documents, "rejected": rejected}
                for code, (documents, rejected) in languages
                if code
            },
            "rules": {name: self._rule(number) for number, name in enumerate(self.names)},
        }
        if self.models:
            report["models"] = self.models
        report["changed"] = {
            change: {"documents": documents, "times": times}
            for change, (documents, times) in sorted(self.changed.items())
        }
        return report

    def _rule(self, number: int) -> dict:
        counts, rule = self.counts[number], self.rules[number]
        others = [other for other in np.flatnonzero(self.both[number]).tolist() if other != number]
        fields = ("id", "source", "place", "value", "excerpt")
        entry = {
            "documents": int(counts.failed.sum()),
            "bytes": int(counts.failed_bytes.sum()),
            "alone": int(counts.alone.sum()),
            "first": int(counts.first.sum()),
            "share": _share(counts.failed.sum(), self.documents.sum()),
            "share_bytes": _share(counts.failed_bytes.sum(), self.bytes.sum()),
            "with": {self.names[other]: int(self.both[number, other]) for other in others},
            "samples": [dict(zip(fields, sample, strict=True)) for sample in counts.samples],
        }
        if rule:
            entry["thresholds"] = self._thresholds(rule, counts)
        return entry

    def _thresholds(self, rule: Rule, counts: _RuleCounts) -> dict[str, list]:
        thresholds = {}
        is_shared = "{}" not in rule.key  # by all groups of languages
        for group, name in enumerate(GROUPS):
            bound = rule.bounds[group]
            if np.isnan(bound) or not self.documents[group]:
                continue
            columns = slice(None) if is_shared else group
            rows = range(len(SCALES)) if bound else [SCALES.index(1.0)]
            thresholds[rule.key.format(name)] = [
                [
                    _json_number(bound * SCALES[row]),
                    int(counts.scaled[row, columns].sum()),
                    int(counts.scaled_any[row, columns].sum()),
                ]
                for row in rows
            ]
        return thresholds


def _share(part, total) -> float:
    return round(float(part) / max(1, float(total)), 6)


def _json_number(value) -> float | None:
    """Six digits, which float32 has; None for NaN."""
    return None if np.isnan(value) else float(f"{float(value):.6g}")


def _arrow(mask: np.ndarray):
    import pyarrow

    return pyarrow.array(mask)
