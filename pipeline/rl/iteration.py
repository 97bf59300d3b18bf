"""One iteration of PPO: experience, advantages, updates of policy and value model, and what is logged of them.

`Iterations` is what the training loop (train/loop.py) drives, as it drives the engine updates of the other stages.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.rl import advantages, kl, losses, rewards
from pipeline.rl.experience import Clock, Models, collect, draw, repetition, share, tensors_of
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, at_responses, layout, policy_inputs, token_statistics
from pipeline.train import distributed, phases
from pipeline.train.engine import Accept

# Above this mean difference, in nats per token, sampler and trainer are so far apart that a user should know.
NOTABLE_DIFFERENCE = 0.1

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
}
VALUE_MEANS = {
    "value_loss": "loss",
    "value_grad_norm": "grad_norm",
    "value_clip_fraction": "value_clip_fraction",
    "value_mean": "value_mean",
}


class Iterations:
    """PPO's steps for the training loop: one step is one iteration, from sampling to the last update.

    In checkpoints, PPO's part of the loop's state is: step (iterations so far), kl_coef, calibration (mean and
    deviation of the reward), skipped_updates (updates of policy or value model that were not applied), shown (rows of
    samples.jsonl).
    """

    atomic = False  # when an update is refused, earlier updates of the same step have been applied

    def __init__(self, models: Models, pool: list[Task]):
        self.models, self.pool = models, pool
        self.engines = [models.policy, models.value]
        self.state: dict = {}
        self.accepted: list[tuple[float, float]] = []

    @property
    def step_count(self) -> int:
        return self.state.get("step", 0)

    def load(self, path: Path) -> str:
        changes = self.models.policy.load(path)
        self.models.value.load(path)
        return changes

    def begin(self, state: dict) -> None:
        """Use the loop's state from now on; a new run measures the reward's mean and deviation under the initial
        policy."""
        self.state = state
        state.setdefault("step", 0)
        state.setdefault("kl_coef", self.models.config.ppo.kl_coef)
        state.setdefault("skipped_updates", state["skipped"])  # its name in older checkpoints
        state.setdefault("shown", {})
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
        stats = iterate(self.models, self.pool, self.state, lr, batch, accept)
        self.accepted = stats.pop("accepted")
        self.state["step"] += 1
        if stats["rollout_difference"] > NOTABLE_DIFFERENCE and distributed.is_main():
            show(
                f"{self.models.config.kind}: step {self.step_count}: log-probabilities of sampler and trainer differ by"
                f" {stats['rollout_difference']:.2g} per token; give ppo.importance_cap, or precision: fp32"
            )
        return stats

    def uncount_step(self) -> None:
        raise AssertionError("an iteration cannot be taken back: part of it may have been applied")

    def applied_updates(self, stats: dict) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update of the policy that was applied in the last iteration."""
        return self.accepted

    def progress_numbers(self, stats: dict) -> dict | None:
        return {"reward": stats["reward"], "kl": stats["kl"]}

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
) -> dict:
    """One iteration: experience, advantages, updates. Changes the models and, in `state`, kl_coef and skipped_updates.

    lr: of the policy. batch_number: which batch of the data its prompts are; by default that of the step. Returns what
    is logged, and `accepted`: loss and gradient norm of each applied update of the policy.
    """
    config = models.config
    phases.enter("rollout")
    begun, clock = time.perf_counter(), Clock()
    number = state["step"] if batch_number is None else batch_number
    samples = _sample(models, pool, number, clock)
    tokens = tensors_of(samples)
    scores = _shaped_scores(config, samples, state["calibration"])
    signal = _signal(config, tokens, scores, state["kl_coef"])
    updates = _update(models, samples, signal, state, lr, accept)
    clock.lap("update")

    stats = _statistics(config, samples, tokens, scores, signal, state["kl_coef"])
    stats |= updates
    stats |= clock.seconds
    stats["tok_per_second"] = round(stats["weight"] / (time.perf_counter() - begun), 1)
    if config.ppo.kl_target is not None:
        state["kl_coef"] = kl.adapted(
            state["kl_coef"], stats["kl"], config.ppo.kl_target, config.ppo.kl_horizon, config.batch_size
        )
    return stats


