"""Near duplicates by MinHash and locality-sensitive hashing (Broder, 1997; FineWeb's parameters: Penedo et al., 2024,
section 3.4).

14 bands of 8 rows over runs of five tokens find a pair of Jaccard similarity s with probability 1 - (1 - s**8)**14:
0.77 at 0.75, 0.92 at 0.8, 0.99 at 0.85. Bands alone would also merge one pair in nine at 0.5 to 0.6, so a pair is
believed only if its whole signatures agree in `similarity` of the 112 places, whose standard error is sqrt(s (1 - s) /
112), at most 0.047.

Signatures are numpy: 112 hash functions of 1.5 million shingles take 0.06 CPU-s. rensa, a library in Rust, takes
longer, and its signatures changed from one version to the next, and with them what a recipe keeps.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Strict

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np


class Near(Strict):
    """Near duplicates: MinHash of runs of tokens, in bands."""

    bands: int = Field(14, ge=1, le=256)
    """Bands of the signature; a pair is looked at if all rows of one band are equal."""
    rows: int = Field(8, ge=1, le=64)
    """Hash functions of a band. A pair of similarity s is looked at with probability 1 - (1 - s**rows)**bands."""
    shingle: int = Field(5, ge=1, le=64)
    """Tokens of a run; a CJK character is a token."""
    similarity: float = Field(0.7, ge=0, le=1)
    """Estimated Jaccard similarity from which a pair that was looked at is a pair of near duplicates; 0 believes the
    bands, as FineWeb did."""

    @model_validator(mode="after")
    def _affordable(self):
        if self.bands * self.rows > 1024:
            raise ValueError(
                f"bands x rows is {self.bands * self.rows} hash functions, 4 bytes each for every document; use at most"
                " 1024"
            )
        return self


class Dedup(Strict):
    """What counts as a duplicate, which of them is kept, and what is repeated within documents that are none."""

    exact: bool = True
    """Remove documents whose normalised text is that of another one. `false` keeps copies, and needs `near:
    false`."""
    url: str | None = None
    """Field or template of a record's address: of documents with equal addresses (without scheme, `www.`, fragment
    and closing slash) one is kept. The shards then carry a hash of it, `address`."""
    near: Near | None = Near()
    """Near duplicates; `false` leaves them."""
    keep: Literal["any", "first", "longest", "quality"] = "any"
    """Which document of a cluster stays. any: that of the smallest record id, whatever the order and the names of
    sources; first: by name of source and place in it; longest: most bytes; quality: the best score of the classifier
    that `quality` trains."""
    prefer: list[str] = []
    """Sources whose documents stay rather than others', the most preferred first; `keep` decides within a source."""
    upsample: dict[int, int] = {}
    """Cluster size from which on -> how often the document that stays is written to train: {3: 2, 100: 3}. What was
    copied widely is often worth more (FineWeb2, section 5)."""
    lines: int | None = Field(None, ge=1)
    """Remove lines of at least this many tokens that stood before, in this document or another one; the first stays
    (CCNet: Wenzek et al., 2020, section 3.1)."""
    runs: int | None = Field(None, ge=8)
    """Remove runs of at least this many tokens that stood before anywhere; the first stays. 50 is usual (Lee et al.,
    2022, section 4.1)."""

    @field_validator("near", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return None if value is False else Near() if value is True else value

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
                "exact: false keeps copies, and near, on by default, removes them as documents of similarity 1;"
                " give near: false, too, to keep copies, or leave exact out"
            )
        return self


