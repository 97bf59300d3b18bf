"""REINFORCE leave-one-out (RLOO): the baseline of a response is the mean reward of the other responses to its prompt,
and a whole response is one action.

Ahmadian et al., 2024 ("Back to Basics"), section 3.3; Kool et al., 2019. The KL to the reference is part of the reward,
and the ratio is clipped as in PPO, which allows for several updates (TRL's RLOOTrainer does the same).
"""

import torch

from pipeline.rl.losses import clipped_surrogate


def advantages(rewards_PS: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - mean of the others, over the S >= 2 responses to each of P prompts; [P, S]."""
    samples = rewards_PS.shape[1]
    others = (rewards_PS.sum(1, keepdim=True) - rewards_PS) / (samples - 1)
    return rewards_PS - others


def loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_limit: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of the probability of whole responses, the product over their tokens. All tensors are
    [B, T], with the same value at each token of a response; `weights` of 1 / length make it count once."""
    log_ratio = ((logprobs - old_logprobs) * mask).sum(1, keepdim=True).expand_as(logprobs)
    return clipped_surrogate(
        log_ratio,
        advantages,
        mask,
        clip=clip,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ratio_limit=ratio_limit,
        weights=weights,
    )
