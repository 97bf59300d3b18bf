"""Measure models on the same held-out text and prompts: bits per byte and perplexity, win rates under the reward model,
rule scores, samples; on tasks of lm-eval; and speed, memory, memorised text and refusals.

    python pipeline/assess.py recipes/quickstart.yaml

A win rate compares two models' answers to the same held-out prompts: the answer with the higher reward wins, equal
rewards count half. The interval is a percentile bootstrap over prompts (Efron & Tibshirani, 1993, ch. 13). A reward
model should not be the only judge of what was trained against it, so the task's own rule is scored as well wherever a
prompt has an `answer`. A reward model with another tokenizer or chat template than a model's reads the answers as text.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.assessment import task_files
from pipeline.assessment.judge import Client, Judge, judge_pair
from pipeline.assessment.probes_config import Memorised, Refusals, Speed
from pipeline.assessment.refusals import requests_of
from pipeline.assessment.task_files import Task
from pipeline.core import faults, optional_packages
from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, ExternalFiles, Name, PlannedInput, SourceBlock, StageConfig, refuse_unused
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import plural
from pipeline.core.tracking import Progress
from pipeline.data.chat.chat_sources import PromptSource
from pipeline.data.chat.record_checks import check_chat_records
from pipeline.train import planned_model
from pipeline.train.config import Date

# 2: ends of answers from generation_config.json, rewards of models with other tokenizers, only prompts that fit
VERSION = 5  # 5: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"tokens": ("pack",), "reward?": ("reward",), "*": ("pretrain", "sft", "dpo", "kto", "ppo", "grpo", "soup")}


class Config(StageConfig):
    """What to measure; all models are measured on the same rows and prompts."""

    KEPT = "models and tasks that were measured are kept, the current one starts over"

    sequence_length: int | None = Field(None, ge=8)
    """Tokens of one row of held-out text; none: 1024, or fewer if a model has fewer positions."""
    max_rows: int = Field(256, ge=0)
    """Rows of held-out text, evenly from its sources; 0: none, and no packed tokens are needed."""
    sources: dict[str, PromptSource] = {}
    """Prompts, with `answer` where a rule can check it."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that no finetuning stage was trained on; must be the same as in these stages."""
    date: Date = None
    """Today's date for chat templates that write it, as YYYY-MM-DD; use the one of the finetuning stages."""
    max_prompts: int = Field(200, ge=1)
    """Held-out prompts answered by each model."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of an answer."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy answers; above: sampled, with one seed per prompt that all models share."""
    rule: Literal["exact", "contains", "prefix"] = "contains"
    """How an answer is checked against `answer`."""
    compare: list[tuple[str, str]] = []
    """Pairs of inputs [a, b]: how often a's answer has the higher reward, or is preferred by `judge`."""
    judge: Judge | None = None
    """A language model that judges the pairs of `compare`, by an API like OpenAI's."""
    tasks: dict[Name, Task] = {}
    """Tasks of lm-eval that every model is asked, by names of your choice."""
    speed: Speed | None = None
    """Speed of generation and peak of memory of each model; none: not measured."""
    memorised: Memorised | None = None
    """Training text that a model writes out word for word, and personal data in what it writes; none: not measured."""
    refusals: Refusals | None = None
    """Requests that a chat model refuses, harmful and harmless ones; none: not measured."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples for each 95% interval of `compare`, and for standard errors in `tasks` that have no formula."""
    samples: int = Field(8, ge=0)
    """Greedy answers of each model that are written to samples.jsonl."""
    batch: Annotated[int, EXECUTION] = Field(32, ge=1)
    """Rows in memory at a time."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.compare and not self.sources:
            raise ValueError("compare needs prompts: give `sources`")
        models = set(self.inputs) - {"tokens", "reward"}
        unknown = {name for pair in self.compare for name in pair} - models
        if models and unknown:
            raise ValueError(f"compare: {min(unknown)!r} is not a model input; these are: {', '.join(sorted(models))}")
        if self.compare and not self.judge and "reward" not in self.inputs:
            raise ValueError("compare needs a judge: give `inputs: {reward: STAGE}`, or `judge`")
        if self.judge and not self.compare:
            raise ValueError("judge: judges the pairs of `compare`, and there are none; give `compare`")
        if not self.sources:
            for key in ("holdout", "max_prompts", "max_new_tokens", "temperature", "rule", "samples"):
                refuse_unused(self, key, "is about prompts, and there are no `sources`")
        elif all(source.answer is None for source in self.sources.values()):
            refuse_unused(self, "rule", "decides how answers are compared with `answer`, and no source has one")
        if not self.compare and not self.tasks:
            refuse_unused(self, "bootstrap", "is for the intervals of comparisons, and `compare` is empty")
        if not self.max_rows and not self.sources and not self.tasks and not self.has_probes:
            raise ValueError(
                "max_rows: 0 leaves nothing to measure without prompts; give `sources`, `tasks`, `memorised`,"
                " `refusals` or `speed`"
            )
        return self

    @property
    def has_probes(self) -> bool:
        """Whether something is measured by having the models write (probes.py)."""
        return bool(self.speed or self.memorised or self.refusals)

    @classmethod
    def uses_device(cls) -> bool:
        return True

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        return [
            SourceBlock("sources", lambda config: config.sources),
            ExternalFiles("tasks", lambda config: task_files.all_files(config.tasks), drop_key=False),
            ExternalFiles("refusals.file", _requests_file, entry="@refusals"),
        ]

    def check(self, world: int) -> None:
        if world == 1:
            super().check(world)
        elif not self.tasks or self.sources or self.max_rows or self.has_probes:
            raise UserError(
                f"stage {self.kind}: {world} processes share the requests of `tasks`, and nothing else: give tasks a"
                " stage of their own, without sources, memorised, refusals and speed and with max_rows: 0, or launch"
                " one process"
            )

    def check_machine(self) -> None:
        super().check_machine()
        if self.judge:
            self.judge.check_machine()
        if self.tasks:
            optional_packages.require("lm_eval", f"stage {self.kind}: tasks", "remove `tasks`")

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        planned_model.check_files({key: model for key, model in inputs.items() if key != "tokens"})
        if self.sequence_length and self.max_rows and "tokens" in inputs:
            models = [model for key, model in inputs.items() if key not in ("tokens", "reward")]
            planned_model.check_positions(models, self.sequence_length)

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        task_files.check(self.tasks)
        if self.refusals and (self.refusals.file is None or self.refusals.file.is_file()):
            requests_of(self.refusals)
        check_chat_records(self.sources, self.holdout, chat=None, measures_only=True)

    def optional(self) -> set[str]:
        if self.memorised:
            return set()
        return {"tokens"} if self.sources or self.tasks or self.has_probes else set()


def _requests_file(config: Config) -> list[Path]:
    return [config.refusals.file] if config.refusals and config.refusals.file else []


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.assessment.inputs import candidate, held_out_prompts, held_out_rows
    from pipeline.assessment.measures import measure, win_rate
    from pipeline.assessment.probes import prepare
    from pipeline.core import distributed
    from pipeline.data.chat.template import Chat
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.train.finetune_data import model_folder

    distributed.choose_device(config, distributed.local_world())
    distributed.setup()
    models = {name: artifact for name, artifact in inputs.items() if name not in ("tokens", "reward")}
    for pair in config.compare:
        for name in pair:
            if name not in models:
                raise UserError(f"assess.compare: {name!r} is not a model input; these are: {', '.join(models)}")
    candidates = [candidate(name, artifact, config) for name, artifact in models.items()]
    judge = None
    if "reward" in inputs and config.sources:
        judge = Chat(load_tokenizer(model_folder(inputs["reward"])), trained=False, date=config.date)
    rows = None
    if "tokens" in inputs and config.max_rows:
        rows = held_out_rows(config, inputs["tokens"], candidates)
    prompts, unusable = held_out_prompts(config, candidates, judge)
    probes = prepare(config, inputs.get("tokens"), candidates)

    client = Client(config.judge) if config.judge else None
    if client:
        client.check()
    task_results: dict[str, dict] = {}
    if config.tasks:
        from pipeline.assessment.task_results import check_tasks, measure_tasks, write_tasks

        check_tasks(config, candidates)
        task_results = measure_tasks(config, candidates, output)
        if not distributed.is_main():
            return {}
    # Each model is a unit of work: a killed run loses only the model that it was measuring.
    results: dict[str, dict] = {}
    measured = candidates if rows is not None or prompts or config.has_probes else []
    with Progress("assess", len(measured), "models") as bar:
        for model in measured:
            file = output.path / "work" / f"{model.name}.json"
            if not file.exists():
                result = measure(model, rows, prompts, config, judge, inputs.get("reward"), probes)
                faults.point("save")
                write_json(file, result)
                output.note_time()
                faults.point("work")
            results[model.name] = json.loads(file.read_text(encoding="utf-8"))
            bar.update(1, model=model.name)

    report = {name: _figures(results.get(name, {}), bool(prompts)) for name in models}
    if config.tasks:
        write_tasks(config, task_results, report, output)
    wins = {}
    for ours, theirs in config.compare:
        if judge is not None:
            rewards = (results[ours]["rewards"], results[theirs]["rewards"])
            wins[f"{ours} over {theirs}"] = win_rate(*rewards, config, f"{ours}/{theirs}")
        if client:
            by_judge = judge_pair(config, client, prompts, results, ours, theirs, output)
            wins[f"{ours} over {theirs}, by {config.judge.model}"] = by_judge
    counts = {"prompts": len(prompts), "unusable_prompts": unusable}
    write_json(output.path / "report.json", {"models": report, "win_rates": wins} | counts)
    samples = _samples(prompts[: config.samples], results)
    if measured:
        write_atomic(output.path / "samples.jsonl", "".join(line + "\n" for line in samples))
    for name in [model.name for model in measured] if config.refusals else []:
        lines = [json.dumps(answer, ensure_ascii=False) for answer in results[name]["refusal_answers"]]
        write_atomic(output.path / "refusals" / f"{name}.jsonl", "".join(line + "\n" for line in lines))
    asked, written = plural(len(prompts), "prompt"), plural(len(samples), "sample")
    if config.tasks:
        asked, written = f"{asked}, {plural(len(config.tasks), 'task')}", f"tasks.md, {written}"
    return {
        "models": report,
        "win_rates": wins,
        "summary": {
            "input": f"{plural(len(models), 'model')}, {asked}",
            "output": f"report.json, {written}",
            "measure": "; ".join(headline(wins, report, task_results)),
        },
    }


# Lists of a model's unit of work, which are in files of their own or in summaries.
UNREPORTED = ("texts", "rewards", "rules", "refusal_answers")


def _figures(result: dict, has_prompts: bool) -> dict:
    figures = {key: value for key, value in result.items() if key not in UNREPORTED}
    if has_prompts:
        figures["answers"] = len(result["texts"])
        figures["answers_with_rule"] = len(result["rules"])
    return figures


def _samples(prompts: list, results: dict[str, dict]) -> list[str]:
    """Lines of samples.jsonl: a prompt and the answers of all models."""
    lines = []
    for number, prompt in enumerate(prompts):
        sample = {"prompt": prompt.text, "answer": prompt.answer}
        for name, result in results.items():
            sample[name] = result["texts"][number]
        lines.append(json.dumps(sample, ensure_ascii=False))
    return lines


def headline(wins: dict, report: dict, tasks: dict) -> list[str]:
    """For the closing table: win rates, or else scores of tasks, or a measure of each model, with the size of its
    sample."""
    if tasks and not wins:
        from pipeline.assessment.task_results import headlines

        return headlines(tasks)
    if wins:
        return [f"{pair}: {win['rate']:.0%} [{win['low']:.0%}, {win['high']:.0%}]" for pair, win in wins.items()]
    from pipeline.assessment.probes import headline as probe_headline

    parts = []
    for name, result in report.items():
        if "bits_per_byte" in result:
            parts.append(f"{name} {result['bits_per_byte']:.2f} bpb ({result['heldout_tokens']:,} tokens)")
        elif "reward" in result:
            parts.append(f"{name} reward {result['reward']:.2f} (n={result['answers']})")
        elif "rule" in result:
            parts.append(f"{name} right {result['rule']:.0%} (n={result['answers_with_rule']})")
        elif "answer_tokens" in result:
            parts.append(f"{name} {result['answer_tokens']:.0f} tokens per answer (n={result['answers']})")
        else:
            parts += filter(None, [probe_headline(name, result)])
    return parts


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("assess")
