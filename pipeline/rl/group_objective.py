"""What GRPO, Dr. GRPO, RLOO and REINFORCE++ make of an iteration's samples: rewards, advantages, the average of the
loss, and the KL to the reference in one or the other. The algorithms are in grpo.py, rloo.py and reinforce_pp.py.
"""

import torch

from pipeline.rl import grpo, kl, losses, reinforce_pp, rewards, rloo
from pipeline.rl.objective import Objective
from pipeline.rl.responses import Sample, token_statistics

AVERAGES = {"grpo": "response", "dr_grpo": "constant", "rloo": "response", "reinforce_pp": "token"}


def average_of(config) -> str:
    """What the loss is averaged over: response, token or constant."""
    return config.update.average or AVERAGES[config.algorithm]


def kl_in_reward(config) -> bool:
    """Whether the KL counts in the reward, and not in the loss."""
    if config.update.kl_in is not None:
        return config.update.kl_in == "reward"
    if config.algorithm == "reinforce_pp":
        return config.samples == 1
    return config.algorithm == "rloo"


def kl_estimator(config) -> kl.Estimator:
    """k1 is unbiased, and so the one for rewards; its gradient in a loss would be 0 on average. REINFORCE++ takes k2,
    whose gradient is that of the KL."""
    if config.update.kl_estimator is not None:
        return config.update.kl_estimator
    if kl_in_reward(config):
        return "k1"
    return "k2" if config.algorithm == "reinforce_pp" else "k3"


def scores(config, samples: list[Sample], state: dict) -> torch.Tensor:
    """Reward of each response, [B], less the penalty for long ones."""
    scores = torch.tensor([sample.score for sample in samples])
    if config.overlong is not None:
        lengths = torch.tensor([float(len(sample.response_ids)) for sample in samples])
        shares = grpo.overlong_penalty(lengths, config.rollout.max_new_tokens, config.overlong.buffer)
        scores = scores - config.overlong.penalty * shares
    return scores


def signal(config, tokens: dict[str, torch.Tensor], scores: torch.Tensor, kl_coef: float) -> dict[str, torch.Tensor]:
    """What the loss compares the policy with, each [B, T]: logprobs (if they were not measured, sampled_logprobs, for
    the log), advantages, mask; with the KL in the loss also ref_logprobs, and with importance_cap importance. For the
    log of responses: rewards, the score at the last token of a response less the KL where that counts in the reward."""
    mask = tokens["mask"]
    name = "logprobs" if "logprobs" in tokens else "sampled_logprobs"
    signal = {name: tokens[name], "mask": mask}
    penalties = torch.zeros_like(mask)
    if kl_coef and kl_in_reward(config):
        penalties = kl_coef * kl.estimate(tokens["logprobs"], tokens["ref_logprobs"], kl_estimator(config)) * mask
    elif kl_coef:
        signal["ref_logprobs"] = tokens["ref_logprobs"]
    signal["advantages"] = advantages(config, scores, penalties, mask)
    signal["rewards"] = rewards.at_last_token(scores, mask) - penalties
    if config.update.importance_cap is not None:
        cap = config.update.importance_cap
        signal["importance"] = losses.importance(tokens["logprobs"], tokens["sampled_logprobs"], cap)
    return signal


def advantages(config, scores: torch.Tensor, penalties: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages [B, T] of the algorithm; zero after each response. penalties [B, T]: of the KL in the reward."""
    if config.algorithm == "reinforce_pp":
        return reinforce_pp.advantages(scores.view(-1, config.samples), penalties, mask)
    rewards_PS = (scores - penalties.sum(1)).view(-1, config.samples)
    if config.algorithm == "grpo":
        of_responses = grpo.advantages(rewards_PS)
    elif config.algorithm == "dr_grpo":
        of_responses = grpo.dr_advantages(rewards_PS)
    else:
        of_responses = rloo.advantages(rewards_PS)
    return of_responses.view(-1, 1) * mask


def row_weights(config, lengths: torch.Tensor, stopped: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Weight of each of N responses [N] in a sum over tokens that is divided by all their tokens, so that it becomes
    the average that the recipe asks for. Those that are too old, and with `mask_truncated` those that were cut off,
    have weight 0, and the average is over the others."""
    kept = fresh.to(lengths.dtype)
    if config.update.mask_truncated:
        kept = kept * stopped
    average, tokens = average_of(config), lengths.sum()
    if average == "response":
        return kept * tokens / (lengths * kept.sum().clamp(min=1))
    if average == "constant":
        return kept * tokens / (config.rollout.max_new_tokens * kept.sum().clamp(min=1))
    return kept * tokens / (lengths * kept).sum().clamp(min=1)


def after(config, divergence: float | None, state: dict) -> None:
    """Nothing is adapted."""


def policy_loss_fn(config, outputs, batch: dict):
    """The engine's loss of the policy. outputs: as for token_statistics."""
    options, mask = config.update, batch["mask"]
    logprobs, entropy = token_statistics(outputs, batch["labels"], config.rollout.temperature)
    # Before the first update of an iteration the policy is the one that sampled.
    log_ratio = logprobs - batch.get("logprobs", logprobs.detach())
    if config.algorithm == "rloo":
        log_ratio = rloo.response_log_ratio(log_ratio, mask)
    elif options.ratio == "sequence":
        log_ratio = grpo.sequence_log_ratio(log_ratio, mask)
    weights = batch["row_weights"]
    loss, metrics = losses.policy_loss(
        log_ratio,
        batch["advantages"],
        mask,
        clip=options.clip,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
        ratio_limit=options.ratio_limit,
        weights=weights * batch["importance"] if "importance" in batch else weights,
    )
    if "ref_logprobs" in batch:
        divergence = grpo.kl_loss(logprobs, batch["ref_logprobs"], mask, kl_estimator(config), weights)
        loss = loss + batch["kl_coef"] * divergence
        metrics["kl_loss"] = divergence.detach()
    if "sampled_logprobs" in batch:
        metrics["rollout_difference"] = ((logprobs.detach() - batch["sampled_logprobs"]).abs() * mask).sum()
    metrics["entropy_update"] = (entropy * mask).sum()
    return loss, metrics


GROUPS = Objective(scores, signal, row_weights, after)
