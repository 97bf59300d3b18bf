"""Group relative policy optimisation (GRPO) and what was made of it: a response is judged against the other responses
to its prompt, so that there is no value model.

GRPO: Shao et al., 2024 (DeepSeekMath), equations 3 and 4. Dr. GRPO: Liu et al., 2025 ("Understanding R1-Zero-Like
Training"). DAPO: Yu et al., 2025. GSPO: Zheng et al., 2025. What they average over is in group_objective.py.
"""

import torch

from pipeline.rl import kl


def advantages(rewards_PS: torch.Tensor) -> torch.Tensor:
    """A = (r - mean(r)) / std(r) over the S responses to each of P prompts; [P, S].

    std divides by S - 1, and 1e-4 is added to it, as in TRL: a group whose rewards are all equal gets zeros.
    """
    return dr_advantages(rewards_PS) / (rewards_PS.std(1, keepdim=True) + 1e-4)


def dr_advantages(rewards_PS: torch.Tensor) -> torch.Tensor:
    """Dr. GRPO: A = r - mean(r). Dividing by the deviation gives groups in which nearly all responses are right, or
    nearly all wrong, more weight than others."""
    return rewards_PS - rewards_PS.mean(1, keepdim=True)


def sequence_log_ratio(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """GSPO: from log ratios of tokens [B, T] that of the whole response per token, log (pi(y) / pi_old(y)) ^ (1 / |y|):
    one value for all of its tokens, as is the reward."""
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    return ((log_ratio * mask).sum(1, keepdim=True) / lengths).expand_as(log_ratio)


def kl_loss(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    estimator: kl.Estimator,
    weights: torch.Tensor,
) -> torch.Tensor:
    """The KL term of equation 3, summed over tokens with the weights [B, 1] of their responses; times beta it is added
    to the loss."""
    divergence = kl.estimate(logprobs, ref_logprobs, estimator) * weights
    return torch.where(mask.bool(), divergence, 0.0).sum()


def overlong_penalty(lengths: torch.Tensor, longest: int, buffer: int) -> torch.Tensor:
    """Share [B] of the penalty that responses of these lengths pay (DAPO, section 3.4): 0 up to longest - buffer
    tokens, 1 at `longest`, linear between them."""
    return ((lengths - (longest - buffer)) / buffer).clamp(0, 1)
