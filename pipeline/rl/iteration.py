"""One iteration of an online algorithm: experience, advantages, updates of the policy and, in PPO, of the value model,
and what is logged of them. What differs by algorithm is an `Objective`.

`Iterations` is what the training loop (train/loop.py) drives, as it drives the engine updates of the other stages.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.core import distributed
from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.rl import ahead, rewards, sentinel, tools
from pipeline.rl.advantages import explained_variance
from pipeline.rl.config import MICRO_BATCH_TOKENS
from pipeline.rl.experience import Clock, Models, Sampled, collect, draw, repetition, share, tensors_of
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, by_length, layout, size_of, spread
from pipeline.rl.rollout_log import RolloutLog
from pipeline.rl.scoring import count_failures, failures_of, statistics
from pipeline.train import phases
from pipeline.train.engine import Accept

# Above this mean difference, in nats per token, sampler and trainer are so far apart that a user should know.
NOTABLE_DIFFERENCE = 0.1

# Scores of a group that differ by no more than this are equal.
EQUAL = 1e-6

# Names in the log, and the engine's names, of what is averaged over the updates of an iteration.
POLICY_MEANS = {
    "policy_loss": "loss",
    "grad_norm": "grad_norm",
    "ratio_mean": "ratio_mean",
    "ratio_square": "ratio_square",
    "approx_kl": "approx_kl",
    "clip_fraction": "clip_fraction",
    "dual_clip_fraction": "dual_clip_fraction",
    "skipped_fraction": "skipped_fraction",
    "entropy_update": "entropy_update",
    "kl_loss": "kl_loss",
    "rollout_difference": "rollout_difference",
}
VALUE_MEANS = {
    "value_loss": "loss",
    "value_grad_norm": "grad_norm",
    "value_clip_fraction": "value_clip_fraction",
    "value_mean": "value_mean",
}

# What the losses compare the two models with.
POLICY_SIGNALS = ("logprobs", "sampled_logprobs", "advantages", "importance", "ref_logprobs")
VALUE_SIGNALS = ("values", "returns")


class Iterations:
    """Steps for the training loop: one step is one iteration, from sampling to the last update.

    In checkpoints, its part of the loop's state is: step (iterations so far), kl_coef, calibration (mean and deviation
    of the reward, in PPO), skipped_updates (updates of policy or value model that were not applied), resampled (prompts
    that were drawn in addition to batch_size per step), reward_failures (failed calls by reward and kind),
    tool_failures (of tools), shown (rows of samples.jsonl), alarms and lr_scale (sentinel.py; the learning rates are
    multiplied by the second), scored_by (what the calibration was measured with), policy_updates (updates of the policy
    so far) and ahead (responses for the next iteration, ahead.py).
    """

    atomic = False  # when an update is refused, earlier updates of the same step have been applied

    def __init__(self, models: Models, pool: list[Task], rollouts: RolloutLog | None = None):
        self.models, self.pool, self.rollouts = models, pool, rollouts
        self.engines = [models.policy] if models.value is None else [models.policy, models.value]
        self.state: dict = {}
        self.accepted: list[tuple[float, float]] = []
        self.verdict: tuple[str, str] | None = None

    @property
    def step_count(self) -> int:
        return self.state.get("step", 0)

    def load(self, path: Path) -> str:
        if self.models.server is not None:
            self.models.server.num_updates = None
        changes = self.models.policy.load(path)
        if self.models.value is not None:
            self.models.value.load(path)
        return changes

    def begin(self, state: dict, run: str) -> None:
        """Use the loop's state from now on; a new run measures the reward's mean and deviation under the initial
        policy. A fork takes from its recipe what alarms or kl_target may have changed in the run before; if its rewards
        are others, calibration and first evaluation are repeated with the policy that it starts from."""
        self.state = state
        scored_by = self.models.config.scored_by()
        if state.get("run") != run:
            for key in ("kl_coef", "lr_scale", "alarms", "ahead"):
                state.pop(key, None)
            if state.get("scored_by") != scored_by:
                state.pop("calibration", None)
                state["before"] = None
        state["scored_by"] = scored_by
        state.setdefault("step", 0)
        state.setdefault("kl_coef", self.models.config.updates.kl_coef)
        state.setdefault("skipped_updates", state["skipped"])  # its name in older checkpoints
        state.setdefault("shown", {})
        if self.rollouts is not None:
            self.rollouts.rewind(state["step"])
        self.models.num_updates = state.setdefault("policy_updates", 0)
        if self.models.value is None:
            return
        if state.get("calibration") is None:
            # While it is measured, rewards and values have the units of the reward model.
            state["calibration"] = (0.0, 1.0)
            if self.models.config.ppo.calibrate:
                state["calibration"] = self._calibration()
        self.models.value.model.set_units(*state["calibration"])

    def _calibration(self) -> tuple[float, float]:
        config = self.models.config
        indices = list(range(config.ppo.calibrate))
        tasks = [self.pool[draw(config.seed or 0, index, len(self.pool))] for index in indices]
        seeds = [derive(config.seed or 0, "calibrate", index) for index in indices]
        temperature = config.rollout.temperature
        samples = collect(self.models, tasks, indices, seeds, temperature=temperature, measure="score")
        return rewards.calibration([sample.score for sample in samples])

    def step(self, batch: int, lr: float, accept: Accept | None) -> dict:
        """One iteration over the prompts of global batch `batch`. `accept` is called before each update of the policy.
        lr: of the policy; the value model's has the same schedule and its own peak."""
        lr *= self.state.get("lr_scale", 1.0)
        stats = iterate(self.models, self.pool, self.state, lr, batch, accept, self.rollouts)
        self.accepted = stats.pop("accepted")
        self.state["step"] += 1
        self.verdict = sentinel.judge(self.models.config, self.state, stats)
        is_notable = stats["rollout_difference"] > NOTABLE_DIFFERENCE and not self.models.config.rollout.ahead
        if is_notable and distributed.is_main():
            show(
                f"{self.models.config.kind}: step {self.step_count}: log-probabilities of sampler and trainer differ by"
                f" {stats['rollout_difference']:.2g} per token; give importance_cap, or precision: fp32"
            )
        return stats

    def uncount_step(self) -> None:
        raise AssertionError("an iteration cannot be taken back: part of it may have been applied")

    def applied_updates(self, stats: dict) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update of the policy that was applied in the last iteration; of an iteration of
        the value model alone, its means. An iteration whose responses are all too old says nothing of the policy."""
        if self.accepted or stats.get("stale_fraction") == 1:
            return self.accepted
        return [(stats["loss"], stats["grad_norm"])]

    def carry(self, before: dict, state: dict) -> None:
        sentinel.carry(before, state)
        if state["before"] is None:  # the checkpoint is that of the run which was forked
            for key in ("before", "before_rows"):
                state[key] = before[key]
            state["shown"]["before"] = before["shown"]["before"]

    def alarm(self) -> tuple[str, str] | None:
        return self.verdict

    def progress_numbers(self, stats: dict) -> dict | None:
        return {name: stats[name] for name in ("reward", "kl") if name in stats}

    def objective(self, evaluation: dict) -> float | None:
        """save.keep_best keeps the highest held-out reward."""
        return -evaluation["reward"]


def iterate(
    models: Models,
    pool: list[Task],
    state: dict,
    lr: float,
    batch_number: int | None = None,
    accept: Accept | None = None,
    rollouts: RolloutLog | None = None,
) -> dict:
    """One iteration: experience, advantages, updates. Changes the models and, in `state`, kl_coef and skipped_updates.

    lr: of the policy. batch_number: which batch of the data its prompts are; by default that of the step. Returns what
    is logged, and `accepted`: loss and gradient norm of each applied update of the policy.
    """
    config, objective = models.config, models.objective
    phases.enter("rollout")
    begun, clock = time.perf_counter(), Clock()
    number = state["step"] if batch_number is None else batch_number
    samples, drawn = _samples(models, pool, number, state, clock)
    tokens = tensors_of(samples)
    count_failures(config, drawn, state)
    tools.count_failures(config, drawn, state)
    scores = objective.scores(config, samples, state)
    signal = objective.signal(config, tokens, scores, state["kl_coef"])
    if rollouts is not None:
        rollouts.write(state["step"] + 1, models.chat, samples, tokens, signal)
    staleness = _staleness(models, samples) if config.rollout.ahead else {}
    following = _start_following(models, pool, number + 1, state)
    if following is not None:
        clock.lap("ahead")
    updates = _update(models, samples, signal, state, lr, accept)
    state["policy_updates"] = models.num_updates = models.num_updates + len(updates["accepted"])
    clock.lap("update")
    if following is not None:
        ahead.keep(following, state)
        clock.lap("wait")

    stats = _statistics(config, samples, tokens, scores, signal, state["kl_coef"])
    stats |= updates | staleness
    if config.fallible_rewards():
        stats |= failures_of(config, drawn) | {"reward_calls": len(drawn)}
    if not config.measures_policy():  # the update's forward pass is that of the policy that sampled
        stats["entropy"] = stats["entropy_update"]
    if models.server is not None:
        stats |= models.server.numbers()
    stats |= clock.seconds
    stats["tok_per_second"] = round(stats["weight"] / (time.perf_counter() - begun), 1)
    objective.after(config, stats.get("kl"), state)
    return stats


def _samples(
    models: Models, pool: list[Task], batch_number: int, state: dict, clock: Clock
) -> tuple[list[Sample], list[Sample]]:
    """(the samples of an iteration, those of a prompt next to each other; all that were drawn for it).

    With rounds of resampling, groups whose scores are all equal are replaced by groups of further prompts, and come
    last; if they are needed after the last round, they complete the batch (DAPO, section 3.2: dynamic sampling).
    """
    config = models.config
    first = _first_prompt(config, batch_number, state)
    samples = _answers(models, pool, first, config.batch_size, clock, ahead.take(state, first))
    if not config.resample_rounds():
        return samples, samples
    drawn, num_drawn = list(samples), config.batch_size
    telling, equal = _by_spread(models, samples, state)
    for _ in range(config.resample_rounds()):
        missing = config.batch_size - len(telling)
        if not missing:
            break
        further = _answers(models, pool, first + num_drawn, missing, clock)
        num_drawn += missing
        drawn += further
        more, without = _by_spread(models, further, state)
        telling, equal = telling + more, equal + without
    state["resampled"] = state.get("resampled", 0) + num_drawn - config.batch_size
    groups = (telling + equal)[: config.batch_size]
    return [sample for group in groups for sample in group], drawn


def _first_prompt(config, batch_number: int, state: dict) -> int:
    """Number in the run of the first prompt of a batch of the data."""
    return batch_number * config.batch_size + state.get("resampled", 0)


def _requests(models: Models, pool: list[Task], first: int, count: int) -> tuple[list[Task], list[int], list[int]]:
    """(task, number in the run, seed) of each response to prompts `first` to `first + count` of the run."""
    config = models.config
    each = config.responses_per_prompt()
    indices = list(range(first * each, (first + count) * each))
    tasks = [pool[draw(config.seed or 0, index // each, len(pool))] for index in indices]
    return tasks, indices, [derive(config.seed or 0, "rollout", index) for index in indices]


def _answers(
    models: Models, pool: list[Task], first: int, count: int, clock: Clock, sampled: Sampled | None = None
) -> list[Sample]:
    """Samples for prompts `first` to `first + count` of the run. sampled: their responses, if there are already."""
    temperature = models.config.rollout.temperature
    tasks, indices, seeds = _requests(models, pool, first, count)
    return collect(models, tasks, indices, seeds, temperature=temperature, clock=clock, sampled=sampled)


def _start_following(models: Models, pool: list[Task], batch_number: int, state: dict) -> ahead.Following | None:
    """Begin to sample for the next batch of the data; None if that is not asked for, or this iteration is the last."""
    config = models.config
    if not config.rollout.ahead or state["step"] + 1 == config.steps:
        return None
    first = _first_prompt(config, batch_number, state)
    tasks, _, seeds = _requests(models, pool, first, config.batch_size)
    return ahead.start(models, [task.ids for task in tasks], seeds, first)


def _is_fresh(models: Models, sample: Sample) -> bool:
    """Whether a sample is young enough for the policy to learn from it."""
    limit = models.config.rollout.max_staleness
    return limit is None or models.num_updates - sample.num_updates <= limit


def _staleness(models: Models, samples: list[Sample]) -> dict[str, float]:
    """Updates of the policy since samples were drawn, before those of this iteration, and the share of the samples that
    are too old for it."""
    ages = [models.num_updates - sample.num_updates for sample in samples]
    numbers = {"staleness": sum(ages) / len(ages), "staleness_max": max(ages)}
    if models.config.rollout.max_staleness is not None:
        numbers["stale_fraction"] = sum(not _is_fresh(models, sample) for sample in samples) / len(samples)
    return numbers


def _by_spread(models: Models, samples: list[Sample], state: dict) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """(groups of samples whose scores differ, groups whose scores are all equal)."""
    each = models.config.responses_per_prompt()
    spread = _spread(models.objective.scores(models.config, samples, state), each).tolist()
    groups = [samples[start : start + each] for start in range(0, len(samples), each)]
    telling = [group for group, width in zip(groups, spread, strict=True) if width > EQUAL]
    equal = [group for group, width in zip(groups, spread, strict=True) if width <= EQUAL]
    return telling, equal


def _spread(scores: torch.Tensor, each: int) -> torch.Tensor:
    """Largest minus smallest score of each group."""
    grouped = scores.view(-1, each)
    return grouped.amax(1) - grouped.amin(1)


def _statistics(
    config, samples: list[Sample], tokens: dict, scores: torch.Tensor, signal: dict, kl_coef: float
) -> dict:
    """What is logged of an iteration's samples; docs/ppo.md and docs/grpo.md explain each."""
    mask = tokens["mask"]
    count, lengths = mask.sum(), mask.sum(1)
    stats = {
        "reward": float(torch.tensor([sample.score for sample in samples]).mean()),
        "score": float(scores.mean()),
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "eos_rate": sum(sample.stopped for sample in samples) / len(samples),
        "repetition": sum(repetition(sample.response_ids) for sample in samples) / len(samples),
        "weight": float(count),
    }
    if "logprobs" in tokens:
        difference = ((tokens["sampled_logprobs"] - tokens["logprobs"]) * mask).abs()
        stats["entropy"] = float(tokens["entropies"].sum() / count)
        stats["rollout_difference"] = float(difference.sum() / count)
        stats["rollout_difference_max"] = float(difference.max())
    stats |= statistics(config, samples) | tools.statistics(config, samples)
    if "ref_logprobs" in tokens:
        divergence = float(((tokens["logprobs"] - tokens["ref_logprobs"]) * mask).sum(1).mean())
        stats |= {"kl": divergence, "kl_coef": kl_coef}
        stats["rlhf_reward"] = float(scores.mean()) - kl_coef * divergence
    if "values" in tokens:
        stats["explained_variance"] = explained_variance(tokens["values"], signal["returns"], mask)
    each = config.responses_per_prompt()
    if each > 1:
        stats["reward_spread"] = float(scores.view(-1, each).std(1).mean())
        stats["equal_groups"] = float((_spread(scores, each) <= EQUAL).float().mean())
    if config.rule:
        stats["rule"] = sum(sample.rule for sample in samples) / len(samples)
    return stats


