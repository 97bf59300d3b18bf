"""Win rates of pairs of answers, with intervals, and what they would be for answers of equal length."""

from pipeline.core.seeds import derive

ITERATIONS = 30  # Newton's method; it has converged after about eight
RIDGE = 0.01  # on the weight of the length, which is unbounded where length alone decides


def interval(outcomes: list[float], config, name: str) -> dict:
    """The mean of outcomes (1: won, 0.5: tie, 0: lost), with a 95% percentile bootstrap interval over prompts (Efron &
    Tibshirani, 1993, ch. 13)."""
    import numpy as np

    outcomes = np.array(outcomes)
    low, high = np.quantile(outcomes[_resamples(len(outcomes), config, name)].mean(1), [0.025, 0.975])
    return {
        "rate": float(outcomes.mean()),
        "low": float(low),
        "high": float(high),
        "ties": float((outcomes == 0.5).mean()),
        "prompts": len(outcomes),
    }


def _resamples(count: int, config, name: str):
    """Places of the prompts in each resample, (resamples, count)."""
    import numpy as np

    return np.random.default_rng(derive(config.seed, "bootstrap", name)).integers(count, size=(config.bootstrap, count))


def length_controlled(outcomes: list[float], lengths: list[tuple[int, int]], config, name: str) -> dict:
    """The win rate that a logistic regression on the difference of lengths predicts for no difference (Dubois et al.,
    2024, without the difficulty of instructions): outcome ~ sigmoid(a + b tanh(d / std(d))), of which sigmoid(a), with
    a 95% percentile bootstrap interval.

    lengths: characters of our and of their answer. One more prompt with answers of equal length that is half won keeps
    a finite where all are won.
    """
    import numpy as np

    differences = np.array([ours - theirs for ours, theirs in lengths], float)
    spread = differences.std()
    features = np.tanh(differences / spread) if spread else np.zeros(len(differences))
    outcomes = np.array(outcomes)
    counts = np.ones(
        (config.bootstrap + 1, len(outcomes))
    )  # how often each prompt is in each resample; first: all once
    for row, places in enumerate(_resamples(len(outcomes), config, name), 1):
        counts[row] = np.bincount(places, minlength=len(outcomes))
    rates = 1 / (1 + np.exp(-_intercepts(outcomes, features, counts)))
    low, high = np.quantile(rates[1:], [0.025, 0.975])
    return {"rate": float(rates[0]), "low": float(low), "high": float(high)}


def _intercepts(outcomes, features, counts):
    """a of each resample, by Newton's method on a and b."""
    import numpy as np

    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(ITERATIONS):
        shares = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * features)))
        at_zero = 1 / (1 + np.exp(-a))
        residuals = counts * (outcomes - shares)
        slopes = counts * shares * (1 - shares)
        gradient_a = residuals.sum(1) + (0.5 - at_zero)
        gradient_b = (residuals * features).sum(1) - RIDGE * b
        aa = slopes.sum(1) + at_zero * (1 - at_zero)
        ab = (slopes * features).sum(1)
        bb = (slopes * features**2).sum(1) + RIDGE
        determinant = aa * bb - ab**2
        # A step is at most 1, so that it does not leave the region where Newton's method converges.
        a = a + np.clip((bb * gradient_a - ab * gradient_b) / determinant, -1, 1)
        b = b + np.clip((aa * gradient_b - ab * gradient_a) / determinant, -1, 1)
    return a
