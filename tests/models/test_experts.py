"""Mixtures of experts under autocast: what the experts' matrix products are computed in, and that nothing else moves."""

import collections

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models import build, experts

TINY = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2}
# families without a recipe here: other names of the sizes, biases and transposed weights, one expert that all share
OTHERS = {
    "gpt_oss": "num_local_experts",
    "glm4_moe": "n_routed_experts",
    "olmoe": "num_experts",
    "jamba": "num_experts",
}
PRODUCTS = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "grouped_mm_fallback": 0, "addmm": 1, "baddbmm": 1}


class Products(TorchDispatchMode):
    """Multiplications of a forward and backward pass by the type of their operands, routers (to a few experts)
    aside."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        if name in PRODUCTS:
            left, right = [value for value in args if isinstance(value, torch.Tensor)][PRODUCTS[name] :][:2]
            if min(*left.shape[-2:], *right.shape[-2:]) > 4:
                self.found[name, left.dtype, right.dtype] += 2 * left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


def passed(model, autocast: bool):
    """(products, logits, gradients) of one forward and backward pass."""
    ids = torch.randint(3, 60, (2, 32), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with Products() as products:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits
        logits.float().square().mean().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return products.found, logits.detach(), gradients


def made(family: str):
    if family in OTHERS:
        known = AutoConfig.for_model(family)
        sizes = {key: value for key, value in TINY.items() if hasattr(known, key)}
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=64, **sizes, **{OTHERS[family]: 4}, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        experts.install(model)
        return model
    block = {**families.of_family(family), "pad_vocab_to": 64}
    return build.new(block, families.Sized(64), 64, seed=1)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", *OTHERS])
def test_experts_multiply_in_bf16(family):
    """Correctness 6: they ran in fp32 under `precision: bf16`."""
    model = made(family).train()
    model.set_attn_implementation("eager")  # torch's attention on a CPU computes DeepSeek's head sizes in fp32 inside
    products, _, gradients = passed(model, autocast=True)
    assert {(left, right) for _, left, right in products} == {(torch.bfloat16, torch.bfloat16)}
    assert any(name == "_grouped_mm" for name, *_ in products)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_fp32_is_what_it_was_and_bf16_is_near(family):
    """Correctness 6: without autocast the same bits as transformers' own experts; with it a gradient for each weight,
    off by the rounding of bf16."""
    model = made(family).train()
    _, exact, gradients = passed(model, autocast=False)
    _, near, rounded = passed(model, autocast=True)
    model.set_experts_implementation("grouped_mm")
    _, theirs, expected = passed(model, autocast=False)
    assert torch.equal(exact, theirs) and all(torch.equal(gradients[name], expected[name]) for name in expected)
    # a token near the border of two experts may go to the other one: most tokens, not all
    assert ((near - exact).abs().amax(-1) < 0.05 * exact.abs().max()).float().mean() > 0.9
    for name, gradient in gradients.items():
        if "experts" in name and "shared" not in name:
            assert (rounded[name] - gradient).norm() < 0.3 * gradient.norm(), name


def test_the_choice_is_not_published(tmp_path):
    """Correctness 6: config.json names no implementation that other programs lack."""
    model = made("mixtral")
    assert "experts_implementation" not in model.config.to_json_string(use_diff=False)
    model.save_pretrained(tmp_path)
    loaded = build.load(tmp_path)
    assert loaded.config._experts_implementation == experts.NAME
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"