# ---- updates ---------------------------------------------------------------------------------------------------------


def _update(
    models: Models, samples: list[Sample], signal: dict, state: dict, policy_lr: float, accept: Accept | None
) -> dict:
    """Policy and value updates of one iteration. Returns means over its updates, equal on all processes.

    An update that `accept` refuses ends the iteration, unless spikes.policy is skip: the run is about to be stopped or
    rolled back.
    """
    config, step = models.config, state["step"]
    value_lr = None
    if models.value is not None:  # the same schedule, another peak
        value_lr = policy_lr * (config.value_optimizer.lr / config.optimizer.lr)
    policy_stats, value_stats = [], []
    update_policy, refused = step >= config.value_only_steps(), False
    for minibatch in _minibatches(config, step, len(samples)):
        if refused and config.spikes.policy != "skip":
            break
        rows = by_length(share(minibatch), samples)
        size = config.micro_batch or _rows_at_a_time(samples, minibatch)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if update_policy and any(_is_fresh(models, samples[row]) for row in minibatch):
            weights = _row_weights(models, samples, minibatch)
            policy_batches = [_policy_batch(models, samples, signal, part, weights) for part in parts]
            for batch in policy_batches:
                batch["kl_coef"] = state["kl_coef"]
            policy_stats.append(models.policy.step(policy_batches, policy_lr, accept))
            refused = refused or policy_stats[-1].get("refused", False)
            if config.updates.target_kl is not None:
                # Every process reads the same reduced number, so that all stop together.
                update_policy = policy_stats[-1]["approx_kl"] <= config.updates.target_kl
        if models.value is not None:
            value_batches = [_micro_batch(models, samples, signal, part, VALUE_SIGNALS) for part in parts]
            value_stats.append(models.value.step(value_batches, value_lr))
    num_skipped = sum(not stats["applied"] for stats in policy_stats + value_stats)
    state["skipped_updates"] += num_skipped

    logged = _update_means(policy_stats, value_stats)
    logged["policy_updates"] = len(policy_stats)
    logged["skipped_updates"] = state["skipped_updates"]
    logged["applied"] = num_skipped == 0
    if refused:
        logged["refused"] = True
    logged["accepted"] = [(stats["loss"], stats["grad_norm"]) for stats in policy_stats if stats["applied"]]
    logged["lr"] = policy_lr
    if models.value is not None:
        logged |= {"value_updates": len(value_stats), "value_lr": value_lr}
    return logged


