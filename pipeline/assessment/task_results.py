"""All tasks of stage assess on all of its models: one unit of work for each task of each model, and what is published:
tasks.json, tasks.md, what was asked and answered, and a model card for each model."""

import json
from pathlib import Path

from pipeline.assessment import task_differences
from pipeline.assessment.harness import check_template, load_task, open_model, run_task
from pipeline.assessment.inputs import Candidate
from pipeline.core import faults
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import say

MOST_NAMED = 3  # scores in the closing table


def check_tasks(config, candidates: list[Candidate]) -> None:
    """Load every task and its data once, before a model is measured. Raises UserError for the first that cannot be, or
    that a model cannot be asked."""
    for key, task in config.tasks.items():
        load_task(key, task)
        for candidate in candidates:
            check_template(key, task, candidate)


def measure_tasks(config, candidates: list[Candidate], output: Output) -> dict[str, dict]:
    """Model -> key of `tasks` -> its scores; on the main process. A killed run loses only the task that it was
    asking. Collective."""
    from pipeline.core import distributed

    for candidate in candidates:
        missing = [key for key in config.tasks if not _unit(output, candidate.name, key).exists()]
        model = None
        for key in distributed.from_main(missing):
            model = model or open_model(candidate, config.batch)
            scores, samples = run_task(model, key, config.tasks[key], config.bootstrap)
            if distributed.is_main():
                faults.point("task")
                write_json(_unit(output, candidate.name, key), {"result": scores, "samples": samples})
                output.note_time()
                faults.point("task")
                say(f"assess: {candidate.name}, {'; '.join(_texts(key, scores))}")
    results: dict[str, dict] = {}
    if distributed.is_main():
        for candidate in candidates:
            results[candidate.name] = {key: _read(output, candidate.name, key)["result"] for key in config.tasks}
    return results


def _unit(output: Output, model: str, key: str) -> Path:
    return output.path / "work" / "tasks" / model / f"{key}.json"


def _read(output: Output, model: str, key: str) -> dict:
    return json.loads(_unit(output, model, key).read_text(encoding="utf-8"))


# ---- what is published -----------------------------------------------------------------------------------------------


def write_tasks(config, results: dict[str, dict], report: dict[str, dict], output: Output) -> None:
    """Write the scores, add them to the report of each model, and write what was asked and answered and the cards."""
    asked: dict[str, dict[str, list]] = {}
    for model, tasks in results.items():
        asked[model] = {key: _read(output, model, key)["samples"] for key in tasks}
        report[model]["tasks"] = {key: entry["scores"] for key, entry in tasks.items()}
        report[model].update(_main_scores(tasks))
        for key in tasks:
            lines = [json.dumps(sample, ensure_ascii=False) for sample in asked[model][key]]
            write_atomic(output.path / "tasks" / model / f"{key}.jsonl", "".join(line + "\n" for line in lines))
        write_atomic(output.path / "cards" / f"{model}.md", card(model, tasks, config))
    changes = task_differences.differences(config, asked)
    write_json(output.path / "tasks.json", {"models": results, "differences": changes, "lm_eval": _version()})
    write_atomic(output.path / "tasks.md", table(results, config) + task_differences.table(changes))


def _main_scores(tasks: dict) -> dict[str, float]:
    """The first metric of each task, for tables with one number for each."""
    found = {}
    for key, entry in tasks.items():
        for name, score in entry["scores"].items():
            for metric, numbers in list(score["metrics"].items())[:1]:
                label = key if len(entry["scores"]) == 1 else f"{key} {name}"
                found[f"{label} {metric}"] = numbers["value"]
    return found


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def rows(results: dict[str, dict]) -> list[tuple[str, str, str, dict, dict]]:
    """(model, task, metric, numbers, score) of every number."""
    found = []
    for model, tasks in results.items():
        for key, entry in tasks.items():
            for name, score in entry["scores"].items():
                label = key if len(entry["scores"]) == 1 else f"{key}/{name}"
                for metric, numbers in score["metrics"].items():
                    found.append((model, label, metric, numbers, score))
    return found


def table(results: dict[str, dict], config) -> str:
    """Markdown: a row for each task and metric, a column for each model."""
    models = list(results)
    cells: dict[tuple[str, str], dict[str, str]] = {}
    asked: dict[tuple[str, str], tuple] = {}
    for model, task, metric, numbers, score in rows(results):
        cells.setdefault((task, metric), {})[model] = interval_text(numbers)
        asked[task, metric] = (score["questions"], score["few_shot"])
    lines = [
        f"| task | metric | questions | examples | {' | '.join(models)} |",
        f"|---|---|---|---|{'---|' * len(models)}",
    ]
    for (task, metric), by_model in cells.items():
        questions, few_shot = asked[task, metric]
        chat = ", chat" if config.tasks[task.partition("/")[0]].chat_template else ""
        values = " | ".join(by_model.get(model, "") for model in models)
        lines.append(f"| {task} | {metric} | {questions} | {few_shot or 0}{chat} | {values} |")
    intervals = "95% intervals in brackets: Wilson's for shares of questions, else 1.96 standard errors by lm-eval"
    return "\n".join([*lines, "", f"{intervals} {_version()}.", ""])


def interval_text(numbers: dict) -> str:
    """0.250 [0.170, 0.350]"""
    value = f"{numbers['value']:.4g}"
    if numbers["low"] is None:
        return value
    low, high = round(numbers["low"], 9), round(numbers["high"], 9)  # Wilson's for 0 is 0 up to rounding errors
    return f"{value} [{low:.3g}, {high:.3g}]"


def card(model: str, tasks: dict, config) -> str:
    """A model card with the scores in the form that model hubs read (model-index)."""
    from huggingface_hub import EvalResult, ModelCardData

    scores = []
    for _, task, metric, numbers, score in rows({model: tasks}):
        options = {"num_few_shot": score["few_shot"] or 0, "questions": score["questions"]}
        scores.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=task,
                dataset_name=task,
                dataset_args=options,
                metric_type=metric,
                metric_value=round(numbers["value"], 6),
            )
        )
    data = ModelCardData(model_name=model, tags=["alma"], library_name="transformers", eval_results=scores)
    lines = ["---", data.to_yaml(), "---", "", f"# {model}", "", table({model: tasks}, config)]
    return "\n".join(lines)


def headlines(results: dict[str, dict]) -> list[str]:
    """For the closing table: the first metric of the first tasks of each model."""
    parts = []
    for model, tasks in results.items():
        texts = [text for key, entry in tasks.items() for text in _texts(key, entry)[:1]]
        more = len(texts) - MOST_NAMED
        parts.append(f"{model} {', '.join(texts[:MOST_NAMED])}{f' and {more} more' if more > 0 else ''}")
    return parts


def _texts(key: str, entry: dict) -> list[str]:
    """`gsm8k_sample exact_match 0.02 [0.00551, 0.07] (n=100)`, for each metric."""
    found = []
    for _, task, metric, numbers, score in rows({"": {key: entry}}):
        found.append(f"{task} {metric} {interval_text(numbers)} (n={score['questions']})")
    return found
