"""Runs in every state, folders that are none, and the command."""

import json
import shutil

import pytest
import reported_run
from html_page import Page
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core.errors import UserError
from pipeline.report.page import Options, page_of
from pipeline.report.run_folder import read_run


def states(root) -> dict[str, str]:
    return {name: stage.state for name, stage in read_run(root).stages.items()}


def test_states(tmp_path):
    root = reported_run.write(tmp_path / "demo")
    (root / "cache").mkdir()
    partial = reported_run.unfinished(root, "sft", ended="the disk <b>is full</b>")
    reported_run.unfinished(root, "dpo")
    stages = "".join(f"  {name}: {{}}\n" for name in ("clean", "tokenizer", "pretrain", "sft", "reward"))
    (partial / "recipe.yaml").write_text(f"name: demo\nstages:\n{stages}")
    manifest = root / "tokenizer" / ("2" * 12) / "manifest.json"
    changed = json.loads(manifest.read_text()) | {"digest": "9" * 64}
    manifest.write_text(json.dumps(changed))
    ppo = root / "ppo" / ("4" * 12) / "manifest.json"
    ppo.write_text(
        ppo.read_text().replace('"files": {}', '"files": {"model/a": {"sha256": "", "size": 1, "mtime": 0}}')
    )
    expected = {
        "clean": "done",
        "tokenizer": "done",
        "pretrain": "stale",
        "sft": "failed",
        "reward": "missing",
        "ppo": "damaged",
        "assess": "done",
        "dpo": "interrupted",
    }
    found = states(root)
    assert found == expected and list(found)[:5] == list(expected)[:5], "in the recipe's order"
    page = Page(page_of(read_run(root), Options()))
    assert "the disk <b>is full</b>" in page.rows["sft"][1] and page.rows["reward"][1] == "not started"


def test_a_run_that_is_running(tmp_path):
    """The lock of this process, which is alive."""
    from pipeline.core.lock import Lock

    root = tmp_path / "going"
    partial = reported_run.unfinished(root, "pretrain")
    rows = reported_run.pretrain_rows(40)[:-1]
    (partial / "metrics.jsonl").write_text(reported_run.lines(rows))
    lock = Lock(root / "pretrain")
    lock.acquire()
    try:
        assert states(root) == {"pretrain": "running"}
    finally:
        lock.release()
    page = Page(page_of(read_run(root), Options()))
    assert len(page.curve("pretrain-loss", "loss")["x"]) == 40 and page.rows["pretrain"][1] == "interrupted"


def test_an_older_unfinished_run_does_not_hide_a_newer_result(tmp_path):
    root = tmp_path / "demo"
    partial = reported_run.unfinished(root, "clean")
    reported_run.publish(root, reported_run.manifest("clean", "1", {}, {}, {}))
    import os

    os.utime(partial / "run.json", (1, 1))
    assert states(root) == {"clean": "done"}


@pytest.mark.parametrize(
    "path, message",
    [
        ("nowhere", "is not there; give the folder of a run"),
        ("file.txt", "is a file; give the folder of a run"),
        ("empty", "no folder in it holds the output of a stage"),
        ("foreign", "no folder in it holds the output of a stage"),
        ("runs", "it contains the runs demo"),
        ("runs/demo/clean", "it is a stage of"),
        ("runs/demo/clean/current", "it is one output of a stage of"),
    ],
)
def test_folders_that_are_no_runs(tmp_path, path, message):
    reported_run.write(tmp_path / "runs/demo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "foreign/checkpoint/x").mkdir(parents=True)
    (tmp_path / "foreign/checkpoint/x/manifest.json").write_text("{}")
    with pytest.raises(UserError, match=message) as found:
        read_run(tmp_path / path)
    assert "\n" not in str(found.value)


def report(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = reported_run.write(tmp_path / "runs/demo")
    shutil.copytree(root, tmp_path / "runs/copy", symlinks=True)
    result = report("runs/demo")
    assert result.exit_code == 0 and "runs/demo/report.html: " in result.output
    assert (root / "report.html").read_text().startswith("<!doctype html>")
    assert report("runs/demo", "runs/copy", "--lang", "zh", "-o", "two.html").exit_code == 0
    assert "demo 与 copy 对比" in (tmp_path / "two.html").read_text()
    for words, message in (
        (["runs"], "contains the runs"),
        (["runs/demo", "--lang", "fr"], "expected one of en, zh"),
        (["runs/demo", "runs/copy", "--live"], "--live serves one run"),
        (["runs/demo", "-o", "runs/demo/report.html/x"], "cannot be written"),
    ):
        result = report(*words)
        assert isinstance(result.exception, UserError) and message in str(result.exception), words


def test_without_plotly(tmp_path, monkeypatch):
    import sys

    from pipeline.report.page import packed_plotly

    packed_plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly", None)
    root = reported_run.write(tmp_path / "demo")
    with pytest.raises(UserError, match=r"pip install 'alma\[report\]'"):
        page_of(read_run(root), Options())
