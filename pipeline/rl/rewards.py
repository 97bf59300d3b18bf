"""From one score per response to one reward per token."""

import torch

from pipeline.rl import kl


def calibration(scores: list[float]) -> tuple[float, float]:
    """(mean, standard deviation) of the reward model on samples of the initial policy. Scores are shifted and scaled
    by them, so that clip range and KL coefficient mean the same for every reward model (Ziegler et al., 2019). If all
    scores are equal, the scale stays as it is."""
    values = torch.tensor(scores, dtype=torch.float64)
    deviation = float(values.std(correction=0))
    return float(values.mean()), deviation if deviation > 1e-6 else 1.0


def shaped(
    scores: torch.Tensor, stopped: torch.Tensor, *, clip: float | None, missing_eos_penalty: float
) -> torch.Tensor:
    """Calibrated scores [B], clipped to [-clip, clip], less the penalty where the response was cut off before a stop
    token."""
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eos_penalty * (~stopped).to(scores.dtype)


def per_token(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    kl_coef: float,
    estimator: kl.Estimator,
) -> torch.Tensor:
    """Rewards [B, T]: -kl_coef * KL estimate at each response token, and the score [B] added at the last one. Zero
    after it."""
    return at_last_token(scores, mask) - kl_coef * kl.estimate(logprobs, ref_logprobs, estimator) * mask


def at_last_token(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Rewards [B, T]: the score [B] at the last token of each response, zero elsewhere."""
    last = mask.sum(1).long() - 1
    assert bool((last >= 0).all()), "a response without tokens has no token to carry its score"
    return torch.zeros_like(mask).scatter(1, last[:, None], scores[:, None].to(mask.dtype))
