"""The output layer that computes its losses in chunks, against torch's cross-entropy over whole logits."""

import families
import pytest
import torch
import torch.nn.functional as F
from tiny_engine import batch_of, config, rows, tiny
from tuned import tokenizer as make_tokenizer

from pipeline.core.errors import UserError
from pipeline.models import attention, build
from pipeline.models.families import supporting
from pipeline.train import chunked_loss, engine, layers
from pipeline.train.batches import loss_of
from pipeline.train.loop import share

Z = 1e-2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def data(vocabulary: int):
    """Ids [3, 7] and labels with ignored ones among them."""
    made = torch.randint(0, vocabulary, (3, 8), generator=torch.Generator().manual_seed(0))
    labels = made[:, 1:].clone()
    labels[0, :3] = labels[2, 5] = -100
    return made[:, :-1], labels


def gradients(model) -> dict:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def reference(model, ids, labels, z: float, dtype=None):
    """Cross-entropy sum, z-loss sum and the gradients of (both) / 7, by torch over whole logits."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
        logits = model(ids).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    extra = z * (torch.logsumexp(logits.float(), -1)[labels != -100] ** 2).sum()
    ((loss + extra) / 7).backward()
    found = gradients(model)
    model.zero_grad()
    return loss.item(), extra.item(), found


def distance(found: dict, expected: dict) -> float:
    """Relative difference of all gradients as one vector."""
    assert set(found) == set(expected)
    return (
        torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm()
        / torch.stack([value.norm() for value in expected.values()]).norm()
    ).item()


@pytest.mark.parametrize("family", supporting("chunked_loss"))
def test_a_family_s_losses_and_gradients_are_those_of_whole_logits(family, tokenizer):
    """fp32, to 1e-6 relative: value, per-token losses and every gradient, with a z-loss, in chunks that do not
    divide the tokens. Logits as before when no labels wait."""
    model = build.new(families.of_family(family), tokenizer, 64, seed=1).eval()
    ids, labels = data(model.config.vocab_size)
    logits = model(ids).logits.detach()
    loss, extra, expected = reference(model, ids, labels, Z)
    layer = chunked_loss.install(model, chunk=4, z_loss=Z)
    layer.expect([{"labels": labels}])
    found = model(ids).logits
    assert found.total.item() == pytest.approx(
        loss, rel=1e-6
    ) and Z * found.lse_BT.square().sum().item() == pytest.approx(extra, rel=1e-6)
    assert torch.allclose(
        found.nll_BT, F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"), atol=1e-5
    )
    (found.total / 7).backward()
    assert distance(gradients(model), expected) < 1e-6
    assert torch.equal(model(ids).logits, logits) and set(model.state_dict()) == set(
        build.new(families.of_family(family), tokenizer, 64, seed=1).state_dict()
    )
    with torch.no_grad():
        layer.expect([{"labels": labels}])
        assert model(ids).logits.total.item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_tied_embeddings_biases_and_bf16(tied, bias):
    """fp32 to 1e-6; under bf16 autocast the loss to 1e-6 and gradients to 1%, since whole logits round their
    gradients' sums to bf16 once and chunks several times."""
    for dtype, close in ((None, 1e-6), (torch.bfloat16, 1e-2)):
        model = tiny(tie_word_embeddings=tied)
        if bias:
            model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size))
        ids, labels = rows(0)
        loss, _, expected = reference(model, ids, labels, Z, dtype)
        layer = chunked_loss.install(model, chunk=40, z_loss=Z)
        layer.expect([{"labels": labels}])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is not None):
            found = model(ids).logits
        (found.total / 7).backward()
        # a bf16 kernel adds the bias before or after it rounds, depending on the number of rows
        assert (
            found.total.item() == pytest.approx(loss, rel=1e-4 if dtype and bias else 1e-6)
            and distance(gradients(model), expected) < close
        )


def train(
    chunk, z: float = 0.0, compiled: bool = False, checkpointing: str = "none", **changes
) -> tuple[list, dict, dict]:
    """Three steps of two micro-batches with an evaluation; (steps, evaluation, weights)."""
    settings = config(micro_batch=4, activation_checkpointing=checkpointing, **changes)
    model = tiny()
    if chunk:
        chunked_loss.install(model, chunk, z, compiled)
    if compiled:
        layers.compile(model)
    trainer = engine.build(model, loss_of(["one", "two"], z), settings)
    batches = [
        [
            {**batch_of(step, part), "source": torch.tensor([0, 1, 1, 0]), "bytes": torch.full((4,), 7)}
            for part in share(settings, trainer, step)
        ]
        for step in range(3)
    ]
    return [trainer.step(batch) for batch in batches], trainer.evaluate(batches[0]), trainer.consolidated()


@pytest.mark.parametrize("z", [0.0, Z])
def test_an_engine_s_steps_with_chunks_are_those_without(z):
    """Losses, norms, z-loss and losses by source to 1e-5 over steps with accumulation; the reported loss is the
    cross-entropy, whatever z-loss is added."""
    (whole, evaluated, _), (chunked, again, _) = train(None, z), train(16, z)
    for one, other in zip([*whole, evaluated], [*chunked, again], strict=True):
        assert set(one) == set(other) and ("z_loss" in one) == bool(z)
        assert all(other[key] == pytest.approx(one[key], rel=1e-5) for key in one)
    if z:
        plain, _, _ = train(None)
        assert whole[0]["loss"] == plain[0]["loss"] and whole[0]["grad_norm"] != plain[0]["grad_norm"]
        assert whole[0]["z_loss"] == pytest.approx(Z * 4.11**2, rel=0.05), "logsumexp of small logits is about ln 61"


