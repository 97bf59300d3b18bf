"""Near duplicates by MinHash and locality-sensitive hashing (Broder, 1997; FineWeb's parameters: Penedo et al., 2024,
section 3.4).

14 bands of 8 rows over runs of five tokens find a pair of Jaccard similarity s with probability 1 - (1 - s**8)**14:
0.77 at 0.75, 0.92 at 0.8, 0.99 at 0.85. Bands alone would also merge one pair in nine at 0.5 to 0.6, so a pair is
accepted only if its complete signatures agree in `similarity` of the 112 places, whose standard error is
sqrt(s (1 - s) / 112), at most 0.047.

Signatures are computed in numpy: 112 hash functions of 1.5 million shingles take 0.06 CPU-s. rensa, a library in Rust,
takes longer, and its signatures changed from one version to the next, and with them what a recipe keeps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Strict, refuse_unused

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np


EMPTY = 0xFFFFFFFF  # every row of the signature of a text without tokens


class Near(Strict):
    """Near duplicates: MinHash of runs of tokens, in bands."""

    bands: int = Field(14, ge=1, le=256)
    """Bands of the signature; a pair is compared if all rows of one band are equal."""
    rows: int = Field(8, ge=1, le=64)
    """Hash functions per band. A pair of similarity s is compared with probability 1 - (1 - s**rows)**bands."""
    shingle: int = Field(5, ge=1, le=64)
    """Tokens per run; a CJK character is a token."""
    similarity: float = Field(0.7, ge=0, le=1)
    """Estimated Jaccard similarity from which on a compared pair counts as near duplicates; 0 accepts all compared
    pairs, as FineWeb did."""

    @model_validator(mode="after")
    def _affordable(self):
        if self.bands * self.rows > 1024:
            raise ValueError(
                f"bands x rows is {self.bands * self.rows} hash functions, 4 bytes each per document; expected at most"
                " 1024"
            )
        return self


class Dedup(Strict):
    """What counts as a duplicate, which duplicate is kept, and which repeated text is removed from other documents."""

    exact: bool = True
    """Remove documents whose normalised text equals another one's. `false` keeps copies, and needs `near: false`."""
    url: str | None = None
    """Field or template of a record's address: of documents with equal addresses (without scheme, `www.`, fragment
    and closing slash) one is kept. The shards then carry a hash of it, `address`."""
    near: Near | None = Near()
    """Remove near duplicates; `false` keeps them."""
    keep: Literal["any", "first", "longest", "quality"] = "any"
    """Which document of a cluster is kept. any: the one with the smallest record id, whatever the order and the names
    of sources; first: by name of source and place in it; longest: most bytes; quality: the best score of the
    classifier that `quality` trains."""
    prefer: list[str] = []
    """Sources whose documents are kept rather than others', the most preferred first; `keep` decides within a
    source."""
    upsample: dict[int, int] = {}
    """Smallest cluster size -> how often the document that is kept is written to train: {3: 2, 100: 3}. Text that was
    copied widely is often worth more (FineWeb2, section 5)."""
    lines: int | None = Field(None, ge=1)
    """Remove lines of at least this many tokens that occurred earlier, in this document or another one; the first
    occurrence stays (CCNet: Wenzek et al., 2020, section 3.1)."""
    runs: int | None = Field(None, ge=8)
    """Remove runs of at least this many tokens that occurred earlier anywhere; the first occurrence stays. 50 is usual
    (Lee et al., 2022, section 4.1)."""

    @field_validator("near", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if value is False:
            return None
        return Near() if value is True else value

    @field_validator("upsample")
    @classmethod
    def _counts(cls, value: dict[int, int]) -> dict[int, int]:
        if any(size < 1 or times < 1 for size, times in value.items()):
            raise ValueError(f"maps a cluster size to a number of copies, both at least 1; found {value}")
        return value

    @model_validator(mode="after")
    def _copies_are_alike(self):
        if self.near and not self.exact:
            raise ValueError(
                "exact: false keeps copies, but near, which is on by default, removes them as documents of similarity"
                " 1; set near: false, too, to keep copies, or remove exact"
            )
        return self

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not (self.exact or self.near or self.url):
            for key in ("keep", "prefer", "upsample"):
                refuse_unused(self, key, "is about duplicates, and exact, near and url look for none")
        return self


def multipliers(number: int) -> "np.ndarray":
    """a, uint32 [number], of the hash functions x -> a x mod 2**32 for odd x that are well mixed already: each permutes
    random numbers, so it needs no offset. They never change.

    Over 2,000 pairs of sets of 300, the estimates have mean 0.399, 0.602, 0.851 and deviation 0.047, 0.045, 0.034 at
    0.399, 0.6, 0.852; theory says 0.046, 0.046, 0.034.
    """
    import numpy as np

    from pipeline.core.seeds import splitmix64

    return (splitmix64(np.arange(1, 1 + number, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def minhash(hashes: "np.ndarray", starts: "np.ndarray", number: int = 112) -> "np.ndarray":
    """MinHash signatures, uint32 [N, number], of N sets of shingle hashes (see token_hashes.shingles). That of an empty
    set has all bits set."""
    import numpy as np

    signatures = np.full((number, len(starts) - 1), EMPTY, np.uint32)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        factors = multipliers(number)
        # odd, because zero would be the minimum of every function; half the width is twice the speed
        upper = (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        begins, values, minima = starts[filled], np.empty_like(upper), np.empty(len(filled), np.uint32)
        for row in range(number):
            np.multiply(upper, factors[row], out=values)
            signatures[row, filled] = np.minimum.reduceat(values, begins, out=minima)
    return np.ascontiguousarray(signatures.T)


def sign_texts(texts: list[str], near: Near) -> "np.ndarray":
    """Signatures of normalised texts, uint32 [N, bands * rows]."""
    from pipeline.data.cleaning.token_hashes import shingles, tokens

    return minhash(*shingles(tokens(texts), near.shingle), near.bands * near.rows)


def near_duplicates(texts: list[str], similarity: float = 0.7, near: Near | None = None) -> "np.ndarray":
    """Cluster of each text: the smallest index of a text in its cluster, int64 [N]. For texts that fit in memory, which
    are hashed about a megabyte at a time."""
    import tempfile

    import numpy as np

    near = near or Near(similarity=similarity)
    parts, batch, length = [np.zeros((0, near.bands * near.rows), np.uint32)], [], 0
    for index, text in enumerate(texts):
        batch.append(text)
        length += len(text)
        if length > 1 << 20 or index == len(texts) - 1:
            parts.append(sign_texts(batch, near))
            batch, length = [], 0
    labels, is_chosen = np.arange(len(texts)), np.ones(len(texts), bool)
    with tempfile.TemporaryDirectory() as scratch:
        join_near_duplicates(
            labels, np.concatenate(parts), np.arange(len(texts)), is_chosen, near, Path(scratch) / "bands"
        )
    return labels


# ---- comparing signatures --------------------------------------------------------------------------------------------


def join_near_duplicates(
    labels: "np.ndarray",
    signatures: "np.ndarray",
    rows: "np.ndarray",
    is_chosen: "np.ndarray",
    near: Near,
    scratch: Path,
) -> None:
    """Join near duplicates among the chosen nodes: `labels` as for external_sort.union; the signature of a node is
    signatures[rows[node]].

    Texts without tokens are not like any other. If the four arrays are on disk, memory use does not grow with the
    number of nodes.
    """
    import numpy as np

    from pipeline.data.dedup.external_sort import blocks, find_roots, grouped_by_key, union

    for band in range(near.bands):
        keys = _band_keys(signatures, rows, is_chosen, near, band)
        for part in grouped_by_key(keys, len(labels), scratch):
            for a, b in _pairs(part):
                is_new = labels[a] != labels[b]
                a, b = a[is_new], b[is_new]
                if near.similarity:
                    is_similar = (signatures[rows[a]] == signatures[rows[b]]).mean(1) >= near.similarity
                    a, b = a[is_similar], b[is_similar]
                union(labels, a, b)
    for part in blocks(len(labels)):
        find_roots(labels, np.arange(part.start, part.stop))


def _band_keys(
    signatures: "np.ndarray", rows: "np.ndarray", is_chosen: "np.ndarray", near: Near, band: int
) -> "Iterator[np.ndarray]":
    """(key of the band, node), uint64 [n, 2], some nodes at a time."""
    import numpy as np

    from pipeline.core.seeds import splitmix64
    from pipeline.data.dedup.external_sort import blocks

    for part in blocks(len(rows), 1 << 16):
        nodes = part.start + np.flatnonzero(is_chosen[part])
        band_rows = np.asarray(signatures[rows[nodes], band * near.rows : (band + 1) * near.rows])
        keys = np.zeros(len(nodes), np.uint64)
        for column in range(near.rows):
            keys = splitmix64(keys + band_rows[:, column] + np.uint64(0x9E3779B97F4A7C15))
        has_tokens = (band_rows != EMPTY).any(1)
        yield np.stack((keys, nodes.astype(np.uint64)), axis=1)[has_tokens]


def _pairs(part: "np.ndarray") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Pairs of nodes with equal keys: each member of a bucket with the bucket's first one and with its neighbour. Their
    number is linear in the size of the bucket; that of all pairs would be quadratic."""
    import numpy as np

    from pipeline.data.dedup.external_sort import run_starts

    order = np.argsort(part[:, 0], kind="stable")
    nodes, starts = part[order, 1].astype(np.int64), run_starts(part[order, 0])
    members = np.flatnonzero(starts != np.arange(len(order)))
    for others in (starts[members], members - 1):
        for begin in range(0, len(members), 1 << 16):
            some = slice(begin, begin + (1 << 16))
            yield nodes[others[some]], nodes[members[some]]
