"""Every shipped recipe's model: its published size, its initial values, a few steps of its tiny copy; the balancing
loss; stages of a pipeline."""

import math

import families
import harness
import pytest
import torch
from family_batches import LENGTH, MUP, ROWS, VOCABULARY, batch_of, fresh, loss_fn
from paths import HELPERS
from tiny_engine import config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from tuned import tokenizer as make_tokenizer

from pipeline.core.errors import UserError
from pipeline.models import build, cost, model_block, pipeline_split
from pipeline.models.families import balance_coefficient, supporting
from pipeline.models.initial_values import initialise
from pipeline.models.model_block import changed_config, check_document_mask
from pipeline.models.publish import publish
from pipeline.train import engine, layers, moe_aux_loss
from pipeline.train.config import Parallel
from pipeline.train.finetune_config import FinetuneConfig


def steps_of(name: str, count: int = 3, **changes) -> list[dict]:
    settings = config(sequence_length=LENGTH, batch_size=ROWS, optimizer={"lr": 3e-3}, **changes)
    trainer = engine.build(fresh(name), loss_fn, settings)
    micro = settings.micro_batch or ROWS
    return [
        trainer.step([batch_of(range(at, at + micro)) for at in range(0, ROWS, micro)], lr=3e-3) for _ in range(count)
    ]


@pytest.mark.parametrize("name", families.PUBLISHED)
def test_a_recipes_model_has_the_published_size(name):
    """Built on the meta device; within 1%: a vocabulary rounded up, positions of another length."""
    recipe = families.load(name)
    model = build.new(
        recipe.model,
        families.Sized(recipe.stages["tokenizer"].vocab_size),
        recipe.stages["pretrain"].sequence_length,
        0,
        materialise=False,
    )
    assert cost.count(model).total == pytest.approx(families.PUBLISHED[name], rel=0.01)


# Recipes whose tiny copy is nearly another's.
ALIKE = ("gpt3-125m", "llama-2-70b", "llama-3.2-1b", "baichuan-7b", "qwen2.5-7b", "mistral-7b", "glm-4-9b", "gemma-2b")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in families.PUBLISHED]
)
def test_a_tiny_copy_starts_as_transformers_says_and_learns(name):
    """Constants of the constructor exactly, deviations of what is drawn within a half; a repeated batch's loss falls
    over 3 steps, the same in two micro-batches (1e-5)."""
    model, references = fresh(name), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        references.append(AutoModelForCausalLM.from_config(model.config, dtype=torch.float32))
    reference = references[0]
    for (key, made), expected, other in zip(
        model.named_parameters(), *(each.parameters() for each in references), strict=True
    ):
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


@pytest.mark.parametrize(
    "name", ["gpt1-117m", "bloom-560m", "deepseek-v3", "qwen1.5-moe-a2.7b", "gemma-3-1b", "mamba2-130m", "rwkv-169m"]
)
def test_what_is_published_is_read_back(name, tmp_path):
    """from_pretrained gives the logits of the model that was written, to the bit, and keeps keys that its
    configuration class does not list."""
    make_tokenizer(tmp_path / "tokenizer")
    model = fresh(name).eval()
    publish(model.state_dict(), model.config, tmp_path / "tokenizer", tmp_path / "model")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = batch_of(range(2))["inputs"]["input_ids"]
    with torch.no_grad():
        assert torch.equal(read(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
        again = build.load(tmp_path / "model", config=changed_config(tmp_path / "model", {}, LENGTH)).eval()
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
    assert balance_coefficient(read.config) == balance_coefficient(model.config)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_experts_are_balanced_the_same_when_activations_are_computed_twice(how):
    """Losses, norms, balancing losses and loads of 3 steps, to 1e-6."""
    for one, other in zip(
        steps_of("qwen3-30b-a3b"), steps_of("qwen3-30b-a3b", activation_checkpointing=how), strict=True
    ):
        assert [other[key] for key in one] == pytest.approx(list(one.values()), rel=1e-6)


@pytest.mark.parametrize("family", supporting("pipeline"))
@pytest.mark.parametrize("count", [3])
def test_stages_in_a_row_are_the_whole_model(family, count):
    """Logits of random ids, with positions that begin anew in the middle as packed documents have, to 1e-6; every
    parameter in exactly one stage."""
    from pipeline.train.pipelined import Stage

    block, made = families.of_family(family), families.Sized(VOCABULARY)
    whole = build.new(block, made, LENGTH, seed=1).eval()
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[*range(12)], [*range(5), *range(7)]])
    names, flow, parts = {}, (ids, positions), pipeline_split.split(whole, Parallel(pipeline=count), LENGTH)
    for index in range(count):
        part = Stage(
            build.new(block, made, LENGTH, seed=1, materialise=False),
            index,
            parts,
            config(),
            lambda model, name: initialise(model, 1, name),
        ).eval()
        if index == 0:
            table = part.table.weight
        elif index == count - 1 and whole.config.tie_word_embeddings:
            # what DeepSpeed's TiedLayerSpec does between processes
            part.table.weight = table
        names |= {
            pipeline_split.global_name(name, part.offset): value for name, value in part.model.state_dict().items()
        }
        with torch.no_grad():
            flow = part(flow)
    assert torch.allclose(flow, whole(input_ids=ids, position_ids=positions, use_cache=False).logits, atol=1e-6)
    assert set(names) == set(whole.state_dict()) and all(
        torch.equal(value, names[name]) for name, value in whole.state_dict().items()
    ), "weights do not depend on the cut"


