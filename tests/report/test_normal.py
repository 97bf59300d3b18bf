"""Bands against numbers that were computed by hand, and thinning and outliers against their definitions."""

import math
import random
import statistics

import numpy as np
import pytest
import reported_run

from pipeline.report.metric_series import Metrics, Series, outliers, read_metrics, thin
from pipeline.report.normal import Band, bands
from pipeline.report.run_folder import read_run


def found(root, stage) -> dict[str, Band]:
    run = read_run(root)
    metrics = read_metrics(run.stages[stage].path / "metrics.jsonl")
    return {band.key: band for band in bands(run.stages[stage], metrics, run)}


def test_a_pretraining_run(tmp_path):
    normal = found(reported_run.write(tmp_path / "demo"), "pretrain")
    first = normal["first_loss"]
    assert first.measured == pytest.approx(math.log(1000) + 0.1)
    assert (first.low, first.high) == pytest.approx((6.9078 - 0.1, 6.9078 + 64 * 0.02**2 / 2 + 0.5), abs=1e-3)
    assert first.verdict == "inside"
    assert normal["schedule"].measured < 1e-12 and normal["schedule"].verdict == "inside"
    assert normal["gradients"].measured == 0.5 and normal["gradients"].values["share"] == 0
    # the spike at 200 and the step at 250 that was not applied
    assert normal["spikes"].measured == 2 and normal["spikes"].verdict == "outside"
    assert normal["throughput"].measured == 1.0


def test_a_run_that_is_not_as_its_recipe_says(tmp_path):
    root = tmp_path / "demo"
    rows = reported_run.pretrain_rows()
    rows[0]["heldout_loss"] = 9.0
    rows[150]["lr"] *= 1.001
    for row in rows[1:-1]:
        row["grad_norm"] = 4.0
    record = reported_run.manifest("tokenizer", "2", {}, {"vocab_size": 1000}, {})
    reported_run.publish(root, record)
    parents = {"tokenizer": reported_run.parent("tokenizer", "2")}
    record = reported_run.manifest("pretrain", "3", reported_run.PRETRAIN, {}, parents)
    reported_run.publish(root, record, {"metrics.jsonl": reported_run.lines(rows)})
    verdicts = {key: band.verdict for key, band in found(root, "pretrain").items()}
    assert verdicts["first_loss"] == verdicts["schedule"] == verdicts["gradients"] == "outside"


def test_the_final_loss_of_a_published_size(tmp_path):
    """Chinchilla's own run: 70e9 parameters are outside of what was fitted; 1e9 with 20e9 tokens are inside of it."""
    for size, expected in ((70e9, False), (1e9, True)):
        root = tmp_path / f"{size:g}"
        metrics = {"parameters": size, "tokens": 20e9, "loss_after": 2.6}
        reported_run.publish(root, reported_run.manifest("pretrain", "3", {}, metrics, {}))
        normal = found(root, "pretrain")
        assert ("final_loss" in normal) == expected
    one = 1.69 + 406.4 / 1e9**0.34 + 410.7 / 20e9**0.28
    two = 1.8172 + 482.01 / 1e9**0.3478 + 2085.43 / 20e9**0.3658
    band = normal["final_loss"]
    assert (band.low, band.high) == pytest.approx((0.85 * min(one, two), 1.15 * max(one, two)))
    assert band.verdict == "inside" and 2.4 < one < 2.7 and 2.4 < two < 2.7


def test_first_losses_of_pairs(tmp_path):
    for kind, first, verdict in (("dpo", 0.6931, "inside"), ("dpo", 0.8, "outside"), ("reward", 0.7, "inside")):
        root = tmp_path / f"{kind}{first}"
        rows = reported_run.lines([{"step": 1, "loss": first}, {"step": 2, "loss": 0.5}])
        record = reported_run.manifest(kind, "3", {"loss": "sigmoid"}, {}, {})
        reported_run.publish(root, record, {"metrics.jsonl": rows})
        assert found(root, kind)[f"first_loss_{kind}"].verdict == verdict


def test_a_policy(tmp_path):
    normal = found(reported_run.write(tmp_path / "demo"), "ppo")
    assert normal["kl"].measured == 1.0 and normal["kl"].high == 12.0 and normal["kl"].verdict == "inside"
    assert normal["policy_eos"].verdict == "inside" and normal["first_ratio"].verdict == "inside"


def test_shares_are_judged_by_their_interval(tmp_path):
    """7 of 8 answers end: 88% is below 90%, but 8 answers do not say so; 60 of 80 do."""
    for ended, count, verdict in ((7, 8, "inside"), (60, 80, "outside")):
        root = tmp_path / str(count)
        rows = [{"step": 4, "heldout_loss": 1.0, "heldout_eos_rate": ended / count, "heldout_answered": count}]
        reported_run.publish(
            root, reported_run.manifest("sft", "3", {}, {}, {}), {"metrics.jsonl": reported_run.lines(rows)}
        )
        assert found(root, "sft")["eos"].verdict == verdict


def test_thinning_keeps_what_stands_out():
    draw = np.random.default_rng(0)
    values = draw.normal(size=50_000)
    values[[7, 31_111, 49_998]] = 40, -35, 50
    series = Series(np.arange(50_000) * 3, values)
    thinned = thin(series, 400)
    assert len(thinned) <= 400 and {40, -35, 50} <= set(thinned.values)
    assert (thinned.steps[0], thinned.steps[-1]) == (0, 149_997)
    assert (np.diff(thinned.steps) > 0).all()
    assert all(values[step // 3] == value for step, value in zip(thinned.steps, thinned.values, strict=True))
    for begin in range(0, 50_000, 1000):  # no stretch of the curve looks calmer than it was
        inside = (thinned.steps >= 3 * begin) & (thinned.steps < 3 * (begin + 1000))
        part = values[begin : begin + 1000]
        assert thinned.values[inside].max() >= np.quantile(part, 0.99)
        assert thinned.values[inside].min() <= np.quantile(part, 0.01)
    assert thin(Series(series.steps[:5], series.values[:5]), 400).values.tolist() == values[:5].tolist()


def test_outliers_against_their_definition():
    draw = random.Random(1)
    values = [draw.gauss(3, 0.1) for _ in range(700)]
    for place in (100, 300, 301, 690):
        values[place] += 3
    expected = []
    for place in range(64, 700):
        begin = 64 + (place - 64) // 128 * 128
        history = values[max(0, begin - 128) : begin]
        median = statistics.median(history)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in history)
        if values[place] > median + 6 * max(deviation, 1e-3 * max(1, abs(median))):
            expected.append(place)
    assert outliers(Series(np.arange(700), np.array(values))) == expected == [100, 300, 301, 690]
    assert outliers(Series(np.arange(60), np.array(values[:60]))) == []


def test_a_file_that_is_not_there(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == Metrics()
