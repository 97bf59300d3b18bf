"""PPO's two losses (Schulman et al., 2017), as sums over response tokens: the engine divides by the tokens of the whole
optimizer step.

Each returns (sum of the loss, sums of the metrics); every argument is [B, T], `mask` is 1 on response tokens.
"""

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) = 5e8: far beyond any clip range, and finite in fp32


def policy_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    ratio_limit: float | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate, equation 7. log_ratio: log of new to old probability, of tokens, or one for all tokens of a
    response.

    clip_high: another upper side of the clip range (DAPO, Yu et al., 2025). dual_clip: bound of the loss where the
    advantage is negative (Ye et al., 2020, equation 5). ratio_limit: rows with a larger mean ratio carry no loss; they
    are counted. weights: correction for a sampler whose distribution is not that of `old_logprobs` (Yao et al., 2025:
    truncated importance sampling), or a response's share of the average; [B, T] or [B, 1].
    """
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    upper = clip if clip_high is None else clip_high
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + upper)
    loss = torch.maximum(plain, clipped)
    bounded = torch.zeros_like(mask, dtype=torch.bool)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
    if weights is not None:
        loss = loss * weights
    with torch.no_grad():
        row_ratio = (ratio * mask).sum(1) / mask.sum(1).clamp(min=1)
        # A ratio that is not a number stays in, so that the engine refuses the whole step and reports it.
        excessive = torch.zeros_like(row_ratio, dtype=torch.bool)
        if ratio_limit is not None:
            excessive = row_ratio > ratio_limit
        kept = mask * (~excessive)[:, None]
        metrics = {
            "ratio_mean": (ratio * mask).sum(),
            "ratio_square": (ratio.square() * mask).sum(),
            "approx_kl": ((ratio - 1 - log_ratio) * mask).sum(),
            "clip_fraction": ((clipped > plain) * mask).sum(),
            "dual_clip_fraction": (bounded * mask).sum(),
            "skipped_fraction": (mask - kept).sum(),
        }
    # where, not a product: infinity times zero is not a number
    return torch.where(kept.bool(), loss, 0.0).sum(), metrics


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, *, clip: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the squared error; with `clip`, the larger one of it and of the error of values within `clip` of the old
    ones."""
    plain = (values - returns).square()
    loss = plain
    if clip is not None:
        near_values = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(plain, (near_values - returns).square())
    clipped = (loss > plain).to(mask.dtype)
    metrics = {"value_clip_fraction": (clipped * mask).sum().detach(), "value_mean": (values * mask).sum().detach()}
    return 0.5 * torch.where(mask.bool(), loss, 0.0).sum(), metrics


def importance(old_logprobs: torch.Tensor, sampled_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Weight of each token [B, T] when the sampler's distribution is not the trainer's (another precision, another
    engine): their ratio, at most `cap`."""
    return (old_logprobs - sampled_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=cap)
