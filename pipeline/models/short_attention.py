"""Attention of short rows on a CPU in bf16, as online RL trains on them: transformers' sdpa with another backward pass.

torch's flash kernel for a CPU is fast forward and slow backward in bf16 if rows are short: for 8 rows of 100 tokens and
6 heads of 64 its backward pass takes 25 to 30 ms of one core with AMX, the same kernel in fp32 7 ms (docs/log.md, 72).
So the backward pass reads queries, keys and values in fp32; its gradients are rounded to bf16 as before, and are a
little nearer to those of fp32.

    install(model)       # True if the model can have it
"""

import torch

from pipeline.models.families import family_of
from pipeline.models.row_attention import is_special

NAME = "alma_short"

# Tokens of a row up to which the backward pass in fp32 is the faster one.
LONGEST = 256


class _Attention(torch.autograd.Function):
    """Causal attention: queries, keys, values [B, H, T, D] in bf16 -> the same."""

    @staticmethod
    def forward(ctx, query, key, value, scale: float | None):
        outputs, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=scale
        )
        ctx.save_for_backward(query, key, value, outputs, lse)
        ctx.scale = scale
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, lse = ctx.saved_tensors
        query, key, value, outputs = (tensor.float() for tensor in tensors)
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), query, key, value, outputs, lse, 0.0, True, scale=ctx.scale
        )
        return *(gradient.to(grad.dtype) for gradient in gradients), None


def forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **options):
    """What transformers calls: queries [B, H, T, D], keys and values -> ([B, T, H, D], None)."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    length = query.shape[2]
    is_row = attention_mask is None and is_causal is not False and 1 < length == key.shape[2] <= LONGEST
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if not (is_row and learns and query.device.type == "cpu" and value.dtype == torch.bfloat16 and not dropout):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    groups = query.shape[1] // key.shape[1]
    # rotary positions leave queries and keys in fp32 under autocast, which sdpa rounds too
    query, key = query.to(value.dtype), repeat_kv(key.to(value.dtype), groups)
    outputs = _Attention.apply(query, key, repeat_kv(value, groups), scaling)
    return outputs.transpose(1, 2).contiguous(), None


def install(model) -> bool:
    """Give a model this attention in place of sdpa, and say whether it can have it: families whose attention was
    verified with row_attention.py, without windows, caps and dropout, on a CPU."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config
    if config._attn_implementation != "sdpa" or not family_of(config).document_mask or is_special(config):
        return False
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
