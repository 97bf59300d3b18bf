"""The parts of a report that are tables and texts: sample answers, evaluation with intervals, tokenizer, lineage, time
and cost."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from pipeline.core.intervals import wilson
from pipeline.core.terminal import byte_size
from pipeline.report.run_folder import Run, StageRun, is_internal

MOST_ANSWERS = 8
MOST_TEXT = 600  # characters of a prompt or an answer
COUNTS = {"accuracy": "heldout_pairs", "eos_rate": "heldout_answered_after"}  # share -> how many it is of


# ---- sample answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """Answers to the same prompts, of one stage."""

    stage: str
    columns: list[str]
    rows: list[dict]
    """prompt, answer (the known one) and a list of (text, reward or None) for the columns."""


def answers(run: Run) -> list[Answers]:
    """samples.jsonl of ppo (before and after) and of assess (of each model)."""
    found = []
    for stage in run.stages.values():
        path = stage.path / "samples.jsonl" if stage.path else None
        if path is None or not path.exists():
            continue
        records = [record for record in _json_lines(path) if "prompt" in record]
        if records and "when" in records[0]:
            found.append(_before_and_after(stage.name, [record for record in records if "when" in record]))
        elif records:
            found.append(_by_model(stage.name, records))
    return [entry for entry in found if entry.rows]


def _before_and_after(stage: str, records: list[dict]) -> Answers:
    by_prompt: dict[str, dict] = {}
    for record in records:
        row = by_prompt.setdefault(str(record["prompt"]), {"answer": record.get("answer")})
        row[str(record["when"])] = (str(record.get("sampled", ""))[:MOST_TEXT], record.get("sampled_reward"))
    rows = []
    for prompt, row in list(by_prompt.items())[:MOST_ANSWERS]:
        texts = [row.get("before", ("", None)), row.get("after", ("", None))]
        rows.append({"prompt": prompt[:MOST_TEXT], "answer": row["answer"], "texts": texts})
    return Answers(stage, ["before", "after"], rows)


def _by_model(stage: str, records: list[dict]) -> Answers:
    models = [key for key in records[0] if key not in ("prompt", "answer")]
    rows = []
    for record in records[:MOST_ANSWERS]:
        texts = [(str(record.get(model, ""))[:MOST_TEXT], None) for model in models]
        rows.append(
            {"prompt": str(record.get("prompt", ""))[:MOST_TEXT], "answer": record.get("answer"), "texts": texts}
        )
    return Answers(stage, models, rows)


def _json_lines(path: Path) -> list[dict]:
    """The readable lines of a file, up to as many as are shown twice over."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if len(records) >= 4 * MOST_ANSWERS:
                break
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            if isinstance(record, dict):
                records.append(record)
    return records


# ---- evaluation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A held-out number before and after a stage."""

    stage: str
    name: str
    before: float
    after: float
    interval: tuple[float, float] | None
    of: str
    """What the 95% interval is of: `after` or `change`."""


def changes(run: Run) -> list[Change]:
    """Every number that a stage measured before and after."""
    found = []
    for stage in run.stages.values():
        for key, before in stage.metrics.items():
            name = key.removesuffix("_before")
            after = stage.metrics.get(f"{name}_after")
            if key == name or not isinstance(before, (int, float)) or not isinstance(after, (int, float)):
                continue
            found.append(Change(stage.name, name, before, after, *_interval(stage, name, after)))
    return found


def _interval(stage: StageRun, name: str, after: float) -> tuple[tuple[float, float] | None, str]:
    """The interval that the stage recorded, or Wilson's for a share whose count it recorded."""
    metrics = stage.metrics
    if metrics.get(f"{name}_change_interval"):
        return tuple(metrics[f"{name}_change_interval"]), "change"
    if metrics.get(f"{name}_interval"):
        return tuple(metrics[f"{name}_interval"]), "after"
    half = metrics.get(f"{name}_half_after")
    if half is not None:
        return (after - half, after + half), "after"
    count = metrics.get(COUNTS.get(name.removeprefix("heldout_"), ""))
    if count and 0 <= after <= 1:
        return wilson(after, int(count)), "after"
    return None, ""


@dataclass(frozen=True)
class Assessment:
    """What a stage of kind assess measured."""

    stage: str
    metrics: list[str]
    models: dict[str, dict]
    win_rates: dict[str, dict]


def assessments(run: Run) -> list[Assessment]:
    """Tables of models, and win rates with their intervals."""
    found = []
    for stage in run.stages.values():
        models = stage.metrics.get("models")
        if stage.kind != "assess" or not isinstance(models, dict):
            continue
        metrics: list[str] = []
        for numbers in models.values():
            metrics += [key for key, value in numbers.items() if _is_number(value) and key not in metrics]
        found.append(Assessment(stage.name, metrics, models, stage.metrics.get("win_rates") or {}))
    return found


