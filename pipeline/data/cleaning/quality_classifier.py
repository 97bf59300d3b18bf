"""A classifier of quality that a recipe trains from example sources and applies to every document.

    examples: {good: {path: good/*.jsonl}, bad: {path: raw/*.jsonl}}
    quality: {good: [good], bad: [bad], min_score: 0.4}

It is fastText's classifier (Joulin et al., 2016; as DCLM and FineWeb use it) for two classes, for which the product of
its two matrices is one vector: logistic regression over the mean of words and pairs of words. Tokens are those of
token_hashes.tokens, so Chinese needs no segmenter. The tokens of a document are hashed already, so scoring costs two
additions per token.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.core.config import Strict
from pipeline.data.cleaning.training_examples import changed_keys, example_texts, save_model

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.cleaning.token_hashes import Tokens
    from pipeline.data.sources.sources import Source

FILE = "quality.npz"
BUCKETS = 1 << 20
LONGEST = 1 << 13  # tokens of a document that are used
BATCH = 64  # documents per update
LEARNING_RATE = 0.1


class Quality(Strict):
    """A classifier of good and bad examples; documents that look more like the bad ones are dropped. Off unless
    examples are named."""

    good: list[str] = []
    """Names in `examples`: text as it should be."""
    bad: list[str] = []
    """Names in `examples`: text as it should not be; unfiltered pages of the web serve well."""
    min_score: float = Field(0.5, ge=0, le=1)
    """low_quality: documents with a smaller probability of being good. report.json shows what other bounds would have
    done."""
    epochs: int = Field(5, ge=1)
    """Passes over the examples."""
    max_examples: int = Field(50_000, ge=10)
    """Largest number of documents of each kind; the first ones are used."""

    @model_validator(mode="after")
    def _both(self):
        if bool(self.good) != bool(self.bad):
            raise ValueError("a classifier needs good and bad examples; name both, or neither")
        if (changed := changed_keys(self)) and not self.good:
            raise ValueError(f"{', '.join(changed)} has no effect without a classifier; name its examples: good, bad")
        return self


def train(examples: "dict[str, Source]", quality: Quality, folder: Path) -> None:
    """Train the classifier, if the recipe wants one and it does not exist yet. The config has checked that `examples`
    has the names."""
    if quality.good and not (folder / FILE).exists():
        good = example_texts(examples, quality.good, quality.max_examples, "quality.good")
        bad = example_texts(examples, quality.bad, quality.max_examples, "quality.bad")
        save_model(folder / FILE, **_fit(good, bad, quality.epochs))


def quality_scores(batch: "Tokens", folder: Path) -> "np.ndarray":
    """Probability of being good of each text, float64 [N]."""
    import numpy as np

    model = _load(folder / FILE)
    keys, starts = _features(batch)
    size = np.diff(starts)
    # bincount adds each text's values one after the other, so that the sum is the same in any batch; as a difference of
    # one running sum it would not be.
    sums = np.bincount(np.repeat(np.arange(len(size)), size), model["weight"][keys], minlength=len(size))
    return np.round(_sigmoid(model["bias"] + sums / np.sqrt(np.maximum(1, size))), 5)


def describe(folder: Path) -> dict[str, float]:
    """Numbers about the trained model for report.json."""
    model = _load(folder / FILE)
    return {key: round(float(model[key]), 4) for key in ("examples", "accuracy", "auc")}


@functools.lru_cache(1)
def _load(path: Path) -> dict:
    import numpy as np

    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def _features(batch: "Tokens") -> "tuple[np.ndarray, np.ndarray]":
    """Buckets of the tokens and pairs of tokens of each text, int32, and where each text's begin, int64 [N + 1]."""
    import numpy as np

    from pipeline.core.seeds import splitmix64

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    is_used = np.arange(len(owner)) - batch.starts[:-1][owner] < LONGEST
    has_next = is_used[:-1] & (owner[:-1] == owner[1:])
    pairs = splitmix64(batch.hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + batch.hashes[1:])[has_next]
    keys = np.concatenate((batch.hashes[is_used], pairs))
    text = np.concatenate((owner[is_used], owner[:-1][has_next]))
    order = np.argsort(text, kind="stable")
    starts = np.searchsorted(text[order], np.arange(len(batch.starts)))
    return (keys[order] >> np.uint64(44)).astype(np.int32), starts


def _fit(good: list[str], bad: list[str], epochs: int) -> dict:
    """Logistic regression by Adagrad (Duchi et al., 2011), both kinds with equal weight. Every tenth example is held
    out: accuracy and AUC are measured on these."""
    import numpy as np

    from pipeline.core.seeds import splitmix64
    from pipeline.data.cleaning.token_hashes import tokens

    texts, label = good + bad, np.concatenate((np.ones(len(good)), np.zeros(len(bad))))
    parts, sizes = [], []
    for begin in range(0, len(texts), 256):
        keys, starts = _features(tokens(texts[begin : begin + 256]))
        parts.append(keys)
        sizes.append(np.diff(starts))
    keys, starts = np.concatenate(parts), np.concatenate(([0], np.cumsum(np.concatenate(sizes))))
    scale = 1 / np.sqrt(np.maximum(1, np.diff(starts)))
    share = np.where(label == 1, 0.5 / len(good), 0.5 / len(bad)) * len(texts)
    order = np.argsort(splitmix64(np.arange(1, len(texts) + 1, dtype=np.uint64)))  # a fixed shuffle
    heldout, training = order[::10], np.delete(order, np.s_[::10])
    weight, squares, bias, bias_squares = np.zeros(BUCKETS), np.full(BUCKETS, 1e-8), 0.0, 1e-8
    for _ in range(epochs):
        for begin in range(0, len(training), BATCH):
            rows = training[begin : begin + BATCH]
            batch_keys = np.concatenate([keys[starts[row] : starts[row + 1]] for row in rows])
            owner = np.repeat(np.arange(len(rows)), np.diff(starts)[rows])
            logit = bias + scale[rows] * np.bincount(owner, weight[batch_keys], minlength=len(rows))
            error = (_sigmoid(logit) - label[rows]) * share[rows] / len(rows)
            buckets, inverse = np.unique(batch_keys, return_inverse=True)
            gradient = np.bincount(inverse, (error * scale[rows])[owner])
            squares[buckets] += gradient**2
            weight[buckets] -= LEARNING_RATE * gradient / np.sqrt(squares[buckets])
            bias_squares += error.sum() ** 2
            bias -= LEARNING_RATE * error.sum() / np.sqrt(bias_squares)
    logit = np.array([bias + scale[row] * weight[keys[starts[row] : starts[row + 1]]].sum() for row in heldout])
    return {
        "weight": weight.astype(np.float32),
        "bias": np.float64(bias),
        "accuracy": np.float64(((logit > 0) == label[heldout]).mean()),
        "auc": np.float64(_auc(logit, label[heldout])),
        "examples": np.int64(len(texts)),
    }


def _sigmoid(logit: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return 1 / (1 + np.exp(-logit))


def _auc(logit: "np.ndarray", label: "np.ndarray") -> float:
    """Area under the ROC curve, from ranks (Mann & Whitney, 1947)."""
    import numpy as np

    ranks = np.empty(len(logit))
    ranks[np.argsort(logit)] = np.arange(1, len(logit) + 1)
    positive = label.sum()
    negative = len(logit) - positive
    return (ranks[label == 1].sum() - positive * (positive + 1) / 2) / max(1, positive * negative)
