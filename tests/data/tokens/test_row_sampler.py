"""The row sampler against plain Python: every token once per epoch, the same rows on every rank, mixtures exact to the
row, best fit exact to the document, and nothing lost by fill-in-the-middle."""

import collections
import hashlib
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import UserError
from pipeline.data.tokens.fim import Cutter
from pipeline.data.tokens.packing import best_fit
from pipeline.data.tokens.permutation import permuted
from pipeline.data.tokens.row_sampler import RowSampler
from pipeline.data.tokens.rows import documents_of
from pipeline.data.tokens.store import TokenStore

quick = settings(max_examples=40, deadline=None, derandomize=True)
EOS, SENTINELS = 1, (2, 3, 4)


class Fake:
    """A store of counted tokens: token i of source s is i, so that a row shows where it comes from."""

    eos_id, folder = 10**9, "fake"

    def __init__(self, sizes):
        self.sizes, self.sources = sizes, sorted(sizes)

    def num_tokens(self, source):
        return self.sizes[source]

    def read(self, source, start, length):
        return np.arange(start, start + length)


def sampler(sizes, length, weights=None, seed=0, **options):
    return RowSampler(Fake(sizes), length, weights, seed, **options)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(17, 700), st.integers(1, 16), st.integers(0, 9))
def test_every_row_once_per_epoch_and_each_epoch_in_its_own_order(tokens, length, seed):
    row_sampler = sampler({"a": tokens}, length, None, seed)
    count = (tokens - 1) // length
    epochs = [[row_sampler.row(epoch * count + i) for i in range(count)] for epoch in range(2)]
    for epoch, rows in enumerate(epochs):
        assert sorted(row.index for row in rows) == list(range(count)) and {row.epoch for row in rows} == {epoch}
        assert all((row.tokens == np.arange(row.index * length, row.index * length + length + 1)).all() for row in rows)
    if count > 20:
        assert [row.index for row in epochs[0]] != [row.index for row in epochs[1]]


@quick
@given(
    st.dictionaries(st.sampled_from("abcde"), st.floats(0.001, 1), min_size=1),
    st.integers(0, 5),
    st.integers(0, 20_000),
)
def test_a_row_depends_on_seed_and_index_alone(weights, seed, index):
    """Not on ranks, restarts or the length of the run: a fresh sampler and one that was elsewhere before give the same
    row."""
    sizes = {source: 5000 + 100 * ord(source) for source in "abcde"}
    first, second = sampler(sizes, 16, weights, seed), sampler(sizes, 16, weights, seed)
    for elsewhere in (50_000, 3, 9_000):
        second.row(elsewhere)
    one, other = first.row(index), second.row(index)
    assert (one.source, one.epoch, one.index) == (other.source, other.epoch, other.index) and (
        one.tokens == other.tokens
    ).all()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("abcde"), st.floats(0.0005, 1), min_size=1), st.integers(0, 5))
def test_weights_are_realised_in_every_prefix_and_no_row_repeats_within_an_epoch(weights, seed):
    sizes = {source: 1000 + 331 * ord(source) for source in "abcde"}
    row_sampler = sampler(sizes, 16, weights, seed)
    seen, counts = set(), collections.Counter()
    for index in range(9_000):
        row = row_sampler.row(index)
        assert (row.source, row.epoch, row.index) not in seen
        seen.add((row.source, row.epoch, row.index))
        counts[row.source] += 1
        if index + 1 in (1000, 4096, 4097, 9000):
            assert row_sampler.rows_by_source(index + 1) == {source: counts[source] for source in row_sampler.sources}
            for source in row_sampler.sources:
                assert abs(counts[source] / (index + 1) - row_sampler.weights[source]) < 0.01
    for source in row_sampler.sources:  # far away: a rare source too has its share
        assert row_sampler.rows_by_source(10**8)[source] == pytest.approx(1e8 * row_sampler.weights[source], rel=1e-3)


def test_rows_are_well_shuffled():
    """Neighbours in the order are not neighbours in the text: mean distance of a random permutation is n/3."""
    row_sampler = sampler({"a": 160_001}, 16)
    order = np.array([row_sampler.row(i).index for i in range(10_000)])
    assert abs(np.abs(np.diff(order)).mean() / 10_000 - 1 / 3) < 0.02
    assert (
        abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05 and abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    )


