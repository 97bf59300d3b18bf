"""KL divergence to the reference: estimators from samples, and the controller of its coefficient."""

from typing import Literal

import torch

Estimator = Literal["k1", "k2", "k3"]


def estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: Estimator) -> torch.Tensor:
    """Per-token estimates of KL(policy || reference), of the shape of its inputs, from tokens that the policy sampled
    (Schulman, 2020).

    k1 = log(p/q): unbiased, may be negative; the right one in a reward.
    k2 = log(p/q)^2 / 2: biased; its gradient is that of the KL.
    k3 = q/p - 1 - log(q/p): unbiased, never negative, smaller variance where the two are close.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    # Beyond 20 the exponential is larger than any reward and soon infinite.
    inverse = (-log_ratio).clamp(-20, 20)
    return inverse.exp() - 1 - inverse


def adapted(coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """The next KL coefficient: higher if the measured `kl` (nats per response) is above `target`, lower if it is below,
    by at most 20% of samples/horizon (Ziegler et al., 2019, section 2.2)."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / horizon)
