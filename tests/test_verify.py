"""`alma verify parallel` and `alma verify resume`: what they say of a sound machine, and that they find faults."""

import json
import sys
from pathlib import Path

import pytest
import tiny

from pipeline import cli
from pipeline.verify import parallel

TESTS = Path(__file__).parent


def alma(monkeypatch, folder: Path, *words) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["alma", *(str(word) for word in words)])
    for key, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(TESTS)}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def report(folder: Path, what: str) -> dict:
    return json.loads((folder / "runs" / "tiny" / "verify" / f"{what}.json").read_text())


def test_all_layouts_agree(tmp_path, monkeypatch, capsys):
    """Without any stage run. Every layout is there, no number differs by more than 1e-5, and the folder is left clean."""
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert alma(monkeypatch, tmp_path, "verify", "parallel", "recipe.yaml") == 0, capsys.readouterr().out
    said, found = capsys.readouterr().out, report(tmp_path, "parallel")
    assert "synthetic" in said and "all layouts agree" in said
    assert {(row["layout"], row["precision"]) for row in found["layouts"]} == {(name, precision) for name, *_ in parallel.LAYOUTS for precision in ("fp32",)}
    for trial in found["trials"]:
        assert len(trial["steps"]) == 12 and trial["steps"][0]["loss"] > trial["steps"][9]["loss"] + 0.1, "it learns, so that weights matter"
        assert [step["applied"] for step in trial["steps"]] == [True] * 10 + [False, True]
    assert sum(row["passed"] for row in found["layouts"]) == len(parallel.LAYOUTS)
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "verify").iterdir()] == ["parallel.json"]


def test_faults_are_found(tmp_path, monkeypatch, capsys):
    """Four layouts, each with a fault of its own (mutant_worker.py): all four fail, for their own reason, and the command ends with 1."""
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    monkeypatch.setattr(parallel, "WORKER", "mutant_worker")
    monkeypatch.setattr(parallel, "LAYOUTS", [layout for layout in parallel.LAYOUTS if layout[0] in ("one process", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "pipeline of 2")])
    assert alma(monkeypatch, tmp_path, "verify", "parallel", "recipe.yaml") == 1, capsys.readouterr().out
    rows = {row["layout"]: row for row in report(tmp_path, "parallel")["layouts"]}
    assert rows["one process"]["passed"] and rows["ZeRO-3"]["passed"], "no fault, no finding"
    assert rows["DDP"]["grad_norm"] == pytest.approx(0.5, abs=0.1) and not rows["DDP"]["passed"]
    assert rows["ZeRO-1"]["loss"] > 1e-5 and not rows["ZeRO-1"]["passed"]
    assert rows["ZeRO-2"]["loss"] > 1e-3 and not rows["ZeRO-2"]["passed"]
    assert not rows["pipeline of 2"]["nan_kept_out"] and not rows["pipeline of 2"]["passed"] and rows["pipeline of 2"]["loss"] > 1
    assert "LAYOUTS DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["parallel", "recipe.yaml", "pack"], "'pack' is no stage of kind pretrain"),
        (["parallel", "recipe.yaml", "pretrain.stepz=3"], "did you mean 'steps'"),
        (["parallel", "recipe.yaml", "model.family=lama"], "did you mean llama"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, words, said):
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert alma(monkeypatch, tmp_path, "verify", *words) == 2
    assert said in capsys.readouterr().err
