"""Two models that a recipe trains from example sources and applies: a classifier of quality, and an n-gram language
model for perplexity. Both are numpy over hashed tokens.

    examples: {good: {path: good/*.jsonl}, bad: {path: raw/*.jsonl}}
    quality: {good: [good], bad: [bad], min_score: 0.4}
    perplexity: {like: [good], max_en: 3000, max_zh: 400}

The classifier is fastText's (Joulin et al., 2016; as DCLM and FineWeb use it) with the product of its two matrices as
one vector, which two classes allow: logistic regression over words and pairs of words, averaged. Tokens are those of
text.tokens, so Chinese needs no segmenter. Scoring costs two additions a token, for the tokens are hashed already.
"""

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic
from pipeline.core.terminal import many

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.cleaning.text_arrays import Tokens
    from pipeline.data.sources.sources import Source

BUCKETS = 1 << 20
LONGEST = 1 << 13  # tokens of a document that are looked at
# Weights of 1-, 2- and 3-grams in the language model (Jelinek & Mercer, 1980). They move the perplexity of all
# documents together, and so the threshold and not the order.
MIXED = (0.15, 0.35, 0.5)


def _moved(block: Strict) -> list[str]:
    """Keys that differ from their defaults. Not those that were written: a resolved recipe writes all of them."""
    return [key for key, field in type(block).model_fields.items() if getattr(block, key) != field.default]


class Quality(Strict):
    """A classifier of two kinds of examples; documents that look more like the bad ones are left out. Off unless
    examples are named."""

    good: list[str] = []
    """Names in `examples`: text as it should be."""
    bad: list[str] = []
    """Names in `examples`: text as it should not be; unfiltered pages of the web serve well."""
    min_score: float = Field(0.5, ge=0, le=1)
    """low_quality: documents with a smaller probability of being good. The ledger says what another bound would have
    done."""
    epochs: int = Field(5, ge=1)
    """Passes over the examples."""
    max_examples: int = Field(50_000, ge=10)
    """The most documents of each kind, the first ones."""

    @model_validator(mode="after")
    def _both(self):
        if bool(self.good) != bool(self.bad):
            raise ValueError("a classifier needs good and bad examples; name both, or neither")
        if (moved := _moved(self)) and not self.good:
            raise ValueError(f"{', '.join(moved)} without a classifier does nothing; name its examples: good and bad")
        return self


class Perplexity(Strict):
    """A language model of runs of three tokens; documents that it finds improbable are left out. Off unless examples
    are named."""

    like: list[str] = []
    """Names in `examples`: text that is like what is wanted."""
    max_en: float | None = Field(None, gt=1)
    """high_perplexity: English documents with a higher perplexity a token; null keeps them."""
    max_zh: float | None = Field(None, gt=1)
    """The same for Chinese, where a token is a character."""
    max_examples: int = Field(200_000, ge=1)
    """The most documents, the first ones."""

    @model_validator(mode="after")
    def _trained(self):
        if (moved := _moved(self)) and not self.like:
            raise ValueError(f"{', '.join(moved)} without a language model does nothing; name its examples: like")
        return self


# ---- training --------------------------------------------------------------------------------------------------------


def train(examples: "dict[str, Source]", quality: Quality, perplexity: Perplexity, folder: Path) -> None:
    """Train what is asked for and is not there yet: quality.npz, perplexity.npz, published whole. The config has
    checked that `examples` has what they name."""
    if quality.good and not (folder / "quality.npz").exists():
        both = [
            _texts(examples, names, quality.max_examples, where)
            for names, where in ((quality.good, "quality.good"), (quality.bad, "quality.bad"))
        ]
        _save(folder / "quality.npz", **_classifier(*both, quality.epochs))
    if perplexity.like and not (folder / "perplexity.npz").exists():
        _save(
            folder / "perplexity.npz",
            **_counts(_texts(examples, perplexity.like, perplexity.max_examples, "perplexity.like")),
        )


