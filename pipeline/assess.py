"""Measure models side by side: bits per byte and perplexity on held-out text, win rates under the reward model, rule
scores, samples.

    python pipeline/assess.py recipes/quickstart.yaml

A win rate compares two models' answers to the same held-out prompts: the answer with the higher reward wins, equal
rewards count half. The interval is a percentile bootstrap over prompts (Efron & Tibshirani, 1993, ch. 13). A reward
model may not be the only judge of what was trained against it, so the task's own rule is scored beside it wherever a
prompt has an `answer`. A reward model with another tokenizer or chat template than a model's reads the answers as text.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import EXECUTION, PlannedInput, SourceBlock, StageConfig, idle
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.seeds import derive
from pipeline.core.terminal import many
from pipeline.core.tracking import Progress
from pipeline.data.chat.chat_sources import PromptSource
from pipeline.data.chat.record_checks import check_chat_records
from pipeline.train import planned_model
from pipeline.train.config import Date

VERSION = 2  # 2: ends of answers as generation_config.json says, rewards of foreign tokenizers, prompts that fit
INPUTS = {"tokens": ("pack",), "reward?": ("reward",), "*": ("pretrain", "sft", "dpo", "ppo")}


class Config(StageConfig):
    """What to measure; every model input is measured on the same rows and prompts."""

    KEPT = "models that were measured are kept, the one in work starts over"

    sequence_length: int | None = Field(None, ge=8)
    """Tokens of one row of held-out text; none: 1024, or as many as every model has positions for."""
    max_rows: int = Field(256, ge=0)
    """Rows of held-out text, spread evenly over it; 0: none, and no packed tokens are needed."""
    sources: dict[str, PromptSource] = {}
    """Prompts, with `answer` where a rule can check one."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts that no tuning stage was trained on; must be what these stages say."""
    date: Date = None
    """What a chat template writes that asks for today's date, as YYYY-MM-DD; give what the tuning stages have."""
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
        if not self.sources:
            for key in ("holdout", "max_prompts", "max_new_tokens", "temperature", "rule", "samples"):
                idle(self, key, "is of prompts, and there are no `sources`")
        elif all(source.answer is None for source in self.sources.values()):
            idle(self, "rule", "says how answers are compared with `answer`, and no source has one")
        if not self.compare:
            idle(self, "bootstrap", "is of the intervals of comparisons, and `compare` names none")
        if not self.max_rows and not self.sources:
            raise ValueError("max_rows: 0 leaves nothing to measure without prompts; give `sources`")
        return self

    @classmethod
    def uses_device(cls) -> bool:
        return True

    @classmethod
    def external(cls) -> list[SourceBlock]:
        return [SourceBlock("sources", lambda config: config.sources)]

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        if self.sequence_length and self.max_rows and "tokens" in inputs:
            models = [model for key, model in inputs.items() if key not in ("tokens", "reward")]
            planned_model.check_positions(models, self.sequence_length)

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        check_chat_records(self.sources, self.holdout, chat=None, measures_only=True)

    def optional(self) -> set[str]:
        return {"tokens"} if self.sources else set()


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.data.chat.template import Chat
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.train import distributed
    from pipeline.train.finetune_data import model_folder

    distributed.choose_device(config, 1)
    distributed.setup()
    models = {name: found for name, found in inputs.items() if name not in ("tokens", "reward")}
    for pair in config.compare:
        for name in pair:
            if name not in models:
                raise UserError(f"assess.compare: {name!r} is no model input; there is {', '.join(models)}")
    subjects = {name: Subject.of(name, found, config) for name, found in models.items()}
    judge = None
    if "reward" in inputs and config.sources:
        judge = Chat(load_tokenizer(model_folder(inputs["reward"])), trained=False, date=config.date)
    rows = None
    if "tokens" in inputs and config.max_rows:
        rows = held_out_rows(config, inputs["tokens"], list(subjects.values()))
    prompts, unusable = held_out_prompts(config, list(subjects.values()), judge)

    # A unit of work is one model: a killed run loses at most the model it was at.
    results = {}
    work = output.path / "work"
    with Progress("assess", len(models), "models") as bar:
        for name, subject in subjects.items():
            kept = work / f"{name}.json"
            if not kept.exists():
                result = measure(subject, rows, prompts, config, judge, inputs)
                faults.point("save")
                write_json(kept, result)
                output.note_time()
                faults.point("work")
            results[name] = json.loads(kept.read_text(encoding="utf-8"))
            bar.update(1, model=name)

    report = {
        name: {key: value for key, value in result.items() if key not in ("texts", "rewards", "rules")}
        | ({"answers": len(result["texts"]), "answers_with_rule": len(result["rules"])} if prompts else {})
        for name, result in results.items()
    }
    wins = {
        f"{a} over {b}": win_rate(results[a]["rewards"], results[b]["rewards"], config, f"{a}/{b}")
        for a, b in config.compare
    }
    counts = {"prompts": len(prompts), "unusable_prompts": unusable}
    write_json(output.path / "report.json", {"models": report, "win_rates": wins, **counts})
    lines = []
    for row, prompt in enumerate(prompts[: config.samples]):
        lines.append(
            json.dumps(
                {
                    "prompt": prompt.text,
                    "answer": prompt.answer,
                    **{name: result["texts"][row] for name, result in results.items()},
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
            "measure": "; ".join(headline(wins, report)),
        },
    }


def headline(wins: dict, report: dict) -> list[str]:
    """The closing table's parts: win rates, or else what is known of each model, with the size of its sample."""
    if wins:
        return [f"{pair}: {win['rate']:.0%} [{win['low']:.0%}, {win['high']:.0%}]" for pair, win in wins.items()]
    parts = []
    for name, result in report.items():
        if "bits_per_byte" in result:
            parts.append(f"{name} {result['bits_per_byte']:.2f} bpb ({result['heldout_tokens']:,} tokens)")
        elif "reward" in result:
            parts.append(f"{name} reward {result['reward']:.2f} (n={result['answers']})")
        elif "rule" in result:
            parts.append(f"{name} right {result['rule']:.0%} (n={result['answers_with_rule']})")
        else:
            parts.append(f"{name} {result['answer_tokens']:.0f} tokens an answer (n={result['answers']})")
    return parts


@dataclass(frozen=True)
class Subject:
    """A model to measure, before its weights are read."""

    name: str
    folder: Path
    tokenizer: object
    chat: object | None
    """How it is asked (data/chat.py); none without prompts."""
    vocabulary: int
    positions: int | None
    """Most tokens of a row; none: any number."""

    @classmethod
    def of(cls, name: str, found: Artifact, config: Config) -> "Subject":
        from transformers import AutoConfig

        from pipeline.data.chat.template import Chat
        from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer, use_known_padding
        from pipeline.models.families import positions
        from pipeline.train.finetune_data import model_folder

        folder = model_folder(found)
        if not (folder / "config.json").is_file():
            raise UserError(f"inputs.{name}: {folder} holds no model (no config.json)")
        tokenizer = load_tokenizer(folder)
        made = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        use_known_padding(tokenizer, made.vocab_size)
        chat = Chat(tokenizer, trained=False, date=config.date) if config.sources else None
        return cls(name, folder, tokenizer, chat, made.vocab_size, positions(made))


def held_out_rows(config: Config, tokens: Artifact, subjects: list[Subject]) -> list:
    """Fixed rows of held-out text. Raises UserError for a model that reads these tokens as other text, or that has no
    positions for a row."""
    from pipeline.data.tokens.heldout_rows import heldout_rows
    from pipeline.data.tokens.store import TokenStore

    store = TokenStore(tokens.path, "heldout")
    packed_with = tokenizer_of_pack(tokens)
    for subject in subjects:
        if wrong := foreign(store, packed_with, subject):
            raise UserError(
                f"inputs.tokens: {tokens.path} was packed with another tokenizer than that of {subject.name}: {wrong};"
                f" the model would be measured on other text. Measure {subject.name} in a stage of its own, with text"
                " packed by its tokenizer, or leave held-out text out (max_rows: 0)"
            )
        if config.sequence_length and subject.positions and config.sequence_length > subject.positions:
            raise UserError(
                f"sequence_length: {config.sequence_length} is more than the {subject.positions} positions of"
                f" {subject.name}; use {subject.positions} or fewer"
            )
    length = config.sequence_length or min([1024, *(subject.positions or 1024 for subject in subjects)])
    return heldout_rows(tokens.path, length, config.max_rows)


def tokenizer_of_pack(tokens: Artifact):
    """The tokenizer that packed these tokens, if its folder is still where it was, else None."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

    parent = tokens.manifest.get("parents", {}).get("tokenizer")
    folder = (tokens.path.parent / parent["path"]).resolve() if parent else None
    return load_tokenizer(folder) if folder and (folder / "tokenizer.json").is_file() else None


def foreign(store, packed_with, subject: Subject) -> str | None:
    """Why packed tokens stand for other text to this model, or None. A model may know more tokens than the text was
    packed with."""
    import numpy as np

    from pipeline.data.tokenizer.fast_tokenizer import token_bytes

    if subject.vocabulary < store.vocab_size:
        return f"they have {store.vocab_size} ids, the model has {subject.vocabulary}"
    if packed_with is not None:
        known = subject.tokenizer.get_vocab()
        for token, index in sorted(packed_with.get_vocab().items(), key=lambda entry: entry[1]):
            if known.get(token) != index:
                return f"{token!r} has the id {index} in one and {known.get(token)} in the other"
        return None
    sizes = token_bytes(subject.tokenizer)[: store.vocab_size]
    if len(sizes) < store.vocab_size:
        return f"they have {store.vocab_size} ids, its tokenizer has {len(sizes)}"
    differing = np.flatnonzero(sizes != store.token_bytes)
    if len(differing):
        index = int(differing[0])
        return f"id {index} stands for {store.token_bytes[index]} bytes in one and {sizes[index]} in the other"
    return None


def held_out_prompts(config: Config, subjects: list[Subject], judge) -> tuple[list, dict[str, int]]:
    """(the prompts that every model answers, how many could not be asked by reason): the first `max_prompts` of the
    held-out ones in an order drawn from the seed, without those that the template of a model or of the judge cannot
    write or that leave no room for an answer."""
    if not config.sources:
        return [], {}
    from pipeline.core.terminal import say
    from pipeline.data.chat.conversations import load_prompts
    from pipeline.data.chat.record_accounting import NOTABLE

    _, heldout, ledger = load_prompts(config.sources, config.holdout)
    ledger.judge(max_bad=1.0)  # nothing is learned here: what is left out is said, and ends nothing
    chosen: list = []
    reasons: dict[str, int] = {}
    for prompt in sorted(heldout, key=lambda prompt: derive(config.seed, "assess", prompt.id)):
        if len(chosen) == config.max_prompts:
            break
        reason = _unusable(prompt, config, subjects, judge)
        if reason is None:
            chosen.append(prompt)
        else:
            reasons[reason] = reasons.get(reason, 0) + 1
    if not chosen:
        raise UserError(
            f"stage {config.kind}: none of {len(heldout)} held-out prompts can be asked: {'; '.join(sorted(reasons))}"
        )
    for reason, count in reasons.items():
        if count > NOTABLE * (len(chosen) + sum(reasons.values())):
            say(
                f"WARNING {config.kind}: {many(count, 'held-out prompt')} of {len(chosen) + sum(reasons.values())} left"
                f" out: {reason}; the figures are of the other {len(chosen)}"
            )
    return chosen, reasons


def _unusable(prompt, config: Config, subjects: list[Subject], judge) -> str | None:
    for subject in subjects:
        try:
            size = len(subject.chat.prompt(prompt.messages)) + config.max_new_tokens
        except ValueError as error:
            return f"{subject.name}: {error}"
        if subject.positions and size > subject.positions:
            return f"{subject.name}: longer with its answer than the model's {subject.positions} positions"
    try:
        if judge is not None:
            judge.prompt(prompt.messages)
    except ValueError as error:
        return f"reward: {error}"
    return None


def measure(
    subject: Subject, rows: list | None, prompts: list, config: Config, judge, inputs: dict[str, Artifact]
) -> dict:
    """Everything that is known of one model by itself: held-out text, answers, their rewards and rule scores."""
    from pipeline.models.build import load
    from pipeline.models.publish import stop_ids
    from pipeline.rl.rollout import generate
    from pipeline.rl.rules import score
    from pipeline.train.distributed import device

    model = load(subject.folder).to(device()).eval()
    result = {} if rows is None else text_loss(model, rows, config)
    if not prompts:
        return {**result, "texts": [], "rewards": [], "rules": []}
    tokenizer = subject.tokenizer
    ids = [subject.chat.prompt(prompt.messages) for prompt in prompts]
    stops = stop_ids(subject.folder, tokenizer)
    completions = generate(
        model,
        ids,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=stops,
        pad_id=tokenizer.pad_token_id,
        seeds=[derive(config.seed, "answer", prompt.id) for prompt in prompts],
        batch=config.batch,
    )
    said = [completion.ids[: len(completion.ids) - completion.stopped] for completion in completions]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in said]
    rules = [
        score(config.rule, text.strip(), prompt.answer)
        for text, prompt in zip(texts, prompts, strict=True)
        if prompt.answer is not None
    ]
    # a model that names no end of an answer always writes as much as it may
    ended = sum(completion.stopped for completion in completions) / len(completions) if stops else None
    result |= {"end_of_turn_rate": ended, "answer_tokens": sum(len(c.ids) for c in completions) / len(completions)}
    rewards = []
    if judge is not None:
        read = [prompt + completion.ids for prompt, completion in zip(ids, completions, strict=True)]
        if not judge.reads_like(subject.chat):
            read = [
                judge.answered(prompt.messages, text, completion.stopped)
                for prompt, text, completion in zip(prompts, texts, completions, strict=True)
            ]
        rewards = judged(read, inputs["reward"], judge, config)
        result["reward"] = sum(rewards) / len(rewards)
    if rules:
        result["rule"] = sum(rules) / len(rules)
    return {**result, "texts": [text.strip() for text in texts], "rewards": rewards, "rules": rules}


def judged(rows: list[list[int]], found: Artifact, judge, config: Config) -> list[float]:
    """The reward model's score of each row of its own tokens. Raises UserError for rows that it has no positions
    for."""
    from pipeline.models.build import load
    from pipeline.models.families import positions
    from pipeline.train.distributed import device
    from pipeline.train.finetune_data import model_folder
    from pipeline.train.scores import reward_scores

    folder = model_folder(found)
    model = load(folder, head="judge").to(device()).eval()
    longest, most = max(len(row) for row in rows), positions(model.config)
    if most and longest > most:
        raise UserError(
            f"inputs.reward: an answer has {longest} tokens with its prompt, the reward model in {folder} has positions"
            f" for {most}; use a smaller max_new_tokens (now {config.max_new_tokens}), or shorter prompts"
        )
    return reward_scores(model, rows, config.batch).tolist()


def text_loss(model, rows: list, config: Config) -> dict:
    """Bits per byte (nats / ln 2 / bytes of text) and perplexity (per token) on fixed held-out rows."""
    import torch

    from pipeline.train.distributed import device
    from pipeline.train.loss import cross_entropy_sum

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
    from pipeline.core.stage import main

    main("assess")
