"""Recipes fit the GPUs that they name, and the estimate that is printed agrees with a simulation at full size.

The simulation runs a step on fake tensors: simulated_stage.py for DDP, DeepSpeed and pipelines, simulated_fsdp.py for
FSDP, simulated_ppo.py for online RL, simulated_tuning.py for adapters (tests/helpers/). The margin is that of `alma
plan`: 2 GiB for the CUDA context and NCCL, and 5% of the rest for the allocator's fragmentation.
"""

import dataclasses

import families
import pytest
import simulated_fsdp
import simulated_ppo
import simulated_tuning
import torch
import transformers
from paths import ROOT
from simulated_stage import peak

from pipeline.checks import plan_stages
from pipeline.core.graph import nodes, planned_inputs
from pipeline.core.recipe import load
from pipeline.models import cost, devices
from pipeline.train import layouts
from pipeline.train.config import TrainConfig

GPU = devices.find("H100-80G")
# Stages whose recipes name another GPU.
LARGER = {("llama-3-8b", "anneal"): "H200-141G", ("deepseek-v3", "pretrain"): "H200-141G"}
# Recipes of which no stage is simulated in pretraining, and why.
UNCHECKED = {
    "mamba-130m": "its recurrence has kernels of its own on a GPU, which this machine cannot run",
    "mamba2-130m": "its recurrence has kernels of its own on a GPU, which this machine cannot run",
    "rwkv-169m": "its recurrence has kernels of its own on a GPU, which this machine cannot run",
    "llama-3.1-8b-dpo": "has no pretraining stage; its adapters are simulated below",
    "qwen2.5-7b-qlora": "has no pretraining stage; its adapters are simulated below",
    "qwen3-0.6b-lora": "has no pretraining stage; its adapters are simulated below",
    "smollm2-135m-dpo": "has no pretraining stage",
    "smollm2-135m-grpo": "has no pretraining stage",
    "smollm2-135m-sft": "has no pretraining stage",
}
QUICK = ("gpt2-124m", "llama-7b")
RECIPES = [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.stem != "quickstart"]


def marked(name: str):
    if name in UNCHECKED:
        return pytest.param(name, marks=pytest.mark.skip(reason=UNCHECKED[name]))
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)


def stages_of(name: str, words: tuple = ()) -> list:
    """(stage, config, configuration of its model) of each pretraining stage."""
    graph = nodes(load(ROOT / "recipes" / f"{name}.yaml", words))
    found = []
    for node in graph.values():
        if node.config.kind == "pretrain":
            found.append((node.name, node.config, node.config.planned_model_config(planned_inputs(node, graph))))
    return found


def estimate(config, model_config, world: int) -> float:
    size = cost.count(plan_stages.on_meta(model_config))
    layout = layouts.layout_of(config, model_config, size, world, "cuda")
    return sum(cost.memory(model_config, size, config.sequence_length, layout).values())


@pytest.mark.parametrize("name", [marked(name) for name in RECIPES])
def test_a_recipe_fits_the_gpus_it_names(name):
    """Correctness 7: the peak of the fullest process, simulated at full size, and the printed estimate within 10%."""
    stages = stages_of(name)
    assert stages, "has no pretraining stage: it belongs into UNCHECKED"
    for stage, config, model_config in stages:
        gpu = devices.find(LARGER.get((name, stage), GPU.name))
        simulated = simulation(config, model_config)
        assert simulated <= gpu.usable, f"{name}: {stage}: {simulated / 2**30:.1f} GiB"
        predicted = estimate(config, model_config, config.run.world)
        assert predicted == pytest.approx(simulated, rel=0.10), f"{name}: {stage}"


@pytest.mark.parametrize("name", [name for name, count in families.PUBLISHED.items() if count > 1e9])
def test_recipes_above_a_billion_parameters_have_fsdp(name):
    """In every stage that trains."""
    stages = load(ROOT / "recipes" / f"{name}.yaml").stages
    shards = {key: stage.parallel.shard for key, stage in stages.items() if isinstance(stage, TrainConfig)}
    assert shards and set(shards.values()) <= {"full", "hybrid"}, shards


def simulation(config, model_config) -> float:
    """Bytes at the peak of the fullest process."""
    if config.parallel.shard:
        return simulated_fsdp.peak(config, model_config, config.run.world)
    return peak(config, model_config, config.run.world).total


