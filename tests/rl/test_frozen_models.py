"""Reference and reward model as online RL keeps them. Over several processes: tests/train/test_fsdp.py (their weights)
and tests/test_ppo.py (whole runs)."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from ppo_world import tiny

from pipeline.models import build
from pipeline.rl.frozen_models import OnDemand, SplitModel, complete, copy_to_read, only_read
from pipeline.train.config import Parallel
from pipeline.train.scores import reward_scores


def kept(model, precision: str, parallel: dict, shared: bool = True):
    config = SimpleNamespace(precision=precision, parallel=Parallel(**parallel))
    return only_read(model, config, shared=shared)


@pytest.mark.parametrize("parallel", [{}, {"shard": "full"}], ids=["whole", "split"])
@pytest.mark.parametrize("kind", ["causal", "reward"])
def test_matrices_in_bf16_change_no_bit_of_what_is_measured(kind, parallel):
    """Under autocast, which rounds them at each use; the tables and vectors stay in fp32."""
    model = tiny(kind, tie_word_embeddings=False, initializer_range=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = kept(model, "bf16", parallel)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(1))
    with complete(frozen) as other, torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        if kind == "causal":
            assert torch.equal(other(ids).logits, model(ids).logits)
        else:
            assert torch.equal(reward_scores(other, ids.tolist()), reward_scores(model, ids.tolist()))
        types = {name: value.dtype for name, value in other.named_parameters()}
    rounded = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert rounded == {name for name in types if "proj" in name or name.startswith(("lm_head", "score"))}
    assert not any(parameter.requires_grad for parameter in other.parameters())


def test_in_fp32_nothing_is_rounded():
    model = tiny(tie_word_embeddings=True)
    frozen = kept(model, "fp32", {"zero": 3})
    assert isinstance(frozen, SplitModel)
    with complete(frozen) as other:
        assert other.lm_head.weight is other.model.embed_tokens.weight
        assert all(torch.equal(value, model.get_parameter(name)) for name, value in other.named_parameters())
    assert all(parameter.is_meta for parameter in frozen.skeleton.parameters())


def test_a_table_that_is_read_twice_is_not_rounded():
    """A tied output layer: its values are also looked up."""
    frozen = kept(tiny(tie_word_embeddings=True), "bf16", {}, shared=False)
    assert frozen.lm_head.weight.dtype == torch.float32
    assert frozen.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("parallel", [{}, {"shard": "full"}], ids=["whole", "split"])
def test_a_model_on_demand_is_in_memory_only_while_it_is_used(tmp_path, parallel):
    """The same bits as the one that stays, twice, and nothing of it is left."""
    model = tiny(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    config = SimpleNamespace(precision="bf16", parallel=Parallel(**parallel), on_demand=True)

    def load():
        return build.skeleton(tmp_path) if parallel else (build.load(tmp_path), None)

    frozen = copy_to_read(*load(), config, load)
    assert isinstance(frozen, OnDemand)
    stays = kept(model, "bf16", parallel)
    for _ in range(2):
        with complete(frozen) as other, complete(stays) as wanted:
            weights = dict(wanted.named_parameters())
            assert all(torch.equal(value, weights[name]) for name, value in other.named_parameters())
            assert {value.dtype for value in weights.values()} == {value.dtype for value in other.parameters()}
            seen = [weakref.ref(value) for value in other.parameters()]
        del other
        assert not any(reference() is not None for reference in seen)