def _texts(examples: "dict[str, Source]", names: list[str], most: int, where: str) -> list[str]:
    from pipeline.data.cleaning.text_arrays import normalise
    from pipeline.data.sources.csv_files import REPEATED
    from pipeline.data.sources.formats import Bad
    from pipeline.data.sources.records import read, text_of
    from pipeline.data.sources.sources import needed_fields
    from pipeline.data.sources.templates import MissingField

    found = []
    for name in names:
        for item in read(examples[name], name, "examples", needed_fields(examples[name])):
            if isinstance(item, Bad):
                if item.reason == REPEATED:  # a whole file
                    raise UserError(f"examples.{name}: {item.place}: {item.reason} ({item.raw})")
                continue
            try:
                text = normalise(text_of(examples[name], item).encode(errors="replace").decode())
            except MissingField:
                continue
            if text:
                found.append(text)
            if len(found) >= most:
                return found
    if len(found) < 10:
        raise UserError(
            f"{where}: {', '.join(names)} gave {many(len(found), 'text')}, at least 10 are needed; look at the"
            " sources' `text`"
        )
    return found


def _save(path: Path, **arrays) -> None:
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def _features(batch: "Tokens") -> "tuple[np.ndarray, np.ndarray]":
    """Buckets of the tokens and pairs of tokens of each text, int32, and where each text's begin, int64 [N + 1]."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import mixed

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    near = np.arange(len(owner)) - batch.starts[:-1][owner] < LONGEST
    paired = near[:-1] & (owner[:-1] == owner[1:])
    pairs = mixed(batch.hashes[:-1] * np.uint64(0x9E3779B97F4A7C15) + batch.hashes[1:])[paired]
    keys, text = np.concatenate((batch.hashes[near], pairs)), np.concatenate((owner[near], owner[:-1][paired]))
    order = np.argsort(text, kind="stable")
    return (keys[order] >> np.uint64(44)).astype(np.int32), np.searchsorted(text[order], np.arange(len(batch.starts)))


def _classifier(good: list[str], bad: list[str], epochs: int) -> dict:
    """Logistic regression by Adagrad (Duchi et al., 2011), in batches of 64, both kinds with equal weight. Every
    tenth example is held out: accuracy and AUC are of these."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import mixed, tokens

    texts, label = good + bad, np.concatenate((np.ones(len(good)), np.zeros(len(bad))))
    parts, sizes = [], []
    for begin in range(0, len(texts), 256):
        keys, starts = _features(tokens(texts[begin : begin + 256]))
        parts.append(keys)
        sizes.append(np.diff(starts))
    keys, starts = np.concatenate(parts), np.concatenate(([0], np.cumsum(np.concatenate(sizes))))
    scale = 1 / np.sqrt(np.maximum(1, np.diff(starts)))
    share = np.where(label == 1, 0.5 / len(good), 0.5 / len(bad)) * len(texts)
    order = np.argsort(mixed(np.arange(1, len(texts) + 1, dtype=np.uint64)))  # a fixed shuffle
    held, used = order[::10], np.delete(order, np.s_[::10])
    weight, squares, bias, bias_squares = np.zeros(BUCKETS), np.full(BUCKETS, 1e-8), 0.0, 1e-8
    for _ in range(epochs):
        for begin in range(0, len(used), 64):
            rows = used[begin : begin + 64]
            mine = np.concatenate([keys[starts[row] : starts[row + 1]] for row in rows])
            owner = np.repeat(np.arange(len(rows)), np.diff(starts)[rows])
            logit = bias + scale[rows] * np.bincount(owner, weight[mine], minlength=len(rows))
            error = (1 / (1 + np.exp(-logit)) - label[rows]) * share[rows] / len(rows)
            seen, inverse = np.unique(mine, return_inverse=True)
            slope = np.bincount(inverse, (error * scale[rows])[owner])
            squares[seen] += slope**2
            weight[seen] -= 0.1 * slope / np.sqrt(squares[seen])
            bias_squares += error.sum() ** 2
            bias -= 0.1 * error.sum() / np.sqrt(bias_squares)
    logit = np.array([bias + scale[row] * weight[keys[starts[row] : starts[row + 1]]].sum() for row in held])
    truth = label[held]
    ranks = np.empty(len(held))
    ranks[np.argsort(logit)] = np.arange(1, len(held) + 1)
    positive = truth.sum()
    auc = (ranks[truth == 1].sum() - positive * (positive + 1) / 2) / max(1, positive * (len(held) - positive))
    return {
        "weight": weight.astype(np.float32),
        "bias": np.float64(bias),
        "accuracy": np.float64(((logit > 0) == truth).mean()),
        "auc": np.float64(auc),
        "examples": np.int64(len(texts)),
    }


