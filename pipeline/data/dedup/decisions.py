"""The decision for each document that passed the filters: train, heldout, or a duplicate of another one. Over all
sources at once."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.seeds import derive, splitmix64
from pipeline.data.dedup.document_index import EXACT, HELDOUT, NEAR, TRAIN, URL, Index
from pipeline.data.dedup.external_sort import blocks, find_roots, grouped_by_key, run_starts, scratch_array, union
from pipeline.data.dedup.minhash import Dedup, join_near_duplicates


def decide(index: Index, dedup: Dedup, *, holdout: float, seed: int, scratch: Path) -> None:
    """Fill in decision, original and cluster of `index`. Except for `keep: first`, the result does not depend on the
    order in which documents were read.

    Documents are addressed by rank: their position in the order of record ids. Arrays of one number per document are on
    disk, and sorted part by part.
    """
    number = len(index.row)
    ranked = _rank(index, scratch)
    labels = scratch_array(scratch / "labels", np.int64, number)  # rank -> root of its cluster
    for part in blocks(number):
        labels[part] = np.arange(part.start, part.stop)
    first_of_text = scratch_array(scratch / "first-hash", bool, number)
    first_of_address = scratch_array(scratch / "first-address", bool, number)
    first_of_both = scratch_array(scratch / "first-both", bool, number)
    _join_equal(labels, index.hash if dedup.exact else None, ranked, first_of_text, scratch)
    _join_equal(labels, index.address if dedup.url else None, ranked, first_of_address, scratch)
    for part in blocks(number):
        first_of_both[part] = first_of_text[part] & first_of_address[part]
    if dedup.near:
        join_near_duplicates(labels, index.signature, ranked, first_of_both, dedup.near, scratch / "bands")
    for part in blocks(number):
        find_roots(labels, np.arange(part.start, part.stop))
    _choose_originals(index, labels, ranked, dedup, scratch)
    for part in blocks(number):
        documents = ranked[part]
        decision = _reasons(index, documents, first_of_text[part], first_of_address[part], dedup)
        is_kept = index.original[documents] == documents
        # One document of a cluster is kept, so a choice by the cluster's smallest id is a choice of clusters, and it
        # survives a change of any other source.
        cluster_id = index.id[ranked[labels[part]], 0]
        random = splitmix64(cluster_id ^ np.uint64(derive(seed, "holdout"))) >> np.uint64(11)
        fraction = random.astype(np.float64) / 2**53
        decision[is_kept & (fraction >= 1 - holdout)] = HELDOUT
        index.decision[documents] = decision


def _reasons(
    index: Index, documents: np.ndarray, first_of_text: np.ndarray, first_of_address: np.ndarray, dedup: Dedup
) -> np.ndarray:
    """TRAIN for the documents that are kept; for the others whether they are exact, URL or near duplicates, uint8."""
    originals = index.original[documents]
    is_kept = originals == documents
    decision = np.full(len(documents), NEAR, np.uint8)
    decision[~first_of_address] = URL
    decision[~first_of_text] = EXACT
    # `keep` or `prefer` may have kept another document than the first of its text or address: then the first one is
    # dropped for the same reason as the others.
    replaced = np.flatnonzero(~is_kept & first_of_text & first_of_address)
    first, kept = documents[replaced], originals[replaced]
    if dedup.url:
        has_same_address = (index.address[first] == index.address[kept]).all(1) & (index.address[first] != 0).any(1)
        decision[replaced[has_same_address]] = URL
    if dedup.exact:
        has_same_text = (index.hash[first] == index.hash[kept]).all(1)
        decision[replaced[has_same_text]] = EXACT
    decision[is_kept] = TRAIN
    return decision


def _rank(index: Index, scratch: Path) -> np.ndarray:
    """Documents in the order of their record ids, int64 [D]; equal ids in the order of documents."""
    number = len(index.row)

    def rows() -> Iterator[np.ndarray]:
        for part in blocks(number):
            yield np.column_stack((index.id[part], np.arange(part.start, part.stop, dtype=np.uint64)))

    ranked, rank = scratch_array(scratch / "ranked", np.int64, number), 0
    for part in grouped_by_key(rows(), number, scratch / "ids"):
        order = np.lexsort((part[:, 2], part[:, 1], part[:, 0]))
        ranked[rank : rank + len(order)] = part[order, 2].astype(np.int64)
        rank += len(order)
    return ranked


def _join_equal(
    labels: np.ndarray, keys: np.ndarray | None, ranked: np.ndarray, is_first: np.ndarray, scratch: Path
) -> None:
    """Join documents whose 128-bit keys are equal; a key of zero means that there is none. Fills in `is_first` [D]:
    whether a rank is the first with its key."""
    number = len(ranked)
    for part in blocks(number):
        is_first[part] = True
    if keys is None:
        return

    def rows() -> Iterator[np.ndarray]:
        for part in blocks(number):
            ranks = np.arange(part.start, part.stop, dtype=np.uint64)
            some_keys = keys[ranked[part]]
            yield np.column_stack((some_keys, ranks))[(some_keys != 0).any(1)]

    for part in grouped_by_key(rows(), number, scratch / "keys"):
        order = np.lexsort((part[:, 2], part[:, 1], part[:, 0]))
        ranks, starts = part[order, 2].astype(np.int64), run_starts(part[order, :2])
        is_repeat = starts != np.arange(len(order))
        is_first[ranks[is_repeat]] = False
        union(labels, ranks[starts[is_repeat]], ranks[is_repeat])


def _choose_originals(index: Index, labels: np.ndarray, ranked: np.ndarray, dedup: Dedup, scratch: Path) -> None:
    """The document of each cluster that is kept, by `prefer` and `keep`; and the number of its members."""
    number = len(ranked)
    preference = np.full(len(index.sources) + 1, len(dedup.prefer) + 1, np.uint64)
    preference[-1] = 0  # documents of `earlier` are published already: they are kept
    for place, name in enumerate(dedup.prefer):
        preference[index.sources.index(name)] = place + 1

    def rows() -> Iterator[np.ndarray]:
        for part in blocks(number):
            documents, ranks = ranked[part], np.arange(part.start, part.stop)
            columns = (
                splitmix64(labels[part].astype(np.uint64) + np.uint64(1)),
                preference[index.source[documents]],
                _order_key(index, documents, dedup.keep).astype(np.uint64),
                ranks.astype(np.uint64),
            )
            yield np.column_stack(columns)

    for part in grouped_by_key(rows(), number, scratch / "clusters"):
        order = np.lexsort((part[:, 3], part[:, 2], part[:, 1], part[:, 0]))
        documents = ranked[part[order, 3].astype(np.int64)]
        starts = run_starts(part[order, 0])
        index.original[documents] = documents[starts]
        index.cluster[documents] = np.bincount(starts, minlength=len(starts))[starts]


def _order_key(index: Index, documents: np.ndarray, keep: str) -> np.ndarray:
    """The document of a cluster with the smallest of these is kept."""
    if keep == "first":
        return documents
    if keep == "longest":
        return (1 << 62) - index.size[documents]
    if keep == "quality":
        return (1 - index.score[documents].astype(np.float64)) * 1e9
    return np.zeros(len(documents))
