"""`alma compare A B`: differences of recipes, results and numbers."""

import json

import ledger
import pytest
import reported_run
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core.errors import UserError


def compare(*words):
    result = CliRunner().invoke(app, ["compare", *map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs with the same pack; pretrain differs in its rate; b's is in another number of processes; a has a dpo."""
    monkeypatch.chdir(tmp_path)
    for name, rate, loss, processes, steps in (("a", 1e-3, 3.0, 1, 40), ("b", 3e-4, 2.85, 2, 30)):
        root = tmp_path / "runs" / name
        pack = ledger.output(root / "pack", {}, tokens=5)
        config = {"optimizer": {"lr": rate}, "run": {"processes": processes}}
        made = ledger.output(root / "pretrain", config, {"tokens": pack}, loss_after=loss, shared=7)
        rows = reported_run.pretrain_rows(steps)
        for row in rows:
            row.update({"loss": row["loss"] + loss} if "loss" in row else {})
        (made.path / "metrics.jsonl").write_text(reported_run.lines(rows))
    ledger.output(tmp_path / "runs/a/dpo", {})
    return tmp_path / "runs"


def test_recipes_numbers_and_curves(runs):
    result = json.loads(compare("runs/a", "runs/b", "--json"))
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert stages["pack"]["same"] and stages["pack"]["same_content"] is True
    pretrain = stages["pretrain"]
    assert (
        pretrain["differences"] == ["optimizer.lr: 0.001 -> 0.0003", "run.processes: 1 -> 2"]
        and not pretrain["same_content"]
    )
    assert stages["dpo"]["states"] == ["done", ""]
    numbers = {(row["stage"], row["name"]): (row["first"], row["second"]) for row in result["numbers"]}
    assert numbers["pretrain", "loss_after"] == (3.0, 2.85) and numbers["pretrain", "shared"] == (7, 7)
    curves = {row["name"]: row for row in result["curves"]}
    at = [next(row["loss"] for row in reported_run.pretrain_rows(40) if row["step"] == 30 and "loss" in row)]
    assert curves["loss"]["step"] == 30, "the last that both have"
    assert curves["loss"]["first"] == pytest.approx(at[0] + 3.0) and curves["loss"]["second"] == pytest.approx(
        at[0] + 2.85
    )


def test_as_text(runs):
    said = compare("runs/a", "runs/b")
    for text in ("optimizer.lr: 0.001 -> 0.0003", "only in a", "same bytes", "-0.15", "-5.0%"):
        assert text in said, text
    assert (
        "shared" not in said
        and "of one run only (--all shows them)" in said
        and "shared" in compare("runs/a", "runs/b", "--all")
    )


def test_keys_that_decide_no_result(runs):
    """`run` is an execution key of the real stages: it is named, but is no difference of the recipe."""
    for name, workers in (("a", 1), ("b", 4)):
        manifest = runs / name / "pack/current/manifest.json"
        record = json.loads(manifest.read_text())
        record["config"]["run"] = {"processes": workers}
        manifest.write_text(json.dumps(record))
    assert "run.processes: 1 -> 4 (decides no result)" in compare("runs/a", "runs/b")


def test_the_same_run_and_mistakes(runs):
    said = compare("runs/a", "runs/a")
    assert "same recipe and inputs" in said and "other bytes" not in said
    result = CliRunner().invoke(app, ["compare", "runs/a", "runs/c"])
    assert isinstance(result.exception, UserError) and "runs/c: is not there" in str(result.exception)
