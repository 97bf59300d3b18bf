"""What PPO makes of an iteration's samples: scores, the signal that policy and value model are compared with, and their
losses."""

import torch

from pipeline.rl import advantages, kl, losses, rewards
from pipeline.rl.objective import Objective
from pipeline.rl.responses import Sample, token_statistics


def scores(config, samples: list[Sample], state: dict) -> torch.Tensor:
    """Score of each response, [B]: calibrated, with the rule's share, clipped, less the penalty for a missing end."""
    mean, deviation = state["calibration"]
    raw = torch.tensor([sample.score for sample in samples])
    rules = torch.tensor([sample.rule for sample in samples])
    return rewards.shaped(
        (raw - mean) / deviation + config.ppo.rule_coef * rules,
        torch.tensor([sample.stopped for sample in samples]),
        clip=config.ppo.reward_clip,
        missing_eos_penalty=config.ppo.missing_eos_penalty,
    )


def signal(config, tokens: dict[str, torch.Tensor], scores: torch.Tensor, kl_coef: float) -> dict[str, torch.Tensor]:
    """What the two losses compare the models with, each [B, T]: logprobs, values, returns, advantages, mask, and with
    importance_cap also importance. For the log of responses: rewards, before they are whitened."""
    options, mask = config.ppo, tokens["mask"]
    token_rewards = rewards.per_token(
        scores, tokens["logprobs"], tokens["ref_logprobs"], mask, kl_coef=kl_coef, estimator=options.kl_estimator
    )
    rewards_BT = token_rewards
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
        "rewards": rewards_BT,
    }
    if options.importance_cap is not None:
        signal["importance"] = losses.importance(tokens["logprobs"], tokens["sampled_logprobs"], options.importance_cap)
    return signal


def row_weights(config, lengths: torch.Tensor, stopped: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor | None:
    """All tokens count alike, but for those of responses that are too old, which do not count."""
    if bool(fresh.all()):
        return None
    kept = fresh.to(lengths.dtype)
    return kept * lengths.sum() / (lengths * kept).sum()


def after(config, divergence: float | None, state: dict) -> None:
    """Adapt the KL coefficient to the KL of an iteration, in nats per response."""
    if config.ppo.kl_target is not None:
        state["kl_coef"] = kl.adapted(
            state["kl_coef"], divergence, config.ppo.kl_target, config.ppo.kl_horizon, config.batch_size
        )


def policy_loss_fn(config, outputs, batch: dict):
    """The engine's loss of the policy. outputs: as for token_statistics."""
    options = config.ppo
    logprobs, entropy = token_statistics(outputs, batch["labels"], config.rollout.temperature)
    weights = batch.get("importance")
    if "row_weights" in batch:
        weights = weights * batch["row_weights"]
    loss, metrics = losses.policy_loss(
        logprobs - batch["logprobs"],
        batch["advantages"],
        batch["mask"],
        clip=options.clip,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        ratio_limit=options.ratio_limit,
        weights=weights,
    )
    metrics["entropy_update"] = (entropy * batch["mask"]).sum()
    return loss, metrics


def value_loss_fn(config, logits: torch.Tensor, batch: dict):
    """The engine's loss of the value model, whose logits are [B, T, 1]."""
    return losses.value_loss(
        logits[..., 0], batch["values"], batch["returns"], batch["mask"], clip=config.ppo.value_clip
    )


PPO = Objective(scores, signal, row_weights, after)
