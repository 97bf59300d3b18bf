"""`alma list`: runs, stages, states, sizes, last metrics."""

import json
import os

import ledger
import pytest
import reported_run
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core.errors import UserError


def alma_list(*words) -> str:
    result = CliRunner().invoke(app, ["list", *map(str, words)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """demo is done; going has a stage that was interrupted, later; broken cannot be read."""
    monkeypatch.chdir(tmp_path)
    reported_run.write(tmp_path / "runs/demo")
    for file in (tmp_path / "runs/demo").rglob("*.json"):
        os.utime(file, (1e9, 1e9))
    for file in (tmp_path / "runs/demo").rglob("*.jsonl"):
        os.utime(file, (1e9, 1e9))
    going = tmp_path / "runs/going"
    ledger.output(going / "pack", {}, summary={"measure": "5 tokens"})
    run = ledger.output(going / "pretrain", {"steps": 400}, checkpoints=(20,), publish=False)
    (run / "metrics.jsonl").write_text(reported_run.lines(reported_run.pretrain_rows(40)) + '{"step": 41, "lo')
    (tmp_path / "runs/notes").mkdir()
    return tmp_path / "runs"


def test_runs_in_a_folder(runs):
    found = json.loads(alma_list("--json"))["runs"]
    assert [entry["run"] for entry in found] == ["demo", "going"], "by default those in runs, the newest last"
    going = found[1]
    on_disk = sum(
        file.stat().st_size for file in (runs / "going").rglob("*") if not file.is_symlink() and file.is_file()
    )
    links = sum(link.lstat().st_size for link in (runs / "going").rglob("*") if link.is_symlink())
    assert going["bytes"] == on_disk + links
    assert [(stage["stage"], stage["state"]) for stage in going["stages"]] == [
        ("pack", "done"),
        ("pretrain", "interrupted"),
    ]
    last = reported_run.pretrain_rows(40)[-2:]
    expected = f"step 40 of 400: heldout_loss {last[1]['heldout_loss']:.4g}, loss {last[0]['loss']:.4g}"
    assert going["stages"][1]["metric"] == expected and going["stages"][0]["metric"] == "5 tokens"
    said = alma_list(runs)
    assert "1 of 2 done, pretrain interrupted at step 20" in said and "5 of 5 done" in said
    assert "2001-09-09 01:46" in said and expected in said


def test_stages_of_a_run(runs):
    said = alma_list("runs/going")
    assert "interrupted: at step 20" in said and "step 40 of 400" in said and "alma gc runs/going" in said
    entry = json.loads(alma_list("runs/demo", "--json"))
    assert entry["run"] == "demo" and len(entry["stages"]) == 5
    assert next(stage for stage in entry["stages"] if stage["stage"] == "clean")["metric"] == "dropped: 50"


def test_a_damaged_stage_is_named_and_a_newer_run_does_not_hide_the_others(runs):
    manifest = runs / "demo/tokenizer/current/manifest.json"
    newer = json.loads(manifest.read_text()) | {"schema_version": 99}
    manifest.write_text(json.dumps(newer))
    (runs / "going/pack/current/manifest.json").write_text("{")
    said = alma_list()
    assert "update alma" in said and "pack damaged" in said


@pytest.mark.parametrize("folder, message", [("nowhere", "is not there"), ("notes", "has no runs")])
def test_mistakes(runs, folder, message):
    result = CliRunner().invoke(app, ["list", str(runs / folder)])
    assert isinstance(result.exception, UserError) and message in str(result.exception)
