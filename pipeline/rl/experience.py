"""One iteration's experience: sample with the policy, score with the reward model and the rule, measure each token with
policy, reference and value model.

Every process does its share. Afterwards all have the whole batch, so that whitening, logging and the cut into
minibatches use the same samples whatever the number of processes. Only token ids and a few numbers per token travel.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from pipeline.core import distributed
from pipeline.core.intervals import mean_half
from pipeline.core.seeds import derive
from pipeline.data.chat.template import Chat
from pipeline.models import lora
from pipeline.rl import rules, sampling, tools
from pipeline.rl.frozen_models import Frozen, complete
from pipeline.rl.objective import Objective
from pipeline.rl.process_reward import ProcessReward
from pipeline.rl.prompts import Task
from pipeline.rl.responses import (
    Sample,
    SharedReward,
    ValueModel,
    by_length,
    layout,
    places,
    predict,
    rows,
    token_statistics,
)
from pipeline.rl.reward_workers import RewardWorkers
from pipeline.rl.rollout import Completion
from pipeline.rl.scoring import add_scores, statistics
from pipeline.rl.server import RolloutServer
from pipeline.train.engine import Engine


@dataclass
class Models:
    """The models of a run. `policy` and `value` are trained; `reference` and `reward` are frozen, without gradients or
    optimizer."""

    policy: Engine
    value: Engine | None
    """None for algorithms without a value model."""
    reference: Frozen | None
    """None: the policy without its adapter, or no reference is needed (`measures_kl` of the config)."""
    reward: Frozen | None
    """A model of its own, or the backbone of the value model without its adapter (SharedReward). None: the rewards are
    functions."""
    chat: Chat
    reward_chat: Chat | None
    """Set if the reward model has a tokenizer of its own: then it reads text, not the policy's ids."""
    config: object
    """The stage's Config."""
    objective: Objective
    """The algorithm."""
    workers: RewardWorkers
    """Of rewards that are functions."""
    server: RolloutServer | None = None
    """What samples, if the policy itself does not."""
    num_updates: int = 0
    """Updates of the policy so far."""
    process: ProcessReward | None = None
    """None: no reward is that of a process reward model."""

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[torch.nn.Module]:
        """The reference. Collective."""
        if self.reference is not None:
            with complete(self.reference) as reference:
                yield reference
            return
        with self.policy.gathered(), lora.disabled(self.policy.model):
            yield self.policy.model

    @contextlib.contextmanager
    def as_reward(self) -> Iterator[torch.nn.Module]:
        """The reward model. Collective."""
        if not isinstance(self.reward, SharedReward):
            with complete(self.reward) as reward:
                yield reward
            return
        with self.value.gathered(), self.reward.inside(self.value.model.classifier) as reward:
            yield reward

    def autocast(self):
        """As the engine does it, so that the first ratio of an iteration is 1."""
        return torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    @property
    def pad_id(self) -> int:
        return self.chat.tokenizer.pad_token_id

    @property
    def stop_ids(self) -> list[int]:
        return sorted({*self.chat.end_ids, self.chat.tokenizer.eos_token_id} - {None})

    def close(self) -> None:
        """End all processes."""
        self.workers.close()
        if self.server is not None and distributed.is_main():
            self.server.close()

    def text(self, sample: Sample) -> str:
        """The answer: with tools, what follows the last result of one."""
        return self.chat.tokenizer.decode(sample.last_turn, skip_special_tokens=True)


class Clock:
    """Seconds of an iteration's parts, by name."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The part `name` has just ended."""
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"] = round(now - self._last, 4)
        self._last = now


