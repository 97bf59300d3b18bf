"""One iteration of PPO: experience, advantages, updates of policy and value model, and what is logged of them."""

import time

import numpy as np
import torch

from pipeline.rl import advantages, kl, losses, rewards
from pipeline.rl.experience import Models, Task, collect, draw, repetition, share, tensors_of
from pipeline.rl.responses import Sample, at_responses, layout, policy_inputs, token_statistics
from pipeline.seeds import derive
from pipeline.train.schedule import learning_rate


def iterate(models: Models, pool: list[Task], state: dict) -> dict:
    """One iteration: experience, advantages, updates. Changes the models and state's kl_coef and skipped; returns
    what is logged."""
    config, options, step, phases = models.config, models.config.ppo, state["step"], {}
    begun = moment = time.perf_counter()

    def clock(name: str) -> None:
        nonlocal moment
        phases[f"seconds_{name}"] = round(time.perf_counter() - moment, 4)
        moment = time.perf_counter()

    indices = list(range(step * config.batch_size, (step + 1) * config.batch_size))
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
    updates = _update(models, samples, batch, state)
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
        **phases,
        "tok_per_second": round(float(count) / (time.perf_counter() - begun), 1),
    }
    if options.kl_target is not None:
        state["kl_coef"] = kl.adapted(
            state["kl_coef"], divergence, options.kl_target, options.kl_horizon, config.batch_size
        )
    return stats


def _update(models: Models, samples: list[Sample], batch: dict, state: dict) -> dict:
    """Policy and value updates of one iteration. Returns means over its updates, equal on all processes."""
    config, options, step = models.config, models.config.ppo, state["step"]
    policy_lr = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
    value_lr = learning_rate(config.schedule, config.value_optimizer.lr, step, config.steps)
    policy_stats, value_stats, training = [], [], step >= options.critic_warmup
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
            if training:
                policy_stats.append(
                    models.policy.step([_policy_batch(models, samples, batch, part) for part in parts], policy_lr)
                )
                # Every process reads the same reduced number, so that all stop together.
                training = options.target_kl is None or policy_stats[-1]["approx_kl"] <= options.target_kl
            value_stats.append(
                models.value.step([_value_batch(models, samples, batch, part) for part in parts], value_lr)
            )
    state["skipped"] += sum(not stats["applied"] for stats in policy_stats + value_stats)

    def mean(stats: list[dict], key: str) -> float:
        return sum(item[key] for item in stats) / len(stats)

    named = {
        "value_loss": "loss",
        "value_grad_norm": "grad_norm",
        "value_clip_fraction": "value_clip_fraction",
        "value_mean": "value_mean",
    }
    logged = {name: mean(value_stats, key) for name, key in named.items()}
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
        logged["ratio_variance"] = logged.pop("ratio_square") - logged["ratio_mean"] ** 2
        # 0 if the trainer's first pass agrees with the log-probabilities it starts from.
        logged["first_approx_kl"] = policy_stats[0]["approx_kl"]
    return {
        **logged,
        "policy_updates": len(policy_stats),
        "value_updates": len(value_stats),
        "skipped_updates": state["skipped"],
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