def _sample(models: Models, pool: list[Task], batch_number: int, clock: Clock) -> list[Sample]:
    config = models.config
    indices = list(range(batch_number * config.batch_size, (batch_number + 1) * config.batch_size))
    tasks = [pool[draw(config.seed or 0, index, len(pool))] for index in indices]
    seeds = [derive(config.seed or 0, "rollout", index) for index in indices]
    return collect(models, tasks, indices, seeds, temperature=config.rollout.temperature, clock=clock)


def _shaped_scores(config, samples: list[Sample], calibration: tuple[float, float]) -> torch.Tensor:
    """Score of each response, [B]: calibrated, with the rule's share, clipped, less the penalty for a missing end."""
    mean, deviation = calibration
    raw = torch.tensor([sample.score for sample in samples])
    rules = torch.tensor([sample.rule for sample in samples])
    return rewards.shaped(
        (raw - mean) / deviation + config.ppo.rule_coef * rules,
        torch.tensor([sample.stopped for sample in samples]),
        clip=config.ppo.reward_clip,
        missing_eos_penalty=config.ppo.missing_eos_penalty,
    )


def _signal(config, tokens: dict[str, torch.Tensor], scores: torch.Tensor, kl_coef: float) -> dict[str, torch.Tensor]:
    """What the two losses compare the models with, each [B, T]: logprobs, values, returns, advantages, mask, and with
    importance_cap also importance."""
    options, mask = config.ppo, tokens["mask"]
    token_rewards = rewards.per_token(
        scores, tokens["logprobs"], tokens["ref_logprobs"], mask, kl_coef=kl_coef, estimator=options.kl_estimator
    )
    if options.whiten_rewards:
        token_rewards = advantages.whiten(token_rewards, mask, shift_mean=False)
    advantage, returns = advantages.gae(
        token_rewards, tokens["values"], mask, gamma=options.gamma, lambda_=options.lambda_
    )
    signal = {
        "logprobs": tokens["logprobs"],
        "values": tokens["values"],
        "returns": returns,
        "advantages": advantages.whiten(advantage, mask),
        "mask": mask,
    }
    if options.importance_cap is not None:
        signal["importance"] = losses.importance(tokens["logprobs"], tokens["sampled_logprobs"], options.importance_cap)
    return signal


def _statistics(
    config, samples: list[Sample], tokens: dict, scores: torch.Tensor, signal: dict, kl_coef: float
) -> dict:
    """What is logged of an iteration's samples; docs/ppo.md explains each."""
    mask = tokens["mask"]
    count, lengths = mask.sum(), mask.sum(1)
    divergence = float(((tokens["logprobs"] - tokens["ref_logprobs"]) * mask).sum(1).mean())
    difference = ((tokens["sampled_logprobs"] - tokens["logprobs"]) * mask).abs()
    stats = {
        "reward": float(torch.tensor([sample.score for sample in samples]).mean()),
        "score": float(scores.mean()),
        "kl": divergence,
        "kl_coef": kl_coef,
        "rlhf_reward": float(scores.mean()) - kl_coef * divergence,
        "entropy": float(tokens["entropies"].sum() / count),
        "explained_variance": advantages.explained_variance(tokens["values"], signal["returns"], mask),
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "eos_rate": sum(sample.stopped for sample in samples) / len(samples),
        "repetition": sum(repetition(sample.response_ids) for sample in samples) / len(samples),
        "rollout_difference": float(difference.sum() / count),
        "rollout_difference_max": float(difference.max()),
        "weight": float(count),
    }
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
    value_lr = policy_lr * (config.value_optimizer.lr / config.optimizer.lr)  # the same schedule, another peak
    policy_stats, value_stats = [], []
    update_policy, refused = step >= config.ppo.critic_warmup, False
    for minibatch in _minibatches(config, step, len(samples)):
        if refused and config.spikes.policy != "skip":
            break
        rows = share(minibatch)
        size = config.micro_batch or len(rows)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        if update_policy:
            policy_batches = [_policy_batch(models, samples, signal, part) for part in parts]
            policy_stats.append(models.policy.step(policy_batches, policy_lr, accept))
            refused = refused or policy_stats[-1].get("refused", False)
            if config.ppo.target_kl is not None:
                # Every process reads the same reduced number, so that all stop together.
                update_policy = policy_stats[-1]["approx_kl"] <= config.ppo.target_kl
        value_batches = [_value_batch(models, samples, signal, part) for part in parts]
        value_stats.append(models.value.step(value_batches, value_lr))
    num_skipped = sum(not stats["applied"] for stats in policy_stats + value_stats)
    state["skipped_updates"] += num_skipped

    logged = _update_means(policy_stats, value_stats)
    logged["policy_updates"] = len(policy_stats)
    logged["value_updates"] = len(value_stats)
    logged["skipped_updates"] = state["skipped_updates"]
    logged["applied"] = num_skipped == 0
    if refused:
        logged["refused"] = True
    logged["accepted"] = [(stats["loss"], stats["grad_norm"]) for stats in policy_stats if stats["applied"]]
    logged["lr"] = policy_lr
    logged["value_lr"] = value_lr
    return logged


