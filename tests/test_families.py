"""Every shipped recipe's model: its published size, its initial values, a few steps of its tiny copy; the balancing loss; stages of a pipeline."""

import math

import families
import pytest
import torch
from test_engine import config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from tuned import tokenizer as make_tokenizer

from pipeline.errors import UserError
from pipeline.models import build, cost, stages
from pipeline.train import balance, engine
from pipeline.train.loss import cross_entropy_sum

VOCABULARY, LENGTH, ROWS = 260, 16, 4


def loss_fn(logits, batch):
    return cross_entropy_sum(logits, batch["labels"]), {}


def batch_of(rows: range, seed: int = 0) -> dict:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(seed))[rows.start : rows.stop]
    return {"inputs": {"input_ids": ids[:, :-1]}, "labels": ids[:, 1:], "weight": float(len(ids) * LENGTH)}


def fresh(name: str, seed: int = 1, **options):
    return build.new(families.shrunken(name), families.Sized(VOCABULARY), LENGTH, seed, **options)


def steps_of(name: str, count: int = 3, **changes) -> list[dict]:
    settings = config(sequence_length=LENGTH, batch_size=ROWS, optimizer={"lr": 3e-3}, **changes)
    trainer = engine.build(fresh(name), loss_fn, settings)
    micro = settings.micro_batch or ROWS
    return [trainer.step([batch_of(range(at, at + micro)) for at in range(0, ROWS, micro)], lr=3e-3) for _ in range(count)]


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_a_recipes_model_has_the_published_size(name):
    """Built on the meta device; within 1%: a vocabulary rounded up, positions of another length."""
    recipe = families.load(name)
    model = build.new(recipe.model, families.Sized(recipe.stages["tokenizer"].vocab_size), recipe.stages["pretrain"].sequence_length, 0, materialise=False)
    assert cost.count(model)["total"] == pytest.approx(families.PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_a_tiny_copy_starts_as_transformers_says_and_learns(name):
    """Constants of the constructor exactly, deviations of what is drawn within a half; a repeated batch's loss falls over 3 steps, the same in two micro-batches (1e-5)."""
    model, references = fresh(name), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        references.append(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32))
    reference = references[0]
    for (key, made), expected, other in zip(model.named_parameters(), *(each.parameters() for each in references), strict=True):
        if torch.equal(expected, other):
            assert torch.equal(made, expected), key
        elif made.numel() > 64:
            assert (made.std() / expected.std()).item() == pytest.approx(1, rel=0.5), key
    assert all(torch.equal(made, expected) for made, expected in zip(model.buffers(), reference.buffers(), strict=True))
    whole, parts = steps_of(name), steps_of(name, micro_batch=2)
    assert whole[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.15)
    assert whole[2]["loss"] < whole[1]["loss"] < whole[0]["loss"] and all(stats["applied"] for stats in whole)
    for one, other in zip(whole, parts, strict=True):
        assert [other[key] for key in one] == pytest.approx(list(one.values()), rel=1e-5)
