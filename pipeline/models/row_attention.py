"""Attention for rows as pretraining reads them: causal, without padding, and with `document_mask` documents apart.

transformers' sdpa derives documents from positions: it reads a flag off the device in every micro-batch, builds a
matrix [T, T] for each row, and every layer converts and keeps it for the backward pass (at 8,192 tokens 134 MB a
layer). Here what a layer needs is prepared once per micro-batch from the batch's positions, without waiting for the
device:

* on a GPU with bf16, the borders of the documents, for torch's variable-length attention (a FlashAttention kernel). No
  matrix exists;
* elsewhere one matrix in the type of the queries, which all layers share.

    install(model)                                       # True if the model can have it
    inputs |= document_inputs(model, position_ids, ...)  # train/engine.py, when a batch is moved to the device
    with padded(model): ...                              # calls with padding, such as generation
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from pipeline.models.families import family_of

NAME = "alma_rows"
LENGTHS = 64  # numbers of documents are rounded up to a multiple of this, so that few shapes are compiled


def forward(module, query, key, value, attention_mask, cu_seq_lens_q=None, max_length_q=None, **options):
    """What transformers calls: queries [B, H, T, D], keys and values -> ([B, T, H, D], None)."""
    exchanges = getattr(module, "exchanges", None)
    if exchanges is None:
        return _attention(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, **options), None
    # rotary positions leave queries and keys in fp32 under autocast
    sent = [exchanges.to_heads(tensor.to(value.dtype)) for tensor in (query, key, value)]
    outputs = _attention(module, *sent, attention_mask, cu_seq_lens_q, max_length_q, **options)
    return exchanges.to_tokens(outputs), None


class Exchanges(NamedTuple):
    """Of an attention layer whose rows several processes share (train/context_parallel.py): all heads of some tokens
    [B, H, T, D] become some heads of all tokens, and outputs [B, T, H, D] the other way round."""

    to_heads: Callable[[torch.Tensor], torch.Tensor]
    to_tokens: Callable[[torch.Tensor], torch.Tensor]


def exchange(layer: torch.nn.Module, to_heads: Callable, to_tokens: Callable) -> None:
    """Let the attention of a decoder layer exchange tokens for heads."""
    layer.self_attn.exchanges = Exchanges(to_heads, to_tokens)


def _attention(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, **options) -> torch.Tensor:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    rows, heads, length, _ = query.shape
    # rotary positions leave queries and keys in fp32 under autocast
    flat = [tensor.transpose(1, 2).flatten(0, 1).to(value.dtype) for tensor in (query, key, value)]
    borders = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    outputs = varlen(*flat, *borders, options.get("scaling"), heads != key.shape[1])
    return outputs.view(rows, length, heads, -1)


def varlen(query, key, value, borders_q, borders_k, longest_q: int, longest_k: int, scale, shares_keys: bool):
    """Causal attention inside each sequence: queries [N, H, D] of all sequences, one after another -> [N, H, D]."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        query,
        key,
        value,
        borders_q,
        borders_k,
        longest_q,
        longest_k,
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=shares_keys,
    )


def install(model) -> bool:
    """Give a model this attention in place of sdpa, and say whether it can have it: families for which `document_mask`
    was verified, without windows that are shorter than a row, caps and dropout."""
    config = model.config
    if config._attn_implementation != "sdpa" or not family_of(config).document_mask or is_special(config):
        return False
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, forward)
    model.set_attn_implementation(NAME)
    return True


def is_special(config) -> bool:
    """Whether a model's attention is more than that of whole rows: windows, caps of its scores, dropout."""
    window = getattr(config, "sliding_window", None)
    has_window = bool(window) and getattr(config, "use_sliding_window", True)
    return has_window or bool(getattr(config, "attn_logit_softcapping", None)) or bool(_dropout(config))


def _dropout(config) -> float:
    return getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)


def is_installed(model) -> bool:
    return model is not None and getattr(model.config, "_attn_implementation", None) == NAME


@contextlib.contextmanager
def padded(model):
    """Inside, a model may be called with masks of padding."""
    installed = is_installed(model)
    if installed:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if installed:
            model.set_attn_implementation(NAME)


def document_inputs(model, position_ids_BT: torch.Tensor, device: torch.device, dtype: torch.dtype) -> dict:
    """What the attention of a micro-batch needs to keep documents apart, on the device, from positions on the CPU that
    begin again with each document. dtype: in which attention is computed."""
    if device.type == "cuda" and dtype == torch.bfloat16 and can_have_lengths(model.config):
        lengths = borders(position_ids_BT).to(device, non_blocking=True)
        return {"cu_seq_lens_q": lengths, "max_length_q": position_ids_BT.shape[1]}
    return {"attention_mask": mask(position_ids_BT.to(device, non_blocking=True), dtype)}


def can_have_lengths(config) -> bool:
    """Whether torch has variable-length attention, and it takes this model's heads: one width up to 256."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    if getattr(config, "qk_nope_head_dim", None):  # latent attention: keys are wider than values
        return False
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return head <= 256


def borders(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the tokens of all rows, and the end, int32. The end is repeated up to a multiple of
    LENGTHS: documents of no tokens."""
    starts = _begins(position_ids_BT).flatten().nonzero()[:, 0]
    ends = starts.new_full((LENGTHS - len(starts) % LENGTHS,), position_ids_BT.numel())
    return torch.cat([starts, ends]).int()


def mask(position_ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where a token sees another one, -inf elsewhere, [B, 1, T, T]: what sdpa makes of a boolean mask."""
    documents_BT = _begins(position_ids_BT).cumsum(1)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    seen_BTT = same_BTT.tril()
    return torch.zeros(seen_BTT.shape, dtype=dtype, device=seen_BTT.device).masked_fill_(~seen_BTT, float("-inf"))[
        :, None
    ]


def _begins(position_ids_BT: torch.Tensor) -> torch.Tensor:
    """Whether a token is the first of its document in its row: its position does not follow on the one before."""
    follows = torch.diff(position_ids_BT, prepend=position_ids_BT[:, :1] + 1) == 1
    return ~follows
