"""Causal attention for bf16 on a CPU: torch's forward pass, and a backward pass of plain matrix products over blocks of
queries.

torch's own backward pass (flash attention for CPUs, torch 2.13) takes 30% of a training step at 512 tokens, five times
what its multiplications need: 94-114 ms of one core for 8 rows and 6 heads of 64. Here a block of queries has its
scores made again from the forward pass's logsumexps (Dao et al., 2022, algorithm 4, with blocks of queries alone), the
compiler makes one pass of what lies between the products, and a block stops at its own diagonal: 50-70 ms, a step 13%
faster (docs/performance.md). Worth it only when compiled, so `attention: auto` takes it with `compile: true`, bf16 and
a CPU.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "blocks"
BLOCKS = 4  # of queries: work is 5/8 of all scores where 1/2 is needed, and a graph of four blocks compiles in 13 s
MOST_SCORES = 2**25  # of a block, 12 bytes each while they last; above it torch's backward pass, which keeps none


def attend(
    module,
    query_BHTK,
    key,
    value,
    attention_mask,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs,
):
    """What transformers calls for a layer. Other masks than the causal one, dropout and passes without gradients are
    torch's."""
    rows, heads, length, width = query_BHTK.shape
    # rotated queries and keys come in fp32; sdpa casts them, too
    compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    ours = (
        torch.is_grad_enabled()
        and compute == torch.bfloat16
        and attention_mask is None
        and not dropout
        and kwargs.get("position_bias") is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and key.shape[2] == length
        and value.shape[-1] == width
        and length % BLOCKS == 0
        and rows * heads * length * length // BLOCKS <= MOST_SCORES
    )
    if not ours:
        return sdpa_attention_forward(
            module,
            query_BHTK,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    groups = heads // key.shape[1]
    query, key, value = (tensor.to(compute) for tensor in (query_BHTK, key, value))
    out = Blocks.apply(
        query, repeat_kv(key, groups), repeat_kv(value, groups), width**-0.5 if scaling is None else scaling
    )
    return out.transpose(1, 2).contiguous(), None


class Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scale: float):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        shape = query.shape
        length = shape[2]
        # [rows * heads, T, K]
        query, key, value, out, grad = (
            tensor.reshape(-1, length, shape[3]) for tensor in (query, key, value, out, grad)
        )
        delta = (out.float() * grad.float()).sum(-1, keepdim=True)
        # Scores come out of the product with their logsumexp subtracted. 29 columns of zeros beside, since widths of 32
        # are multiplied fastest.
        room = query.new_zeros(len(query), length, 29)
        queries = torch.cat([query, *_parts(-lse.reshape(-1, length, 1) / ctx.scale), room], -1)
        keys = torch.cat([key, query.new_ones(len(query), length, 3), room], -1)
        step, grad_query, grad_key, grad_value = length // BLOCKS, [], 0, 0
        for begin in range(0, length, step):
            end = begin + step
            visible = torch.arange(end, device=query.device) <= torch.arange(begin, end, device=query.device)[:, None]
            weights = torch.where(
                visible, torch.exp(torch.bmm(queries[:, begin:end], keys[:, :end].mT).float() * ctx.scale), 0.0
            )
            raised = torch.bmm(grad[:, begin:end], value[:, :end].mT).float()  # d loss / d weights
            grad_scores = (weights * (raised - delta[:, begin:end]) * ctx.scale).to(query.dtype)
            grad_query.append(torch.bmm(grad_scores, key[:, :end]))
            grad_key = _grown(grad_key, step) + torch.bmm(grad_scores.mT, query[:, begin:end]).float()
            grad_value = _grown(grad_value, step) + torch.bmm(weights.to(query.dtype).mT, grad[:, begin:end]).float()
        found = torch.cat(grad_query, 1), grad_key.to(key.dtype), grad_value.to(value.dtype)
        return *(tensor.view(shape) for tensor in found), None


def _parts(number: torch.Tensor) -> list[torch.Tensor]:
    """An fp32 number as a sum of three in bf16. A product of bf16 matrices adds up in fp32 and rounds at the end, so
    what is subtracted inside of it, as three more columns, leaves a small number to round: a weight near 1 is then
    exact to 1e-3 and not to the rounding of its score (errors of sharp attention's gradients: 0.6%; without 1.3%;
    torch's 0.3%)."""
    parts = []
    for _ in range(3):
        # by bits: the compiler leaves out a rounding to bf16 that is followed by a cast back
        kept = (number.view(torch.int32) & -(2**16)).view(torch.float32)
        parts.append(kept.bfloat16())
        number = number - kept
    return parts


def _grown(total, by: int):
    """A sum over the keys seen so far, with room for the next block's."""
    return torch.nn.functional.pad(total, (0, 0, 0, by)) if isinstance(total, torch.Tensor) else total


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
