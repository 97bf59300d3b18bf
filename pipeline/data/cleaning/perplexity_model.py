"""An n-gram language model that a recipe trains from example sources; documents that it finds improbable are dropped.

    examples: {good: {path: good/*.jsonl}}
    perplexity: {like: [good], max_en: 3000, max_zh: 400}

Tokens are those of token_hashes.tokens, hashed into buckets; 1-, 2- and 3-grams are interpolated with fixed weights
(Jelinek & Mercer, 1980).
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

FILE = "perplexity.npz"
BUCKETS = 1 << 22
# Weights of 1-, 2- and 3-grams. They move the perplexity of all documents together, and so the threshold but not the
# order.
WEIGHTS = (0.15, 0.35, 0.5)


class Perplexity(Strict):
    """A language model of runs of three tokens; documents that it finds improbable are dropped. Off unless examples are
    named."""

    like: list[str] = []
    """Names in `examples`: text like the corpus should be."""
    max_en: float | None = Field(None, gt=1)
    """high_perplexity: English documents with a higher perplexity per token; null keeps them."""
    max_zh: float | None = Field(None, gt=1)
    """The same for Chinese, where a token is a character."""
    max_examples: int = Field(200_000, ge=1)
    """Largest number of documents; the first ones are used."""

    @model_validator(mode="after")
    def _trained(self):
        if (changed := changed_keys(self)) and not self.like:
            raise ValueError(f"{', '.join(changed)} has no effect without a language model; name its examples: like")
        return self


def train(examples: "dict[str, Source]", perplexity: Perplexity, folder: Path) -> None:
    """Train the model, if the recipe wants one and it does not exist yet. The config has checked that `examples` has
    the names."""
    if perplexity.like and not (folder / FILE).exists():
        texts = example_texts(examples, perplexity.like, perplexity.max_examples, "perplexity.like")
        save_model(folder / FILE, **_fit(texts))


def perplexities(batch: "Tokens", folder: Path) -> "np.ndarray":
    """Perplexity per token of each text, float64 [N]; NaN for an empty one."""
    import numpy as np

    model = _load(folder / FILE)
    ngrams, owner = _ngrams(batch)
    counts = [
        np.where(keys >= 0, table[np.maximum(keys, 0)], 0).astype(np.float64)
        for keys, table in zip(ngrams, model["counts"], strict=True)
    ]
    total, kinds = float(model["total"]), float(model["kinds"])
    probability = WEIGHTS[0] * (counts[0] + 0.5) / (total + 0.5 * (kinds + 1))
    for order in (1, 2):
        context = np.concatenate(([0.0], counts[order - 1][:-1]))  # the shorter run that ends one token earlier
        conditional = np.divide(
            np.minimum(counts[order], context),
            context,
            out=np.zeros(len(context)),
            where=(context > 0) & (ngrams[order] >= 0),
        )
        probability = probability + WEIGHTS[order] * conditional
    size = np.diff(batch.starts)
    with np.errstate(invalid="ignore"):
        sums = np.bincount(owner, -np.log(probability), minlength=len(size))
        mean = sums / np.where(size > 0, size, np.nan)
    return np.round(np.exp(mean), 2)


def describe(folder: Path) -> dict[str, float]:
    """Numbers about the trained model for report.json."""
    model = _load(folder / FILE)
    return {key: round(float(model[key]), 4) for key in ("examples", "total")}


@functools.lru_cache(1)
def _load(path: Path) -> dict:
    import numpy as np

    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def _fit(texts: list[str]) -> dict:
    """Counts of each bucket of 1-, 2- and 3-grams, uint32 [3, BUCKETS], and their sums."""
    import numpy as np

    from pipeline.data.cleaning.token_hashes import tokens

    counts = np.zeros((3, BUCKETS), np.int64)
    for begin in range(0, len(texts), 256):
        ngrams, _ = _ngrams(tokens(texts[begin : begin + 256]))
        for order, keys in enumerate(ngrams):
            counts[order] += np.bincount(keys[keys >= 0], minlength=BUCKETS)
    return {
        "counts": counts.astype(np.uint32),
        "total": np.int64(counts[0].sum()),
        "kinds": np.int64((counts[0] > 0).sum()),
        "examples": np.int64(len(texts)),
    }


def _ngrams(batch: "Tokens") -> "tuple[list[np.ndarray], np.ndarray]":
    """Buckets of the 1-, 2- and 3-gram that ends at each token (-1 where the text begins later), and the text of each
    token."""
    import numpy as np

    from pipeline.core.seeds import splitmix64

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    place = np.arange(len(owner)) - batch.starts[:-1][owner]
    ngrams, rolled = [], batch.hashes
    for order in range(3):
        if order:
            padding = np.zeros(min(order, len(owner)), np.uint64)
            earlier = np.concatenate((padding, batch.hashes[: len(owner) - order]))
            rolled = earlier * np.uint64(0xD6E8FEB86659FD93 + 2 * order) + rolled
        ngrams.append(np.where(place >= order, (splitmix64(rolled) >> np.uint64(42)).astype(np.int64), -1))
    return ngrams, owner
