"""Responses of ppo and grpo token by token, from logs/rollouts.jsonl (rl/rollout_log.py): reward, value, KL and
advantage of each token, as numbers and as shades of the text."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.run_folder import Run

NUMBERS = ("reward", "value", "kl", "advantage", "logprob")
SHADED = ("reward", "value", "kl", "advantage")
MOST_RESPONSES = 4  # of an iteration
MOST_LINES = 1000  # of a file that are read
MOST_PROMPT = 400  # characters; the end of a prompt is what is answered


@dataclass(frozen=True)
class TokenNumbers:
    """One token of a response."""

    text: str
    numbers: dict[str, float | None]
    shades: dict[str, float]
    """From -1 to 1: the square root of a number's size in relation to the largest one that is shown, with its sign."""
    inserted: str
    """What a tool said before this token."""


@dataclass(frozen=True)
class Rollout:
    """One response."""

    step: int
    prompt: str
    score: float | None
    stopped: bool
    length: int
    tokens: list[TokenNumbers]


@dataclass(frozen=True)
class Rollouts:
    """Responses of one stage: of the first and the last iteration that was written."""

    stage: str
    names: list[str]
    """The numbers that its tokens have."""
    responses: list[Rollout]

    @property
    def shaded(self) -> list[str]:
        return [name for name in SHADED if name in self.names]


def rollouts(run: Run) -> list[Rollouts]:
    found = []
    for stage in run.stages.values():
        path = stage.path / "logs" / "rollouts.jsonl" if stage.path else None
        records = _records(path) if path and path.is_file() else []
        if records:
            found.append(_of_stage(stage.name, records))
    return found


def _records(path: Path) -> list[dict]:
    """The lines of a file that are complete: each has a step, tokens, and lists of numbers as long as these."""
    records = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for _, line in zip(range(MOST_LINES), lines, strict=False):
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a killed process
            if isinstance(record, dict) and isinstance(record.get("step"), int) and _texts(record.get("tokens")):
                records.append(record)
    return records


def _texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _of_stage(stage: str, records: list[dict]) -> Rollouts:
    steps = {min(record["step"] for record in records), max(record["step"] for record in records)}
    shown = []
    for step in sorted(steps):
        shown += [record for record in records if record["step"] == step][:MOST_RESPONSES]
    columns = [{name: _column(record, name) for name in NUMBERS if name in record} for record in shown]
    names = [name for name in NUMBERS if any(name in column for column in columns)]
    largest = {}
    for name in names:
        sizes = [abs(value) for column in columns for value in column.get(name, []) if value is not None]
        largest[name] = max(sizes, default=0.0)
    responses = [_rollout(record, column, largest) for record, column in zip(shown, columns, strict=True)]
    return Rollouts(stage, names, responses)


def _column(record: dict, name: str) -> list[float | None]:
    """A number of each token; None where there is none."""
    values = record[name] if isinstance(record[name], list) else []
    values = [value if _is_number(value) else None for value in values]
    return (values + [None] * len(record["tokens"]))[: len(record["tokens"])]


def _rollout(record: dict, columns: dict[str, list[float | None]], largest: dict[str, float]) -> Rollout:
    inserted = dict(_insertions(record.get("inserted")))
    tokens = []
    for place, text in enumerate(record["tokens"]):
        numbers = {name: column[place] for name, column in columns.items()}
        shades = {name: _shade(numbers.get(name), largest.get(name, 0.0)) for name in SHADED}
        tokens.append(TokenNumbers(text, numbers, shades, inserted.get(place, "")))
    score, length = record.get("score"), record.get("length")
    return Rollout(
        record["step"],
        str(record.get("prompt", ""))[-MOST_PROMPT:],
        score if _is_number(score) else None,
        record.get("stopped") is True,
        length if isinstance(length, int) else len(tokens),
        tokens,
    )


def _insertions(value) -> list[tuple[int, str]]:
    pairs = value if isinstance(value, list) else []
    return [
        (pair[0], str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2 and _is_number(pair[0])
    ]


def _shade(value: float | None, largest: float) -> float:
    if not value or not largest:
        return 0.0
    return round(math.copysign(math.sqrt(abs(value) / largest), value), 3)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