def test_a_loss_that_is_not_finite_updates_nothing():
    model = tiny()
    chunked_loss.install(model, 16, Z)
    trainer = engine.build(model, loss_of(["one"], Z), config())
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    before = trainer.consolidated()
    assert not trainer.step(
        [{**batch_of(0, range(8)), "source": torch.zeros(8, dtype=torch.long), "bytes": torch.ones(8)}]
    )["applied"]
    assert all(torch.equal(value, before[name]) for name, value in trainer.consolidated().items())


@pytest.mark.parametrize("how", ["selective", "full"])
def test_activation_checkpointing_with_chunks_does_not_change_a_bit(how):
    assert train(16, Z, checkpointing=how)[:2] == train(16, Z)[:2]


def test_the_layers_of_a_stage_recompute_what_they_are_asked_to():
    """Products run once more with full and not with selective: counted."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.number += "aten.mm" in str(function) or "aten.addmm" in str(function)
            return function(*args, **(kwargs or {}))

    found = {}
    for how in ("none", "selective", "full"):
        model = tiny().train()
        if how != "none":
            layers.checkpoint(model, how)
        loss = model(rows(0)[0]).logits.sum()
        with Count() as count:
            loss.backward()
        found[how] = count.number
    # recomputation ends before a layer's last product, whose result nobody needs
    assert found["selective"] == found["none"] and found["full"] == found["none"] + 3 * 6, found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_layers_and_loss_train_the_same(checkpointing):
    """Three steps to 1e-5. The three layers are equal and share one compiled graph."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (plain, _, _), (compiled, _, _) = train(16, Z), train(16, Z, compiled=True, checkpointing=checkpointing)
    for one, other in zip(plain, compiled, strict=True):
        assert all(other[key] == pytest.approx(one[key], rel=1e-5) for key in one)


def test_attention_is_chosen_or_refused(tokenizer):
    """sdpa by default; with documents in a row eager and sdpa agree; FlashAttention is refused without a GPU."""
    model = tiny()
    assert attention.choose(model, "auto", "bf16") == "sdpa"
    ids, positions = rows(0)[0], torch.tensor([[*range(5), *range(7)]] * 8)
    apart = model(ids, position_ids=positions, use_cache=False).logits
    assert attention.choose(model, "eager", "fp32") == "eager"
    assert torch.allclose(model(ids, position_ids=positions, use_cache=False).logits, apart, atol=1e-5)
    alone = model(ids[:, 5:], use_cache=False).logits
    assert torch.allclose(apart[:, 5:], alone, atol=1e-5), "the second document does not see the first"
    with pytest.raises(UserError, match="flash_attention_2 needs a GPU"):
        attention.choose(model, "flash_attention_2", "bf16")
    for family in ("mamba", "rwkv"):
        attention.choose(build.new(families.of_family(family), tokenizer, 64, seed=1), "auto", "fp32")


# ---- what finetuning adds: only labelled positions, weights, each token's loss ---------------------------------------


def losses_of(model, ids, labels, scale, **options):
    """(sum of scale * loss, gradients of it) by whole logits if there are no options, else by the output layer."""
    if options:
        layer = chunked_loss.install(model, chunk=5, selects=True, **options)
        batch = {"labels": labels}
        if not layer.per_token:
            batch["label_weights"] = scale
        layer.expect([batch])
        found = model(ids).logits
        total = (found.nll_BT * scale).sum() if layer.per_token else found.total
    else:
        logits = model(ids).logits.transpose(1, 2)
        total = (F.cross_entropy(logits, labels, ignore_index=-100, reduction="none") * scale).sum()
    total.backward()
    return total.item(), gradients(model)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_labelled_positions_alone_with_weights(per_token, frozen, tied, bias):
    """fp32, 1e-6 relative; `frozen`: the output layer has no gradient, as with LoRA."""

    def model():
        made = tiny(tie_word_embeddings=tied)
        if bias:
            made.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, made.config.vocab_size))
        made.lm_head.requires_grad_(not frozen)
        return made

    ids, labels = rows(0)
    scale = torch.linspace(-1, 2, labels.numel()).view(labels.shape) * (labels != -100)
    expected, reference_gradients = losses_of(model(), ids, labels, scale)
    found, found_gradients = losses_of(model(), ids, labels, scale, per_token=per_token)
    assert found == pytest.approx(expected, rel=1e-6)
    assert distance(found_gradients, reference_gradients) < 1e-6


@pytest.mark.parametrize("per_token", [False, True])
def test_a_batch_without_labels_has_no_loss_and_a_gradient_of_zero(per_token):
    model = tiny()
    ids, labels = rows(0)
    total, found = losses_of(model, ids, torch.full_like(labels, -100), torch.ones(labels.shape), per_token=per_token)
    assert total == 0 and all(not gradient.any() for gradient in found.values())
