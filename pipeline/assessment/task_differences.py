"""Differences of scores on the same questions: one model asked in several ways (with and without examples, in its chat
template), and the pairs of `compare`. Each question is compared with itself, which is sharper than two intervals."""

from itertools import combinations

from pipeline.assessment.task_files import file_of
from pipeline.core.intervals import mean_change


def differences(config, samples: dict[str, dict[str, list[dict]]]) -> list[dict]:
    """Rows with what was compared, the metric, the difference (second minus first) and its 95% bootstrap interval over
    questions. samples: model -> key of `tasks` -> its questions (harness.run_task)."""
    rows = []
    for model, by_key in samples.items():
        for first, second in combinations(by_key, 2):
            if _asks(config, first) == _asks(config, second):
                subject = {"model": model, "first": first, "second": second}
                rows += _compared(by_key[first], by_key[second], subject)
    for ours, theirs in config.compare:
        for key in samples[ours]:
            subject = {"task": key, "first": theirs, "second": ours}
            rows += _compared(samples[theirs][key], samples[ours][key], subject)
    return rows


def _asks(config, key: str) -> str:
    """What identifies the questions of an entry of `tasks`."""
    task = config.tasks[key]
    return str(file_of(key, task) or task.name(key))


def _compared(first: list[dict], second: list[dict], subject: dict) -> list[dict]:
    """A row for each metric, over the questions that both have."""
    before, after = ({_place(sample): sample["scores"] for sample in samples} for samples in (first, second))
    values: dict[str, tuple[list, list]] = {}
    for place, scores in before.items():
        for metric in scores.keys() & after.get(place, {}).keys():
            name, _, kind = place
            label = metric if kind == "none" else f"{metric} ({kind})"
            columns = values.setdefault(f"{name} {label}", ([], []))
            columns[0].append((scores[metric], 1))
            columns[1].append((after[place][metric], 1))
    rows = []
    for label, (old, new) in sorted(values.items()):
        if len(old) < 2:
            continue
        low, high = mean_change(old, new)
        change = sum(value for value, _ in new) / len(new) - sum(value for value, _ in old) / len(old)
        rows.append({**subject, "metric": label, "difference": change, "low": low, "high": high, "questions": len(old)})
    return rows


def _place(sample: dict) -> tuple[str, int, str]:
    """Task, question and filter of a line."""
    return sample["task"], sample["doc"], sample["filter"]


def table(rows: list[dict]) -> str:
    """Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [
        "",
        "Differences on the same questions, second minus first, with 95% intervals:",
        "",
        "| of | first | second | metric | difference | questions |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        of = row.get("model") or row["task"]
        change = f"{row['difference']:+.4g} [{row['low']:+.3g}, {row['high']:+.3g}]"
        lines.append(f"| {of} | {row['first']} | {row['second']} | {row['metric']} | {change} | {row['questions']} |")
    return "\n".join([*lines, ""])