MODES = [
    ({"zero": 1, "pipeline": 4}, 4, "none"),
    ({"zero": 1, "pipeline": 4}, 4, "full"),
    ({"zero": 1, "pipeline": 2}, 2, "selective"),
    ({}, 1, "none"),
    ({"zero": 1}, 2, "selective"),
    ({"zero": 2}, 1, "none"),
    ({"zero": 2}, 4, "full"),
    ({"zero": 3}, 4, "full"),
    ({"zero": 3}, 2, "none"),
    ({"shard": "full"}, 2, "none"),
    ({"shard": "full"}, 8, "selective"),
    ({"shard": "hybrid"}, 2, "full"),
]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["llama-7b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("parallel, micro, checkpointing", MODES)
def test_the_estimate_is_that_of_a_simulation(model, parallel, micro, checkpointing):
    """Within 10%, for every engine and way of checkpointing, dense and with experts."""
    text = ", ".join(f"{key}: {value}" for key, value in parallel.items())
    words = [f"pretrain.parallel={{{text}}}", f"pretrain.micro_batch={micro}"]
    words.append(f"pretrain.activation_checkpointing={checkpointing}")
    ((_, config, model_config),) = stages_of(model, words)
    simulated = simulation(config, model_config)
    assert estimate(config, model_config, config.run.world) == pytest.approx(simulated, rel=0.10)


@pytest.mark.slow
@pytest.mark.parametrize("size, micro, checkpointing", [(2, 2, "none"), (8, 8, "selective"), (8, 4, "full")])
def test_the_estimate_of_a_tensor_group_is_that_of_a_simulation(size, micro, checkpointing):
    """Within 10%: what a group does and does not split of a layer's activations."""
    words = [f"pretrain.parallel={{shard: full, tensor: {size}}}", f"pretrain.micro_batch={micro}"]
    words.append(f"pretrain.activation_checkpointing={checkpointing}")
    ((_, config, model_config),) = stages_of("llama-7b", words)
    simulated = simulation(config, model_config)
    assert estimate(config, model_config, config.run.world) == pytest.approx(simulated, rel=0.10)


def test_experts_that_the_processes_cannot_share_evenly_are_in_the_estimate():
    """256 experts of DeepSeek-V3 over 2,048 processes, of which the down projections can be cut only by expert: torch
    gathers and reduces 2,048 of them (docs/log.md, 71). In groups of 1,024 every matrix is cut evenly, and fits."""
    ((_, config, model_config),) = stages_of("deepseek-v3", ["pretrain.parallel={shard: full}"])
    gpu = devices.find("H200-141G")
    costs = plan_stages.costs_of(plan_stages.on_meta(model_config), config)
    down_projections = 7168 * 2048
    more = (2048 - 256) * down_projections / costs.size.largest_layer
    assert costs.size.padding(2048) == pytest.approx(1 + more, abs=0.01)
    assert costs.size.padding(1024) == pytest.approx(1, abs=0.01)
    cluster = devices.like(gpu.driver_name, gpu.memory, 2048, 8)
    full = layouts.candidate(config, costs, cluster)
    assert full.peak == pytest.approx(327 * 2**30, rel=0.01), "docs/log.md, 71"
    found, _ = layouts.search(config, costs, cluster)
    groups = [one for one in found if one.keys["parallel"].get("shard_ranks") == 1024]
    assert any(one.fits(cluster) for one in groups) and str(groups[0]).startswith("FSDP hybrid of 1024, micro-batch")


COMPILED = [
    ("llama-7b", "zero: 1, pipeline: 4"),
    ("qwen2.5-7b", "zero: 1, pipeline: 4"),
    ("llama-7b", "shard: full"),
    ("qwen2.5-7b", "shard: full"),
]


@pytest.mark.slow
@pytest.mark.parametrize("model, parallel", COMPILED)
def test_the_estimate_of_compiled_layers_is_that_of_a_simulation(model, parallel):
    """Within 10%: what the compiler's partitioner keeps of a layer."""
    words = [f"pretrain.parallel={{{parallel}}}", "pretrain.activation_checkpointing=none"]
    ((_, config, model_config),) = stages_of(model, [*words, "pretrain.micro_batch=2", "pretrain.compile=true"])
    simulated = simulation(config, model_config)
    assert estimate(config, model_config, config.run.world) == pytest.approx(simulated, rel=0.10)


# ---- finetuning ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("micro_batch=2", "activation_checkpointing=full")], ids=["recipe", "full"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo"])
def test_the_estimate_of_finetuning_under_fsdp_is_that_of_a_simulation(stage, words):
    """Within 10%, of the stages of recipes/llama-7b.yaml that train all weights; and the recipe's fit their GPUs."""
    (_, _, model_config), *_ = stages_of("llama-7b")
    config = load(ROOT / "recipes" / "llama-7b.yaml", [f"{stage}.{word}" for word in words]).stages[stage]
    if stage == "reward":
        model_config.num_labels, model_config.pad_token_id = 1, 0
    simulated = simulated_fsdp.peak(config, model_config, config.run.world)
    costs = layouts.costs_of(build_on_meta(stage, model_config), config)
    cluster = devices.like(GPU.driver_name, GPU.memory, config.run.world, config.run.processes)
    assert layouts.candidate(config, costs, cluster).peak == pytest.approx(simulated, rel=0.10)
    if not words:
        assert simulated <= GPU.usable


def build_on_meta(stage: str, model_config):
    if stage != "reward":
        return plan_stages.on_meta(model_config)
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(model_config, dtype=torch.float32)


# ---- online RL -------------------------------------------------------------------------------------------------------

ONLINE = {
    "as the recipe has it": ("llama-7b", ()),
    "long answers": ("llama-7b", ("ppo.rollout={max_new_tokens: 1536, batch: 4}", "ppo.micro_batch=2")),
    "grouped queries and a large vocabulary": ("llama-3-8b", ("ppo.rollout.batch=32", "ppo.batch_size=1024")),
    "fp32": ("llama-7b", ("ppo.precision=fp32", "ppo.parallel={shard: hybrid}")),
}


def ppo_of(shape: str, words: tuple):
    """Stage ppo of recipes/llama-7b.yaml for a model of the sizes of another recipe."""
    config = load(ROOT / "recipes" / "llama-7b.yaml", words).stages["ppo"]
    (_, _, model_config), *_ = stages_of(shape)
    return config, model_config


@pytest.mark.slow
@pytest.mark.parametrize("name", ONLINE)
def test_the_estimate_of_ppo_is_that_of_a_simulation(name):
    """Within 10%, of the largest phase of an iteration; and the recipe's fits its GPUs."""
    config, model_config = ppo_of(*ONLINE[name])
    simulated = max(simulated_ppo.peaks(config, model_config, config.run.world).values())
    costs = plan_stages.costs_of(plan_stages.on_meta(model_config), config)
    cluster = devices.like(GPU.driver_name, GPU.memory, config.run.world, config.run.processes)
    assert layouts.candidate(config, costs, cluster).peak == pytest.approx(simulated, rel=0.10)
    if name == "as the recipe has it":
        assert simulated <= GPU.usable


def test_models_on_demand_are_in_the_estimate_only_while_they_measure():
    """The largest phase of the recipe is sampling, in which neither is in memory."""
    cluster = devices.like(GPU.driver_name, GPU.memory, 32, 8)
    memories = []
    for words in ((), ("ppo.on_demand=true",)):
        config, model_config = ppo_of("llama-7b", words)
        costs = plan_stages.costs_of(plan_stages.on_meta(model_config), config)
        memories.append(layouts.candidate(config, costs, cluster).memory)
    stays, on_demand = memories
    assert stays.keys() - on_demand.keys() == {"reference", "reward model"}
    assert on_demand == {name: size for name, size in stays.items() if name in on_demand}


def test_ppo_that_does_not_fit_is_told_what_would():
    """What it needs to sample counts too: fewer rows at a time are a change of the layout."""
    config, model_config = ppo_of("llama-7b", ("ppo.rollout.batch=64", "ppo.batch_size=2048"))
    model = plan_stages.on_meta(model_config)
    cluster = devices.like(GPU.driver_name, GPU.memory, 32, 8)
    text = layouts.advice(config, model, cluster)
    assert "; FSDP full, micro-batch 1, rollout.batch 32 would, with" in text, text
    smaller = config.model_copy(update={"rollout": config.rollout.model_copy(update={"batch": 32})})
    assert layouts.advice(smaller, model, cluster) is None
    assert "no other layout" in layouts.advice(config, model, devices.like("unknown", 20 * 2**30, 8, 8))


TUNED = [
    ("qwen3-0.6b-lora", "sft", "qwen3-0.6b", 15),
    ("qwen2.5-7b-qlora", "sft", "qwen2.5-7b", 15),
    ("llama-3.1-8b-dpo", "dpo", "llama-3-8b", 45),
]  # GiB that drivers show: a T4 of 16 GB has 15, an L40S of 48 GB has 45


@pytest.mark.slow
@pytest.mark.parametrize("name, stage, shape, gib", TUNED)
def test_a_recipe_with_adapters_fits_the_gpu_it_names(name, stage, shape, gib):
    """`shape`: the recipe that has the published model's sizes."""
    config = load(ROOT / "recipes" / f"{name}.yaml").stages[stage]
    (_, _, model_config), *_ = stages_of(shape)
    simulated = simulated_tuning.peak(config, model_config).total
    gpu = devices.like("a GPU", gib * 2**30, 1, 1).device
    assert simulated <= gpu.usable, f"{simulated / 2**30:.1f} GiB"
    plan = plan_stages.costs_of(plan_stages.on_meta(model_config), config)
    layout = layouts.layout_of(config, model_config, plan.size, 1, "cuda")
    sequences = dataclasses.replace(layout, micro=layout.micro * config.sequences_per_row())
    predicted = sum(cost.memory(model_config, plan.size, config.sequence_length, sequences).values())
    assert predicted == pytest.approx(simulated, rel=0.10)


def test_a_layout_that_does_not_fit_is_told_what_would():
    words = ["pretrain.activation_checkpointing=none", "pretrain.parallel={zero: 2}"]
    ((_, config, model_config),) = stages_of("llama-7b", words)
    model = plan_stages.on_meta(model_config)
    text = layouts.advice(config, model, devices.like(GPU.driver_name, GPU.memory, 32, 8))
    assert text.startswith("does not fit") and "would, with" in text
    assert layouts.advice(config, model, devices.like("unknown", 4 * GPU.memory, 32, 8)) is None
