"""One iteration's experience: sample with the policy, score with the reward model and the rule, measure each token with
policy, reference and value model.

Every process does its share; then all hold the whole batch, so that whitening, logging and the cut into minibatches see
the same samples whatever the number of processes. What travels is token ids and a few numbers a token.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.core.intervals import mean_half
from pipeline.core.seeds import derive
from pipeline.data.chat.template import Chat
from pipeline.rl import rules
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, ValueModel, at_responses, layout, policy_inputs, rows, token_statistics
from pipeline.rl.rollout import generate
from pipeline.train import distributed
from pipeline.train.engine import Engine
from pipeline.train.scores import reward_scores


@dataclass
class Models:
    """Who takes part. `policy` and `value` are trained; `reference` and `reward` are frozen, without gradients or
    optimizer."""

    policy: Engine
    value: Engine
    reference: torch.nn.Module
    reward: torch.nn.Module
    chat: Chat
    reward_chat: Chat | None
    """Set if the reward model has a tokenizer of its own: then it reads text, not the policy's ids."""
    config: object
    """The stage's Config."""

    @property
    def pad_id(self) -> int:
        return self.chat.tokenizer.pad_token_id

    @property
    def stop_ids(self) -> list[int]:
        return sorted({self.chat.end_id, self.chat.tokenizer.eos_token_id} - {None})

    def text(self, sample: Sample) -> str:
        return self.chat.tokenizer.decode(sample.response_ids, skip_special_tokens=True)


