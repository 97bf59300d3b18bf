"""Win rates and their length-controlled form against a general optimiser and known answers."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.assessment.win_rates import RIDGE, interval, length_controlled

CONFIG = SimpleNamespace(seed=1, bootstrap=400)


def regression(outcomes, lengths) -> float:
    """The same likelihood, maximised by scipy."""
    optimize = pytest.importorskip("scipy.optimize")
    outcomes = np.array(outcomes)
    differences = np.array([a - b for a, b in lengths], float)
    x = np.tanh(differences / differences.std()) if differences.std() else 0 * differences

    def loss(parameters):
        a, b = parameters
        z = a + b * x
        likelihood = (outcomes * -np.logaddexp(0, -z) + (1 - outcomes) * -np.logaddexp(0, z)).sum()
        pseudo = 0.5 * (-np.logaddexp(0, -a) - np.logaddexp(0, a))
        return -(likelihood + pseudo) + RIDGE / 2 * b**2

    a = optimize.minimize(loss, [0.0, 0.0], tol=1e-12).x[0]
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("seed", range(5))
def test_against_an_optimiser(seed):
    draw = np.random.default_rng(seed)
    lengths = [(int(a), int(b)) for a, b in draw.integers(1, 400, (60, 2))]
    outcomes = draw.choice([0, 0.25, 0.5, 0.75, 1], 60, p=[0.3, 0.1, 0.2, 0.1, 0.3]).tolist()
    found = length_controlled(outcomes, lengths, CONFIG, "x")
    assert found["rate"] == pytest.approx(regression(outcomes, lengths), abs=1e-5)
    assert found["low"] < found["rate"] < found["high"]


def test_a_judge_that_only_likes_length():
    """Ours is longer on three prompts of four and wins exactly these: 75%, and 50% at equal length."""
    lengths = [(300, 100)] * 75 + [(100, 300)] * 25
    outcomes = [1.0] * 75 + [0.0] * 25
    assert interval(outcomes, CONFIG, "x")["rate"] == 0.75
    found = length_controlled(outcomes, lengths, CONFIG, "x")
    assert found["rate"] == pytest.approx(0.5, abs=0.06)


def test_equal_lengths_and_one_side_only():
    outcomes = [1.0] * 30 + [0.0] * 10
    found = length_controlled(outcomes, [(5, 5)] * 40, CONFIG, "x")
    assert found["rate"] == pytest.approx(30.5 / 41, abs=1e-9)
    found = length_controlled([1.0] * 20, [(9, 3), (3, 9)] * 10, CONFIG, "x")
    assert 0.9 < found["rate"] < 1 and np.isfinite(list(found.values())).all()
    assert length_controlled([0.5], [(4, 9)], CONFIG, "x")["rate"] == pytest.approx(0.5, abs=1e-6)
