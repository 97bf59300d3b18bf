"""REINFORCE++ (Hu et al., 2025): PPO without a value model. Its baseline is the whole batch, and its loss is PPO's
(losses.policy_loss).

With one response per prompt the KL is part of each token's reward; with several, the mean of the group is
subtracted first and the KL is part of the loss ("REINFORCE++ with baseline").
"""

import torch

from pipeline.rl.advantages import whiten


def advantages(rewards_PS: torch.Tensor, token_penalties: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Advantages [P * S, T], normalised over all response tokens of the batch.

    rewards_PS: of whole responses. token_penalties [P * S, T]: KL penalty of each token, zero if the KL is in the loss;
    a token pays for itself and those after it. With S > 1 a response's reward is compared with the mean of its group.
    """
    if rewards_PS.shape[1] > 1:
        rewards_PS = rewards_PS - rewards_PS.mean(1, keepdim=True)
    penalties = token_penalties * mask
    remaining = penalties.flip(1).cumsum(1).flip(1)
    return whiten((rewards_PS.reshape(-1, 1) - remaining) * mask, mask)
