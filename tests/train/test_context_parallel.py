"""Context parallelism: processes that share the tokens of a row compute what one process computes, and what is
refused."""

import context_worker
import harness
import pytest
import torch
from paths import HELPERS, ROOT
from pydantic import ValidationError
from tiny_engine import config

from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.train.config import Parallel
from pipeline.train.pretrain_config import Config


@pytest.mark.parametrize(
    "processes, names",
    [
        pytest.param(2, ["qwen3 documents full"], id="two"),
        pytest.param(4, list(context_worker.VARIANTS), id="four", marks=pytest.mark.slow),
    ],
)
def test_rows_are_trained_on_as_by_one_process(processes, names, tmp_path):
    """Everything that 3 steps and an evaluation return, sums by source and bytes included, to 1e-5; weights to 1e-4
    absolute; resuming bit for bit, and by one process to 1e-5; samples."""
    path = tmp_path / "results.pt"
    harness.launch(processes, HELPERS / "context_worker.py", path, ",".join(names), cwd=tmp_path, seconds=900)
    results = torch.load(path, weights_only=False)
    assert results.pop("sampled") == context_worker.sampled({})
    for name, found in results.items():
        expected = context_worker.train(name, {})
        for one, other in zip(expected["steps"], found["steps"], strict=True):
            assert other["applied"] and other["grad_norm"] > 0.5
            assert [other[key] for key in one] == pytest.approx(list(one.values()), rel=1e-5), name
        means = expected["means"]
        assert [found["means"][key] for key in means] == pytest.approx(list(means.values()), rel=1e-5), name
        for key, value in found["weights"].items():
            assert torch.allclose(value, expected["weights"][key], atol=1e-4), (name, key)
        assert found["resumed"] == found["steps"][2]
        alone = context_worker.engine_of(name, context_worker.settings_of(name, {}))
        assert f"{processes} processes with shard full and context 2" in alone.load(tmp_path / name)
        batches = [
            context_worker.batch_of(2, range(row, row + 2), alone.config.document_mask) for row in range(0, 8, 2)
        ]
        loss = alone.step(batches)["loss"]
        assert loss == pytest.approx(expected["steps"][2]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "parallel, words",
    [
        ({"context": 2}, "here is no shard; use shard: full"),
        ({"context": 2, "shard": "hybrid"}, "here is shard: hybrid"),
        ({"context": 2, "tensor": 2, "shard": "full"}, "context: 2 and tensor: 2 both split the heads"),
    ],
)
def test_what_is_beside_a_context_group_is_refused(parallel, words):
    with pytest.raises(ValidationError, match=words):
        Parallel(**parallel)


def test_rows_and_processes_that_cannot_be_divided_are_refused():
    layout = {"parallel": {"shard": "full", "context": 3}, "sequence_length": 24}
    with pytest.raises(UserError, match="stage sft: context: 3 is for pretraining"):
        config(kind="sft", **layout).check(3)
    keys = config(**layout).model_dump(exclude_defaults=True)
    pretraining = Config.model_validate(keys)
    pretraining.check_layout(6)
    with pytest.raises(UserError, match="compile: true with context: 3 was not verified"):
        pretraining.model_copy(update={"compile": True}).check_layout(6)
    with pytest.raises(UserError, match="4 processes cannot be divided into groups of context: 3; use 2 or 4"):
        pretraining.check_layout(4)
    with pytest.raises(UserError, match="sequence_length 25 cannot be divided into context: 3 equal parts"):
        pretraining.model_copy(update={"sequence_length": 25}).check_layout(3)


@pytest.mark.parametrize(
    "words, message",
    [
        (["model.family=gemma"], "the attention of this gemma model cannot be exchanged"),
        (["model.family=mistral"], "the attention of this mistral model cannot be exchanged"),
        (["model.attention_dropout=0.1"], "this llama model cannot be exchanged; .* without windows, caps and dropout"),
        (["model.num_key_value_heads=1"], "num_key_value_heads: 1 of the model is not divisible by context: 2"),
    ],
)
def test_models_whose_attention_cannot_be_exchanged_are_refused(words, message):
    layout = ["pretrain.parallel={shard: full, context: 2}", "pretrain.run.processes=2", "pretrain.optimizer={}"]
    recipe = load(ROOT / "recipes" / "quickstart.yaml", [*layout, *words])
    with pytest.raises(UserError, match=message):
        recipe.stages["pretrain"].check(2)