@dataclass(frozen=True)
class Share:
    """A number of models with an interval: a metric of a task, or another figure of stage assess."""

    stage: str
    name: str
    count: int | None
    """Questions, or what else was asked; of the first model that has it."""
    models: dict[str, dict]
    """Model -> value, low, high; the last two may be None."""

    @property
    def is_share(self) -> bool:
        """Whether all values are from 0 to 1, so that intervals can be drawn on that scale."""
        values = [number for entry in self.models.values() for number in entry.values() if number is not None]
        return all(0 <= number <= 1 for number in values)


def shares(run: Run) -> list[Share]:
    """The tasks of every stage assess and its other figures with intervals, each a row with all models."""
    found: dict[tuple[str, str], Share] = {}
    for stage in run.stages.values():
        models = stage.metrics.get("models")
        if stage.kind != "assess" or not isinstance(models, dict):
            continue
        for model, numbers in models.items():
            for name, count, entry in [*_task_numbers(numbers.get("tasks") or {}), *_rates(numbers, "")]:
                share = found.setdefault((stage.name, name), Share(stage.name, name, count, {}))
                share.models[model] = entry
    return list(found.values())


def _task_numbers(tasks: dict) -> list[tuple[str, int | None, dict]]:
    """(name, questions, value with interval) of each metric of each task."""
    rows = []
    for key, scores in tasks.items():
        for task, score in scores.items():
            label = key if len(scores) == 1 else f"{key}/{task}"
            examples = f", {score['few_shot']} examples" if score.get("few_shot") else ""
            for metric, entry in score.get("metrics", {}).items():
                interval = {name: entry.get(name) for name in ("value", "low", "high")}
                rows.append((f"{label} {metric}{examples}", score.get("questions"), interval))
    return rows


def _rates(block: dict, prefix: str) -> list[tuple[str, int | None, dict]]:
    """The figures {rate, low, high, n} within a block, by their path."""
    rows = []
    for key, value in block.items():
        if not isinstance(value, dict) or key == "tasks":
            continue
        name = f"{prefix}{key}"
        if {"rate", "low", "high", "n"} <= value.keys():
            rows.append((name, value["n"], {"value": value["rate"], "low": value["low"], "high": value["high"]}))
        rows += _rates(value, f"{name}.")
    return rows


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# ---- lineage, time and cost ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ancestor:
    """An input of a stage, as its record names it."""

    key: str
    stage: str
    fingerprint: str
    status: str
    """is_current, is_other or is_external."""


def ancestors(stage: StageRun, run: Run) -> list[Ancestor]:
    """The inputs of a stage, and whether they are still what the run has."""
    found = []
    for key, parent in stage.parents.items():
        name = str(parent.get("stage", ""))
        now = run.stages.get(name)
        status = "is_external"
        if is_internal(parent):
            same = now is not None and now.record.get("digest") == parent.get("digest")
            status = "is_current" if same else "is_other"
        found.append(Ancestor(key, name, str(parent.get("fingerprint", ""))[:12], status))
    return found


@dataclass(frozen=True)
class Cost:
    """What a stage took."""

    stage: str
    seconds: float
    processes: int
    flops: float | None
    memory_gb: float | None

    @property
    def process_hours(self) -> float:
        return self.seconds * self.processes / 3600


@dataclass
class Costs:
    """Of all stages, with what is assumed of a process."""

    stages: list[Cost]
    price: float | None
    """Per process hour."""
    watts: float | None
    """Per process."""
    hours: float = field(init=False)

    def __post_init__(self):
        self.hours = sum(cost.process_hours for cost in self.stages)

    def money(self, hours: float) -> float:
        return hours * self.price

    def kilowatt_hours(self, hours: float) -> float:
        return hours * self.watts / 1000


def costs(run: Run, memory: dict[str, float | None], price: float | None, watts: float | None) -> Costs:
    """memory: stage -> the largest logged peak_memory_gb."""
    found = []
    for stage in run.stages.values():
        if stage.seconds is not None:
            processes = int(stage.record.get("processes") or 1)
            flops = stage.metrics.get("flops")
            found.append(Cost(stage.name, float(stage.seconds), processes, flops, memory.get(stage.name)))
    return Costs(found, price, watts)


# ---- numbers for people ----------------------------------------------------------------------------------------------


def number(value) -> str:
    """At most five digits: 0.0123, 3.1416, 12,345, 1.2e-05."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def moment(text: str) -> str:
    """2026-11-30T06:32:29Z as 2026-11-30 06:32 UTC; other texts as they are."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, TypeError):
        return str(text or "")


def size_of(path: Path | None) -> str:
    """Bytes of all files below a folder."""
    if path is None:
        return ""
    return byte_size(sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()))
