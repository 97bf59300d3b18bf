"""Explicit seeds: every random choice is drawn from one that is derived from (seed, what it is for, where it
stands)."""

import hashlib


def derive(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from a seed and any path of words and numbers, such as derive(seed, "rollout", step, sample)."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
