"""Sorting and joining of more rows than fit into memory."""

import collections

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.dedup import external_sort
from pipeline.data.dedup.external_sort import components


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=300), st.integers(1, 50))
def test_rows_come_together_by_key_in_parts(tmp_path_factory, values, size):
    keys = np.array(values, np.uint64) * np.uint64(0x0539_1234_5678_9ABC)
    rows = np.column_stack((keys, np.arange(len(keys), dtype=np.uint64)))
    before, external_sort.PARTITION = external_sort.PARTITION, 256
    try:
        parts = list(
            external_sort.grouped_by_key(
                (rows[i : i + size] for i in range(0, len(rows), size)),
                len(rows),
                tmp_path_factory.mktemp("parts") / "x",
            )
        )
    finally:
        external_sort.PARTITION = before
    seen: set = set()
    last = -1
    for part in parts:
        mine = set(part[:, 0].tolist())
        assert not mine & seen and min(mine) > last  # all of a key in one part, parts in the order of keys
        seen, last = seen | mine, max(mine)
        for key in mine:
            assert (np.diff(part[part[:, 0] == key, 1].astype(np.int64)) > 0).all()
    assert sum(map(len, parts)) == len(rows)


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_components_against_a_search(edges):
    labels = components(30, np.array([a for a, _ in edges], np.int64), np.array([b for _, b in edges], np.int64))
    near = collections.defaultdict(set)
    for a, b in edges:
        near[a].add(b)
        near[b].add(a)
    for node in range(30):
        seen, todo = {node}, [node]
        while todo:
            for other in near[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        assert labels[node] == min(seen)