def _minibatches(config, step: int, count: int) -> Iterator[list[int]]:
    """Samples of each update of an iteration, over all processes: `epochs` passes, each in an order of its own. Which
    samples make an update does not depend on the number of processes."""
    size = count // config.updates.minibatches
    for epoch in range(config.updates.epochs):
        source = np.random.default_rng(derive(config.seed or 0, "minibatches", step, epoch))
        order = source.permutation(count).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]


def _rows_at_a_time(samples: list[Sample], minibatch: list[int]) -> int:
    """Rows of a micro-batch of at most MICRO_BATCH_TOKENS tokens; equal on all processes."""
    return max(1, MICRO_BATCH_TOKENS // max(size_of(samples[row]) for row in minibatch))


def _update_means(policy_stats: list[dict], value_stats: list[dict]) -> dict:
    """Means over an iteration's updates. `loss` and `grad_norm` are the policy's, or the value model's as long as only
    that one learns."""

    def means(stats: list[dict], names: dict[str, str]) -> dict:
        names = {name: key for name, key in names.items() if key in stats[0]}
        return {name: sum(update[key] for update in stats) / len(stats) for name, key in names.items()}

    logged = {"loss": 0.0, "grad_norm": 0.0}  # if nothing was learned
    if value_stats:
        logged = means(value_stats, VALUE_MEANS)
        logged["loss"], logged["grad_norm"] = logged["value_loss"], logged["value_grad_norm"]
    if policy_stats:
        logged |= means(policy_stats, POLICY_MEANS)
        logged["loss"] = logged["policy_loss"]
        logged["ratio_variance"] = logged.pop("ratio_square") - logged["ratio_mean"] ** 2
        # 0 if the trainer's first pass agrees with the log-probabilities it starts from.
        logged["first_approx_kl"] = policy_stats[0]["approx_kl"]
    return logged


def _row_weights(models: Models, samples: list[Sample], minibatch: list[int]) -> dict[int, float]:
    """Weight of each row of an update, over all processes; empty if all count alike."""
    lengths = torch.tensor([float(len(samples[row].response_ids)) for row in minibatch])
    stopped = torch.tensor([samples[row].stopped for row in minibatch])
    fresh = torch.tensor([_is_fresh(models, samples[row]) for row in minibatch])
    weights = models.objective.row_weights(models.config, lengths, stopped, fresh)
    return {} if weights is None else dict(zip(minibatch, weights.tolist(), strict=True))


def _policy_batch(
    models: Models, samples: list[Sample], signal: dict, rows: list[int], weights: dict[int, float]
) -> dict:
    batch = _micro_batch(models, samples, signal, rows, POLICY_SIGNALS)
    if weights:
        batch["row_weights"] = torch.tensor([[weights[row]] for row in rows])
    return batch


def _micro_batch(models: Models, samples: list[Sample], signal: dict, rows: list[int], names: tuple[str, ...]) -> dict:
    """Rows of the iteration, with what the loss compares them with at the places of their tokens. The engine divides by
    response tokens."""
    batch = layout([samples[row] for row in rows], models.pad_id)
    batch["weight"] = float(batch["mask"].sum())
    lengths = torch.tensor([len(samples[row].response_ids) for row in rows])
    for name in names:
        if name in signal:
            batch[name] = spread(signal[name][rows], lengths, batch["mask"])
    return batch
