"""`alma plan`: layouts of shipped recipes on other devices, and layouts written into a recipe's file."""

import json

import pytest
from paths import ROOT

from pipeline.checks import plan_apply, plan_commands, plan_stages
from pipeline.checks.plan_apply import REMOVE, with_key
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.recipe import load
from pipeline.models import devices
from pipeline.train.layouts import cheapest_change

LLAMA = ROOT / "recipes" / "llama-7b.yaml"


def stage_of(recipe: str, on: str, name: str = "pretrain", words: tuple = ()) -> plan_stages.StagePlan:
    graph = nodes(load(ROOT / "recipes" / f"{recipe}.yaml", words))
    return plan_stages.plan_recipe(graph, [name], devices.parse(on)).stages[0]


def test_layouts_that_fit_come_first_and_the_fastest_of_them(capsys):
    stage = stage_of("llama-7b", "32xH100-80G")
    cluster, fitting = stage.cluster, stage.fitting
    assert stage.current.fits(cluster) and stage.current.keys["parallel"] == {"shard": "full"}
    assert [one.step_seconds for one in fitting] == sorted(one.step_seconds for one in fitting)
    assert stage.found[: len(fitting)] == fitting and 0 < len(fitting) < len(stage.found)
    assert {one.layout.zero for one in stage.found} == {None, 1, 2, 3}
    assert not any(one.layout.zero == 3 and one.layout.compiled for one in stage.found)
    assert stage.tokens_needed() == 238_000 * 2048 * 2048 and stage.tokens_present is None
    assert 0.1 < stage.hours(fitting[0]) / stage.hours(stage.current) <= 1


def test_a_layout_that_does_not_fit_gets_the_smallest_change_that_does():
    stage = stage_of(
        "llama-7b", "8xH100", words=["pretrain.parallel={zero: 2}", "pretrain.activation_checkpointing=none"]
    )
    assert not stage.current.fits(stage.cluster)
    change = cheapest_change(stage.current, stage.found, stage.cluster)
    assert change.fits(stage.cluster)
    differing = {key for key in ("parallel", "micro_batch", "activation_checkpointing", "compile")
                 if change.keys.get(key) != stage.current.keys.get(key)}  # fmt: skip
    assert len(differing) == 1


def test_what_a_cluster_cannot_have_is_reported():
    stage = stage_of("llama-7b", "24xH100")
    assert stage.current is None and "24 data-parallel ranks" in " ".join(stage.refused)
    stage = stage_of("quickstart", "2xCPU")
    assert any("muon" in reason for reason in stage.refused) and stage.fitting


def test_tensor_groups_of_a_node_are_among_the_layouts():
    """Where the family can be split: of equal layouts a larger group needs less memory. Others are refused."""
    stage = stage_of("llama-7b", "32xH100-80G")
    peaks = {one.layout.tensor: one.peak for one in stage.found
             if one.layout.shard and one.layout.shard * one.layout.tensor == 32 and one.layout.micro == 1
             and one.layout.checkpointing == "none" and not one.layout.compiled
             and one.layout.context == 1}  # fmt: skip
    assert set(peaks) == {1, 2, 4, 8} and sorted(peaks.values(), reverse=True) == [peaks[size] for size in (1, 2, 4, 8)]
    assert any("tensor 8" in str(one) for one in stage.found)
    refused = stage_of("gemma-2b", "16xH100", words=("pretrain.parallel={shard: full, tensor: 2}",))
    assert refused.current is None and "gemma cannot be split over a tensor group" in refused.current_problem
    assert {one.layout.tensor for one in refused.found} == {1}


def test_the_text_and_the_json_of_a_chain(capsys):
    plan_commands.plan(str(LLAMA), [], on="32xH100-80G", price=2.0, top=2)
    text = capsys.readouterr().out
    for part in ("32xH100-80G", "pretrain", "sft", "ppo", "activations", "cost", "none are packed yet"):
        assert part in text, part
    plan_commands.plan(str(LLAMA), ["pretrain"], on="8xA100-40G", price=2.0, top=2)
    assert "DOES NOT FIT" in capsys.readouterr().out
    plan_commands.plan(str(LLAMA), ["pretrain"], on="32xH100-80G", price=2.0, top=2, as_json=True)
    result = json.loads(capsys.readouterr().out)["stages"]["pretrain"]
    best = result["layouts"][0]
    assert best["fits"] and best["cost"] == pytest.approx(best["hours"] * 32 * 2.0)
    assert (
        sum(best["memory"].values()) == best["peak_bytes"] and result["checkpoint_bytes"] == 12 * result["parameters"]
    )