@pytest.mark.parametrize("family", supporting("document_mask"))
def test_documents_of_a_row_do_not_see_each_other(family):
    """The second document's logits are those it has alone, to 1e-5, where positions begin anew with it. Families
    where that is not so are refused."""
    model = build.new(families.of_family(family), families.Sized(VOCABULARY), LENGTH, 1).eval()
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = model(
            input_ids=ids, position_ids=torch.tensor([[*range(6), *range(LENGTH - 6)]]), use_cache=False
        ).logits[:, 6:]
        assert torch.allclose(packed, model(input_ids=ids[:, 6:], use_cache=False).logits, atol=1e-5)
    with pytest.raises(UserError, match="for the family bloom, only for llama"):
        check_document_mask("bloom")


# ---- the balancing loss ----------------------------------------------------------------------------------------------


def plain_balance(router_logits, rows: int, top: int, affinity) -> torch.Tensor:
    """Equations 17 to 20 row by row, expert by expert; summed over layers and rows."""
    total = 0.0
    for logits in router_logits:
        for row in logits.float().view(rows, -1, logits.shape[-1]):
            scores = affinity(row)
            shares = scores / scores.sum(-1, keepdim=True)
            chosen = scores.topk(top, -1).indices
            for expert in range(scores.shape[1]):
                f = (chosen == expert).sum() * scores.shape[1] / (top * len(row))
                total = total + f * shares[:, expert].mean()
    return total


def language_loss(model, ids, **options):
    out = model(input_ids=ids, use_cache=False, **options)
    return torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids.flatten()), out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b"])
def test_the_balancing_loss_is_the_papers(name, checkpointing):
    """Loss and gradients of a plain implementation on transformers' own router logits, to 1e-6; also when
    activations are computed twice."""
    model, reference, plain = fresh(name), fresh(name), fresh(name)
    ids, coefficient = batch_of(range(ROWS))["inputs"]["input_ids"], model.config.router_aux_loss_coef
    language, out = language_loss(reference, ids, output_router_logits=True)
    router = plain_balance(out.router_logits, ROWS, 2, lambda row: row.softmax(-1)) / ROWS
    (language + coefficient * router).backward()
    language_loss(plain, ids)[0].backward()
    balancing = moe_aux_loss.Balance(model, 0)
    if checkpointing:
        layers.checkpoint(model, "full")
    balancing.begin(1 / ROWS)
    language_loss(model, ids)[0].backward()
    read = balancing.read(ROWS)
    assert read["router_loss"] == pytest.approx(coefficient * router.item(), rel=1e-6) and 1 <= read["expert_load"] <= 4
    changed = 0
    for (key, parameter), expected, alone in zip(
        model.named_parameters(), reference.parameters(), plain.parameters(), strict=True
    ):
        assert torch.allclose(parameter.grad, expected.grad, rtol=1e-6, atol=1e-6 * expected.grad.abs().max().item()), (
            key
        )
        changed += "gate.weight" in key and not torch.allclose(parameter.grad, alone.grad, rtol=1e-3)
    assert changed, "without the loss the routers' gradients are others"


def test_every_stage_but_finetuning_trains_with_the_balancing_loss():
    """Also one of another kind than pretrain."""
    model = fresh("mixtral-8x7b")
    assert moe_aux_loss.attach(model, config(kind="midtrain")) is not None
    tuning = FinetuneConfig(kind="sft", sources={}, steps=1, batch_size=1, sequence_length=8)
    assert moe_aux_loss.attach(model, tuning) is None


