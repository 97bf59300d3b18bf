"""Attention over blocks of queries (pipeline/models/cpu_attention.py) against fp64 and beside torch's own."""

import pytest
import torch
from tiny_engine import rows, tiny

from pipeline.core.errors import UserError
from pipeline.models import attention, cpu_attention


class Layer:
    is_causal = True
    num_key_value_groups = 2


def drawn(length: int, heads: int = 4, groups: int = 2, sharpness: float = 1.0):
    draw = torch.Generator().manual_seed(length)
    query, key, value, grad = (
        torch.randn(3, n, length, 32, generator=draw) for n in (heads, heads // groups, heads // groups, heads)
    )
    return (query * sharpness).bfloat16(), key.bfloat16(), value.bfloat16(), grad.bfloat16()


def gradients(attend, query, key, value, grad):
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def exact(query, key, value):
    scores = query @ key.repeat_interleave(2, 1).mT / 32**0.5
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(
        -1
    ) @ value.repeat_interleave(2, 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length,sharpness", [(4, 1.0), (64, 1.0), (256, 3.0)])
def test_output_and_gradients_are_as_near_to_fp64s_as_torchs(length, sharpness, compiled):
    """The output is torch's to the bit; each gradient's error in norm is below 1% and at most 2.5 times that of
    torch's."""
    query, key, value, grad = drawn(length, sharpness=sharpness)
    true = gradients(exact, *(tensor.double() for tensor in (query, key, value, grad)))
    torchs = gradients(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        query,
        key,
        value,
        grad,
    )

    def attend(query, key, value):
        return cpu_attention.attend(Layer(), query, key, value, None)[0].transpose(1, 2)

    ours = gradients(torch.compile(attend, dynamic=False) if compiled else attend, query, key, value, grad)
    assert torch.equal(ours[0], torchs[0])
    for one, other, right in zip(ours[1:], torchs[1:], true[1:], strict=True):
        error, known = (((tensor.double() - right).norm() / right.norm()).item() for tensor in (one, other))
        assert error < 0.01 and error < 2.5 * known, (error, known)


def test_what_is_not_plain_causal_attention_in_bf16_is_torchs(monkeypatch):
    """Masks, dropout, other lengths, fp32 and passes without gradients do not come to the blocks."""
    query, key, value, _ = drawn(64)
    asked = []
    monkeypatch.setattr(cpu_attention.Blocks, "apply", lambda *_: asked.append(1) or query)
    cpu_attention.attend(Layer(), query, key, value, None)
    assert len(asked) == 1
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    cpu_attention.attend(Layer(), query, key, value, mask)
    cpu_attention.attend(Layer(), query, key, value, None, dropout=0.1)
    cpu_attention.attend(Layer(), query, key, value, None, is_causal=False)
    cpu_attention.attend(Layer(), query[:, :, :63], key[:, :, :63], value[:, :, :63], None)
    cpu_attention.attend(Layer(), query[:, :, -1:], key, value, None)
    cpu_attention.attend(Layer(), query.float(), key.float(), value.float(), None)
    with torch.no_grad():
        cpu_attention.attend(Layer(), query, key, value, None)
    assert len(asked) == 1


def test_auto_takes_blocks_for_compiled_bf16_on_a_cpu_and_documents_stay_apart():
    model = tiny()
    assert (
        attention.choose(model, "auto", "bf16", compiled=True) == "blocks"
        and attention.choose(model, "auto", "fp32", compiled=True) == "sdpa"
    )
    with pytest.raises(UserError, match="blocks is for a CPU, with precision: bf16 and compile: true"):
        attention.choose(model, "blocks", "bf16")
    ids, positions = rows(0)[0], torch.tensor([[*range(5), *range(7)]] * 8)
    found = {}
    for name in ("sdpa", "blocks"):
        attention.choose(model, name, "bf16", compiled=True)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, position_ids=positions, use_cache=False).logits.float().square().sum().backward()
        apart = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, use_cache=False).logits.float().square().sum().backward()
        found[name] = apart, [parameter.grad for parameter in model.parameters()]
    for sdpa, blocks in zip(found["sdpa"][0], found["blocks"][0], strict=True):
        assert torch.equal(sdpa, blocks), "a mask is torch's"
    for sdpa, blocks in zip(found["sdpa"][1], found["blocks"][1], strict=True):
        assert (sdpa - blocks).norm() < 0.02 * sdpa.norm()
    assert any(
        not torch.equal(sdpa, blocks) for sdpa, blocks in zip(found["sdpa"][1], found["blocks"][1], strict=True)
    ), "blocks were used"
