"""Output layer and cross-entropy in one, over chunks of tokens, so that the complete logits of a large vocabulary never
exist.

The logits of 8 rows of 4,096 tokens with a vocabulary of 128k take 16 GB in fp32, and their gradient as much again.
Here the logits of one chunk become its losses and, in the same forward pass, its gradients; the backward pass only
scales these (Liger's fused linear cross-entropy: Hsu et al., 2024, section 3.2).

The layer remains the model's own module, with its weights, name and hooks, so ZeRO-3 gathers its weight, pipelines cut
it and checkpoints contain it. It returns losses while labels are queued, and logits otherwise (generation):

    head.install(model, chunk=1024, z_loss=1e-4)
    model.get_output_embeddings().expect([labels_BT])
    losses = model(input_ids).logits          # TokenLosses
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from pipeline.models.families import family_of

IGNORE = -100
# Logits at a time, 8 bytes each in bf16. Measured on a CPU (docs/performance.md); on a GPU the sum of weight gradients
# is faster with long chunks.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


class TokenLosses(NamedTuple):
    """What the model returns instead of logits. A tuple, so that DeepSpeed's hooks find its tensors."""

    total: torch.Tensor
    """Sum of the cross-entropy in nats, []. Its gradient is that of cross-entropy + z_loss * logsumexp^2; its value
    does not contain the second."""
    nll_BT: torch.Tensor
    """-log p(label) in nats, 0 where the label is -100, fp32 [B, T]; no gradient."""
    lse_BT: torch.Tensor
    """logsumexp of the logits, 0 where the label is -100, fp32 [B, T]; no gradient."""


class Head(torch.nn.Linear):
    """A model's output layer that returns TokenLosses for each of the labels [B, T] in its queue, in that order, and
    logits when the queue is empty."""

    chunk: int | None
    z_loss: float
    compiled: bool
    queue: list[torch.Tensor]

    def expect(self, labels: list[torch.Tensor]) -> None:
        self.queue = list(labels)

    def forward(self, hidden_BTD: torch.Tensor):
        if not self.queue:
            return super().forward(hidden_BTD)
        labels_BT, device = self.queue.pop(0), hidden_BTD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
        chunk = self.chunk or chunk_of(self.out_features, device)
        backward = torch.is_grad_enabled() and (hidden_BTD.requires_grad or self.weight.requires_grad)
        results = Chunked.apply(
            hidden_BTD, self.weight, self.bias, labels_BT, chunk, self.z_loss, dtype, backward, self.compiled
        )
        return TokenLosses(*results)


def chunk_of(vocabulary: int, device: str) -> int:
    """Tokens at a time if the recipe says `auto`."""
    return max(256, CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // vocabulary)


def install(model, chunk: int | None = None, z_loss: float = 0.0, compiled: bool = False) -> Head:
    """Make the model's output layer a Head. chunk: tokens at a time; None: so many that the logits of a chunk take 32
    MB on a CPU, 1 GB on a GPU."""
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and family_of(model.config).chunked_loss, (
        f"{model.config.model_type} has no output layer that can be computed in chunks"
    )
    head.__class__ = Head
    head.chunk, head.z_loss, head.compiled, head.queue = chunk, z_loss, compiled, []
    return head


def installed(model) -> Head | None:
    """The model's Head, or None. Only the last stage of a pipeline has one."""
    if model is None or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, Head) else None


class Chunked(torch.autograd.Function):
    """(sum of losses, losses, logsumexps), with gradients that are computed in the forward pass, chunk after chunk, and
    scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_BTD,
        weight_VD,
        bias_V,
        labels_BT,
        chunk: int,
        z_loss: float,
        dtype: torch.dtype,
        backward: bool,
        compiled: bool,
    ):
        hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
        nll_N, lse_N = (torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_BTD.device) for _ in range(2))
        needs_hidden, needs_weight, needs_bias = (backward and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if needs_bias else None
        step = _compiled_chunk() if compiled else _chunk
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            weight = weight_VD.to(dtype)
            bias = None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                hidden = hidden_ND[part].to(dtype)
                nll_N[part], lse_N[part], grad_logits = step(hidden, weight, bias, labels_N[part], z_loss, backward)
                if needs_hidden:
                    grad_hidden[part] = grad_logits @ weight
                if needs_weight:
                    grad_weight += grad_logits.T @ hidden
                if needs_bias:
                    grad_bias += grad_logits.sum(0, dtype=torch.float32)
        ctx.gradients = []
        for gradient, tensor in ((grad_hidden, hidden_BTD), (grad_weight, weight_VD), (grad_bias, bias_V)):
            ctx.gradients.append(None if gradient is None else gradient.view(tensor.shape).to(tensor.dtype))
        nll_BT, lse_BT = nll_N.view(labels_BT.shape), lse_N.view(labels_BT.shape)
        ctx.mark_non_differentiable(nll_BT, lse_BT)
        return nll_BT.sum(), nll_BT, lse_BT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        # They are scaled in place, so a second backward pass must not find them.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*scaled, None, None, None, None, None, None)


def _chunk(hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """(losses [N], logsumexps [N], gradient of the sum of loss + z_loss * logsumexp^2 with respect to the logits [N,
    V], or None)."""
    logits = F.linear(hidden_ND, weight_VD, bias_V)
    counted = labels_N != IGNORE
    index = labels_N.clamp(min=0)[:, None]
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    logp_label = logp.gather(1, index)[:, 0]
    lse = torch.where(counted, logits.gather(1, index)[:, 0].float() - logp_label, 0.0)
    nll = torch.where(counted, -logp_label, 0.0)
    if not backward:
        return nll, lse, None
    # d nll / d logits = p - onehot; d lse^2 / d logits = 2 lse p
    p = logp.exp_()
    if z_loss:
        p *= (1 + 2 * z_loss * lse)[:, None]
    p.scatter_add_(1, index, torch.full_like(nll, -1)[:, None])
    p *= counted[:, None]
    return nll, lse, p.to(logits.dtype)


def _fused_chunk(hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """The same as `_chunk`, in a form that the compiler turns into two passes over the logits."""
    logits = F.linear(hidden_ND, weight_VD, bias_V).float()
    counted = labels_N != IGNORE
    index = labels_N.clamp(min=0)[:, None]
    largest = logits.amax(-1, keepdim=True)
    lse = (logits - largest).exp().sum(-1).log() + largest[:, 0]
    nll = torch.where(counted, lse - logits.gather(1, index)[:, 0], 0.0)
    if not backward:
        return nll, torch.where(counted, lse, 0.0), None
    p = (logits - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
    p = torch.where(torch.arange(logits.shape[1], device=logits.device) == index, p - 1, p) * counted[:, None]
    return nll, torch.where(counted, lse, 0.0), p.to(hidden_ND.dtype)


@functools.cache
def _compiled_chunk():
    """Compiled once per process."""
    return torch.compile(_fused_chunk, dynamic=False)