def multipliers(number: int) -> "np.ndarray":
    """a, uint32 [number], of x -> a x mod 2**32, for odd x that are well mixed already: each permutes random numbers,
    so that it needs no offset; fixed for good.

    Over 2,000 pairs of sets of 300, the estimates have mean 0.399, 0.602, 0.851 and deviation 0.047, 0.045, 0.034 at
    0.399, 0.6, 0.852; theory says 0.046, 0.046, 0.034.
    """
    import numpy as np

    from pipeline.data.cleaning.text_arrays import mixed

    return (mixed(np.arange(1, 1 + number, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(1)


def signatures(hashes: "np.ndarray", starts: "np.ndarray", number: int = 112) -> "np.ndarray":
    """MinHash signatures, uint32 [N, number], of N sets of shingle hashes (see text.shingles). That of an empty set
    is all ones."""
    import numpy as np

    table = np.full((number, len(starts) - 1), 0xFFFFFFFF, np.uint32)
    filled = np.flatnonzero(np.diff(starts))
    if len(filled):
        a = multipliers(number)
        # zero would be the least under every function; half the width is twice the speed
        upper = (hashes >> np.uint64(32)).astype(np.uint32) | np.uint32(1)
        begins, values, least = starts[filled], np.empty_like(upper), np.empty(len(filled), np.uint32)
        for column in range(number):
            np.multiply(upper, a[column], out=values)
            table[column, filled] = np.minimum.reduceat(values, begins, out=least)
    return np.ascontiguousarray(table.T)


def signed(texts: list[str], near: Near) -> "np.ndarray":
    """Signatures of normalised texts, uint32 [N, bands * rows]."""
    from pipeline.data.cleaning.text_arrays import shingles, tokens

    return signatures(*shingles(tokens(texts), near.shingle), near.bands * near.rows)


def near_duplicates(texts: list[str], similarity: float = 0.7, near: Near | None = None) -> "np.ndarray":
    """Cluster of each text: the smallest index of a text in its cluster, int64 [N]. For texts that fit in memory;
    they are hashed some megabytes at a time."""
    import tempfile

    import numpy as np

    near = near or Near(similarity=similarity)
    tables, batch, length = [np.zeros((0, near.bands * near.rows), np.uint32)], [], 0
    for index, text in enumerate(texts):
        batch.append(text)
        length += len(text)
        if length > 1 << 20 or index == len(texts) - 1:
            tables.append(signed(batch, near))
            batch, length = [], 0
    labels = np.arange(len(texts))
    with tempfile.TemporaryDirectory() as scratch:
        join(
            labels,
            np.concatenate(tables),
            np.arange(len(texts)),
            np.ones(len(texts), bool),
            near,
            Path(scratch) / "bands",
        )
    return labels


def join(
    labels: "np.ndarray", table: "np.ndarray", rows: "np.ndarray", chosen: "np.ndarray", near: Near, scratch: Path
) -> None:
    """Join near duplicates among the `chosen` nodes: `labels` are those of external.union, signatures stand in
    table[rows[node]].

    Texts without tokens are like no other. Memory does not grow with the number of nodes if the four arrays are on
    disk.
    """
    import numpy as np

    from pipeline.data.dedup.external_sort import blocks, roots, together, union

    for band in range(near.bands):
        for part in together(_keys(table, rows, chosen, near, band), len(labels), scratch):
            for a, b in _pairs(part):
                apart = labels[a] != labels[b]
                a, b = a[apart], b[apart]
                if near.similarity:
                    alike = (table[rows[a]] == table[rows[b]]).mean(1) >= near.similarity
                    a, b = a[alike], b[alike]
                union(labels, a, b)
    for part in blocks(len(labels)):
        roots(labels, np.arange(part.start, part.stop))


def _keys(
    table: "np.ndarray", rows: "np.ndarray", chosen: "np.ndarray", near: Near, band: int
) -> "Iterator[np.ndarray]":
    """(key of the band, node), uint64 [n, 2], some nodes at a time."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import mixed
    from pipeline.data.dedup.external_sort import blocks

    for part in blocks(len(rows), 1 << 16):
        nodes = part.start + np.flatnonzero(chosen[part])
        piece = np.asarray(table[rows[nodes], band * near.rows : (band + 1) * near.rows])
        keys = np.zeros(len(nodes), np.uint64)
        for column in range(near.rows):
            keys = mixed(keys + piece[:, column] + np.uint64(0x9E3779B97F4A7C15))
        yield np.stack((keys, nodes.astype(np.uint64)), axis=1)[(piece != 0xFFFFFFFF).any(1)]


def _pairs(part: "np.ndarray") -> "Iterator[tuple[np.ndarray, np.ndarray]]":
    """Pairs of nodes with equal keys: each member of a bucket with the bucket's first and with its neighbour. Linear
    in the bucket, where all pairs would be quadratic."""
    import numpy as np

    from pipeline.data.dedup.external_sort import runs

    order = np.argsort(part[:, 0], kind="stable")
    nodes, begins = part[order, 1].astype(np.int64), runs(part[order, 0])
    inside = np.flatnonzero(begins != np.arange(len(order)))
    for others in (begins[inside], inside - 1):
        for begin in range(0, len(inside), 1 << 16):
            yield nodes[others[begin : begin + (1 << 16)]], nodes[inside[begin : begin + (1 << 16)]]
