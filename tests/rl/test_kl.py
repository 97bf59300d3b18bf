"""KL estimators against the exact value, and the controller by hand."""

import math

import pytest
import torch

from pipeline.rl import kl


def test_kl_estimators_against_the_exact_value():
    """17: on a categorical over 5 tokens, 200,000 draws, within 4 standard errors; k2 within its bias."""
    source = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 5, generator=source, dtype=torch.float64) * 0.4).softmax(-1)
    exact = float((p * (p / q).log()).sum())
    draws = torch.multinomial(p, 200_000, replacement=True, generator=source)
    for name in ("k1", "k3"):
        values = kl.estimate(p.log()[draws], q.log()[draws], name)
        assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / math.sqrt(len(draws)), name
    assert abs(float(kl.estimate(p.log()[draws], q.log()[draws], "k2").mean()) - exact) < 0.3 * exact
    assert float(kl.estimate(p.log(), q.log(), "k3").min()) >= 0 > float(kl.estimate(p.log(), q.log(), "k1").min())
    assert torch.isfinite(kl.estimate(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), "k3")).all()


def test_kl_estimators_differ_in_gradient():
    """17: of k1 the expected gradient is 0, of k2 that of the KL itself; so k1 belongs into the reward and k2 into a
    loss."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    p = logits.softmax(-1)
    exact = torch.autograd.grad((p * (p.log() - q.log())).sum(), logits, retain_graph=True)[0]
    found = {}
    for name in ("k1", "k2", "k3"):
        found[name] = torch.autograd.grad(
            (p.detach() * kl.estimate(p.log(), q.log(), name)).sum(), logits, retain_graph=True
        )[0]
    torch.testing.assert_close(found["k1"], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found["k2"], exact)
    assert not torch.allclose(found["k3"], exact)


def test_kl_controller():
    """18: at twice the target the coefficient rises by 0.2 n / horizon, at the target it stays."""
    assert kl.adapted(0.1, 12.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.2 * 64 / 1000))
    assert kl.adapted(0.1, 6.0, 6.0, 1000, 64) == 0.1
    assert kl.adapted(0.1, 6.3, 6.0, 1000, 64) == pytest.approx(0.1 * (1 + 0.05 * 64 / 1000))
    assert kl.adapted(0.1, 0.0, 6.0, 1000, 64) == pytest.approx(0.1 * (1 - 0.2 * 64 / 1000))
