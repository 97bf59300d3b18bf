"""Tensor parallelism: each family that claims it computes what one process computes; the loss of a part of the
vocabulary; what is refused. With checkpointing, frozen weights and other layouts' checkpoints: test_parallel.py."""

import threading
from types import SimpleNamespace

import harness
import pytest
import tensor_worker
import torch
from paths import HELPERS, ROOT
from pydantic import ValidationError
from tiny_engine import config
from transformers import AutoConfig

from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.models.families import FAMILIES
from pipeline.train import state, tensor_parallel
from pipeline.train.config import Parallel
from pipeline.train.pretrain_config import Config


@pytest.mark.parametrize(
    "processes, names",
    [
        pytest.param(2, ["qwen3"], id="two"),
        pytest.param(4, list(tensor_worker.VARIANTS), id="four", marks=pytest.mark.slow),
    ],
)
def test_a_family_is_trained_as_by_one_process(processes, names, tmp_path):
    """Initial weights bit for bit, of models that were never complete; losses and gradient norms of 3 steps to 1e-5,
    weights to 1e-4 absolute; resuming bit for bit, and by one process to 1e-5; samples."""
    path = tmp_path / "results.pt"
    harness.launch(processes, HELPERS / "tensor_worker.py", path, ",".join(names), cwd=tmp_path, seconds=900)
    results = torch.load(path, weights_only=False)
    assert results.pop("sampled") == tensor_worker.sampled({})
    for name, found in results.items():
        expected = tensor_worker.train(name, {})
        assert found["first"].keys() >= expected["first"].keys() - {"lm_head.weight"}
        for key, value in found["first"].items():
            assert torch.equal(value, expected["first"][key]), (name, key)
        for one, other in zip(expected["steps"], found["steps"], strict=True):
            assert other["applied"] and other["grad_norm"] > 0.5
            assert [other[key] for key in one] == pytest.approx(list(one.values()), rel=1e-5), name
        for key, value in found["weights"].items():
            assert torch.allclose(value, expected["weights"][key], atol=1e-4), (name, key)
        assert found["resumed"] == found["steps"][2]
        alone = tensor_worker.engine_of(name, tensor_worker.settings_of({}))
        assert f"saved with {processes} processes with shard full and tensor 2" in alone.load(tmp_path / name)
        reader = state.Reader(tmp_path / name, "model")
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for key, shape in alone.shapes.items():
                stored = sum(piece.stop - piece.start for piece in reader.pieces[kind, key])
                assert stored == torch.Size(shape).numel(), f"{kind} of {key} is there once"


def test_every_family_that_claims_it_has_a_plan_of_rows_and_columns():
    for name, family in FAMILIES.items():
        if family.tensor:
            styles = set(AutoConfig.for_model(name).base_model_tp_plan.values())
            assert {"colwise", "rowwise"} <= styles <= {"colwise", "rowwise", "replicated_with_grad_allreduce"}


# ---- loss ------------------------------------------------------------------------------------------------------------


