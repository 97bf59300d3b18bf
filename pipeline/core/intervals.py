"""95% intervals of the numbers that a stage reports at its end, their wording, and a warning if nothing was learned."""

import math
from collections.abc import Sequence

NORMAL = 1.959964  # 97.5% quantile of the normal distribution


def wilson(share: float, count: int, z: float = NORMAL) -> tuple[float, float]:
    """95% interval of a proportion (Wilson, 1927): sensible for few pairs and for shares of 0 and 1, where the
    normal approximation has no width."""
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(count: int, total: int) -> dict:
    """`count` of `total` (at least 1) as the figures of a report: rate, its 95% interval (low, high), and n."""
    low, high = wilson(count / total, total)
    return {"rate": count / total, "low": low, "high": high, "n": total}


def student(degrees: int) -> float:
    """97.5% quantile of Student's t distribution with whole degrees of freedom, to 1e-6, by bisection of its closed
    form (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""

    def inside(t: float) -> float:  # probability of a value between -t and t
        angle = math.atan(t / math.sqrt(degrees))
        cosine = math.cos(angle)
        total, term = 0.0, 1.0 if degrees % 2 == 0 else cosine
        for power in range(2 + degrees % 2, degrees + 1, 2):
            total += term
            term *= cosine**2 * (power - 1) / power
        if degrees % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * total)

    low, high = 0.0, 20.0
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def mean_half(values: Sequence[float]) -> float:
    """Half of the width of the 95% interval of a mean (Student, 1908). Raises ValueError for fewer than two values."""
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values have no interval")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = student(count - 1) if count <= 200 else NORMAL
    return quantile * math.sqrt(variance / count)


def mean_change(before: Sequence, after: Sequence, resamples: int = 2000) -> tuple[float, float]:
    """95% percentile bootstrap interval (Efron & Tibshirani, 1993, chapter 13) of after's mean minus before's, over
    records that were measured twice, in the same order. A record is a pair (sum, weight), whose mean is the sum of
    sums by the sum of weights. The same numbers give the same interval. Raises ValueError for fewer than two records.
    """
    import numpy as np

    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    count = len(before)
    if count < 2 or before.shape != after.shape:
        raise ValueError(f"{count} records before and {len(after)} after have no interval")
    changes, weights = after[:, 0] - before[:, 0], after[:, 1]
    generator = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        taken = generator.integers(count, size=count)
        means.append(changes[taken].sum() / weights[taken].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def change_of(before: Sequence | None, after: Sequence | None) -> tuple[float, float] | None:
    """`mean_change`, or None where there are too few records, or none from before (a run that an older version of alma
    began)."""
    if before is None or after is None or len(before) < 2:
        return None
    return mean_change(before, after)


def changes_of(result: dict, names: Sequence[str]) -> dict[str, tuple[float, float] | None]:
    """`change_of` of each number that a training run measured on held-out records. result: what the run returned, whose
    rows are (number of each name, weight)."""
    before, after = result.get("before_rows"), result.get("after_rows")
    changes = {}
    for column, name in enumerate(names):
        columns = [rows and [(row[column], row[-1]) for row in rows] for rows in (before, after)]
        changes[name] = change_of(*columns)
    return changes


def shares(before: float, after: float, count: int) -> str:
    """A proportion before and after, with the interval of the second: "0% -> 96% (95%: 80% to 99%, n=24)"."""
    low, high = wilson(after, count)
    return f"{before:.0%} -> {after:.0%} (95%: {low:.0%} to {high:.0%}, n={count})"


def unchanged(before: float, after: float) -> bool:
    """Whether a proportion has not risen although there was room to."""
    return after <= before < 0.95


def warn(stage: str, findings: list[str]) -> list[str]:
    """Print what shows that a stage learned nothing. Returns the findings, for its metrics."""
    from pipeline.core.terminal import say

    for finding in findings:
        say(f"{stage}: WARNING: nothing was learned that can be shown: {finding}")
    return findings
