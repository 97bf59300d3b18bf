"""What became of the data: documents of clean and records of the finetuning stages, from read to published, with
samples of what was dropped and why. From each stage's report.json."""

import json
from dataclasses import dataclass, field

from pipeline.report.run_folder import Run, StageRun

MOST_REASONS = 14
MOST_SAMPLES = 3  # of a reason
EXCERPT = 300  # characters
STATUS = ("not selected", "bad", "filtered", "duplicates")


@dataclass
class Sample:
    """A document or record that was dropped."""

    place: str
    text: str
    value: str = ""
    """What broke the rule."""
    kept: str = ""
    """Of a duplicate: the text that was kept for it."""


@dataclass
class Reason:
    """Why documents were dropped."""

    name: str
    status: str
    number: int
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Funnel:
    """What one stage did with its input."""

    stage: str
    unit: str
    """documents or records."""
    steps: list[tuple[str, int]]
    """(status, number), from read to held out. Those after `read` sum to it."""
    reasons: list[Reason]
    problem: str = ""

    @property
    def read(self) -> int:
        return self.steps[0][1] if self.steps else 0


def funnels(run: Run) -> list[Funnel]:
    """Of every stage that left a report of its data."""
    found = []
    for stage in run.stages.values():
        path = stage.path / "report.json" if stage.path else None
        if path is None or not path.exists():
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            funnel = _of_documents(stage, report) if "funnel" in report else _of_records(stage, report)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            funnel = Funnel(stage.name, "documents", [], [], f"{type(error).__name__}: {error}")
        if funnel is not None:
            found.append(funnel)
    return found


def _of_documents(stage: StageRun, report: dict) -> Funnel:
    """Of clean. A cell of its counts is (documents, bytes read, bytes published)."""
    numbers: dict[tuple[str, str], int] = {}
    for languages in report["funnel"]["steps"].values():
        for cells in languages.values():
            for status, by_reason in cells.items():
                for reason, cell in by_reason.items():
                    numbers[status, reason] = numbers.get((status, reason), 0) + cell[0]
    steps = [("read", sum(numbers.values()))]
    for status in STATUS:
        total = sum(number for (other, _), number in numbers.items() if other == status)
        if total:
            steps.append((status, total))
    steps += [(split, numbers.get(("kept", split), 0)) for split in ("train", "heldout")]
    reasons = [Reason(name, status, number) for (status, name), number in numbers.items() if status != "kept"]
    reasons = sorted(reasons, key=lambda reason: -reason.number)[:MOST_REASONS]
    rules, copies, bad = report["rules"]["rules"], report["funnel"]["duplicates"]["samples"], report["funnel"]["bad"]
    for reason in reasons:
        samples = rules[reason.name]["samples"] if reason.name in rules else copies.get(reason.name, [])
        if reason.status == "bad":
            samples = [
                {"source": name} | entry for name, entries in bad.items() for entry in entries.get(reason.name, [])
            ]
        reason.samples = [_sample(sample) for sample in samples[:MOST_SAMPLES]]
    return Funnel(stage.name, "documents", steps, reasons)


def _sample(sample: dict) -> Sample:
    value = sample.get("value", sample.get("alike", ""))
    original = sample.get("of")
    kept = str(original.get("excerpt", "")) if isinstance(original, dict) else ""
    place = f"{sample.get('source', '')} {sample.get('place', sample.get('id', ''))}".strip()
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return Sample(place, str(sample.get("excerpt") or "")[:EXCERPT], shown, kept[:EXCERPT])


def _of_records(stage: StageRun, report: dict) -> Funnel | None:
    """Of sft, reward, dpo, kto and ppo."""
    sources = report.get("sources")
    if not isinstance(sources, dict) or not all("records" in entry for entry in sources.values()):
        return None
    reasons: dict[str, Reason] = {}
    totals = {"records": 0, "train": 0, "heldout": 0}
    for name, entry in sources.items():
        for key in totals:
            totals[key] += entry[key]
        for why, rejected in entry["rejected"].items():
            reason = reasons.setdefault(why, Reason(why, "dropped", 0))
            reason.number += rejected["count"]
            reason.samples += [Sample(f"{name} {place}", "") for place in rejected["first"][:MOST_SAMPLES]]
    dropped = sum(reason.number for reason in reasons.values())
    steps = [("read", totals["records"])]
    if dropped:
        steps.append(("dropped", dropped))
    steps += [("train", totals["train"]), ("heldout", totals["heldout"])]
    ordered = sorted(reasons.values(), key=lambda reason: -reason.number)[:MOST_REASONS]
    return Funnel(stage.name, "records", steps, ordered)
