"""REINFORCE leave-one-out (RLOO): the baseline of a response is the mean reward of the other responses to its prompt,
and a whole response is one action.

Ahmadian et al., 2024 ("Back to Basics"), section 3.3; Kool et al., 2019. The KL to the reference is part of the reward,
and the ratio is clipped as in PPO, which allows for several updates (TRL's RLOOTrainer does the same).
"""

import torch


def advantages(rewards_PS: torch.Tensor) -> torch.Tensor:
    """A_i = r_i - mean of the others, over the S >= 2 responses to each of P prompts; [P, S]."""
    samples = rewards_PS.shape[1]
    others = (rewards_PS.sum(1, keepdim=True) - rewards_PS) / (samples - 1)
    return rewards_PS - others


def response_log_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """From log ratios of tokens [B, T] that of the whole response, the sum over its tokens, at each of them. In a loss
    over tokens, weights of 1 / length make it count once."""
    return (log_ratio * mask).sum(1, keepdim=True).expand_as(log_ratio)