def share(items: list) -> list:
    """This process's part of a list that is equal on all."""
    size = -(-len(items) // distributed.world())
    return items[distributed.rank() * size : (distributed.rank() + 1) * size]


@dataclass(frozen=True)
class Sampled:
    """Responses that were sampled before their iteration, over all processes."""

    completions: list[Completion]
    num_updates: int
    """Updates that the policy had had."""


def collect(
    models: Models,
    tasks: list[Task],
    indices: list[int],
    seeds: list[int],
    *,
    temperature: float,
    clock: Clock | None = None,
    measure: Literal["score", "kl", "all"] = "all",
    sampled: Sampled | None = None,
) -> list[Sample]:
    """Samples of the whole list `tasks`, on every process. Collective.

    measure: "score" (only reward and rule), "kl" (also the reference's log-probabilities of sampled tokens) or "all"
    (everything that an update needs). sampled: the responses, if they have been sampled already.
    """
    clock = clock or Clock()
    tasks, indices, seeds = share(tasks), share(indices), share(seeds)
    config = models.config
    samples: list[Sample] = []
    with models.policy.gathered():
        if sampled is None:
            num_updates = models.num_updates
            completions = sampling.sample(models, [task.ids for task in tasks], seeds, temperature=temperature)
        else:
            num_updates, completions = sampled.num_updates, share(sampled.completions)
        for task, index, completion in zip(tasks, indices, completions, strict=True):
            ids, logprobs, stopped = completion.ids, completion.logprobs, completion.stopped
            samples.append(Sample(index, task.ids, ids, stopped, logprobs, num_updates))
        if config.tools:
            tools.use(models, samples, tasks, seeds, sampling.own_sampler(models, temperature))
        clock.lap("rollout")
        if measure == "all" and config.measures_policy():
            measured = _logprobs(models, models.policy.model, samples)
            for sample, (logprobs, entropies) in zip(samples, measured, strict=True):
                sample.logprobs, sample.entropies = logprobs, entropies
    if measure != "score" and config.measures_kl():
        with models.as_reference() as reference:
            measured = _logprobs(models, reference, samples)
        for sample, (logprobs, _) in zip(samples, measured, strict=True):
            sample.ref_logprobs = logprobs
    if measure == "all" and models.value is not None:
        with models.value.gathered():
            measured = _values(models, models.value.model, samples)
        for sample, values in zip(samples, measured, strict=True):
            sample.values = values
    clock.lap("measure")
    add_scores(models, samples, tasks)
    for sample, task in zip(samples, tasks, strict=True):
        if config.rule is not None:
            sample.rule = rules.score(config.rule, models.text(sample), task.answer)
    clock.lap("score")
    return distributed.all_gather_lists(samples)


def _logprobs(models: Models, model, samples: list[Sample]) -> list[tuple[list[float], list[float]]]:
    """(log-probability, entropy) at each response token of each sample."""

    def read(batch):
        return token_statistics(predict(model, batch), batch["labels"], models.config.rollout.temperature)

    return _forward(models, model, samples, read)


def _values(models: Models, model: ValueModel, samples: list[Sample]) -> list[list[float]]:
    """The value at each response token of each sample."""

    def read(batch):
        return (model(**batch["inputs"]).logits[..., 0],)

    return [values for (values,) in _forward(models, model, samples, read)]


@torch.no_grad()
def _forward(
    models: Models, model, samples: list[Sample], read: Callable[[dict], tuple[torch.Tensor, ...]]
) -> list[tuple[list[float], ...]]:
    """For each sample, the numbers at its response's tokens, of each tensor [B, T] that read(batch) returns; in
    batches, without gradient."""
    device = next(model.parameters()).device
    model.eval()
    results: list[tuple[list[float], ...]] = [()] * len(samples)
    order = by_length(list(range(len(samples))), samples)
    for start in range(0, len(order), models.config.rollout.batch):
        part = order[start : start + models.config.rollout.batch]
        batch = layout([samples[index] for index in part], models.pad_id, device)
        with models.autocast():
            tensors = read(batch)
        lists = [tensor.float().tolist() for tensor in tensors]
        for row, index in enumerate(part):
            own = places(samples[index])
            results[index] = tuple([values[row][place] for place in own] for values in lists)
    return results


def tensors_of(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """What was measured, as [B, longest] float tensors, and `mask`; zero after each response."""
    tensors = {}
    for name in ("sampled_logprobs", "logprobs", "ref_logprobs", "entropies", "values"):
        values = [getattr(sample, name) for sample in samples]
        if values[0]:  # a response has a token, so an empty list was not measured
            tensors[name] = rows(values, 0.0)
    tensors["mask"] = rows([[1.0] * len(sample.response_ids) for sample in samples], 0.0)
    return tensors


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(models: Models, heldout: list[Task]) -> tuple[dict, list[dict]]:
    """Held-out prompts answered with fixed seeds, at the rollout's temperature and greedily: means, and rows for
    samples.jsonl. Collective."""
    config = models.config
    tasks = heldout[: config.evaluate_prompts]
    indices = list(range(len(tasks)))
    seeds = [derive(config.seed or 0, "evaluate", index) for index in indices]
    sampled = collect(models, tasks, indices, seeds, temperature=config.rollout.temperature, measure="kl")
    greedy = collect(models, tasks, indices, seeds, temperature=0.0, measure="score")

    numbers = {
        "reward": _mean(sample.score for sample in sampled),
        "reward_greedy": _mean(sample.score for sample in greedy),
        "eos_rate": _mean(sample.stopped for sample in sampled),
        "length": _mean(len(sample.response_ids) for sample in sampled),
        "repetition": _mean(repetition(sample.response_ids) for sample in sampled),
    }
    numbers |= statistics(config, sampled) | tools.statistics(config, sampled)
    if config.measures_kl():
        divergences = [math.fsum(sample.sampled_logprobs) - math.fsum(sample.ref_logprobs) for sample in sampled]
        numbers["kl"] = _mean(divergences)
    if len(sampled) > 1:  # half of the reward's 95% interval
        numbers["reward_half"] = mean_half([sample.score for sample in sampled])
    if config.rule:
        numbers["rule"] = _mean(sample.rule for sample in sampled)
        numbers["rule_greedy"] = _mean(sample.rule for sample in greedy)
    answered = list(zip(tasks, sampled, greedy, strict=True))
    return numbers, [_shown(models, *answers) for answers in answered[: config.show]]


def _shown(models: Models, task: Task, sampled: Sample, greedy: Sample) -> dict:
    """A row of samples.jsonl."""
    row = {
        "prompt": task.text,
        "answer": task.answer,
        "sampled": models.text(sampled),
        "sampled_reward": round(sampled.score, 4),
        "greedy": models.text(greedy),
        "greedy_reward": round(greedy.score, 4),
    }
    if sampled.calls or greedy.calls:
        row["sampled_calls"] = [asdict(call) for call in sampled.calls]
        row["greedy_calls"] = [asdict(call) for call in greedy.calls]
    if sampled.rewards:
        row["sampled_rewards"] = sampled.rewards
        row["greedy_rewards"] = greedy.rewards
    return row


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def repetition(ids: list[int]) -> float:
    """Share of a response's trigrams that are repetitions of an earlier one: 0 without repetition, near 1 for a
    loop."""
    trigrams = [tuple(ids[start : start + 3]) for start in range(len(ids) - 2)]
    if not trigrams:
        return 0.0
    return 1 - len(set(trigrams)) / len(trigrams)


# ---- which prompts ---------------------------------------------------------------------------------------------------


def draw(seed: int, index: int, count: int) -> int:
    """Which of `count` prompts sample `index` of the run answers: each once per pass, every pass in an order of its
    own. A pure function, so there is no cursor to save."""
    return _order(seed, index // count, count)[index % count]


@functools.lru_cache(2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return np.random.default_rng(derive(seed, "prompts", epoch)).permutation(count).tolist()
