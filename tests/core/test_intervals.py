"""Intervals of closing numbers, and the warning of a stage that learned nothing."""

import json
import random
from types import SimpleNamespace

import pytest
import tiny
import tuned
from harness import succeed

from pipeline.core.intervals import change_of, mean_change, mean_half, shares, student, unchanged
from pipeline.rl.online import headline


def test_student_against_the_published_table():
    """Correctness 19: two-sided 95% points (Abramowitz & Stegun, table 26.10)."""
    published = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042, 60: 2.000, 120: 1.980}
    assert {degrees: round(student(degrees), 3) for degrees in published} == published


def test_interval_of_a_mean():
    """Correctness 19: Student's own data (1908), the extra sleep of ten patients: 1.58 +- 0.88."""
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert sum(extra) / 10 == pytest.approx(1.58) and mean_half(extra) == pytest.approx(0.88, abs=0.005)
    assert mean_half([2.0, 2.0]) == 0
    with pytest.raises(ValueError):
        mean_half([1.0])


def test_words():
    assert shares(0.0, 1.0, 10) == "0% -> 100% (95%: 72% to 100%, n=10)"
    assert unchanged(0.0, 0.0) and unchanged(0.5, 0.4) and not unchanged(1.0, 1.0) and not unchanged(0.2, 0.3)


def test_ppo_says_how_sure_it_is():
    """Correctness 19: four prompts, whose rewards differ more than they rose."""
    config = SimpleNamespace(rule="exact")
    before = {"reward": -0.1, "reward_half": 1.5, "rule": 0.0}
    after = {"reward": 1.92, "reward_half": 1.6, "rule": 0.25, "kl": 3.0}
    said, nothing = headline(config, before, after, 4)
    assert said == (
        "held-out reward -0.10 \u00b1 1.50 -> 1.92 \u00b1 1.60 (95%, n=4), exact 0% -> 25% (95%: 5% to 70%, n=4), KL 3.00"
    )
    assert nothing == ["held-out reward -0.10 \u00b1 1.50 -> 1.92 \u00b1 1.60 (95%, n=4)"]
    sure = {"reward_half": 0.1}
    assert headline(config, before | sure, after | sure, 400)[1] == []
    one = headline(SimpleNamespace(rule=None), {"reward": 0.0}, {"reward": 9.0, "kl": 0.0}, 1)
    assert one[0] == "held-out reward 0.00 -> 9.00 (95%, n=1), KL 0.00" and one[1]


@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_a_tuning_stage_that_learned_nothing_warns(kind, tmp_path):
    """Correctness 19: one step with next to no learning rate; the plain runs do not warn."""
    tuned.copy_until(kind, tmp_path)
    said = succeed(kind, "tiny.yaml", f"{kind}.steps=1", f"{kind}.optimizer.lr=1e-12", cwd=tmp_path)
    assert f"{kind}: WARNING: nothing was learned that can be shown:" in said
    assert tuned.metrics(tmp_path, kind)["warnings"]
    if kind == "sft":
        assert "ends its turn 0% -> 0% (95%: 0% to" in said
    assert tuned.metrics(tuned.plain(), kind)["warnings"] == []


def test_pretraining_that_learned_nothing_warns(tmp_path):
    """Correctness 19: a learning rate that makes held-out text worse."""
    tiny.write_inputs(tmp_path, documents=40)
    (tmp_path / "tiny.yaml").write_text(tiny.RECIPE)
    said = succeed(
        "pretrain",
        "tiny.yaml",
        "pretrain.steps=1",
        "pretrain.schedule.warmup_steps=0",
        "pretrain.optimizer.lr=5",
        cwd=tmp_path,
    )
    assert "pretrain: WARNING: nothing was learned that can be shown: held-out bits per byte" in said
    metrics = json.loads((tmp_path / "runs/tiny/pretrain/current/manifest.json").read_text())["metrics"]
    assert "(n=10 rows)" in metrics["summary"]["measure"]


def test_change_of_a_mean():
    """Of 400 records with a known mean change: the interval has the width of the normal approximation; records in
    another order, or measured twice alike, are told apart from a change."""
    draw = random.Random(0)
    before = [(draw.gauss(20, 5), 10.0) for _ in range(400)]
    after = [(loss + draw.gauss(-1, 2), weight) for loss, weight in before]
    low, high = mean_change(before, after)
    half = 1.96 * 2 / 400**0.5 / 10
    mean = sum(b - a for (a, _), (b, _) in zip(before, after, strict=True)) / 4000
    assert low == pytest.approx(mean - half, abs=0.2 * half) and high == pytest.approx(mean + half, abs=0.2 * half)
    assert (low, high) == mean_change(before, after) and high < 0
    assert mean_change(before, before) == (0, 0)
    unpaired = mean_change(before, after[::-1])
    assert unpaired[1] - unpaired[0] > 2 * (high - low)
    assert change_of(None, after) is None and change_of(before[:1], after[:1]) is None
