"""Mixtures of sources and batches of like length: exact shares, no record before its turn, a function of the seed."""

import json

import numpy as np
import pytest
import tuned
from harness import stage, succeed

from pipeline.dpo import Config
from pipeline.train.finetune_data import PackedRows, ShuffledRows
from pipeline.train.record_order import Groups, MixedRecords, grouped_by_length

SOURCE_OF = np.repeat([0, 1, 2], [700, 200, 100])


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 0, 3], [0.001, 0.998, 0.001]])
def test_each_source_has_its_share_and_repeats_no_record_early(weights):
    records = MixedRecords(5, SOURCE_OF, weights)
    stream = np.concatenate([records.epoch(epoch) for epoch in range(6)])
    assert len(stream) == 6000
    shares = np.bincount(SOURCE_OF[stream], minlength=3) / len(stream)
    np.testing.assert_allclose(shares, np.array(weights) / sum(weights), atol=1e-3)
    for end in (1000, 2345, 6000):
        counts = np.bincount(stream[:end], minlength=1000)
        for source in range(3):
            own = counts[SOURCE_OF == source]
            assert own.max() - own.min() <= 1, (source, end)
    assert np.array_equal(records.taken(6), np.bincount(stream, minlength=1000))
    assert np.array_equal(MixedRecords(5, SOURCE_OF, weights).epoch(4), stream[4000:5000])
    assert not np.array_equal(MixedRecords(6, SOURCE_OF, weights).epoch(4), stream[4000:5000])


@pytest.mark.parametrize("capacity", [None, 64])
def test_packed_rows_of_a_mixture_hold_its_records(capacity):
    """Also where epochs have different numbers of rows, and whatever row is asked for first."""
    lengths = np.random.default_rng(0).integers(3, 60, 1000)
    lengths[SOURCE_OF == 1] = 60
    records = MixedRecords(5, SOURCE_OF, [1, 2, 1])
    rows = PackedRows(7, lengths, capacity, records)
    if capacity:
        sizes = [len(rows._epochs.of(epoch)) for epoch in range(4)]
        assert len(set(sizes)) > 1
    else:
        sizes = [1000] * 4
    order = [rows.at(index) for index in range(sum(sizes))]
    start = 0
    for epoch, size in enumerate(sizes):
        taken = sorted(record for row in order[start : start + size] for record in row)
        assert taken == sorted(records.epoch(epoch).tolist())
        start += size
    assert PackedRows(7, lengths, capacity, records).at(start - 1) == order[-1]
    for count in (0, 5, sizes[0], start - 3):
        expected = np.bincount([record for row in order[:count] for record in row], minlength=1000)
        assert np.array_equal(rows.taken(count), expected)


@pytest.mark.parametrize("count, batch", [(997, 8), (16, 8), (5, 8), (64, 64), (1000, 3)])
def test_batches_of_like_length(count, batch):
    """Every row once per epoch; batches are cut over the whole run; little is padded; the longest comes first."""
    lengths = np.random.default_rng(1).integers(1, 500, count)
    rows = ShuffledRows(3, count, groups=Groups(lambda row: int(lengths[row]), batch))
    order = [rows.at(index) for index in range(4 * count)]
    for epoch in range(4):
        assert sorted(order[epoch * count : (epoch + 1) * count]) == list(range(count))
    assert ShuffledRows(3, count, groups=rows.groups).at(3 * count) == order[3 * count]
    steps = [lengths[order[start : start + batch]] for start in range(0, len(order) - batch, batch)]
    if count > 3 * batch:
        assert lengths[order[:batch]].max() == lengths.max()
        padded = sum(len(step) * step.max() for step in steps) / sum(step.sum() for step in steps)
        shuffled = lengths[np.concatenate([np.random.default_rng(epoch).permutation(count) for epoch in range(4)])]
        unsorted = [shuffled[start : start + batch] for start in range(0, len(order) - batch, batch)]
        usual = sum(len(step) * step.max() for step in unsorted) / sum(step.sum() for step in unsorted)
        assert padded < 1.1 < 1.3 < usual
        longest = [int(step.max()) for step in steps]
        assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_rows_that_complete_a_batch_keep_their_place():
    rows = list(range(100, 130))
    grouped = grouped_by_length(rows, Groups(lambda row: row, 8), first=13, seed=0, epoch=1)
    assert grouped[:3] == rows[:3] and sorted(grouped) == rows
    for start in (3, 11, 19):
        part = grouped[start : start + 8]
        assert max(part) - min(part) == 7


KEYS = {"sources": {"a": {"path": "x"}, "b": {"path": "y"}}, "batch_size": 2, "sequence_length": 64, "steps": 3}


@pytest.mark.parametrize(
    "mixture, message",
    [
        ({"a": 1, "c": 1}, "mixture: there is no source 'c'; expected a, b"),
        ({"a": 1}, "mixture: gives no weight to b; 0 means not to train on a source"),
        ({"a": 0.5, "b": 0.4}, "its weights sum to 0.9, expected 1"),
        ({"a": 0, "b": 0}, "no source has a weight above 0"),
    ],
)
def test_mixtures_that_are_refused(mixture, message):
    with pytest.raises(ValueError, match=message):
        Config(**KEYS, mixture=mixture)


def test_a_stage_reports_what_it_takes_of_each_source(tmp_path):
    """A dpo with a mixture, killed and resumed: the pairs that are taken are those of the mixture, the small source is
    repeated, and each is measured under the reference."""
    folder = tuned.world(tmp_path)
    pair = tuned.PAIR
    words = [
        f"dpo.sources={{few: {{path: rows.jsonl, part: [0, 0.02], {pair}}}, many: {{path: rows.jsonl, part: [0.1, 1], {pair}}}}}",
        "dpo.mixture={few: 0.6, many: 0.4}",
        "dpo.inputs.model=./base",
        "dpo.steps=6",
    ]
    code, text = stage("dpo", "tiny.yaml", *words, cwd=folder, fault="save:1")
    assert code == -9, text
    text = succeed("dpo", "tiny.yaml", *words, cwd=folder)
    metrics = json.loads((folder / "runs/tiny/dpo/current/manifest.json").read_text())["metrics"]
    few, many = metrics["sources"]["few"], metrics["sources"]["many"]
    assert few["taken"] + many["taken"] == 48 and abs(few["taken"] - 28.8) < 2
    assert few["records"] < 20 < 400 < many["records"]
    epochs = few["taken"] / few["records"]
    assert f"few {few['taken'] / 48:.1%}, {epochs:.2f} epochs of {few['records']}; many" in text
    assert all(np.isfinite(line["loss"]) for line in tuned.lines(folder, "dpo") if "loss" in line)


def test_a_source_of_a_mixture_without_records_ends_the_stage(tmp_path):
    folder = tuned.world(tmp_path)
    chat = tuned.CHAT
    words = [
        f"sft.sources={{held: {{path: rows.jsonl, part: [0.9, 1], {chat}}}, rest: {{path: rows.jsonl, part: [0, 0.9], {chat}}}}}",
        "sft.mixture={held: 1, rest: 1}",
    ]
    code, text = stage("sft", "tiny.yaml", *words, cwd=folder)
    assert code == 2 and "mixture: none of the records of held is left to train on" in text, text
