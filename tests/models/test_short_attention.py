"""Attention and norm of short rows on a CPU in bf16: outputs are transformers' own, gradients no further from fp32."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.models import fused_norm, short_attention

IDS = torch.randint(3, 64, (3, 40), generator=torch.Generator().manual_seed(1))


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    keys = {"vocab_size": 64, "initializer_range": 0.1, "tie_word_embeddings": True, **sizes, **changes}
    return LlamaForCausalLM(LlamaConfig(**keys))


def outcome(model, enabled: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, gradient of all parameters) of a loss over IDS."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        logits = model(input_ids=IDS, use_cache=False).logits
    logprobs = logits.float().log_softmax(-1).gather(-1, IDS.roll(-1, 1)[..., None])
    logprobs[:, 10:].sum().backward()
    return logprobs.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("heads", [4, 2])
def test_outputs_stay_and_gradients_are_not_less_exact(heads):
    """In fp32 nothing changes but the order of sums."""
    model = llama(num_key_value_heads=heads)
    with torch.no_grad():  # norms that do something
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) / 5)
    exact = outcome(model, enabled=False)
    plain = outcome(model)
    other = copy.deepcopy(model)
    assert short_attention.install(other) and other.config._attn_implementation == short_attention.NAME
    found = outcome(other)
    assert error(found[0], plain[0]) < 1e-6  # the same kernel forward
    assert error(found[1], exact[1]) < 1.1 * error(plain[1], exact[1])
    assert fused_norm.install(other)
    found = outcome(other)
    assert error(found[0], exact[0]) < 1.5 * error(plain[0], exact[0])
    assert error(found[1], exact[1]) < 1.5 * error(plain[1], exact[1])
    in_fp32 = outcome(other, enabled=False)
    assert error(in_fp32[0], exact[0]) < 1e-5 and error(in_fp32[1], exact[1]) < 1e-5


def test_models_with_another_attention_or_norm_keep_theirs():
    assert not short_attention.install(llama(attention_dropout=0.1))
    model = llama()
    model.config.model_type = "olmo2"
    assert not fused_norm.install(model)


def test_padded_rows_are_read_as_before():
    """Generation gives a mask, which the replacement leaves to sdpa."""
    model, other = llama(), llama()
    short_attention.install(other)
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = (each(input_ids=IDS, attention_mask=mask).logits for each in (model, other))
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()])
