"""KTO: what it learns, that the estimate of the KL divergence does not depend on how a batch is divided, mistakes, and
that a killed run ends as if it had not been."""

import json
import random

import numpy as np
import pytest
import tuned
from harness import files_of, stage, succeed

from pipeline.core.output import Output
from pipeline.kto import Config, headline, ranked_right, say_balance
from pipeline.train.finetune_data import Ragged
from pipeline.train.labelled_data import mismatched_row, partners

STAGE = f"""
  kto:
    {{{tuned.COMMON}, steps: 24, optimizer: {{lr: 3e-3}}, sources: {{nouns: {{path: judged.jsonl}}}}}}
"""


def judged_rows() -> list[dict]:
    rows = []
    for index, row in enumerate(tuned.rows()):
        prompt = f"What is a {row['words']} {row['noun']}?"
        good = index % 2 == 0
        rows.append({"prompt": prompt, "completion": row["kind" if good else "wrong"], "label": good})
    return rows


def world(folder) -> None:
    tuned.copy_until("dpo", folder)
    lines = [json.dumps(row, ensure_ascii=False) for row in judged_rows()]
    (folder / "judged.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "tiny.yaml").write_text(tuned.RECIPE + STAGE, encoding="utf-8")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The world after an uninterrupted run."""
    folder = tmp_path_factory.mktemp("kto")
    world(folder)
    succeed("kto", "tiny.yaml", cwd=folder)
    return folder


def test_what_is_learned(plain):
    """Before, the policy is the reference, by definition."""
    found = tuned.metrics(plain, "kto")
    assert found["heldout_loss_before"] == pytest.approx(0.5, abs=1e-5)
    assert found["heldout_margin_before"] == pytest.approx(0, abs=1e-5)
    assert found["heldout_auc_after"] > 0.9
    assert found["heldout_loss_after"] < 0.5 and found["heldout_margin_change_interval"][0] > 0
    margin = found["heldout_reward_desirable_after"] - found["heldout_reward_undesirable_after"]
    assert margin == pytest.approx(found["heldout_margin_after"], abs=1e-6)
    assert found["heldout_kl_before"] == pytest.approx(0, abs=1e-5) and found["warnings"] == []


def test_micro_batches_change_nothing_but_the_last_bits(plain, tmp_path):
    """Losses, norms and KL estimates of a run with micro-batches of one answer, 1e-5."""
    world(tmp_path)
    succeed("kto", "tiny.yaml", "kto.micro_batch=1", "kto.steps=8", cwd=tmp_path)
    for one, other in zip(tuned.lines(plain, "kto")[:9], tuned.lines(tmp_path, "kto"), strict=False):
        for key in ("loss", "grad_norm", "kl", "margin", "heldout_loss", "heldout_kl"):
            assert other.get(key) == pytest.approx(one.get(key), abs=1e-5), key
    assert any(line.get("kl", 0) > 0 for line in tuned.lines(tmp_path, "kto"))


def killed_like_plain(plain, folder, faults: list[str], kill_after: float | None = None) -> None:
    world(folder)
    for fault in faults:
        code, text = stage("kto", "tiny.yaml", cwd=folder, fault=fault)
        assert code == -9, f"did not reach {fault}: {text}"
    if kill_after is not None:
        stage("kto", "tiny.yaml", cwd=folder, kill_after=kill_after)
    succeed("kto", "tiny.yaml", cwd=folder)
    expected, found = (files_of(where / "runs/tiny/kto/current") for where in (plain, folder))
    assert expected == found


@pytest.mark.slow
def test_killed_and_resumed(plain, tmp_path):
    """work:1 is after the reference of the training answers, work:6 in the steps."""
    faults = ["save:1", "work:1", "work:6", "save:1"]
    killed_like_plain(plain, tmp_path, faults, kill_after=random.uniform(0.2, 2.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("kto.lora={rank: 4}", "kto.optimizer.lr=3e-2"), ("kto.loss=apo_zero_unpaired",)], ids=["adapters", "apo"]
)
def test_variants_killed_twice_and_resumed(words, tmp_path):
    """With the bytes of the run that was left alone, whose reference was computed by that run itself."""
    found = []
    for name, faults in (("alone", []), ("killed", ["work:5", "save:2"])):
        world(folder := tmp_path / name)
        for fault in faults:
            code, text = stage("kto", "tiny.yaml", "kto.steps=10", *words, cwd=folder, fault=fault)
            assert code == -9, f"did not reach {fault}: {text}"
        succeed("kto", "tiny.yaml", "kto.steps=10", *words, cwd=folder)
        found.append(files_of(folder / "runs/tiny/kto/current"))
    assert found[0] == found[1]


def test_partners_are_others_and_a_function_of_the_seed():
    for count in (2, 3, 100):
        partner = partners(7, "train", count)
        assert sorted(partner) == list(range(count)) and (partner != np.arange(count)).all()
        assert np.array_equal(partner, partners(7, "train", count))
    assert not np.array_equal(partners(7, "train", 100), partners(8, "train", 100))
    assert partners(7, "train", 1).tolist() == [0]


def test_a_mismatched_row_is_cut():
    arrays = {"train.ids": Ragged.of([[1, 2, 3, 4], [5, 6, 7, 8, 9]], np.int32), "train.start": np.array([3, 2])}
    row = mismatched_row(arrays, "train", 0, 1, 5)
    assert row.ids.tolist() == [1, 2, 3, 7, 8] and row.start == 3
    assert mismatched_row(arrays, "train", 1, 0, 5).ids.tolist() == [5, 6, 4]


def test_mistakes_are_sentences(tmp_path):
    world(tmp_path)
    for words, message in (
        (("kto.sources.nouns.path=rows.jsonl",), "no judged answer among its fields"),
        (("kto.loss=dpo",), "expected 'kto' or 'apo_zero_unpaired'"),
        (("kto.sources.nouns.prompt=x",), "completion and label is missing: give templates for all"),
    ):
        code, text = stage("kto", "tiny.yaml", *words, cwd=tmp_path)
        assert code == 2 and message in text.replace("\n", " ") and "Traceback" not in text, text


def test_an_unbalanced_set_is_reported(capsys, tmp_path):
    config = Config(sources={"s": {"path": "x"}}, batch_size=8, sequence_length=64, steps=1)
    output = Output(tmp_path, "kto", "kto", {})
    say_balance(config, output, np.array([True] * 30 + [False] * 10))
    said = capsys.readouterr().out
    assert "30 good and 10 bad" in said and "desirable_weight: 0.333 to 0.444 would balance them" in said
    say_balance(config, output, np.array([True] * 10 + [False] * 10))
    assert capsys.readouterr().out == ""
    say_balance(config, output, np.array([True] * 10))
    assert "WARNING: all 10 answers are good ones" in capsys.readouterr().out


def test_nothing_learned_is_said():
    before, after = {"margin": 0.0}, {"margin": 0.5}
    assert headline(before, after, (-0.1, 1.1), 0.5, 50)[1] != []
    assert headline(before, after, (0.1, 0.9), 0.8, 50)[1] == []


def test_ranked_right_by_counting():
    """Against a count of all pairs, with ties; by numpy alone."""
    source = np.random.default_rng(0)
    rows = [[0, 0, float(reward), float(label), 1] for reward, label in source.integers(0, 4, (40, 2)) // [1, 2]]
    good, bad = (np.array([row[2] for row in rows if row[3] == kind]) for kind in (1, 0))
    wins = (good[:, None] > bad).sum() + (good[:, None] == bad).sum() / 2
    assert ranked_right(rows) == pytest.approx(wins / (len(good) * len(bad)))
    assert ranked_right([[0, 0, 1.0, 1.0, 1]]) is None
