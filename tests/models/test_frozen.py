"""Frozen weights in bf16 and in 4 bits: against the fp32 model, and against transformers with bitsandbytes and peft."""

import copy
from types import SimpleNamespace

import four_bits_worker
import harness
import pytest
import tiny_engine
import torch
from paths import HELPERS
from test_lora import ids, of_peft, our_name, tiny, trained
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.core import optional_packages
from pipeline.core.errors import UserError
from pipeline.models import build, cost, experts, frozen, lora
from pipeline.models.lora_config import Lora
from pipeline.models.model_parts import Parts
from pipeline.train import finetune

CPU = torch.device("cpu")


def kept(base, kind, precision="fp32", **keys):
    """A copy of the model with frozen weights of that kind and a trained adapter."""
    model = copy.deepcopy(base)
    frozen.store(model, kind, precision, CPU)
    return trained(model, Lora(rank=4, **keys))


def loss_and_gradients(model, precision="fp32"):
    torch.manual_seed(3)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        logits = model(input_ids=ids()).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids()[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_bf16_computes_what_autocast_computes(family):
    """To the bit, for a model whose weights bf16 can hold, as published ones are; half the bytes of its matrices.
    Gemma's embedding computes with its weight in its own way, and stays."""
    base = tiny(family)
    experts.install(base)
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    full, half = (kept(base, kind, "bf16") for kind in ("fp32", "bf16"))
    (loss, gradients), (other_loss, other_gradients) = (loss_and_gradients(model, "bf16") for model in (full, half))
    assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name
    in_fp32 = sum(p.numel() for p in half.parameters() if not p.requires_grad and p.dtype == torch.float32)
    assert in_fp32 < (0.15 if family == "gemma2" else 0.05) * sum(p.numel() for p in base.parameters())


def test_bf16_is_sampled_and_scored_outside_an_engine():
    from pipeline.rl.rollout import generate

    base = tiny()
    for parameter in base.parameters():
        parameter.data = parameter.data.bfloat16().float()
    options = {"max_new_tokens": 5, "temperature": 0, "stop_ids": [], "pad_id": 0, "seeds": [0]}
    [completion] = generate(kept(base, "bf16", "bf16"), [[5, 6, 7]], **options)
    whole = kept(base, "fp32")
    with torch.autocast("cpu", torch.bfloat16):
        [expected] = generate(whole, [[5, 6, 7]], **options)
    assert completion.ids == expected.ids and completion.logprobs == pytest.approx(expected.logprobs, abs=1e-6)


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


def of_transformers(folder, dtype=torch.float32):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=torch.float32)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nf4_is_that_of_transformers_and_peft(family, options, bitsandbytes, tmp_path):
    """Outputs and gradients of a model in 4 bits with double quantisation and an adapter."""
    base = tiny(family)
    base.save_pretrained(tmp_path)
    ours = kept(build.load(tmp_path), "nf4", **options).train()
    theirs = of_peft(of_transformers(tmp_path), Lora(rank=4, **options), ours).train()  # else a kernel for inference
    loss, gradients = loss_and_gradients(ours)
    other_loss, other_gradients = loss_and_gradients(theirs)
    assert abs(float(loss_and_gradients(trained(copy.deepcopy(base), Lora(rank=4, **options)))[0] - loss)) > 1e-3
    torch.testing.assert_close(loss, other_loss, atol=1e-6, rtol=1e-6)
    for name, gradient in other_gradients.items():
        torch.testing.assert_close(gradients[our_name(name)], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_nf4_with_autocast_multiplies_in_bf16(bitsandbytes):
    """And returns bf16, as other linear layers do; the loss is near that in fp32."""
    base = tiny()
    model = kept(base, "nf4", "bf16")
    types = []
    layer = model.model.layers[0].mlp.gate_proj
    layer.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    loss, gradients = loss_and_gradients(model, "bf16")
    assert types == [torch.bfloat16] and all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert float(loss) == pytest.approx(float(loss_and_gradients(kept(base, "nf4"))[0]), abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_merged_model_has_what_was_multiplied(precision, bitsandbytes, tmp_path):
    """An adapter that was trained on 4 bits is merged into these numbers, also when its folder is read later."""
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    model = kept(base, "nf4", precision).eval()
    merged = build.load(tmp_path / "base")
    frozen.round_like(model, merged, CPU)
    lora.attach(merged, Lora(rank=4, base="nf4"), seed=7)
    lora.fill(merged, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    lora.save(merged, tmp_path / "adapter", tmp_path / "base", precision)
    lora.merge_and_compare(merged, 16)
    if precision == "fp32":
        expected = model(input_ids=ids()).logits
        torch.testing.assert_close(merged(input_ids=ids()).logits, expected, atol=1e-5, rtol=1e-5)
    again = build.load(lora.base_of(tmp_path / "adapter"))
    lora.load(again, tmp_path / "adapter")
    lora.merge(again)
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, atol=1e-6, rtol=1e-6, msg=name)
    assert not torch.allclose(
        again.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight, atol=0.01
    )


def test_what_the_weights_take(bitsandbytes):
    """Parameters are counted as weights, not as bytes; 4 bits with their scales take 0.52 bytes each."""
    base = tiny()
    whole = cost.count(base)
    sizes = {}
    for kind in ("fp32", "bf16", "nf4"):
        model = copy.deepcopy(base)
        frozen.store(model, kind, "bf16", CPU)
        model.requires_grad_(False)
        sizes[kind] = cost.count(model)
        assert (sizes[kind].total, sizes[kind].frozen, sizes[kind].active) == (whole.total, whole.total, whole.active)
    vectors = sum(p.numel() for p in base.parameters() if p.dim() == 1)
    assert sizes["fp32"].frozen_bytes == 4 * whole.total
    assert sizes["bf16"].frozen_bytes == 2 * (whole.total - vectors) + 4 * vectors
    linear = whole.total - whole.embedding - vectors
    assert sizes["nf4"].frozen_bytes == pytest.approx(0.516 * linear + 2 * whole.embedding + 4 * vectors, rel=1e-3)
    assert sizes["nf4"].four_bits == linear and not sizes["bf16"].four_bits
    packed = 0
    for layer in model.modules():
        if isinstance(layer, frozen.FourBit):
            scales = layer.scales.state
            packed += layer.weight.nbytes + scales.absmax.nbytes + scales.state2.absmax.nbytes
    assert packed == pytest.approx(frozen.NF4_BYTES * linear, rel=0.02)  # blocks at the ends are not full


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_is_read_in_parts_is_quantised_like_a_complete_one(family, options, bitsandbytes, tmp_path):
    """To the bit, from the folder's fp32 values; its size is known before it has values."""
    tiny(family).save_pretrained(tmp_path)
    whole = build.load(tmp_path)
    parts, weights = build.skeleton(tmp_path)
    settings = SimpleNamespace(kind="sft", seed=7, precision="bf16", lora=Lora(rank=4, base="nf4", **options))
    parent = SimpleNamespace(folder=tmp_path, new_tokens={})
    finetune.adapt(settings, parent, whole)
    finetune.adapt(settings, parent, parts, weights)
    assert cost.count(parts) == cost.count(whole)
    Parts(parts).materialise_all(weights, CPU)
    expected, found = whole.state_dict(), parts.state_dict()
    assert expected.keys() == found.keys() and torch.uint8 in {value.dtype for value in found.values()}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for model in (whole, parts):
        model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parts(input_ids=ids()).logits, whole(input_ids=ids()).logits)


def test_the_backward_pass_keeps_no_packed_weight_of_its_own(bitsandbytes):
    """ZeRO-3 gives a parameter other memory when it drops what it has gathered. A view of the old memory would keep it,
    for all layers at once."""
    model = kept(tiny(), "nf4")
    layer = model.model.layers[0].mlp.up_proj
    inputs = torch.randn(3, frozen.widths(layer)[0], requires_grad=True)
    (expected,) = torch.autograd.grad(layer(inputs).sum(), inputs)
    gathered = layer.weight.data
    storage = gathered.untyped_storage()
    holders = torch._C._storage_Use_Count(storage._cdata)
    outputs = layer(inputs)
    assert torch._C._storage_Use_Count(storage._cdata) == holders
    layer.weight.data = torch.empty(0, dtype=torch.uint8)  # dropped
    layer.weight.data = gathered.clone()  # and gathered again
    (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
    assert torch.equal(gradient, expected)


def test_the_weights_of_others_and_scales_of_all():
    """Of a 7B model in 4 bits on 8 processes, each has an eighth of the packed weights and all scales."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=32))
        frozen.store(model, "nf4", "bf16", torch.device("meta"))
        lora.attach(model, Lora(rank=16, base="nf4"), seed=0)
    size = cost.count(model)
    one = cost.state_bytes(size, cost.Layout())["weights"]
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    scales = linear * (1 / 64 + 4 / (64 * 256))
    for layout in (cost.Layout(ranks=8, shard=8), cost.Layout(ranks=8, zero=3)):
        found = cost.state_bytes(size, layout)["weights"]
        assert found == pytest.approx((one - scales) / 8 + scales, rel=1e-6)


# ---- on two processes ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two(tmp_path_factory, bitsandbytes):
    """Results of four_bits_worker.py, and the folder of its model."""
    folder = tmp_path_factory.mktemp("four-bits")
    tiny_engine.tiny().save_pretrained(folder / "model")
    words = [HELPERS / "four_bits_worker.py", folder / "results.pt", folder / "model"]
    harness.launch(2, *words, cwd=folder, seconds=600)
    return torch.load(folder / "results.pt", weights_only=False), folder / "model"


@pytest.mark.slow
@pytest.mark.parametrize("name", four_bits_worker.LAYOUTS)
def test_4_bits_on_two_processes_like_one(on_two, name):
    """Losses, gradient norms, trained weights and the logits for sampling. Where the model is split, a process keeps
    half of the packed weights."""
    results, folder = on_two
    found = results[name]
    expected = four_bits_worker.observed(folder, "one dora" if name.endswith("dora") else "one")
    for step, wanted in zip(found["steps"], expected["steps"], strict=True):
        assert step["applied"] and step["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, atol=1e-4, rtol=0, msg=key)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-4, rtol=1e-4)
    share = 0.5 if {"zero 3", "fsdp"} & {name, name.rpartition(" ")[0]} else 1.0
    assert found["packed"] == share * expected["packed"] > 0


def test_without_bitsandbytes_nf4_is_refused(monkeypatch):
    monkeypatch.setattr(optional_packages, "is_installed", lambda name: False)
    with pytest.raises(
        UserError, match=r"lora.base: nf4 needs the package bitsandbytes, .* pip install 'alma\[qlora\]'"
    ):
        frozen.store(tiny(), "nf4", "bf16", CPU)
