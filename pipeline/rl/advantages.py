"""Generalised advantage estimation and whitening over response tokens."""

import torch


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lambda_: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages, returns), each [B, T] and zero where `mask` is 0 (Schulman et al., 2016, equation 16).

    `mask` is 1 on the response's tokens, which are the first of each row. After the last token there is nothing: its
    next value is 0. Returns are advantages + values, before any whitening, so that the value model's target has the
    scale of the rewards.
    """
    advantages = torch.zeros_like(rewards)
    next_advantages = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        errors = rewards[:, t] + gamma * next_values - values[:, t]
        # A masked position gives zeros to the one before it, so that padding neither adds to an advantage nor is
        # bootstrapped from.
        next_advantages = mask[:, t] * (errors + gamma * lambda_ * next_advantages)
        next_values = mask[:, t] * values[:, t]
        advantages[:, t] = next_advantages
    return advantages, (advantages + values) * mask


def whiten(values: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
    """Variance 1 over all tokens under `mask`, and mean 0 if `shift_mean`, else the mean is kept; zero elsewhere.

    `values` is the whole batch of an iteration, over all processes: whitening each part would make the gradient depend
    on how the work is divided.
    """
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean).square() * mask).sum() / count
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened * mask


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - var(returns - values) / var(returns) over tokens: 1 for a perfect value model, 0 for a constant one,
    negative for a worse one."""
    token_returns, token_values = returns[mask.bool()], values[mask.bool()]
    variance = token_returns.var(correction=0)
    if float(variance) <= 1e-12:
        return 0.0
    return float(1 - (token_returns - token_values).var(correction=0) / variance)
