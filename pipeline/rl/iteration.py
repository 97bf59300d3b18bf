"""One iteration of PPO: experience, advantages, updates of policy and value model, and what is logged of them.

`Iterations` is what the training loop (train/loop.py) drives, as it drives the engine updates of the other stages.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.core.seeds import derive
from pipeline.core.terminal import show
from pipeline.rl import advantages, kl, losses, rewards
from pipeline.rl.experience import Models, collect, draw, repetition, share, tensors_of
from pipeline.rl.prompts import Task
from pipeline.rl.responses import Sample, at_responses, layout, policy_inputs, token_statistics
from pipeline.train import distributed, phases
from pipeline.train.schedule import learning_rate

Admit = Callable[[float, float], bool]


class Iterations:
    """PPO's steps for the training loop: one step is one iteration, from sampling to the last update.

    What checkpoints keep of PPO is in the loop's state: step (iterations made), kl_coef, calibration (mean and
    deviation of the reward), skipped_updates (updates of policy or value model that were not applied), shown (rows of
    samples.jsonl).
    """

    atomic = False  # updates before a refused one have been applied

    def __init__(self, models: Models, pool: list[Task]):
        self.models, self.pool = models, pool
        self.engines = [models.policy, models.value]
        self.state: dict = {}
        self.accepted: list[tuple[float, float]] = []

    @property
    def step_count(self) -> int:
        return self.state.get("step", 0)

    def load(self, path: Path) -> str:
        changed = self.models.policy.load(path)
        self.models.value.load(path)
        return changed

    def begin(self, state: dict) -> None:
        """Take over the loop's state; a new run measures the reward's mean and deviation under the initial policy."""
        self.state = state
        state.setdefault("step", 0)
        state.setdefault("kl_coef", self.models.config.ppo.kl_coef)
        state.setdefault("skipped_updates", state["skipped"])  # its name in older checkpoints
        state.setdefault("shown", {})
        if state.get("calibration") is None:
            # 1 until measured: the value model and the rewards have the same units at any time.
            state["calibration"] = (0.0, 1.0)
            if self.models.config.ppo.calibrate:
                state["calibration"] = self._calibration()
        self.models.value.model.mean, self.models.value.model.deviation = state["calibration"]

    def _calibration(self) -> tuple[float, float]:
        config, count = self.models.config, self.models.config.ppo.calibrate
        tasks = [self.pool[draw(config.seed or 0, index, len(self.pool))] for index in range(count)]
        seeds = [derive(config.seed or 0, "calibrate", index) for index in range(count)]
        samples = collect(
            self.models,
            tasks,
            list(range(count)),
            seeds,
            temperature=config.rollout.temperature,
            clock=lambda _: None,
            measure="score",
        )
        return rewards.calibration([sample.score for sample in samples])

    def step(self, batch: int, lr: float, admit: Admit | None) -> dict:
        """One iteration over the prompts of global batch `batch`. `admit` is asked before each update of the
        policy. lr: the policy's; the value model has its own, of the same schedule."""
        stats = iterate(self.models, self.pool, self.state, batch, admit)
        self.accepted = stats.pop("accepted")
        self.state["step"] += 1
        if stats["rollout_difference"] > 0.1 and distributed.is_main():
            show(
                f"{self.models.config.kind}: step {self.step_count}: log-probabilities of sampler and trainer differ by"
                f" {stats['rollout_difference']:.2g} per token; give ppo.importance_cap, or precision: fp32"
            )
        return stats

    def take_back(self) -> None:
        raise AssertionError("an iteration is not taken back: part of it may have been applied")

    def guarded(self, stats: dict) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update of the policy that was applied in the last iteration."""
        return self.accepted

    def shown(self, stats: dict) -> dict | None:
        return {"reward": stats["reward"], "kl": stats["kl"]}

    def objective(self, evaluation: dict) -> float | None:
        """save.keep_best keeps the highest held-out reward."""
        return -evaluation["reward"]


def iterate(
    models: Models, pool: list[Task], state: dict, batch_number: int | None = None, admit: Admit | None = None
) -> dict:
    """One iteration: experience, advantages, updates. Changes the models and state's kl_coef and skipped_updates.

    batch_number: which batch of the data its prompts are; by default that of the step. Returns what is logged, and
    `accepted`: loss and gradient norm of each applied update of the policy.
    """
    config, options, step, seconds = models.config, models.config.ppo, state["step"], {}
    number = step if batch_number is None else batch_number
    phases.enter("rollout")
    begun = moment = time.perf_counter()

    def clock(name: str) -> None:
        nonlocal moment
        seconds[f"seconds_{name}"] = round(time.perf_counter() - moment, 4)
        moment = time.perf_counter()

    indices = list(range(number * config.batch_size, (number + 1) * config.batch_size))
    tasks = [pool[draw(config.seed or 0, index, len(pool))] for index in indices]
    seeds = [derive(config.seed or 0, "rollout", index) for index in indices]
    samples = collect(models, tasks, indices, seeds, temperature=config.rollout.temperature, clock=clock)

    tokens = tensors_of(samples)
    mask, logprobs, values = tokens["mask"], tokens["logprobs"], tokens["values"]
    mean, deviation = state["calibration"]
    raw = torch.tensor([sample.score for sample in samples])
    calibrated = (raw - mean) / deviation + options.rule_coef * torch.tensor([sample.rule for sample in samples])
    scores = rewards.shaped(
        calibrated,
        torch.tensor([sample.stopped for sample in samples]),
        clip=options.reward_clip,
        missing_eos_penalty=options.missing_eos_penalty,
    )
    token_rewards = rewards.per_token(
        scores, logprobs, tokens["ref_logprobs"], mask, kl_coef=state["kl_coef"], estimator=options.kl_estimator
    )
    if options.whiten_rewards:
        token_rewards = advantages.whiten(token_rewards, mask, shift_mean=False)
    advantage, returns = advantages.gae(token_rewards, values, mask, gamma=options.gamma, lambda_=options.lambda_)
    batch = {
        "logprobs": logprobs,
        "values": values,
        "returns": returns,
        "advantages": advantages.whiten(advantage, mask),
        "mask": mask,
    }
    if options.importance_cap is not None:
        batch["importance"] = losses.importance(logprobs, tokens["sampled_logprobs"], options.importance_cap)
    updates = _update(models, samples, batch, state, admit)
    clock("update")

    count, lengths = mask.sum(), mask.sum(1)
    divergence = float(((logprobs - tokens["ref_logprobs"]) * mask).sum(1).mean())
    difference = ((tokens["sampled_logprobs"] - logprobs) * mask).abs()
    stats = {
        "reward": float(raw.mean()),
        "score": float(scores.mean()),
        "kl": divergence,
        "kl_coef": state["kl_coef"],
        "rlhf_reward": float(scores.mean()) - state["kl_coef"] * divergence,
        **({"rule": sum(sample.rule for sample in samples) / len(samples)} if config.rule else {}),
        "entropy": float(tokens["entropies"].sum() / count),
        "explained_variance": advantages.explained_variance(values, returns, mask),
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "eos_rate": sum(sample.stopped for sample in samples) / len(samples),
        "repetition": sum(repetition(sample.response_ids) for sample in samples) / len(samples),
        "rollout_difference": float(difference.sum() / count),
        "rollout_difference_max": float(difference.max()),
        **updates,
        **seconds,
        "weight": float(count),
        "tok_per_second": round(float(count) / (time.perf_counter() - begun), 1),
    }
    if options.kl_target is not None:
        state["kl_coef"] = kl.adapted(
            state["kl_coef"], divergence, options.kl_target, options.kl_horizon, config.batch_size
        )
    return stats


def _update(models: Models, samples: list[Sample], batch: dict, state: dict, admit: Admit | None) -> dict:
    """Policy and value updates of one iteration. Returns means over its updates, equal on all processes.

    An update that `admit` refuses ends the iteration, unless spikes.policy is skip: the run is about to be stopped or
    rolled back.
    """
    config, options, step = models.config, models.config.ppo, state["step"]
    policy_lr = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
    value_lr = learning_rate(config.schedule, config.value_optimizer.lr, step, config.steps)
    policy_stats, value_stats, training, refused = [], [], step >= options.critic_warmup, False
    for epoch in range(options.epochs):
        order = (
            np.random.default_rng(derive(config.seed or 0, "minibatches", step, epoch))
            .permutation(len(samples))
            .tolist()
        )
        size = len(samples) // options.minibatches
        for start in range(0, len(order), size):
            # Shares of the same global minibatch: which samples make an update does not depend on the number of
            # processes.
            rows = share(order[start : start + size])
            micro = config.micro_batch or len(rows)
            parts = [rows[first : first + micro] for first in range(0, len(rows), micro)]
            if refused and config.spikes.policy != "skip":
                break
            if training:
                micro_batches = [_policy_batch(models, samples, batch, part) for part in parts]
                policy_stats.append(models.policy.step(micro_batches, policy_lr, admit))
                refused = refused or policy_stats[-1].get("refused", False)
                # Every process reads the same reduced number, so that all stop together.
                training = options.target_kl is None or policy_stats[-1]["approx_kl"] <= options.target_kl
            value_stats.append(
                models.value.step([_value_batch(models, samples, batch, part) for part in parts], value_lr)
            )
    not_applied = sum(not stats["applied"] for stats in policy_stats + value_stats)
    state["skipped_updates"] += not_applied

    def mean(stats: list[dict], key: str) -> float:
        return sum(item[key] for item in stats) / len(stats)

    named = {
        "value_loss": "loss",
        "value_grad_norm": "grad_norm",
        "value_clip_fraction": "value_clip_fraction",
        "value_mean": "value_mean",
    }
    logged = {name: mean(value_stats, key) for name, key in named.items()} if value_stats else {}
    logged |= {"loss": logged.get("value_loss"), "grad_norm": logged.get("value_grad_norm")}  # until the policy learns
    if policy_stats:
        named = {"policy_loss": "loss", "grad_norm": "grad_norm"} | {
            key: key
            for key in (
                "ratio_mean",
                "ratio_square",
                "approx_kl",
                "clip_fraction",
                "dual_clip_fraction",
                "skipped_fraction",
                "entropy_update",
            )
        }
        logged |= {name: mean(policy_stats, key) for name, key in named.items()}
        logged["loss"] = logged["policy_loss"]
        logged["ratio_variance"] = logged.pop("ratio_square") - logged["ratio_mean"] ** 2
        # 0 if the trainer's first pass agrees with the log-probabilities it starts from.
        logged["first_approx_kl"] = policy_stats[0]["approx_kl"]
    return {
        **logged,
        "policy_updates": len(policy_stats),
        "value_updates": len(value_stats),
        "skipped_updates": state["skipped_updates"],
        "applied": not_applied == 0,
        **({"refused": True} if refused else {}),
        "accepted": [(stats["loss"], stats["grad_norm"]) for stats in policy_stats if stats["applied"]],
        "lr": policy_lr,
        "value_lr": value_lr,
    }


def _policy_batch(models: Models, samples: list[Sample], batch: dict, rows: list[int]) -> dict:
    made = layout([samples[row] for row in rows], models.pad_id)
    return {
        **_cut(batch, rows, made, ("logprobs", "advantages", "importance")),
        "inputs": policy_inputs(models.policy.model, made),
        "responses": made["responses"],
    }


def _value_batch(models: Models, samples: list[Sample], batch: dict, rows: list[int]) -> dict:
    made = layout([samples[row] for row in rows], models.pad_id)
    return {**_cut(batch, rows, made, ("values", "returns")), "inputs": made["inputs"]}


def _cut(batch: dict, rows: list[int], made: dict, names: tuple[str, ...]) -> dict:
    """Rows of the iteration's tensors, as wide as this micro-batch's longest response; the engine divides by
    response tokens."""
    width = made["mask"].shape[1]
    return {
        "mask": made["mask"],
        "weight": float(made["mask"].sum()),
        **{name: batch[name][rows, :width] for name in names if name in batch},
    }


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
    return loss, {**metrics, "entropy_update": (entropy * batch["mask"]).sum()}


def value_loss_fn(config, logits: torch.Tensor, batch: dict):
    """The engine's loss of the value model, whose logits are [B, T, 1]."""
    values = at_responses(logits[..., 0], batch["mask"].shape[1])
    return losses.value_loss(values, batch["values"], batch["returns"], batch["mask"], clip=config.ppo.value_clip)