def _counts(texts: list[str]) -> dict:
    """How often each bucket of 1-, 2- and 3-grams came, uint32 [3, BUCKETS * 4]."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import tokens

    table = np.zeros((3, BUCKETS * 4), np.int64)
    for begin in range(0, len(texts), 256):
        batch = tokens(texts[begin : begin + 256])
        for order, keys in enumerate(_grams(batch)[0]):
            table[order] += np.bincount(keys[keys >= 0], minlength=BUCKETS * 4)
    total = int(table[0].sum())
    return {
        "counts": table.astype(np.uint32),
        "total": np.int64(total),
        "kinds": np.int64((table[0] > 0).sum()),
        "examples": np.int64(len(texts)),
    }


def _grams(batch: "Tokens") -> "tuple[list[np.ndarray], np.ndarray]":
    """Buckets of the 1-, 2- and 3-gram that ends at each token (-1 where the text begins later), and the text of
    each token."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import mixed

    owner = np.repeat(np.arange(len(batch.starts) - 1), np.diff(batch.starts))
    place = np.arange(len(owner)) - batch.starts[:-1][owner]
    found, rolled = [], batch.hashes
    for order in range(3):
        if order:
            rolled = (
                np.concatenate((np.zeros(min(order, len(owner)), np.uint64), batch.hashes[: len(owner) - order]))
                * np.uint64(0xD6E8FEB86659FD93 + 2 * order)
                + rolled
            )
        found.append(np.where(place >= order, (mixed(rolled) >> np.uint64(42)).astype(np.int64), -1))
    return found, owner


# ---- applying --------------------------------------------------------------------------------------------------------


@functools.lru_cache(2)
def _load(path: Path) -> dict:
    import numpy as np

    with np.load(path, allow_pickle=False) as opened:
        return {name: opened[name] for name in opened.files}


def scores(batch: "Tokens", folder: Path) -> "np.ndarray":
    """Probability of being good of each text, float64 [N]."""
    import numpy as np

    model = _load(folder / "quality.npz")
    keys, starts = _features(batch)
    size = np.diff(starts)
    # bincount adds each text's values one after the other, so that the sum is the same in any batch; out of one running
    # total it would not be.
    sums = np.bincount(np.repeat(np.arange(len(size)), size), model["weight"][keys], minlength=len(size))
    logit = model["bias"] + sums / np.sqrt(np.maximum(1, size))
    return np.round(1 / (1 + np.exp(-logit)), 5)


def perplexities(batch: "Tokens", folder: Path) -> "np.ndarray":
    """Perplexity a token of each text, float64 [N]; NaN of an empty one."""
    import numpy as np

    model = _load(folder / "perplexity.npz")
    grams, owner = _grams(batch)
    counts = [
        np.where(keys >= 0, table[np.maximum(keys, 0)], 0).astype(np.float64)
        for keys, table in zip(grams, model["counts"], strict=True)
    ]
    total, kinds = float(model["total"]), float(model["kinds"])
    probability = MIXED[0] * (counts[0] + 0.5) / (total + 0.5 * (kinds + 1))
    for order in (1, 2):
        context = np.concatenate(([0.0], counts[order - 1][:-1]))  # the shorter run that ends one token earlier
        share = np.divide(
            np.minimum(counts[order], context),
            context,
            out=np.zeros(len(context)),
            where=(context > 0) & (grams[order] >= 0),
        )
        probability = probability + MIXED[order] * share
    number = len(batch.starts) - 1
    size = np.diff(batch.starts)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(owner, -np.log(probability), minlength=number) / np.where(size > 0, size, np.nan)
    return np.round(np.exp(mean), 2)


def report(folder: Path) -> dict:
    """What the models are, for the ledger."""
    found = {}
    for name, keys in (("quality", ("examples", "accuracy", "auc")), ("perplexity", ("examples", "total"))):
        if (folder / f"{name}.npz").exists():
            model = _load(folder / f"{name}.npz")
            found[name] = {key: round(float(model[key]), 4) for key in keys}
    return found
