"""`alma verify parallel` and `alma verify resume`: they pass on a sound machine, and they detect faults."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import harness
import pytest
import tiny
import torch
from paths import HELPERS, ROOT

from pipeline import cli
from pipeline.checks import launch, layouts, verify_parallel, verify_resume
from pipeline.checks.small_recipe import prepare
from pipeline.core.recipe import load
from pipeline.train.engine import multiplies_bf16


def alma(monkeypatch, folder: Path, *words) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["alma", *(str(word) for word in words)])
    for key, value in {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(HELPERS),
    }.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def report(folder: Path, what: str) -> dict:
    return json.loads((folder / "runs" / "tiny" / "verify" / f"{what}.json").read_text())


@pytest.mark.slow
def test_all_layouts_agree(tmp_path, monkeypatch, capsys):
    """Without running any stage. Every layout is in the table, no number differs by more than 1e-5, and the folder is
    clean afterwards."""
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert alma(monkeypatch, tmp_path, "verify", "parallel", "recipe.yaml") == 0, capsys.readouterr().out
    output, result = capsys.readouterr().out, report(tmp_path, "parallel")
    assert "synthetic" in output and "all layouts agree" in output
    assert {(row["layout"], row["precision"]) for row in result["layouts"]} == {
        (name, precision) for name, *_ in layouts.LAYOUTS for precision in ("fp32",)
    }
    for trial in result["trials"]:
        assert len(trial["steps"]) == 12 and trial["steps"][0]["loss"] > trial["steps"][9]["loss"] + 0.1, (
            "it learns, so that weights matter"
        )
        assert [step["applied"] for step in trial["steps"]] == [True] * 10 + [False, True]
    assert sum(row["passed"] for row in result["layouts"]) == len(layouts.LAYOUTS)
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "verify").iterdir()] == ["parallel.json"]


FAULTS = {
    "DDP": lambda row: row["grad_norm"] == pytest.approx(0.5, abs=0.1),
    "ZeRO-1": lambda row: row["loss"] > 1e-5,
    "ZeRO-2": lambda row: row["loss"] > 1e-3,
    "pipeline of 2": lambda row: row["loss"] > 1 and not row["nan_kept_out"],
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["DDP", "pipeline of 2"], id="two"),
        pytest.param(["DDP", "ZeRO-0", "ZeRO-1", "ZeRO-2", "pipeline of 2"], marks=pytest.mark.slow, id="all"),
    ],
)
def test_faults_are_detected(tmp_path, monkeypatch, capsys, names):
    """Layouts with a fault each (mutant_worker.py): all of them fail, each for its own reason, and the exit code is 1.
    One process and ZeRO-0 have none."""
    monkeypatch.setattr(launch, "run", harness.launch_of_a_proof)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    monkeypatch.setattr(verify_parallel, "WORKER", "mutant_worker")
    compared = [layout for layout in layouts.LAYOUTS if layout.name in ("one process", *names)]
    monkeypatch.setattr(layouts, "LAYOUTS", compared)
    monkeypatch.setattr(verify_parallel, "STEPS", 5)
    assert alma(monkeypatch, tmp_path, "verify", "parallel", "recipe.yaml") == 1, capsys.readouterr().out
    rows = {row["layout"]: row for row in report(tmp_path, "parallel")["layouts"]}
    assert set(rows) == {"one process", *names}
    for name, row in rows.items():
        assert row["passed"] == (name not in FAULTS), name
        if name in FAULTS:
            assert FAULTS[name](row), (name, row)
    assert "LAYOUTS DIFFER" in capsys.readouterr().out


def test_a_killed_run_ends_like_one_that_was_not_killed(tmp_path, monkeypatch, capsys):
    """SIGKILL inside a save and after a step, on one layout: rows, losses, gradient norms and weights are equal bit for
    bit."""
    monkeypatch.setattr(launch, "run", harness.launch_of_a_proof)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert alma(monkeypatch, tmp_path, "verify", "resume", "recipe.yaml", "--same-layout", "--seed", "3") == 0, (
        capsys.readouterr().out
    )
    (row,) = report(tmp_path, "resume")["runs"]
    assert row["passed"] and row["rows"] and row["weights"] and row["loss"] == row["grad_norm"] == 0.0
    assert sorted(kill.partition(":")[0] for kill in report(tmp_path, "resume")["kills"]) == ["save", "work"]


@pytest.mark.slow
def test_a_run_that_loses_its_moments_is_detected(tmp_path, monkeypatch, capsys):
    """A fault in loading (mutant_pretrain.py): Adam's moments are zero after a resume. The rows are right, the rest
    is not, and the exit code is 1."""
    monkeypatch.setattr(launch, "run", harness.launch_of_a_proof)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    monkeypatch.setattr(verify_resume, "SCRIPT", HELPERS / "mutant_pretrain.py")
    monkeypatch.setattr(verify_resume, "kills", lambda seed: ["work:5", "work:5"])
    assert alma(monkeypatch, tmp_path, "verify", "resume", "recipe.yaml", "--same-layout") == 1, capsys.readouterr().out
    (row,) = report(tmp_path, "resume")["runs"]
    assert row["rows"] and not row["passed"] and not row["weights"] and row["loss"] > 0
    assert "RUNS DIFFER" in capsys.readouterr().out


def test_a_recipe_with_muon_is_proved_with_both_optimizers():
    """Each trial with Muon is compared with one process with Muon, and pipelines come last."""
    chosen = layouts.with_muon(list(layouts.LAYOUTS), {"kind": "muon"})
    assert [layout.depth for layout in chosen] == sorted(layout.depth for layout in chosen)
    names = [layout.name for layout in chosen if layout.changes]
    assert names == ["one process, Muon", "DDP, Muon", "FSDP, Muon", "FSDP, 2 copies x 2 ranks, Muon"]
    trials = layouts.trials(["fp32"], chosen)
    steps = [{"loss": 1.0, "grad_norm": 1.0, "applied": True}]
    results = []
    for trial in trials:
        with_muon = "optimizer" in trial["changes"]
        assert with_muon == trial["layout"].endswith("Muon") and (trial["micro_batches"] == 1) >= (
            trial["layout"] in layouts.REFERENCES
        )
        found = [step | {"loss": 2.0} for step in steps] if with_muon else steps
        results.append(trial | {"steps": found, "from_seed": True, "nan_kept_out": True})
    rows = verify_parallel.judge(results, 0.1)
    assert len(rows) == len(chosen) and all(row["passed"] and row["loss"] == 0 for row in rows)


@pytest.mark.slow
def test_muon_agrees_in_all_layouts_that_have_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "run", harness.launch_of_a_proof)
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    monkeypatch.setattr(layouts, "LAYOUTS", layouts.LAYOUTS[:1])
    words = ["verify", "parallel", "recipe.yaml", "pretrain.optimizer.kind=muon"]
    assert alma(monkeypatch, tmp_path, *words) == 0, capsys.readouterr().out
    rows = report(tmp_path, "parallel")["layouts"]
    assert {row["layout"] for row in rows if row["passed"]} == {
        "one process",
        *(layout.name for layout in layouts.MUON_LAYOUTS),
    }


@pytest.mark.slow
def test_the_quickstart_recipe_passes_both_proofs(tmp_path, monkeypatch, capsys):
    """As the README says, also from layout to layout, without running any stage; bf16 and fp32 where the processor has
    instructions for bf16, without which it takes seven times longer."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    words = ["pretrain.precision=bf16"] if multiplies_bf16(torch.device("cpu")) else []
    assert alma(monkeypatch, tmp_path, "verify", "parallel", recipe, *words) == 0, capsys.readouterr().out
    assert alma(monkeypatch, tmp_path, "verify", "resume", recipe) == 0, capsys.readouterr().out
    proofs = tmp_path / "runs/quickstart/verify"
    layouts = json.loads((proofs / "parallel.json").read_text())["layouts"]
    assert len(layouts) > 10 and all(layout["passed"] for layout in layouts)
    assert json.loads((proofs / "resume.json").read_text())["passed"]


