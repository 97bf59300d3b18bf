"""Rewards per token against hand numbers."""

import numpy as np
import torch
from ragged import ragged

from pipeline.rl import rewards


def test_rewards_of_a_row_sum_to_score_minus_kl():
    """16."""
    (logprobs, ref, _, _), mask, lengths = ragged()
    scores = torch.linspace(-2, 2, 5, dtype=torch.float64)
    made = rewards.per_token(scores, logprobs, ref, mask, kl_coef=0.1, estimator="k1")
    torch.testing.assert_close(made.sum(1), scores - 0.1 * ((logprobs - ref) * mask).sum(1))
    assert (made[mask == 0] == 0).all()
    for row, length in enumerate(lengths):
        torch.testing.assert_close(made[row, : length - 1], -0.1 * (logprobs - ref)[row, : length - 1])


def test_clip_comes_before_the_penalties():
    """15, 19: an outlier yields the clip value; a response without a stop token loses the penalty on top, others
    nothing."""
    scores, stopped = torch.tensor([1e4, -1e4, 0.5, 0.5]), torch.tensor([True, True, True, False])
    assert rewards.shaped(scores, stopped, clip=5.0, missing_eos_penalty=1.0).tolist() == [5.0, -5.0, 0.5, -0.5]
    assert rewards.shaped(scores, stopped, clip=None, missing_eos_penalty=0.0).tolist() == scores.tolist()


def test_calibration_gives_mean_0_and_deviation_1():
    """13."""
    scores = (torch.randn(300, generator=torch.Generator().manual_seed(0)) * 7 - 40).tolist()
    mean, deviation = rewards.calibration(scores)
    calibrated = (np.array(scores) - mean) / deviation
    assert abs(calibrated.mean()) < 1e-6 and abs(calibrated.std() - 1) < 1e-6
    assert rewards.calibration([3.0, 3.0]) == (3.0, 1.0)
