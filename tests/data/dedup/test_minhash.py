"""MinHash: estimates against theory and brute force, joining in parts."""

import collections
import random

import numpy as np
import pytest
from cleaned import plain_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup import external_sort
from pipeline.data.dedup.minhash import Near, join_near_duplicates, near_duplicates

LONG = [chr(0x4E00 + i) for i in range(2000)]


def test_near_duplicates_in_parts_are_those_in_one(tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    table = rng.integers(0, 2**32, (3000, 112), dtype=np.uint32)
    for i in range(0, 2000, 4):  # chains of three that share most places
        table[i + 1] = np.where(rng.random(112) < 0.9, table[i], table[i + 1])
        table[i + 2] = np.where(rng.random(112) < 0.85, table[i + 1], table[i + 2])
    found = []
    for size in (32 << 20, 1 << 12):
        monkeypatch.setattr(external_sort, "PARTITION", size)
        labels = np.arange(3000)
        join_near_duplicates(labels, table, np.arange(3000), np.ones(3000, bool), Near(), tmp_path / "bands")
        found.append(labels)
    assert np.array_equal(*found) and 400 < (found[0] != np.arange(3000)).sum() < 1100


EN = (
    "the of river water king stone light under over winter summer bread house market table letter number people morning"
    " evening garden".split()
)
LONG = [chr(0x4E00 + i) for i in range(2000)]


def english(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(EN) + str(rng.randrange(60)).replace("0", "") for _ in range(words)]


def chinese(rng: random.Random, characters: int) -> list[str]:
    return [rng.choice(LONG) for _ in range(characters)]


def plain_shingles(text: str) -> set:
    words = plain_tokens(text)
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} if words else set()


def jaccard(a: str, b: str) -> float:
    a, b = plain_shingles(a), plain_shingles(b)
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_near_duplicates_against_brute_force(language):
    """Planted edits of every size. Recall >= 0.95 at Jaccard >= 0.85, and nothing below 0.4 merged; the oracle is
    exact Jaccard over plain shingles."""
    rng = random.Random(11)
    make, join = (english, " ".join) if language == "en" else (chinese, "".join)
    texts, pairs = [], []
    for _ in range(400):
        base = make(rng, rng.randrange(80, 400))
        edited = list(base)
        for _ in range(rng.randrange(1, max(2, len(base) // 16))):
            edited[rng.randrange(len(edited))] = make(rng, 1)[0]
        if rng.random() < 0.3:
            edited = edited[: int(len(edited) * rng.uniform(0.4, 1))]
        pairs.append((len(texts), len(texts) + 1))
        texts += [join(base), join(edited)]
    labels = near_duplicates(texts)
    found = {pair: labels[pair[0]] == labels[pair[1]] for pair in pairs}
    exact = {pair: jaccard(texts[pair[0]], texts[pair[1]]) for pair in pairs}
    alike = [found[pair] for pair in pairs if exact[pair] >= 0.85]
    apart = [found[pair] for pair in pairs if exact[pair] < 0.4]
    assert len(alike) >= 40 and len(apart) >= 20, (len(alike), len(apart))
    assert np.mean(alike) >= 0.95 and not any(apart)
    for cluster in {tuple(np.flatnonzero(labels == label)) for label in set(labels.tolist())}:
        assert len(cluster) == 1 or cluster in found  # unrelated texts are never merged


@pytest.mark.parametrize("size, similarity", [(20, 0.6), (300, 0.4), (300, 0.7), (300, 0.95), (3000, 0.7)])
def test_signatures_estimate_as_theory_says(size, similarity):
    """Mean within four standard errors, deviation within a tenth of sqrt(s (1 - s) / 112), over 1,000 pairs of
    random sets: the functions are as good as independent random permutations."""
    from pipeline.data.dedup.minhash import minhash

    number, common = 1000, round(size * 2 * similarity / (1 + similarity))
    true = common / (2 * size - common)
    elements = np.random.default_rng(size).integers(0, 2**64, (number, 2 * size - common), dtype=np.uint64)
    a, b = elements[:, :size], np.concatenate((elements[:, :common], elements[:, size:]), axis=1)
    starts = np.arange(number + 1) * size
    found = (minhash(a.ravel(), starts) == minhash(b.ravel(), starts)).mean(1)
    deviation = np.sqrt(true * (1 - true) / 112)
    assert abs(found.mean() - true) < 4 * deviation / np.sqrt(number) and abs(found.std() / deviation - 1) < 0.1


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(60)))
def test_clusters_do_not_depend_on_the_order(order):
    rng = random.Random(5)
    texts = []
    for _ in range(20):
        base = english(rng, 60)
        texts += [" ".join(base), " ".join([*base[:-1], "end"]), " ".join([*base[:-9], *english(rng, 9)])]
    groups = _groups(near_duplicates(texts), range(60))
    assert _groups(near_duplicates([texts[i] for i in order]), order) == groups


def _groups(labels: np.ndarray, names) -> set:
    found = collections.defaultdict(set)
    for name, label in zip(names, labels.tolist(), strict=True):
        found[label].add(name)
    return set(map(frozenset, found.values()))