def share(items: list) -> list:
    """This process's part of a list that is equal on all."""
    size = -(-len(items) // distributed.world())
    return items[distributed.rank() * size : (distributed.rank() + 1) * size]


def collect(
    models: Models,
    tasks: list[Task],
    indices: list[int],
    seeds: list[int],
    *,
    temperature: float,
    clock,
    measure: str = "all",
) -> list[Sample]:
    """Samples of the whole list `tasks`, on every process. Collective.

    measure: "score" (reward and rule alone), "kl" (also the reference's log-probabilities of sampled tokens) or "all"
    (everything that an update needs). `clock(name)` is called after each phase.
    """
    tasks, indices, seeds = share(tasks), share(indices), share(seeds)
    config = models.config
    samples: list[Sample] = []
    with models.policy.gathered():
        made = generate(
            models.policy.model,
            [task.ids for task in tasks],
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=temperature,
            stop_ids=models.stop_ids,
            pad_id=models.pad_id,
            seeds=seeds,
            batch=config.rollout.batch,
        )
        for task, index, completion in zip(tasks, indices, made, strict=True):
            samples.append(Sample(index, task.ids, completion.ids, completion.stopped, completion.logprobs))
        clock("rollout")
        if measure == "all":
            for sample, (logprobs, entropies) in zip(
                samples, _logprobs(models, models.policy.model, samples), strict=True
            ):
                sample.logprobs, sample.entropies = logprobs, entropies
    if measure != "score":
        for sample, (logprobs, _) in zip(samples, _logprobs(models, models.reference, samples), strict=True):
            sample.ref_logprobs = logprobs
    if measure == "all":
        with models.value.gathered():
            for sample, values in zip(samples, _values(models, models.value.model, samples), strict=True):
                sample.values = values
    clock("measure")
    for sample, task, value in zip(samples, tasks, score(models, samples, tasks), strict=True):
        sample.score = value
        if config.rule is not None:
            sample.rule = rules.score(config.rule, models.text(sample), task.answer)
    clock("score")
    return distributed.all_gather(samples)


def score(models: Models, samples: list[Sample], tasks: list[Task]) -> list[float]:
    """The reward model's score at the last token of each response, as published (calibrated by the reward stage on
    its own answers)."""
    rows = [_row(models, sample, task) for sample, task in zip(samples, tasks, strict=True)]
    with _autocast(models):
        return reward_scores(models.reward, rows, models.config.rollout.batch).tolist() if rows else []


def _row(models: Models, sample: Sample, task: Task) -> list[int]:
    """What the reward model reads: the policy's own ids, or the same conversation in its own tokens. A response that
    was cut off stays open."""
    chat = models.reward_chat
    if chat is None:
        return sample.prompt_ids + sample.response_ids
    return chat.answered(task.messages, models.text(sample), sample.stopped)


def _logprobs(models: Models, model, samples: list[Sample]) -> list[tuple[list[float], list[float]]]:
    def read(batch):
        logits = model(**policy_inputs(model, batch)).logits
        return token_statistics(logits, batch["responses"], models.config.rollout.temperature)

    return _forward(models, model, samples, read)


def _values(models: Models, model: ValueModel, samples: list[Sample]) -> list[list[float]]:
    def read(batch):
        return (at_responses(model(**batch["inputs"]).logits[..., 0], batch["responses"].shape[1]),)

    return [row for (row,) in _forward(models, model, samples, read)]


@torch.no_grad()
def _forward(models: Models, model, samples: list[Sample], read: Callable) -> list[tuple[list[float], ...]]:
    """For each sample the numbers at its response's tokens, of each tensor [B, R] that `read(batch)` gives; in
    batches, without gradient."""
    device = next(model.parameters()).device
    model.eval()
    found = []
    for start in range(0, len(samples), models.config.rollout.batch):
        part = samples[start : start + models.config.rollout.batch]
        batch = layout(part, models.pad_id, device)
        with _autocast(models):
            tensors = read(batch)
        lists = [tensor.float().tolist() for tensor in tensors]
        for row, sample in enumerate(part):
            found.append(tuple(values[row][: len(sample.response_ids)] for values in lists))
    return found


def _autocast(models: Models):
    """As the engine does it, so that the first ratio of an iteration is 1."""
    return torch.autocast(models.policy.device.type, dtype=torch.bfloat16, enabled=models.config.precision == "bf16")


def tensors_of(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What was measured, as [B, longest] float tensors with `mask`; zero after each response."""
    names = ("sampled_logprobs", "logprobs", "ref_logprobs", "entropies", "values")
    made = {name: rows([getattr(sample, name) for sample in samples], 0.0) for name in names}
    return {**made, "mask": rows([[1.0] * len(sample.response_ids) for sample in samples], 0.0)}


def evaluate(models: Models, heldout: list[Task]) -> tuple[dict, list[dict]]:
    """Held-out prompts answered with fixed seeds, at the rollout's temperature and greedily: means, and rows for
    samples.jsonl. Collective."""
    config = models.config
    tasks = heldout[: config.evaluate_prompts]
    indices, seeds = (
        list(range(len(tasks))),
        [derive(config.seed or 0, "evaluate", index) for index in range(len(tasks))],
    )
    sampled = collect(
        models, tasks, indices, seeds, temperature=config.rollout.temperature, clock=lambda _: None, measure="kl"
    )
    greedy = collect(models, tasks, indices, seeds, temperature=0.0, clock=lambda _: None, measure="score")

    def mean(values) -> float:
        values = list(values)
        return math.fsum(values) / len(values)

    numbers = {
        "reward": mean(sample.score for sample in sampled),
        "reward_greedy": mean(sample.score for sample in greedy),
        "kl": mean(math.fsum(sample.sampled_logprobs) - math.fsum(sample.ref_logprobs) for sample in sampled),
        "eos_rate": mean(sample.stopped for sample in sampled),
        "length": mean(len(sample.response_ids) for sample in sampled),
        "repetition": mean(repetition(sample.response_ids) for sample in sampled),
    }
    if len(sampled) > 1:  # half of the reward's 95% interval
        numbers["reward_half"] = mean_half([sample.score for sample in sampled])
    if config.rule:
        numbers |= {
            "rule": mean(sample.rule for sample in sampled),
            "rule_greedy": mean(sample.rule for sample in greedy),
        }
    rows = []
    for task, one, best in list(zip(tasks, sampled, greedy, strict=True))[: config.show]:
        sampled_row = {"sampled": models.text(one), "sampled_reward": round(one.score, 4)}
        rows.append(
            {
                "prompt": task.text,
                "answer": task.answer,
                **sampled_row,
                "greedy": models.text(best),
                "greedy_reward": round(best.score, 4),
            }
        )
    return numbers, rows


def repetition(ids: list[int]) -> float:
    """Share of a response's trigrams that stand in it more than once before: 0 without repetition, near 1 for a
    loop."""
    trigrams = [tuple(ids[start : start + 3]) for start in range(len(ids) - 2)]
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


def draw(seed: int, index: int, count: int) -> int:
    """Which of `count` prompts sample `index` of the run answers: each once a pass, every pass in an order of its
    own. A pure function, so there is no cursor to save."""
    return _order(seed, index // count, count)[index % count]


@functools.lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng(derive(seed, "prompts", epoch)).permutation(count).tolist()
