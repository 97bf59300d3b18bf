"""PPO's losses against hand numbers."""

import math

import pytest
import torch
from ragged import ragged

from pipeline.rl import losses


def gradient(ratio, advantage, **changes):
    """Loss, gradient by the new log-probability, and metrics of one token."""
    new = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    loss, metrics = losses.policy_loss(new - old, one * advantage, one, **{"clip": 0.2, **changes})
    return (
        float(loss.detach()),
        float(torch.autograd.grad(loss, new)[0]),
        {key: float(value) for key, value in metrics.items()},
    )


def test_policy_loss_hand_numbers():
    """24, 26: d(loss)/d(logprob) = -A * ratio inside, exactly 0 in the clipped region."""
    assert gradient(1.1, 2.0)[:2] == pytest.approx((-2.2, -2.2))
    assert gradient(1.5, 2.0)[:2] == pytest.approx((-2.4, 0.0)) and gradient(1.5, 2.0)[1] == 0
    assert gradient(0.5, 2.0)[:2] == pytest.approx((-1.0, -1.0))
    assert gradient(0.5, -2.0)[:2] == pytest.approx((1.6, 0.0)) and gradient(0.5, -2.0)[1] == 0
    assert gradient(1.5, -2.0)[:2] == pytest.approx((3.0, 3.0))
    assert gradient(1.25, 2.0, clip_high=0.28)[:2] == pytest.approx((-2.5, -2.5))
    assert gradient(1.5, 2.0)[2]["clip_fraction"] == 1 and gradient(1.1, 2.0)[2]["clip_fraction"] == 0
    assert gradient(1.5, 2.0)[2]["ratio_mean"] == pytest.approx(1.5)
    assert gradient(1.5, 2.0)[2]["approx_kl"] == pytest.approx(0.5 - math.log(1.5))


def test_dual_clip_bounds_the_loss_of_bad_tokens():
    """26: only where the advantage is negative."""
    assert gradient(10.0, -2.0)[0] == pytest.approx(20.0)
    assert gradient(10.0, -2.0, dual_clip=3.0)[:2] == pytest.approx((6.0, 0.0))
    assert gradient(10.0, 2.0, dual_clip=3.0)[:2] == gradient(10.0, 2.0)[:2]
    assert gradient(2.0, -2.0, dual_clip=3.0)[:2] == gradient(2.0, -2.0)[:2]


def test_log_ratios_are_bounded():
    """25."""
    new = torch.tensor([[0.0, -1e4]], requires_grad=True)
    loss, _ = losses.policy_loss(
        new - torch.tensor([[-1e4, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2), clip=0.2
    )
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(new.grad).all()


def test_rows_with_wild_ratios_carry_no_loss():
    """35: counted in tokens, whatever the micro-batch; a number that is none is left for the engine to refuse."""
    new = torch.tensor([[3.0, 4.0], [0.1, 0.0]], requires_grad=True)
    loss, metrics = losses.policy_loss(new, -torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0)
    loss.backward()
    assert (new.grad[0] == 0).all() and (new.grad[1] != 0).all() and metrics["skipped_fraction"] == 2
    loss, _ = losses.policy_loss(new * math.nan, torch.ones(2, 2), torch.ones(2, 2), clip=0.2, ratio_limit=10.0)
    assert loss.isnan()


def test_importance_weights_are_bounded():
    """37: a sampler of another precision is corrected token by token, up to a cap."""
    weights = losses.importance(torch.tensor([[0.0, -1.0, 5.0]]), torch.tensor([[0.0, -1.5, 0.0]]), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[1.0, math.exp(0.5), 2.0]]))
    one = torch.ones(1, 3)
    loss, _ = losses.policy_loss(one * 0, one, one, clip=0.2, weights=weights)
    assert float(loss) == pytest.approx(-float(weights.sum()))


def test_value_loss_hand_numbers():
    """27: half the larger of two squares."""
    values, old, returns = (
        torch.tensor([[1.0, 0.1, 9.0]]),
        torch.tensor([[0.0, 0.0, 0.0]]),
        torch.tensor([[2.0, 2.0, 0.0]]),
    )
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=0.2)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 1
    loss, metrics = losses.value_loss(values, old, returns, torch.tensor([[1.0, 1.0, 0.0]]), clip=None)
    assert float(loss) == pytest.approx(0.5 * (1.0 + 1.9**2)) and float(metrics["value_clip_fraction"]) == 0


def test_loss_sums_do_not_depend_on_how_rows_are_divided():
    """28: rows one by one give the same sum and gradient as together, of uneven lengths."""
    (new, old, advantage, values), mask, _ = ragged()
    for function in (
        lambda x, rows: losses.policy_loss(
            x[rows] - old[rows], advantage[rows], mask[rows], clip=0.2, dual_clip=3.0, ratio_limit=10.0
        )[0],
        lambda x, rows: losses.value_loss(x[rows], old[rows], values[rows], mask[rows], clip=0.2)[0],
    ):
        whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
        function(whole, slice(None)).backward()
        for row in range(len(new)):
            function(parts, slice(row, row + 1)).backward()
        torch.testing.assert_close(whole.grad, parts.grad, rtol=1e-12, atol=0)
        assert (whole.grad[mask == 0] == 0).all()