@pytest.mark.parametrize(
    "words, own",
    [
        ([], "one process"),
        (["run.processes=4"], "DDP"),
        (["parallel.zero=3"], "ZeRO-3"),
        (["parallel.pipeline=2"], "pipeline of 2"),
        (["parallel.shard=full"], "FSDP"),
        (["parallel={shard: hybrid, shard_ranks: 8}"], "FSDP, 2 copies x 2 ranks"),
        (["parallel={shard: full, tensor: 8}", "run.processes=8"], "FSDP, tensor 2"),
        (["parallel={shard: full, tensor: 2}", "run.processes=8"], "FSDP over 2 x tensor 2"),
        (["parallel.shard=full", "compile=true"], ("FSDP, compiled", 2, {"shard": "full"})),
        (["parallel.zero=2", "parallel.offload=true"], ("ZeRO-2, offload", 2, {"zero": 2, "offload": True})),
        (["compile=true"], ("one process, compiled", 1, {})),
        (["compile=true", "run.nodes=2"], ("DDP, compiled", 2, {})),
        (["parallel.zero=1", "parallel.pipeline=8"], ("pipeline of 4", 4, {"zero": 1, "pipeline": 4})),
        (
            ["parallel={pipeline: 2, layers: [3, 1]}"],
            ("pipeline of 2, layers [3, 1]", 2, {"pipeline": 2, "layers": [3, 1]}),
        ),
        (["parallel={pipeline: 2, layers: [9, 3]}"], "pipeline of 2"),
    ],
)
def test_the_recipe_s_own_layout_is_among_those_compared(tmp_path, words, own):
    """For a model that was reduced to 4 layers."""
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    config = load(tmp_path / "recipe.yaml", [f"pretrain.{word}" for word in words]).stages["pretrain"]
    chosen, line = layouts.with_own(config, 4)
    if isinstance(own, str):
        assert len(chosen) == len(layouts.LAYOUTS) and f"among them the recipe's own: {own}" in line
    else:
        name, processes, parallel = own
        [layout] = [layout for layout in chosen if layout.name.startswith("the recipe's own")]
        assert layout[:3] == (f"the recipe's own: {name}", processes, parallel)
        assert layout.changes == ({"compile": True} if config.compile else {}) and layout.name in line
        depths = [layout.depth > 1 for layout in chosen]
        assert len(chosen) == len(layouts.LAYOUTS) + 1 and depths == sorted(depths), "pipelines last"
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    shape = SimpleNamespace(model_type="llama", num_hidden_layers=4, **sizes)
    route, _ = layouts.route(config, shape)
    assert [layout.name for layout in route[:6]] == [*layouts.ROUTE[:5], "pipeline of 2"]
    if isinstance(own, str):
        assert route[6].name == (own if own not in layouts.ROUTE else "one process")
    else:
        assert route[6] in chosen and route[6].name.startswith("the recipe's own")
    if config.parallel.pipeline == 1:
        shape.model_type = "gemma"
        left = ("pipeline of 2", "FSDP, tensor 2")
        assert layouts.route(config, shape)[0] == [layout for layout in route if layout.name not in left]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["parallel={zero: 1, offload: true}", "compile=true", "activation_checkpointing=selective", "precision=bf16"],
        ["parallel={zero: 3, offload: true}", "activation_checkpointing=full"],
        [
            "parallel.pipeline=2",
            "compile=true",
            "activation_checkpointing=full",
            "attention=flash_attention_2",
            "precision=bf16",
        ],
    ],
    ids=["zero1", "zero3", "pipeline"],
)
def test_a_compiled_or_offloaded_recipe_is_proved_as_it_is(tmp_path, monkeypatch, capsys, words):
    """Against a reference that is neither, and recomputes nothing: 1e-5 in fp32, 1% in bf16. No other layouts."""
    monkeypatch.setattr(layouts, "LAYOUTS", layouts.LAYOUTS[:1])
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    words = [f"pretrain.{word}" for word in words]
    assert alma(monkeypatch, tmp_path, "verify", "parallel", "recipe.yaml", *words) == 0, capsys.readouterr().out
    rows = [row for row in report(tmp_path, "parallel")["layouts"] if row["layout"].startswith("the recipe's own")]
    assert rows and all(row["passed"] for row in rows)


