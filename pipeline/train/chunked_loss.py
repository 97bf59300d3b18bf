"""The output layer and the cross-entropy in one, over chunks of tokens, so that the logits of a large vocabulary never
exist whole.

Logits of 8 rows of 4,096 tokens over 128k tokens take 16 GB in fp32, and as much again for their gradient. Here a
chunk's logits become its losses and, at once in the forward pass, its gradients; the backward pass only scales them
(Liger's fused linear cross-entropy: Hsu et al., 2024, section 3.2).

The layer stays the model's own module, with its weights, name and hooks, so that ZeRO-3 gathers its weight, pipelines
cut it and checkpoints hold it. It gives losses while labels are waiting for it, and logits otherwise (generation):

    head.install(model, chunk=1024, z_loss=1e-4)
    model.get_output_embeddings().expect([labels_BT])
    losses = model(input_ids).logits          # TokenLosses
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from pipeline.models.families import family_of

IGNORE = -100
# logits at a time; 8 bytes each in bf16. Measured on a CPU (docs/performance.md); on a GPU the sum of weight gradients
# wants long chunks
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


class TokenLosses(NamedTuple):
    """What the model gives in place of logits. A tuple, so that DeepSpeed's hooks find the tensors in it."""

    total: torch.Tensor
    """Sum of the cross-entropy in nats, []. Its gradient is that of cross-entropy + z_loss * logsumexp^2; its value
    leaves the second out."""
    nll_BT: torch.Tensor
    """-log p(label) in nats, 0 where the label is -100, fp32 [B, T]; no gradient."""
    lse_BT: torch.Tensor
    """logsumexp of the logits, 0 where the label is -100, fp32 [B, T]; no gradient."""


class Head(torch.nn.Linear):
    """A model's output layer that gives TokenLosses for each labels [B, T] that it was told to expect, in that
    order, and logits when there are none."""

    chunk: int | None
    z_loss: float
    compiled: bool
    waiting: list[torch.Tensor]

    def expect(self, labels: list[torch.Tensor]) -> None:
        self.waiting = list(labels)

    def forward(self, hidden_BTD: torch.Tensor):
        if not self.waiting:
            return super().forward(hidden_BTD)
        labels_BT, device = self.waiting.pop(0), hidden_BTD.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_BTD.dtype
        chunk = self.chunk or chunk_of(self.out_features, device)
        backward = torch.is_grad_enabled() and (hidden_BTD.requires_grad or self.weight.requires_grad)
        found = Chunked.apply(
            hidden_BTD, self.weight, self.bias, labels_BT, chunk, self.z_loss, compute, backward, self.compiled
        )
        return TokenLosses(*found)


def chunk_of(vocabulary: int, device: str) -> int:
    """Tokens at a time where the recipe says `auto`."""
    return max(256, CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // vocabulary)


def install(model, chunk: int | None = None, z_loss: float = 0.0, compiled: bool = False) -> Head:
    """Make the model's output layer a Head. chunk: tokens at a time; none: so that a chunk's logits take 32 MB on a
    CPU, 1 GB on a GPU."""
    head = model.get_output_embeddings()
    assert type(head) is torch.nn.Linear and family_of(model.config).chunked_loss, (
        f"{model.config.model_type} has no output layer that can be computed in chunks"
    )
    head.__class__ = Head
    head.chunk, head.z_loss, head.compiled, head.waiting = chunk, z_loss, compiled, []
    return head


def installed(model) -> Head | None:
    """The model's Head, if it has one. A pipeline's stage that is not the last has none."""
    head = model.get_output_embeddings() if model is not None and hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, Head) else None


class Chunked(torch.autograd.Function):
    """(sum of losses, losses, logsumexps) with the gradients made in the forward pass, chunk after chunk, and scaled
    in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_BTD,
        weight_VD,
        bias_V,
        labels_BT,
        chunk: int,
        z_loss: float,
        compute: torch.dtype,
        backward: bool,
        compiled: bool,
    ):
        hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
        nll_N, lse_N = (torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_BTD.device) for _ in range(2))
        wanted = [backward and needed for needed in ctx.needs_input_grad[:3]]
        grad_hidden = torch.empty_like(hidden_ND) if wanted[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if wanted[2] else None
        step = _compiled_chunk() if compiled else _chunk
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            weight, bias = weight_VD.to(compute), None if bias_V is None else bias_V.to(compute)
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                hidden = hidden_ND[part].to(compute)
                nll_N[part], lse_N[part], grad_logits = step(hidden, weight, bias, labels_N[part], z_loss, backward)
                if wanted[0]:
                    grad_hidden[part] = grad_logits @ weight
                if wanted[1]:
                    grad_weight += grad_logits.T @ hidden
                if wanted[2]:
                    grad_bias += grad_logits.sum(0, dtype=torch.float32)
        ctx.gradients = [
            None if gradient is None else gradient.view(like.shape).to(like.dtype)
            for gradient, like in ((grad_hidden, hidden_BTD), (grad_weight, weight_VD), (grad_bias, bias_V))
        ]
        losses, lses = nll_N.view(labels_BT.shape), lse_N.view(labels_BT.shape)
        ctx.mark_non_differentiable(losses, lses)
        return losses.sum(), losses, lses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        # scaled in place: a second pass would find them scaled already, and now finds none
        gradients, ctx.gradients = ctx.gradients, None
        return (
            *(None if gradient is None else gradient.mul_(scale) for gradient in gradients),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def _chunk(hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """(losses [N], logsumexps [N], gradient of the sum of loss + z_loss * logsumexp^2 with respect to the logits [N,
    V], or none)."""
    logits = F.linear(hidden_ND, weight_VD, bias_V)
    counted = labels_N != IGNORE
    at = labels_N.clamp(min=0)[:, None]
    logp = torch.log_softmax(logits, -1, dtype=torch.float32)
    chosen = logp.gather(1, at)[:, 0]
    lse = torch.where(counted, logits.gather(1, at)[:, 0].float() - chosen, 0.0)
    nll = torch.where(counted, -chosen, 0.0)
    if not backward:
        return nll, lse, None
    # d nll / d logits = p - onehot; d lse^2 / d logits = 2 lse p
    p = logp.exp_()
    if z_loss:
        p *= (1 + 2 * z_loss * lse)[:, None]
    p.scatter_add_(1, at, torch.full_like(nll, -1)[:, None])
    p *= counted[:, None]
    return nll, lse, p.to(logits.dtype)


def _fused_chunk(hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """The same in a form that the compiler turns into two passes over the logits."""
    logits = F.linear(hidden_ND, weight_VD, bias_V).float()
    counted = labels_N != IGNORE
    at = labels_N.clamp(min=0)[:, None]
    most = logits.amax(-1, keepdim=True)
    lse = (logits - most).exp().sum(-1).log() + most[:, 0]
    nll = torch.where(counted, lse - logits.gather(1, at)[:, 0], 0.0)
    if not backward:
        return nll, torch.where(counted, lse, 0.0), None
    p = (logits - lse[:, None]).exp() * (1 + 2 * z_loss * lse)[:, None]
    p = torch.where(torch.arange(logits.shape[1], device=logits.device) == at, p - 1, p) * counted[:, None]
    return nll, torch.where(counted, lse, 0.0), p.to(hidden_ND.dtype)


def _compiled_chunk(cache=[]):  # noqa: B006 - one compiled function a process
    if not cache:
        cache.append(torch.compile(_fused_chunk, dynamic=False))
    return cache[0]