def test_deepseeks_affinities_and_values_of_known_routers():
    """Balanced routing costs exactly 1 a layer and row; a router that sends everything to K of N experts with
    certainty costs N / K."""
    even = torch.zeros(8, 4)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    for affinity in ("softmax", "sigmoid"):
        assert moe_aux_loss.row_losses(even, chosen, 2, affinity)[0].tolist() == pytest.approx([1, 1])
    certain = torch.tensor([[50.0, 50.0, -50.0, -50.0]]).repeat(8, 1)
    losses, counts = moe_aux_loss.row_losses(certain, torch.tensor([[0, 1]] * 8), 2, "sigmoid")
    assert losses.tolist() == pytest.approx([2, 2]) and counts.tolist() == [8, 8, 0, 0]
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    plain = plain_balance([logits], 3, 2, torch.sigmoid)
    assert moe_aux_loss.row_losses(logits, logits.topk(2).indices, 3, "sigmoid")[0].sum().item() == pytest.approx(
        plain.item(), rel=1e-6
    )


def test_the_balancing_loss_balances():
    """Routers that begin lopsided: with the loss the busiest expert has less than with almost none."""
    found = {}
    for coefficient in (1e-9, 1.0):
        model = MixtralForCausalLM(
            MixtralConfig(vocab_size=VOCABULARY, **families.SOME, num_local_experts=4, router_aux_loss_coef=coefficient)
        )
        initialise(model, 0)
        for layer in model.model.layers:
            layer.mlp.gate.weight.data *= 20
        trainer = engine.build(model, loss_fn, config(sequence_length=LENGTH, batch_size=ROWS))
        found[coefficient] = [
            trainer.step([batch_of(range(ROWS), step)], lr=1e-2)["expert_load"] for step in range(25)
        ][-1]
    assert found[1.0] < found[1e-9] - 0.1, found


def test_a_router_that_was_not_checked_is_refused():
    with pytest.raises(UserError, match="olmoe, only with mixtral"):
        model_block.check({"family": "olmoe", "router_aux_loss_coef": 0.01})
    model_block.check({"family": "olmoe", "router_aux_loss_coef": 0})


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, layouts",
    [
        pytest.param("qwen3-30b-a3b", "fsdp,pipeline", id="experts"),
        pytest.param(f"qwen3-30b-a3b,llama-7b{MUP}", "zero 3,fsdp,pipeline", marks=pytest.mark.slow, id="two"),
        pytest.param(f"gpt2-124m,llama-7b{MUP}", "ddp,zero 1,zero 3,fsdp", marks=pytest.mark.slow, id="two more"),
        pytest.param("all", "zero 1,zero 3,fsdp,pipeline", marks=pytest.mark.slow, id="all"),
    ],
)
def test_two_processes_train_a_family_as_one_does(names, layouts, tmp_path):
    """Losses, gradient norms, balancing losses and loads of 3 steps to 1e-5 relative, weights to 1e-4 absolute after
    updates of 3e-3."""
    import families_worker

    harness.launch(
        2, HELPERS / "families_worker.py", tmp_path / "results.pt", names, layouts, cwd=tmp_path, seconds=600
    )
    alone = {}
    for (name, layout), found in torch.load(tmp_path / "results.pt", weights_only=False).items():
        expected = alone.setdefault(name, families_worker.train(name, "one"))
        for one, other in zip(expected["steps"], found["steps"], strict=True):
            assert other["applied"] and set(one) == set(other), (name, layout)
            assert [other[key] for key in one] == pytest.approx(list(one.values()), rel=1e-5), (name, layout, list(one))
        for key, value in found["weights"].items():
            if key in expected["weights"]:
                assert torch.allclose(value, expected["weights"][key], atol=1e-4), (name, layout, key)
        assert set(expected["weights"]) >= set(found["weights"]) - {"lm_head.weight"}
        if name.endswith(MUP):  # a layout that forgets the rates of matrices would be found
            plain = families_worker.train(name, "one", forget=True)["steps"][2]["loss"]
            assert abs(plain / expected["steps"][2]["loss"] - 1) > 1e-4
        if layout == "pipeline":
            assert (
                0 < found["measured"]["bubble"] < 1
                and found["measured"]["bubble_ideal"] == pytest.approx(1 / 5)
                and "stages were busy" in found["advice"]
            )
