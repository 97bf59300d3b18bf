"""Measure models side by side: bits per byte and perplexity on held-out text, win rates under the reward model, rule
scores, samples.

    python pipeline/assess.py recipes/quickstart.yaml

A win rate compares two models' answers to the same held-out prompts: the answer with the higher reward wins, equal
rewards count half. The interval is a percentile bootstrap over prompts (Efron & Tibshirani, 1993, ch. 13). A reward
model may not be the only judge of what was trained against it, so the task's own rule is scored beside it wherever a
prompt has an `answer`.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline import faults
from pipeline.artifact import Artifact
from pipeline.data.tuning_sources import PromptSource
from pipeline.errors import UserError
from pipeline.files import write_atomic, write_json
from pipeline.output import Output
from pipeline.plural import many
from pipeline.recipe import EXECUTION, StageConfig
from pipeline.seeds import derive
from pipeline.tracking import Progress

VERSION = 1
INPUTS = {"tokens": ("pack",), "reward?": ("reward",), "*": ("pretrain", "sft", "dpo", "ppo")}


class Config(StageConfig):
    """What to measure; every model input is measured on the same rows and prompts."""

    sequence_length: int = Field(ge=8)
    """Tokens of one row of held-out text."""
    max_rows: int = Field(256, ge=1)
    """Rows of held-out text, spread evenly over it."""
    sources: dict[str, PromptSource] = {}
    """Prompts, with `answer` where a rule can check one."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that no tuning stage was trained on; must be what these stages say."""
    max_prompts: int = Field(200, ge=1)
    """Held-out prompts answered by each model."""
    max_new_tokens: int = Field(64, ge=1)
    """Limit of an answer."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy answers; above: sampled, with a seed for each prompt that all models share."""
    rule: Literal["exact", "contains", "prefix"] = "contains"
    """How an answer is checked against `answer`."""
    compare: list[tuple[str, str]] = []
    """Pairs of inputs [a, b]: how often a's answer has the higher reward."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples behind each 95% interval."""
    samples: int = Field(8, ge=0)
    """Greedy answers of each model that are written to samples.jsonl."""
    batch: Annotated[int, EXECUTION] = Field(32, ge=1)
    """Rows in memory at a time."""

    @model_validator(mode="after")
    def whole(self):
        if self.compare and not self.sources:
            raise ValueError("compare needs prompts: give `sources`")
        named = set(self.inputs) - {"tokens", "reward"}
        unknown = [name for pair in self.compare for name in pair if named and name not in named]
        if unknown:
            raise ValueError(f"compare: {unknown[0]!r} is no model input; there is {', '.join(sorted(named))}")
        if self.compare and "reward" not in self.inputs:
            raise ValueError("compare needs a judge: give `inputs: {reward: STAGE}`")
        return self


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.train import distributed

    distributed.setup()
    models = {name: found for name, found in inputs.items() if name not in ("tokens", "reward")}
    for pair in config.compare:
        for name in pair:
            if name not in models:
                raise UserError(f"assess.compare: {name!r} is no model input; there is {', '.join(models)}")
    prompts = held_out_prompts(config)

    # A unit of work is one model: a killed run loses at most the model it was at.
    results = {}
    work = output.path / "work"
    with Progress("assess", len(models), "models") as bar:
        for name, found in models.items():
            kept = work / f"{name}.json"
            if not kept.exists():
                result = measure(found.path, prompts, config, inputs)
                faults.point("save")
                write_json(kept, result)
                output.note_time()
                faults.point("work")
            results[name] = json.loads(kept.read_text(encoding="utf-8"))
            bar.update(1, model=name)

    report = {
        name: {key: value for key, value in result.items() if key not in ("answers", "rewards", "rules")}
        for name, result in results.items()
    }
    wins = {
        f"{a} over {b}": win_rate(results[a]["rewards"], results[b]["rewards"], config, f"{a}/{b}")
        for a, b in config.compare
    }
    write_json(output.path / "report.json", {"models": report, "win_rates": wins, "prompts": len(prompts)})
    lines = []
    for row, prompt in enumerate(prompts[: config.samples]):
        lines.append(
            json.dumps(
                {
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    **{name: result["answers"][row] for name, result in results.items()},
                },
                ensure_ascii=False,
            )
        )
    write_atomic(output.path / "samples.jsonl", "".join(line + "\n" for line in lines))
    return {
        "models": report,
        "win_rates": wins,
        "summary": {
            "input": f"{many(len(models), 'model')}, {many(len(prompts), 'prompt')}",
            "output": f"report.json, {many(len(lines), 'sample')}",
            "measure": (
                "; ".join(
                    f"{pair}: {win['rate']:.0%} [{win['low']:.0%}, {win['high']:.0%}]" for pair, win in wins.items()
                )
                or "; ".join(f"{name} {result['bits_per_byte']:.2f} bpb" for name, result in report.items())
            ),
        },
    }