def test_a_stage_that_does_not_train_is_refused():
    with pytest.raises(UserError, match="do not train"):
        plan_commands.plan(str(LLAMA), ["clean"], on="8xH100")


@pytest.mark.parametrize("name", ["llama-7b", "glm-4-9b-0414", "gpt2-124m", "quickstart"])
def test_an_applied_layout_changes_only_its_keys(name, tmp_path):
    """Of a copy of a recipe: all other values stay, and so do all comments and lines that have none of its keys."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for path in (ROOT / "recipes").rglob("*.yaml"):
        (folder / path.relative_to(ROOT / "recipes")).parent.mkdir(exist_ok=True)
        (folder / path.relative_to(ROOT / "recipes")).write_text(path.read_text())
    path = folder / f"{name}.yaml"
    stage = stage_of(name, "2xCPU" if name == "quickstart" else "16xH100")
    before, text = load(path), path.read_text()
    plan_apply.apply(path, stage.recipe_keys(stage.best, plan_apply.inherits(path)))
    after = load(path)
    config, expected = after.stages["pretrain"], stage.best.keys
    assert config.parallel.model_dump(exclude_defaults=True) == expected["parallel"]
    assert config.micro_batch == expected["micro_batch"] and config.compile == expected.get("compile", False)
    assert config.activation_checkpointing == expected.get("activation_checkpointing", "none")
    assert config.run.world == stage.cluster.count
    keys = {"parallel", "micro_batch", "activation_checkpointing", "compile", "run"}
    changed = {key: dict(before.stages["pretrain"])[key] for key in keys}
    assert config.model_copy(update=changed) == before.stages["pretrain"]
    for other in set(before.stages) - {"pretrain"}:
        assert after.stages[other] == before.stages[other]
    comments = [line for line in text.splitlines() if line.strip().startswith("#")]
    assert [line for line in path.read_text().splitlines() if line.strip().startswith("#")] == comments


TEXT = """# head
stages:
  pretrain:   # a comment
    micro_batch: 4   # rows
    parallel:
      zero: 1   # why
      pipeline: 2
    run: {nodes: 2, processes: 8}
  sft: {parallel: {zero: 3}, steps: 3}
"""


@pytest.mark.parametrize(
    "path, value, old, new",
    [
        ("pretrain.micro_batch", 8, "micro_batch: 4   # rows", "micro_batch: 8   # rows"),
        ("pretrain.micro_batch", REMOVE, "    micro_batch: 4   # rows\n", ""),
        ("pretrain.parallel", {"zero": 2}, "      zero: 1   # why\n      pipeline: 2\n", "      zero: 2   # why\n"),
        ("pretrain.parallel", REMOVE, "    parallel:\n      zero: 1   # why\n      pipeline: 2\n", ""),
        ("pretrain.compile", True, "    micro_batch", "    compile: true\n    micro_batch"),
        ("pretrain.run.nodes", 4, "{nodes: 2,", "{nodes: 4,"),
        ("pretrain.run.time", "2h", "{nodes: 2,", "{time: 2h, nodes: 2,"),
        ("sft.parallel", {"zero": 2}, "{zero: 3}", "{zero: 2}"),
        ("sft.parallel", REMOVE, "{parallel: {zero: 3}, steps", "{steps"),
        ("sft.steps", REMOVE, ", steps: 3", ""),
        ("dpo.micro_batch", 2, "  pretrain:", "  dpo: {micro_batch: 2}\n  pretrain:"),
    ],
)
def test_one_key_of_a_text(path, value, old, new):
    assert with_key(TEXT, ("stages", *path.split(".")), value) == TEXT.replace(old, new, 1)


def test_a_failed_change_leaves_the_file_alone(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT)
    with pytest.raises(UserError):
        plan_apply.apply(path, {("stages", "pretrain", "no_such_key"): 1})
    assert path.read_text() == TEXT and list(tmp_path.iterdir()) == [path]


def test_a_stage_with_adapters_needs_less():
    """Frozen weights have neither gradients nor moments."""
    peaks = {}
    for base in ("fp32", "bf16", "nf4"):
        words = [f"sft.lora={{rank: 8, base: {base}}}", "sft.parallel={}", "sft.batch_size=8"]
        peaks[base] = stage_of("llama-7b", "8xH100", "sft", words).current.memory
    assert peaks["fp32"]["optimizer"] < 0.01 * 8 * 6.74e9 and 4.0 < peaks["fp32"]["weights"] / 6.74e9 < 4.1
    assert peaks["nf4"]["weights"] < 0.3 * peaks["bf16"]["weights"] < 0.2 * peaks["fp32"]["weights"]
