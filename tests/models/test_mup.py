"""Initial values by depth, and learning rates that hold across widths (mu-P)."""

import math

import families
import pytest
import torch
from family_batches import VOCABULARY, batch_of, loss_fn
from tiny_engine import config

from pipeline.core.errors import UserError
from pipeline.models import build, model_block, pipeline_split
from pipeline.models.initial_values import initialise
from pipeline.train import engine
from pipeline.train.config import Parallel

LLAMA = {
    "family": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def new(block, seed=1, **options):
    return build.new(block, families.Sized(VOCABULARY), 16, seed, **options)


@pytest.mark.parametrize("name", ["llama-3-8b", "mixtral-8x7b", "deepseek-v3", "opt-125m"])
def test_initial_values_by_depth(name):
    """What writes into the residual stream is 1 / sqrt(2 * layers) of what it was, the rest the same to the bit; a
    stage of a pipeline has the same values."""
    block = families.shrunken(name)
    plain, scaled = new(block), new({**block, "init": "depth"})
    changed = 0
    for (key, before), after in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        writes = before.dim() > 1 and any(part in key for part in ("o_proj", "down_proj", "out_proj", "fc2"))
        changed += writes
        assert torch.equal(after, before * (1 / math.sqrt(2 * 3)) if writes else before), key
    assert changed >= 6
    if name == "llama-3-8b":
        from pipeline.train.pipelined import Stage

        parts = pipeline_split.split(plain, Parallel(pipeline=2), 16)
        part = Stage(
            new({**block, "init": "depth"}, materialise=False),
            1,
            parts,
            config(),
            lambda model, name: initialise(model, 1, name),
        )
        assert all(
            torch.equal(value, scaled.state_dict()[pipeline_split.global_name(key, part.offset)])
            for key, value in part.model.state_dict().items()
        )


def sizes(width: int, mup: bool, steps: int = 6) -> dict[str, float]:
    """Mean sizes after some steps at one learning rate: of logits, of the last layer's output, and of how far the
    logits moved."""
    block = {
        **LLAMA,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 16,
        "num_key_value_heads": width // 16,
        "num_hidden_layers": 2,
        "initializer_range": 0.1,
    }
    model = new({**block, **({"mup": {"base_width": 64}} if mup else {})})
    assert model.config.hidden_size // model.config.num_attention_heads == 16
    trainer = engine.build(
        model, loss_fn, config(sequence_length=16, batch_size=4, optimizer={"lr": 1e-2, "max_grad_norm": 1e9})
    )
    ids = batch_of(range(4))["inputs"]["input_ids"]

    def look():
        with torch.no_grad():
            out = trainer.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        return out.logits, out.hidden_states[-2]

    before, _ = look()
    for _ in range(steps):
        trainer.step([batch_of(range(4))], lr=1e-2)
    after, hidden = look()
    return {"moved": (after - before).abs().mean().item(), "hidden": hidden.abs().mean().item()}


def test_coordinates_do_not_grow_with_the_width():
    """The coordinate check of Tensor Programs V (appendix D.1), widths 64 to 512: without mu-P what 6 steps of one
    learning rate do grows with the width, with it not."""
    plain, mup = ([sizes(width, on) for width in (64, 128, 256, 512)] for on in (False, True))
    assert plain[0] == mup[0], "at the base width they are one"
    for key in ("moved", "hidden"):
        assert plain[-1][key] / plain[0][key] > 2, (key, plain)
        assert 0.5 < mup[-1][key] / mup[0][key] < 1.4, (key, mup)


@pytest.mark.parametrize("zero", [None, 1])
def test_groups_of_the_optimizer(zero):
    """Matrices and the output layer learn at base / width of the rate and are decayed as before; embeddings and
    norms learn at the rate itself."""
    model = new({**LLAMA, "mup": {"base_width": 16}})
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inner = engine.build(model, loss_fn, config(sequence_length=16, batch_size=4, parallel={"zero": zero})).optimizer
    found = {}
    if zero is None:
        engine.set_learning_rate(inner, 0.1)
        for group in inner.param_groups:
            for parameter in group["params"]:
                found[names[id(parameter)]] = (group["lr"], group["lr"] * group["weight_decay"])
        for name, (lr, decay) in found.items():
            assert lr == pytest.approx(0.1 if "norm" in name or "embed" in name else 0.025), name
            assert decay == pytest.approx(0.0 if "norm" in name else 0.01), name
    else:
        assert sorted(group.get("lr_scale", 1.0) for group in inner.param_groups) == [0.25, 1.0, 1.0]


def test_sharded_and_replicated_do_the_same_with_mup():
    """Losses of 3 steps in one process under ZeRO-1 and ZeRO-3, to 1e-6."""
    found = []
    for zero in (None, 1, 3):
        trainer = engine.build(
            new({**LLAMA, "mup": {"base_width": 16}}),
            loss_fn,
            config(sequence_length=16, batch_size=4, parallel={"zero": zero}),
        )
        found.append([trainer.step([batch_of(range(4), 0)], lr=1e-2)["loss"] for _ in range(3)])
    assert found[1] == pytest.approx(found[0], rel=1e-6) and found[2] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"init": "deep"}, "'deep' is unknown"),
        ({"family": "gpt2", "init": "depth"}, "gpt2 are scaled by depth already"),
        ({"mup": 256}, "expected {base_width: N}"),
        ({"mup": {"base_width": 64}, "tie_word_embeddings": True}, "cannot share a table"),
        ({"family": "glm", "mup": {"base_width": 64}}, "not verified for glm, only for llama"),
    ],
)
def test_what_cannot_be_scaled_is_refused(keys, said):
    block = {**(LLAMA if "family" not in keys or keys["family"] != "gpt2" else {}), **keys}
    with pytest.raises(UserError, match=said):
        model_block.check(block)
    with pytest.raises(UserError, match="muon scales its steps with the width itself"):
        engine.build(new({**LLAMA, "mup": {"base_width": 16}}), loss_fn, config(optimizer={"kind": "muon"}))
