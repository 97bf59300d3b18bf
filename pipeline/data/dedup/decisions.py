"""What becomes of each document that passed the filters: kept for train or heldout, or the duplicate of another one.
Over all sources at once."""

from pathlib import Path

import numpy as np

from pipeline.core.seeds import derive
from pipeline.data.cleaning.text_arrays import mixed
from pipeline.data.dedup.document_index import EXACT, HELDOUT, NEAR, TRAIN, URL, Index
from pipeline.data.dedup.external_sort import array, blocks, roots, runs, together, union
from pipeline.data.dedup.minhash import Dedup, join


def decide(index: Index, dedup: Dedup, *, holdout: float, seed: int, scratch: Path) -> None:
    """Fill in fate, original and cluster of `index`. The result does not depend on the order in which documents were
    read, but for `keep: first`.

    Everything counts in ranks: positions in the order of record ids. Arrays of one number a document are on disk, and
    sorted part by part.
    """
    number = len(index.row)
    ranked = _ranked(index, scratch)
    labels = array(scratch / "labels", np.int64, number)
    for part in blocks(number):
        labels[part] = np.arange(part.start, part.stop)
    exact, address, unique = (array(scratch / f"first-{name}", bool, number) for name in ("hash", "address", "both"))
    _join_equal(labels, index.hash if dedup.exact else None, ranked, exact, scratch)
    _join_equal(labels, index.address if dedup.url else None, ranked, address, scratch)
    for part in blocks(number):
        unique[part] = exact[part] & address[part]
    if dedup.near:
        join(labels, index.signature, ranked, unique, dedup.near, scratch / "bands")
    for part in blocks(number):
        roots(labels, np.arange(part.start, part.stop))
    _choose(index, labels, ranked, dedup, scratch)
    for part in blocks(number):
        documents, label = ranked[part], labels[part]
        kept = index.original[documents] == documents
        fate = np.where(kept, TRAIN, np.where(~exact[part], EXACT, np.where(~address[part], URL, NEAR))).astype(
            np.uint8
        )
        # The first of its text or address by id goes too, if `keep` or `prefer` took another one of them: for the same
        # reason as the others.
        swapped = np.flatnonzero(~kept & exact[part] & address[part])
        first, other = documents[swapped], index.original[documents[swapped]]
        if dedup.url:
            fate[
                swapped[(index.address[first] == index.address[other]).all(1) & (index.address[first] != 0).any(1)]
            ] = URL
        if dedup.exact:
            fate[swapped[(index.hash[first] == index.hash[other]).all(1)]] = EXACT
        # One document of a cluster is kept, so choosing by the cluster's smallest id chooses by cluster, and the choice
        # survives a change of any other source.
        number_of = mixed(index.id[ranked[label], 0] ^ np.uint64(derive(seed, "holdout"))) >> np.uint64(11)
        fate[kept & (number_of.astype(np.float64) / 2**53 >= 1 - holdout)] = HELDOUT
        index.fate[documents] = fate


def _ranked(index: Index, scratch: Path) -> np.ndarray:
    """Documents in the order of their record ids, int64 [D]; equal ids in the order of documents."""
    number = len(index.row)
    ranked, at = array(scratch / "ranked", np.int64, number), 0
    rows = (
        np.column_stack((index.id[part], np.arange(part.start, part.stop, dtype=np.uint64))) for part in blocks(number)
    )
    for found in together(rows, number, scratch / "ids"):
        order = np.lexsort((found[:, 2], found[:, 1], found[:, 0]))
        ranked[at : at + len(order)] = found[order, 2].astype(np.int64)
        at += len(order)
    return ranked


def _join_equal(
    labels: np.ndarray, keys: np.ndarray | None, ranked: np.ndarray, first: np.ndarray, scratch: Path
) -> None:
    """Join documents whose 128-bit keys are equal; keys of zero are none. `first` [D] becomes whether a rank is the
    first with its key."""
    number = len(ranked)
    for part in blocks(number):
        first[part] = True
    if keys is None:
        return

    def rows():
        for part in blocks(number):
            found = np.column_stack((keys[ranked[part]], np.arange(part.start, part.stop, dtype=np.uint64)))
            yield found[(found[:, :2] != 0).any(1)]

    for found in together(rows(), number, scratch / "keys"):
        order = np.lexsort((found[:, 2], found[:, 1], found[:, 0]))
        ranks, begins = found[order, 2].astype(np.int64), runs(found[order, :2])
        again = begins != np.arange(len(order))
        first[ranks[again]] = False
        union(labels, ranks[begins[again]], ranks[again])


def _choose(index: Index, labels: np.ndarray, ranked: np.ndarray, dedup: Dedup, scratch: Path) -> None:
    """Of each cluster the document that stays, by `prefer` and `keep`; and the number of its members."""
    number = len(ranked)
    preference = np.full(len(index.sources) + 1, len(dedup.prefer) + 1, np.uint64)
    preference[-1] = 0  # documents of `earlier` were published: they stay
    for place, name in enumerate(dedup.prefer):
        preference[index.sources.index(name)] = place + 1

    def rows():
        for part in blocks(number):
            documents = ranked[part]
            key = {
                "any": np.zeros(len(documents)),
                "first": documents,
                "longest": (1 << 62) - index.size[documents],
                "quality": (1 - index.score[documents].astype(np.float64)) * 1e9,
            }[dedup.keep]
            label, ranks = labels[part].astype(np.uint64), np.arange(part.start, part.stop)
            yield np.column_stack(
                (
                    mixed(label + np.uint64(1)),
                    preference[index.source[documents]],
                    key.astype(np.uint64),
                    ranks.astype(np.uint64),
                )
            )

    for found in together(rows(), number, scratch / "clusters"):
        order = np.lexsort((found[:, 3], found[:, 2], found[:, 1], found[:, 0]))
        documents, begins = ranked[found[order, 3].astype(np.int64)], runs(found[order, 0])
        index.original[documents] = documents[begins]
        index.cluster[documents] = np.bincount(begins, minlength=len(begins))[begins]