def _minibatches(config, step: int, count: int) -> Iterator[list[int]]:
    """Samples of each update of an iteration, over all processes: `epochs` passes, each in an order of its own. Which
    samples make an update does not depend on the number of processes."""
    size = count // config.ppo.minibatches
    for epoch in range(config.ppo.epochs):
        source = np.random.default_rng(derive(config.seed or 0, "minibatches", step, epoch))
        order = source.permutation(count).tolist()
        for start in range(0, count, size):
            yield order[start : start + size]


def _update_means(policy_stats: list[dict], value_stats: list[dict]) -> dict:
    """Means over an iteration's updates. `loss` and `grad_norm` are the policy's, or the value model's as long as only
    that one learns."""

    def means(stats: list[dict], names: dict[str, str]) -> dict:
        return {name: sum(update[key] for update in stats) / len(stats) for name, key in names.items()}

    logged = means(value_stats, VALUE_MEANS)
    logged["loss"], logged["grad_norm"] = logged["value_loss"], logged["value_grad_norm"]
    if policy_stats:
        logged |= means(policy_stats, POLICY_MEANS)
        logged["loss"] = logged["policy_loss"]
        logged["ratio_variance"] = logged.pop("ratio_square") - logged["ratio_mean"] ** 2
        # 0 if the trainer's first pass agrees with the log-probabilities it starts from.
        logged["first_approx_kl"] = policy_stats[0]["approx_kl"]
    return logged


def _policy_batch(models: Models, samples: list[Sample], signal: dict, rows: list[int]) -> dict:
    tensors = layout([samples[row] for row in rows], models.pad_id)
    batch = _micro_batch(signal, rows, tensors, ("logprobs", "advantages", "importance"))
    batch["inputs"] = policy_inputs(models.policy.model, tensors)
    batch["responses"] = tensors["responses"]
    return batch


def _value_batch(models: Models, samples: list[Sample], signal: dict, rows: list[int]) -> dict:
    tensors = layout([samples[row] for row in rows], models.pad_id)
    batch = _micro_batch(signal, rows, tensors, ("values", "returns"))
    batch["inputs"] = tensors["inputs"]
    return batch


def _micro_batch(signal: dict, rows: list[int], tensors: dict, names: tuple[str, ...]) -> dict:
    """Rows of the iteration's tensors, as wide as this micro-batch's longest response. The engine divides by response
    tokens."""
    mask = tensors["mask"]
    batch = {"mask": mask, "weight": float(mask.sum())}
    for name in names:
        if name in signal:
            batch[name] = signal[name][rows, : mask.shape[1]]
    return batch


def policy_loss_fn(config, logits: torch.Tensor, batch: dict):
    """The engine's loss of the policy."""
    options = config.ppo
    logprobs, entropy = token_statistics(logits, batch["responses"], config.rollout.temperature)
    loss, metrics = losses.policy_loss(
        logprobs,
        batch["logprobs"],
        batch["advantages"],
        batch["mask"],
        clip=options.clip,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        ratio_limit=options.ratio_limit,
        weights=batch.get("importance"),
    )
    metrics["entropy_update"] = (entropy * batch["mask"]).sum()
    return loss, metrics


def value_loss_fn(config, logits: torch.Tensor, batch: dict):
    """The engine's loss of the value model, whose logits are [B, T, 1]."""
    values = at_responses(logits[..., 0], batch["mask"].shape[1])
    return losses.value_loss(values, batch["values"], batch["returns"], batch["mask"], clip=config.ppo.value_clip)