def test_wrong_weights_are_refused():
    with pytest.raises(UserError, match="no source 'c'"):
        sampler({"a": 100, "b": 100}, 8, {"c": 1})
    with pytest.raises(UserError, match="fewer than the 9"):
        sampler({"a": 100, "b": 5}, 8, {"a": 1, "b": 1})
    with pytest.raises(UserError, match="all weights are 0"):
        sampler({"a": 100}, 8, {"a": 0})
    with pytest.raises(UserError, match="no source has the 9 tokens"):
        sampler({"a": 5}, 8)
    row_sampler = sampler({"a": 100, "b": 5}, 8)
    assert (
        row_sampler.sources == ["a"]
        and any("b is not used" in line for line in row_sampler.warnings(1))
        and any("a repeats: 8.33 epochs" in line for line in row_sampler.warnings(100))
    )


# ---- changes of the mixture ------------------------------------------------------------------------------------------


@quick
@given(st.data())
def test_a_mixture_changes_at_its_row_and_sources_continue_where_they_were(data):
    """Counts of every prefix, by counting; no row twice in an epoch over all phases; the rows before a change are
    those of a run without it."""
    weights = st.dictionaries(st.sampled_from("abcd"), st.floats(0.001, 1), min_size=1)
    tokens = sorted(data.draw(st.sets(st.integers(1, 3000 * 16), min_size=1, max_size=3)))
    first, seed = data.draw(weights), data.draw(st.integers(0, 5))
    changes = [(at, data.draw(weights)) for at in tokens]
    sizes = {source: 1500 + 331 * ord(source) for source in "abcd"}
    row_sampler, plain = sampler(sizes, 16, first, seed, changes=changes), sampler(sizes, 16, first, seed)
    begins = [0, *(-(-at // 16) for at in tokens)]
    seen, counts = set(), collections.Counter()
    for index in range(4000):
        row = row_sampler.row(index)
        phase = sum(begin <= index for begin in begins) - 1
        assert [first, *(shares for _, shares in changes)][phase].get(row.source), "of a source that has no weight here"
        if phase == 0:
            assert row[2:5] == plain.row(index)[2:5]
        assert (row.source, row.epoch, row.index) not in seen and row.epoch * row_sampler.rows_per_epoch[
            row.source
        ] <= counts[row.source]
        seen.add((row.source, row.epoch, row.index))
        counts[row.source] += 1
        if index + 1 in begins or index % 501 == 0:
            assert row_sampler.rows_by_source(index + 1) == {source: counts[source] for source in row_sampler.sources}
    again = sampler(sizes, 16, first, seed, changes=changes)
    for index in (3999, 0, *begins, *(begin - 1 for begin in begins[1:])):
        assert again.row(index)[2:5] == row_sampler.row(index)[2:5], "in any order of requests"


def test_shares_after_a_change_are_its_own():
    row_sampler = sampler(
        {"a": 10**9, "b": 10**9},
        16,
        {"a": 9, "b": 1},
        changes=[(16 * 5000 - 3, {"a": 1, "b": 3}), (16 * 20_000, {"b": 1})],
    )
    assert row_sampler.rows_by_source(5000) == {"a": 4500, "b": 500} and row_sampler.row(20_000).source == "b"
    for rows in (6000, 9096, 20_000):
        rows_of_b = row_sampler.rows_by_source(rows)["b"] - 500
        assert abs(rows_of_b / (rows - 5000) - 0.75) < 0.01
    assert row_sampler.rows_by_source(30_000)["a"] == row_sampler.rows_by_source(20_000)["a"]
    assert any("is never reached" in line for line in row_sampler.warnings(20_000)) and not any(
        "is never reached" in line for line in row_sampler.warnings(20_001)
    )
    with pytest.raises(UserError, match="mixture_changes: .* has no source 'c'"):
        sampler({"a": 100}, 8, {"a": 1}, changes=[(80, {"c": 1})])


@quick
@given(st.integers(1, 5000), st.lists(st.integers(0, 2**63 - 1), min_size=6, max_size=6))
def test_the_permutation_is_the_one_of_plain_integers(size, keys):
    def mixed(value):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            value = ((value ^ (value >> shift)) * factor) % 2**64
        return value ^ (value >> 31)

    def slow(index):
        a = max(1, round(size**0.5))
        b = -(-size // a)
        while True:
            left, right = divmod(index, b)
            for turn, key in enumerate(keys):
                left, right = (
                    ((left + mixed(right ^ key)) % a, right) if turn % 2 else (left, (right + mixed(left ^ key)) % b)
                )
            index = left * b + right
            if index < size:
                return index

    some = np.unique(np.linspace(0, size - 1, 50).astype(np.int64))
    assert permuted(some, size, keys).tolist() == [slow(int(index)) for index in some]
    assert sorted(permuted(np.arange(size), size, keys).tolist()) == list(range(size))


# ---- best fit --------------------------------------------------------------------------------------------------------


def plain_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """One item after another, looking at every bin."""
    free, since, bins = [], [], [0] * len(sizes)
    for turn, item in enumerate(sorted(range(len(sizes)), key=lambda item: (-sizes[item], item))):
        fits = [(free[place], since[place], place) for place in range(len(free)) if free[place] >= sizes[item]]
        if not fits:
            free.append(capacity)
            since.append(turn)
        place = min(fits)[2] if fits else len(free) - 1
        free[place] -= sizes[item]
        since[place] = turn
        bins[item] = place
    return bins


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_best_fit_is_the_plain_algorithm(data):
    capacity = data.draw(st.integers(1, 40))
    sizes = data.draw(st.lists(st.integers(1, capacity), max_size=80))
    assert best_fit(np.array(sizes, dtype=np.int64), capacity).tolist() == plain_best_fit(sizes, capacity)


def packed(folder, sources: dict[str, list[list[int]]], shards: int = 2) -> TokenStore:
    """A folder as docs/pack.md describes it, of documents given as ids without their end."""
    index = {"vocab_size": 1000, "eos_id": EOS, "dtype": "uint16", "splits": {"train": {}, "heldout": {}}}
    (folder / "train").mkdir(parents=True)
    for source, documents in sources.items():
        index["splits"]["train"][source] = []
        cut = max(1, -(-len(documents) // shards))
        for number, first in enumerate(range(0, len(documents), cut)):
            part = [[*ids, EOS] for ids in documents[first : first + cut]]
            names = [f"{source}{first + place}".encode() for place in range(len(part))]
            arrays = {
                "tokens": np.array(list(itertools.chain(*part)), np.uint16),
                "documents": np.array([[end, 1] for end in np.cumsum([len(ids) for ids in part])], np.int64),
                "ids": np.frombuffer(b"".join(names), np.uint8),
                "id_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            }
            for name, array in arrays.items():
                np.save(folder / f"train/{source}-{number:05d}.{name}.npy", array)
            counts = {
                "tokens": len(arrays["tokens"]),
                "documents": len(part),
                "bytes": len(part),
                "id_bytes": len(arrays["ids"]),
            }
            index["splits"]["train"][source].append({"file": f"train/{source}-{number:05d}", **counts})
    np.save(folder / "token_bytes.npy", np.ones(1000, np.int32))
    (folder / "index.json").write_text(json.dumps(index))
    return TokenStore(folder)


def drawn(data) -> dict[str, list[list[int]]]:
    """Documents of 1 to 60 tokens that show their document and their place (as far as 996 numbers can)."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=40))
    documents = [[5 + (number * 61 + place) % 995 for place in range(size)] for number, size in enumerate(sizes)]
    return {"a": documents, "b": [[7] * 5] * 4}


def restored(tokens: list[int]) -> list[int]:
    """A span of a row without fill-in-the-middle, by splitting at the sentinels."""
    if SENTINELS[0] not in tokens:
        return tokens
    end = tokens[-1:] if tokens[-1] == EOS else []
    body = tokens[1 : len(tokens) - len(end)]
    prefix, rest = body[: body.index(SENTINELS[1])], body[body.index(SENTINELS[1]) + 1 :]
    suffix, middle = rest[: rest.index(SENTINELS[2])], rest[rest.index(SENTINELS[2]) + 1 :]
    return prefix + middle + suffix + end


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_packed_rows_have_every_token_once_per_epoch_do_not_cut_documents_and_can_be_undone(tmp_path_factory, data):
    sources, length = drawn(data), data.draw(st.integers(8, 40))
    store = packed(tmp_path_factory.mktemp("rows") / "x", sources)
    rate = data.draw(st.sampled_from([None, 0.5, 1.0]))
    cutter = None if rate is None else Cutter(rate, 0.5, frozenset("a"), SENTINELS, data.draw(st.integers(0, 99)))
    row_sampler = RowSampler(store, length, {"a": 1}, 3, packing="best_fit", fim=cutter)
    stream = [token for ids in sources["a"] for token in [*ids, EOS]]
    owner = [number for number, ids in enumerate(sources["a"]) for _ in [*ids, EOS]]
    begins = {number: owner.index(number) for number in owner}
    labels, rows_of_document = collections.Counter(), collections.defaultdict(set)
    for index in range(row_sampler.rows_per_epoch["a"]):
        row = row_sampler.row(index)
        assert len(row.tokens) == length + 1 and row.tokens.dtype == np.int64 and row.epoch == 0
        at, borders = row.spans[0].slot, []
        assert at == 0 or (at == 1 and row.tokens[0] == EOS), "a row begins after a document, or in the middle of one"
        for span in row.spans:
            assert span.slot == at
            slots_of_span = row.tokens[at : at + span.slots].tolist()
            assert restored(slots_of_span) == stream[span.start : span.start + span.length], "nothing is lost"
            borders += [at] * (at > 0)
            in_fim_order, place = SENTINELS[0] in slots_of_span, span.start
            assert in_fim_order <= (rate is not None) and (in_fim_order or span.slots == span.length)
            for slot in range(at, at + span.slots):
                counts = slot > 0 and row.label_mask[slot - 1]
                assert not (counts and slots_of_span[slot - at] in SENTINELS), "sentinels have no label"
                if not in_fim_order and counts:
                    labels[place + slot - at] += 1
                    rows_of_document[owner[place + slot - at]].add(index)
            if in_fim_order:
                assert row.label_mask[at - 1 : at - 1 + span.slots].sum() == span.length and at > 0
                labels.update(range(place, place + span.length))
                rows_of_document[owner[place]].add(index)
            at += span.slots
        padding = row.tokens[at:]
        assert (padding == EOS).all() and not row.label_mask[at - 1 :].any()
        assert row.starts.tolist() == borders + [at] * (at <= length)
        expected = [
            (f"a{owner[start]}", slot, slots, start - begins[owner[start]]) for slot, slots, start, _ in row.spans
        ]
        assert [tuple(entry.values()) for entry in documents_of(row, store)] == expected
    assert labels == collections.Counter(range(len(stream))), "each token is a label once per epoch"
    fits = length - (3 if cutter else 0)
    for number, ids in enumerate(sources["a"]):
        assert len(rows_of_document[number]) == -(-(len(ids) + 1) // fits) or len(ids) + 1 > fits, (
            "a document that fits is never cut"
        )
    assert row_sampler.epoch_tokens["a"] == len(stream) and row_sampler.cut_documents()["a"] == sum(
        len(ids) + 1 > fits for ids in sources["a"]
    )
    rows = row_sampler.rows_per_epoch["a"]
    assert row_sampler.padding()["a"] == pytest.approx(1 - len(stream) / (rows * length))


@quick
@given(st.data())
def test_the_rows_of_best_fit_are_those_of_the_plain_algorithm(tmp_path_factory, data):
    sources, length = drawn(data), data.draw(st.integers(8, 40))
    row_sampler = RowSampler(
        packed(tmp_path_factory.mktemp("rows") / "x", sources), length, {"a": 1}, 0, packing="best_fit"
    )
    segments, expected, at = [], [], 0
    for ids in sources["a"]:
        size, longer = len(ids) + 1, len(ids) + 1 > length
        while longer and size >= length:
            expected.append([(at, length)])
            at, size = at + length, size - length
        if size:
            segments.append((at - longer, size + longer))
        at += size
    bins = plain_best_fit([size for _, size in segments], length)
    expected += [
        sorted(segment for segment, place in zip(segments, bins, strict=True) if place == number)
        for number in range(max(bins, default=-1) + 1)
    ]
    table = row_sampler._tables["a"]
    rows = [
        list(zip(table.starts[a:b].tolist(), abs(table.lengths[a:b]).tolist(), strict=True))
        for a, b in zip(table.offsets, table.offsets[1:], strict=False)
    ]
    assert sorted(rows) == sorted(expected)


def test_groups_of_documents_are_packed_one_after_another(tmp_path, monkeypatch):
    from pipeline.data.tokens import packing

    store = packed(tmp_path / "x", {"a": [[5] * (number % 23 + 1) for number in range(100)]})
    monkeypatch.setattr(packing, "GROUP", 7)
    row_sampler = RowSampler(store, 16, None, 0, packing="best_fit", work=tmp_path / "work")
    again = RowSampler(store, 16, None, 0, packing="best_fit", work=tmp_path / "work", once=lambda make: make())
    num_labels = sum(int(row_sampler.row(index).label_mask.sum()) for index in range(row_sampler.rows_per_epoch["a"]))
    assert num_labels == store.num_tokens("a") and (row_sampler.row(3).tokens == again.row(3).tokens).all()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {
        f"rows-a-16-0.{part}.npy" for part in ("offsets", "starts", "lengths")
    }


def test_packing_is_dense_and_cuts_few_documents(tmp_path):
    """What best fit is for. Ding et al. (2024) report fewer than one row in 10,000 more than needed on web text, and
    concatenation cuts most rows' first and last document."""
    draw = np.random.default_rng(0)
    store = packed(
        tmp_path / "x", {"a": [[5] * int(size) for size in np.maximum(1, draw.lognormal(4, 1, 5000)).astype(int)]}
    )
    row_sampler, plain = RowSampler(store, 512, None, 0, packing="best_fit"), RowSampler(store, 512, None, 0)
    assert row_sampler.padding()["a"] < 0.005 and row_sampler.cut_documents()["a"] < 0.1 * plain.cut_documents()["a"]


# ---- fill-in-the-middle ----------------------------------------------------------------------------------------------


def test_fim_is_a_function_of_seed_and_row_with_the_configured_shares(tmp_path):
    store = packed(tmp_path / "x", {"a": [[5 + place for place in range(20)]] * 6000, "b": [[6] * 20] * 50})
    cutter = Cutter(0.6, 0.25, frozenset("a"), SENTINELS, 7)
    row_sampler = RowSampler(store, 64, {"a": 1, "b": 1}, 0, packing="best_fit", fim=cutter)
    kinds, lengths = collections.Counter(), []

    def kind_of(slots):
        if slots[0] != SENTINELS[0]:
            return "plain"
        return "bare" if slots[1] == SENTINELS[1] else "psm"

    for index in range(3000):
        row = row_sampler.row(index)
        for span in row.spans:
            slots = row.tokens[span.slot : span.slot + span.slots].tolist()
            kinds[row.source, kind_of(slots)] += 1
            if slots[0] == SENTINELS[0]:
                lengths.append(slots.index(SENTINELS[2]) - slots.index(SENTINELS[1]) - 1)
    assert kinds["b", "bare"] == kinds["b", "psm"] == 0 < kinds["b", "plain"]
    in_fim_order = kinds["a", "bare"] + kinds["a", "psm"]
    assert in_fim_order / (in_fim_order + kinds["a", "plain"]) == pytest.approx(0.6, abs=0.03)
    assert kinds["a", "psm"] / in_fim_order == pytest.approx(0.75 * (20 / 21) ** 2, abs=0.03), (
        "a prefix before the suffix: PSM, unless one of two cuts is at 0"
    )
    assert np.mean(lengths) == pytest.approx(20 / 3, abs=0.5), (
        "two cuts anywhere leave a third to the suffix, on average"
    )
    again = RowSampler(store, 64, {"a": 1, "b": 1}, 0, packing="best_fit", fim=cutter)
    assert all((again.row(index).tokens == row_sampler.row(index).tokens).all() for index in (599, 3, 77))
    other = RowSampler(store, 64, {"a": 1, "b": 1}, 0, packing="best_fit", fim=cutter._replace(key=8))
    assert any(not np.array_equal(other.row(index).tokens, row_sampler.row(index).tokens) for index in range(20))


def test_rows_stay_what_they_were(tmp_path):
    """A run that is resumed with another version of this program must read the same rows: digests of rows as they were
    when the option was added."""
    sources = {
        name: [[5 + (place * step) % 900 for place in range(1 + number * 37 % 150)] for number in range(200)]
        for name, step in (("a", 3), ("b", 7))
    }
    store = packed(tmp_path / "x", sources)
    for fim, length, expected in (
        (None, 64, "802b687f8d57347e"),
        (Cutter(0.5, 0.5, None, SENTINELS, 7), 64, "c0113c5a1ff431c1"),
        (Cutter(1.0, 0.25, frozenset("a"), SENTINELS, 8), 33, "278bdfe7326764f5"),
    ):
        row_sampler = RowSampler(store, length, {"a": 0.7, "b": 0.3}, 5, packing="best_fit", fim=fim)
        digest = hashlib.sha256()
        for index in [*range(600), 10**6, 12345678]:
            row = row_sampler.row(index)
            digest.update(row.tokens.tobytes() + row.starts.tobytes() + row.label_mask.tobytes())
            digest.update(repr((row[2:5], [tuple(span) for span in row.spans])).encode())
        assert digest.hexdigest()[:16] == expected, (fim, digest.hexdigest()[:16])