class Threads:
    """Sums and maxima over threads, which are the members of a group."""

    def __init__(self, count: int):
        self.barrier, self.values = threading.Barrier(count), [None] * count

    def all_reduce(self, tensor, op=torch.distributed.ReduceOp.SUM, group=None):
        self.values[group] = tensor.clone()
        self.barrier.wait(60)
        stacked = torch.stack(self.values)
        self.barrier.wait(60)
        tensor.copy_(stacked.sum(0) if op == torch.distributed.ReduceOp.SUM else stacked.amax(0))


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_the_loss_of_parts_of_the_vocabulary_is_that_of_the_whole(monkeypatch, z_loss):
    """Three processes with 5, 5 and 3 of 13 words, logits up to 60: losses, logsumexps, and all gradients of their sum
    as autograd finds them in fp64, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((9, 4), (13, 4), (13,)))
    hidden, labels = 10 * hidden, torch.tensor([0, 4, 5, 9, 10, 12, -100, 3, -100])
    whole = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*whole)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    lse = logits.logsumexp(-1) * (labels != -100)
    grad_logits, *_ = torch.autograd.grad((nll + z_loss * lse**2).sum(), [logits])
    threads, found = Threads(3), {}
    monkeypatch.setattr(tensor_parallel.dist, "all_reduce", threads.all_reduce)

    def member(rank: int) -> None:
        first, stop = tensor_parallel.part_of(13, rank, 3)
        arguments = (hidden, weight[first:stop], bias[first:stop], labels, z_loss)
        found[rank] = tensor_parallel.split_chunk(rank, first, *arguments, True)
        assert tensor_parallel.split_chunk(rank, first, *arguments, False)[2] is None

    members = [threading.Thread(target=member, args=(rank,)) for rank in range(3)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(60)
    for losses, sums, _ in found.values():
        torch.testing.assert_close(losses.double(), nll.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums.double(), lse.detach(), rtol=1e-5, atol=1e-5)
    joined = torch.cat([found[rank][2] for rank in range(3)], 1)
    torch.testing.assert_close(joined.double(), grad_logits, rtol=1e-5, atol=1e-5)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parallel, words",
    [
        ({"tensor": 2}, "here is no shard; use shard: full"),
        ({"tensor": 2, "zero": 3}, "here is no shard"),
        ({"tensor": 2, "shard": "hybrid"}, "here is shard: hybrid"),
        ({"tensor": 2, "shard": "full", "pipeline": 2}, "pipeline: 2 with shard: full"),
    ],
)
def test_what_is_beside_a_tensor_group_is_refused(parallel, words):
    with pytest.raises(ValidationError, match=words):
        Parallel(**parallel)


def test_optimizers_and_precisions_that_were_not_verified_are_refused():
    layout = {"parallel": {"shard": "full", "tensor": 2}}
    with pytest.raises(ValidationError, match="muon needs complete matrices, of which tensor: 2"):
        config(optimizer={"kind": "muon"}, **layout)
    keys = config(**layout).model_dump(exclude_defaults=True)
    with pytest.raises(ValidationError, match="fp8 was not tried with tensor: 2"):
        Config.model_validate(keys | {"precision": "fp8"})


def test_other_stages_and_processes_that_cannot_be_grouped_are_refused():
    layout = {"parallel": {"shard": "full", "tensor": 2}}
    with pytest.raises(UserError, match="stage sft: tensor: 2 is for pretraining"):
        config(kind="sft", **layout).check(4)
    keys = config(**layout).model_dump(exclude_defaults=True)
    with pytest.raises(UserError, match="compile: true with tensor: 2 was not verified"):
        Config.model_validate(keys | {"compile": True}).check_layout(4)
    pretraining = Config.model_validate(keys)
    with pytest.raises(UserError, match="3 processes cannot be divided into groups of tensor: 2; use 1 or 3"):
        pretraining.check_layout(3)
    with pytest.raises(
        UserError, match="batch_size 8 is not divisible by 3 data-parallel ranks; .* or 2 or 4 processes"
    ):
        pretraining.check_layout(6)
    pretraining.check_layout(16)


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["model.family=gemma"],
            "the family gemma cannot be split over a tensor group here; these can: llama, mistral",
        ),
        (["model.family=phi3"], "the family phi3 cannot be split"),
        (["model.num_key_value_heads=1"], "num_key_value_heads: 1 of the model is not divisible by tensor: 2"),
        (["model.intermediate_size=63"], "intermediate_size: 63 of the model"),
    ],
)
def test_models_that_cannot_be_split_are_refused(words, message, tmp_path):
    """Before anything runs, with the size that is in the way."""
    layout = ["pretrain.parallel={shard: full, tensor: 2}", "pretrain.run.processes=2", "pretrain.optimizer={}"]
    recipe = load(ROOT / "recipes" / "quickstart.yaml", [*layout, *words])
    with pytest.raises(UserError, match=message):
        recipe.stages["pretrain"].check(2)
    shape = SimpleNamespace(model_type="llama", num_attention_heads=6, num_key_value_heads=6, intermediate_size=9)
    assert tensor_parallel.obstacle(shape, 3) is None and "num_attention_heads" in tensor_parallel.obstacle(shape, 4)