def held_out_prompts(config: Config) -> list:
    """The prompts that every model answers: the first `max_prompts` of the held-out ones in an order drawn from the
    seed."""
    if not config.sources:
        return []
    from pipeline.data.conversations import load_prompts

    _, heldout, _ = load_prompts(config.sources, config.holdout)
    return sorted(heldout, key=lambda prompt: derive(config.seed, "assess", prompt.id))[: config.max_prompts]


def measure(path: Path, prompts: list, config: Config, inputs: dict[str, Artifact]) -> dict:
    """Everything that is known of one model by itself: held-out text, answers, their rewards and rule scores."""
    import torch

    from pipeline.data.conversations import prompt_ids
    from pipeline.data.tokens import load_tokenizer
    from pipeline.models.build import load
    from pipeline.rl.rollout import generate
    from pipeline.rl.rules import score
    from pipeline.train.distributed import device

    folder = path / "model" if (path / "model").exists() else path
    model = load(folder).to(device()).eval()
    tokenizer = load_tokenizer(folder)
    result = text_loss(model, config, inputs["tokens"])
    if not prompts:
        return {**result, "answers": [], "rewards": [], "rules": []}
    ids = [prompt_ids(tokenizer, prompt.text) for prompt in prompts]
    stop = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    completions = generate(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=stop,
        pad_id=tokenizer.pad_token_id,
        seeds=[derive(config.seed, "answer", prompt.id) for prompt in prompts],
        batch=config.batch,
    )
    answers = [tokenizer.decode(completion.ids, skip_special_tokens=True).strip() for completion in completions]
    rules = [
        score(config.rule, answer, prompt.answer)
        for answer, prompt in zip(answers, prompts, strict=True)
        if prompt.answer is not None
    ]
    result |= {
        "end_of_turn_rate": sum(completion.stopped for completion in completions) / len(completions),
        "answer_tokens": sum(len(c.ids) for c in completions) / len(completions),
    }
    rewards = []
    if "reward" in inputs:
        from pipeline.train.scores import reward_scores

        judge = load(inputs["reward"].path / "model", head="reward").to(device()).eval()
        with torch.no_grad():
            for start in range(0, len(ids), config.batch):
                rows = [
                    prompt + completion.ids
                    for prompt, completion in zip(
                        ids[start : start + config.batch], completions[start : start + config.batch], strict=True
                    )
                ]
                rewards += reward_scores(judge, rows).tolist()
        result["reward"] = sum(rewards) / len(rewards)
    if rules:
        result["rule"] = sum(rules) / len(rules)
    return {**result, "answers": answers, "rewards": rewards, "rules": rules}


def text_loss(model, config: Config, tokens: Artifact) -> dict:
    """Bits per byte (nats / ln 2 / bytes of text) and perplexity (per token) on fixed held-out rows."""
    import torch

    from pipeline.data.sampler import heldout_rows
    from pipeline.train.distributed import device
    from pipeline.train.loss import cross_entropy_sum

    rows = heldout_rows(tokens.path, config.sequence_length, config.max_rows)
    nats, count, size = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(rows), config.batch):
            chunk = rows[start : start + config.batch]
            ids = torch.tensor([row.tokens.tolist() for row in chunk], device=device())
            nats += cross_entropy_sum(model(input_ids=ids[:, :-1]).logits, ids[:, 1:]).item()
            count += ids[:, 1:].numel()
            size += sum(row.bytes for row in chunk)
    return {
        "bits_per_byte": nats / math.log(2) / size,
        "perplexity": math.exp(nats / count),
        "heldout_tokens": count,
        "heldout_bytes": size,
    }


def win_rate(ours: list[float], theirs: list[float], config: Config, name: str) -> dict:
    """Share of prompts on which ours has the higher reward, with a 95% percentile bootstrap interval over prompts."""
    import numpy as np

    outcome = np.array([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)])
    generator = np.random.default_rng(derive(config.seed, "bootstrap", name))
    means = outcome[generator.integers(len(outcome), size=(config.bootstrap, len(outcome)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {
        "rate": float(outcome.mean()),
        "low": float(low),
        "high": float(high),
        "ties": float((outcome == 0.5).mean()),
        "prompts": len(outcome),
    }


if __name__ == "__main__":
    from pipeline.chain import main

    main("assess")
