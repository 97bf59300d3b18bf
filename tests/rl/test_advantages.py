"""GAE against its definition, whitening, explained variance."""

import numpy as np
import pytest
import torch
from ragged import ragged

from pipeline.rl import advantages


def slow_gae(rewards_T, values_T, gamma, lambda_):
    """The definition: sum over later TD errors, O(T^2), one row without padding."""
    length = len(rewards_T)
    deltas = [rewards_T[t] + gamma * (values_T[t + 1] if t + 1 < length else 0.0) - values_T[t] for t in range(length)]
    return [sum((gamma * lambda_) ** (later - t) * deltas[later] for later in range(t, length)) for t in range(length)]


@pytest.mark.parametrize("gamma, lambda_", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_against_its_definition(gamma, lambda_):
    """21, 22: rows of different lengths, padding full of numbers that must not count; returns are advantages +
    values before whitening."""
    (rewards_BT, values_BT, _, _), mask, lengths = ragged()
    found, returns = advantages.gae(rewards_BT * mask, values_BT, mask, gamma=gamma, lambda_=lambda_)
    for row, length in enumerate(lengths.tolist()):
        wanted = slow_gae(rewards_BT[row, :length].tolist(), values_BT[row, :length].tolist(), gamma, lambda_)
        np.testing.assert_allclose(found[row, :length], wanted, atol=1e-12)
        np.testing.assert_allclose(
            returns[row, :length], np.array(wanted) + values_BT[row, :length].numpy(), atol=1e-12
        )
        if (gamma, lambda_) == (1.0, 1.0):
            np.testing.assert_allclose(
                returns[row, :length], np.cumsum(rewards_BT[row, :length].numpy()[::-1])[::-1], atol=1e-12
            )
        if lambda_ == 0.0:
            np.testing.assert_allclose(
                found[row, length - 1], rewards_BT[row, length - 1] - values_BT[row, length - 1], atol=1e-12
            )
    assert (found[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_gae_hand_numbers():
    found, returns = advantages.gae(
        torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]]), torch.ones(1, 3), gamma=1.0, lambda_=0.5
    )
    # TD errors -0.25, 0.5, 0.25
    torch.testing.assert_close(found, torch.tensor([[-0.25 + 0.5 * (0.5 + 0.125), 0.5 + 0.125, 0.25]]))
    torch.testing.assert_close(returns, found + torch.tensor([[0.5, 0.25, 0.75]]))


def test_whitening():
    """20: over the tokens under the mask; advantages lose their mean, rewards keep it."""
    (values, _, _, _), mask, _ = ragged()
    whitened = advantages.whiten(values + 3, mask)
    kept = whitened[mask.bool()]
    assert abs(kept.mean()) < 1e-9 and abs(kept.var(correction=0) - 1) < 1e-6 and (whitened[mask == 0] == 0).all()
    shifted = advantages.whiten(values + 3, mask, shift_mean=False)[mask.bool()]
    torch.testing.assert_close(shifted.mean(), (values + 3)[mask.bool()].mean())
    torch.testing.assert_close(advantages.whiten(values * 0 + 2, mask), values * 0)


def test_explained_variance():
    (values, _, _, _), mask, _ = ragged()
    assert advantages.explained_variance(values, values, mask) == 1
    assert advantages.explained_variance(values * 0, values, mask) == pytest.approx(0)
    assert advantages.explained_variance(-values, values, mask) < -1
    assert advantages.explained_variance(values, values * 0, mask) == 0