@pytest.mark.slow
def test_a_family_without_a_pipeline_is_refused_there_and_passes_elsewhere(tmp_path, monkeypatch, capsys):
    assert alma(monkeypatch, tmp_path, "verify", "parallel", ROOT / "recipes" / "gemma-2b.yaml") == 0, (
        capsys.readouterr().out
    )
    rows = {
        row["layout"]: row
        for row in json.loads(next((tmp_path / "runs").glob("*/verify/parallel.json")).read_text())["layouts"]
    }
    assert (
        rows["pipeline of 2"]["passed"] is None
        and "gemma" in rows["pipeline of 2"]["reason"]
        and rows["ZeRO-3"]["passed"]
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["parallel", "recipe.yaml", "pack"], "'pack' is not a stage of kind pretrain"),
        (["parallel", "recipe.yaml", "pretrain.stepz=3"], "did you mean 'steps'"),
        (["parallel", "recipe.yaml", "model.family=lama"], "did you mean llama"),
        (["resume", "recipe.yaml", "pretrain", "pack"], "name one stage, not several"),
    ],
)
def test_mistakes_are_reported(tmp_path, monkeypatch, capsys, words, message):
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    assert alma(monkeypatch, tmp_path, "verify", *words) == 2
    assert message in capsys.readouterr().err


def test_keys_that_a_small_copy_cannot_have_are_dropped(tmp_path):
    """Samples longer than its rows, and keep_best on a grid of thousands of steps: the recipe is valid, so the proof
    must be possible."""
    more = "    evaluate_every: 1000\n    samples: {every_steps: 10, prompts: [ape], max_new_tokens: 1000}\n"
    (tmp_path / "recipe.yaml").write_text(
        tiny.RECIPE.replace("{every_steps: 2, keep: 2}", "{every_steps: 1000, keep_best: true}").replace(
            "steps: 6", "steps: 5000"
        )
        + more
    )
    config = prepare(load(tmp_path / "recipe.yaml"), "pretrain", tmp_path / "work", 12).config
    config.check(2)
    assert config.samples is None and not config.save.keep_best
