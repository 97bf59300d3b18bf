"""The header of a tuning stage prints what `alma plan` says of the same stage: one layout, whatever its keys are."""

import pytest
from ppo_world import tiny

from pipeline import dpo, grpo, sft
from pipeline.core.terminal import byte_size
from pipeline.models import cost, devices
from pipeline.train import layouts, run_summary

KEYS = {
    "steps": 4,
    "batch_size": 16,
    "sequence_length": 48,
    "precision": "fp32",
    "micro_batch": 2,
    "sources": {"rows": {"path": "rows.jsonl"}},
}
CLUSTER = devices.like("a GPU", 2**34, 1, 1)


def header(config, model) -> list[str]:
    others = {}
    for name, is_trained in config.other_models().items():
        others[name] = cost.count(model) if is_trained else run_summary.sampling_cost.only_read(cost.count(model))
    work = run_summary.Work("data", others=others)
    size = cost.count(model)
    return run_summary.tuning_lines(config, model, size, cost.training_flops(model, size, 48), None, work)


def memory(lines: list[str]) -> str:
    (line,) = (line for line in lines if line.startswith("memory"))
    return line


CONFIGS = {
    "sft": sft.Config(kind="sft", **KEYS),
    "eager": sft.Config(kind="sft", attention="eager", **KEYS),
    "compiled": sft.Config(kind="sft", compile=True, **KEYS),
    "dpo": dpo.Config(kind="dpo", **KEYS),
    "grpo": grpo.Config(kind="grpo", samples=2, rollout={"max_new_tokens": 8}, update={"minibatches": 4}, **KEYS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_header_and_a_plan_agree(name):
    config, model = CONFIGS[name], tiny(num_hidden_layers=2)
    planned = layouts.candidate(config, layouts.costs_of(model, config), CLUSTER)
    lines = header(config, model)
    assert memory(lines).startswith(f"memory     about {byte_size(planned.peak)} per process")
    for part, size in planned.memory.items():
        assert f"{part} {byte_size(size)}" in memory(lines)


def test_attention_and_compilation_count():
    """Scores that are kept add to activations, compiled layers keep less."""
    model = tiny(num_hidden_layers=2)
    layout = {name: layouts.layout_here(config, model.config, cost.count(model)) for name, config in CONFIGS.items()}
    kept = {}
    for name in ("sft", "eager", "compiled"):
        kept[name] = cost.memory(model.config, cost.count(model), 48, layout[name])["activations"]
    assert kept["compiled"] < kept["sft"] < kept["eager"]


def test_micro_batches_are_those_of_an_update():
    """Of grpo: 16 prompts answered twice in 4 updates of 8 rows, 2 at a time."""
    lines = header(CONFIGS["grpo"], tiny(num_hidden_layers=2))
    assert any("one process; 4 micro-batches of 2 rows per update on each" in line for line in lines), lines
