"""A report of a run that stages made: killed, reported on as it was left, resumed, and reported on again."""

import json

import pytest
import tuned
from harness import stage, succeed
from html_page import Page

from pipeline.data.chat.template import Chat
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.report.page import Options, page_of
from pipeline.report.run_folder import read_run

WORDS = ("tiny.yaml", "sft.steps=12")


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed(tmp_path, monkeypatch):
    tuned.world(tmp_path)
    monkeypatch.chdir(tmp_path)
    code, text = stage("sft", *WORDS, cwd=tmp_path, fault="work:7")  # in step 7, after the checkpoint of step 4
    assert code == -9, text
    run = read_run(tmp_path / "runs/tiny")
    assert {name: found.state for name, found in run.stages.items()} == {
        "sft": "interrupted",
        "reward": "missing",
        "dpo": "missing",
    }
    rows = [row for row in rows_of(run.stages["sft"].path) if "loss" in row]
    page = Page(page_of(run, Options()))
    assert page.curve("sft-loss", "loss")["x"] == [row["step"] for row in rows]

    succeed("sft", *WORDS, cwd=tmp_path)
    run = read_run(tmp_path / "runs/tiny")
    assert run.stages["sft"].state == "done" and run.stages["sft"].record["resumed"] == 1
    page = Page(page_of(run, Options("zh")))
    rows = [row for row in rows_of(run.stages["sft"].path) if "loss" in row]
    assert page.curve("sft-loss", "loss")["y"] == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    shapes = page.figures["plot-sft-loss"]["layout"]["shapes"]
    assert [shape["x0"] for shape in shapes if shape["type"] == "line"] == [4], "resumed from the checkpoint of step 4"
    measured = run.stages["sft"].metrics
    row = next(row for row in page.all_rows if row[:2] == ["sft", "heldout_loss"])
    assert row[3] == f"{measured['heldout_loss_after']:.4g}"
    records = json.loads((run.stages["sft"].path / "report.json").read_text())["sources"]["nouns"]
    assert f"{records['records']:,} · 100.0%" in page.text and f"{records['train']:,} · " in page.text

    # the first record, token by token
    chat = Chat(load_tokenizer(tmp_path / "base/model"))
    asked = [{"role": "user", "content": "What is a old red cat?"}, {"role": "assistant", "content": "animal"}]
    encoded = chat.encode([asked])[0]
    shown = [found for tag, found in page.tags if tag == "span" and "title" in found][: len(encoded.ids)]
    assert [int(found["title"].split()[0]) for found in shown] == encoded.ids
    assert ["loss" in found["class"].split() for found in shown] == encoded.trained
