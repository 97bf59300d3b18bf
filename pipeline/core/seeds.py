"""Explicit seeds: every random choice follows from the recipe's seed, what it is for, and where it is made."""

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from a seed and any path of words and numbers, such as derive(seed, "rollout", step, sample)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def splitmix64(values: "np.ndarray") -> "np.ndarray":
    """splitmix64's finaliser (Steele, Lea & Flood, 2014) of uint64 values: every bit of a result depends on every bit
    of its value."""
    import numpy as np

    first, second = (np.uint64(multiplier) for multiplier in _MULTIPLIERS)
    values = (values ^ (values >> np.uint64(30))) * first
    values = (values ^ (values >> np.uint64(27))) * second
    return values ^ (values >> np.uint64(31))


def splitmix64_of(value: int) -> int:
    """The same of one Python integer below 2**64."""
    first, second = _MULTIPLIERS
    value = ((value ^ (value >> 30)) * first) & _MASK
    value = ((value ^ (value >> 27)) * second) & _MASK
    return value ^ (value >> 31)
