"""Output layer and cross-entropy in one, over chunks of tokens, so that the complete logits of a large vocabulary never
exist.

The logits of 8 rows of 4,096 tokens with a vocabulary of 128k take 16 GB in fp32, and their gradient as much again.
Here only the logits of one chunk exist at a time, and with `selects` only those of positions whose label is not -100.

The layer remains the model's own module, with its weights, name and hooks, so ZeRO-3 gathers its weight, pipelines cut
it and checkpoints contain it. It returns losses while batches are queued, and logits otherwise (generation):

    head.install(model, chunk=1024, z_loss=1e-4)
    model.get_output_embeddings().expect([{"labels": labels_BT}])
    losses = model(input_ids).logits          # TokenLosses

What is differentiable depends on the objective:

* a sum over tokens with known weights (cross-entropy): the logits of a chunk become its losses and, in the same forward
  pass, its gradients; the backward pass only scales these (Liger's fused linear cross-entropy: Hsu et al., 2024,
  section 3.2).
* any function of the single losses (`per_token`: preferences): what a token's gradient is multiplied by is known in the
  backward pass only, which computes the logits of each chunk again. If the output layer is frozen (LoRA), nothing is
  computed twice: the gradient of a hidden state can be scaled later, the sum that is a weight's gradient cannot.
"""

import functools
from collections.abc import Callable
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
    """Sum of the cross-entropy in nats, each token's times its weight, []. Its gradient is that of cross-entropy +
    z_loss * logsumexp^2; its value does not contain the second."""
    nll_BT: torch.Tensor
    """-log p(label) in nats, 0 where the label is -100, fp32 [B, T]; with a gradient only if the layer is
    `per_token`."""
    lse_BT: torch.Tensor
    """logsumexp of the logits, 0 where the label is -100, fp32 [B, T]; no gradient."""
    entropy_BT: torch.Tensor | None = None
    """Entropy of the distribution, 0 where the label is -100, fp32 [B, T]; no gradient. Of a layer with `entropies`."""


class Head(torch.nn.Linear):
    """A model's output layer that returns TokenLosses for each batch in its queue, in that order, and logits when the
    queue is empty. See `install` for the attributes; `step`, if it is set, computes a chunk in place of `_chunk`."""

    chunk: int | None
    z_loss: float
    compiled: bool
    step: Callable | None = None
    per_token: bool
    selects: bool
    temperature: float
    entropies: bool
    queue: list[dict]

    def expect(self, batches: list[dict]) -> None:
        """Queue batches: dicts with `labels` [B, T] and, optionally, `label_weights` [B, T] of their losses."""
        self.queue = list(batches)

    def forward(self, hidden_BTD: torch.Tensor):
        if not self.queue:
            return super().forward(hidden_BTD)
        batch = self.queue.pop(0)
        labels_BT, weights_BT = batch["labels"], batch.get("label_weights")
        hidden_ND, labels_N = hidden_BTD.flatten(0, -2), labels_BT.flatten()
        weights_N = None if weights_BT is None else weights_BT.flatten()
        if not self.selects:
            total, *values = self._losses(hidden_ND, labels_N, weights_N)
            return TokenLosses(total, *(value_N.view(labels_BT.shape) for value_N in values))
        places = (labels_N != IGNORE).nonzero()[:, 0]
        weights_N = None if weights_N is None else weights_N[places]
        total, *values = self._losses(hidden_ND[places], labels_N[places], weights_N)
        zeros = values[0].new_zeros(labels_N.shape)
        placed = [zeros.index_put((places,), value_N).view(labels_BT.shape) for value_N in values]
        return TokenLosses(total, *placed)

    def _losses(self, hidden_ND, labels_N, weights_N) -> tuple[torch.Tensor, ...]:
        """(sum of losses [], losses [N], logsumexps [N]), and with `entropies` also entropies [N]."""
        device = hidden_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
        chunk = self.chunk or chunk_of(self.out_features, device)
        backward = torch.is_grad_enabled() and (hidden_ND.requires_grad or self.weight.requires_grad)
        if self.per_token:
            assert weights_N is None and not self.z_loss, "weights and z_loss belong to a sum over tokens"
            options = (chunk, dtype, backward, self.temperature, self.entropies)
            nll_N, lse_N, entropy_N = PerToken.apply(hidden_ND, self.weight, self.bias, labels_N, *options)
            return (nll_N.sum(), nll_N, lse_N, entropy_N) if self.entropies else (nll_N.sum(), nll_N, lse_N)
        step = self.step or (_compiled_chunk() if self.compiled else _chunk)
        return Chunked.apply(
            hidden_ND, self.weight, self.bias, labels_N, weights_N, chunk, self.z_loss, dtype, backward, step
        )


def chunk_of(vocabulary: int, device: str) -> int:
    """Tokens at a time if the recipe says `auto`."""
    return max(256, CHUNK_ELEMENTS["cpu" if device == "cpu" else "cuda"] // vocabulary)


def can_install(model) -> bool:
    """Whether a model's logits are what its output layer returns."""
    return type(model.get_output_embeddings()) is torch.nn.Linear and family_of(model.config).chunked_loss


def install(
    model,
    chunk: int | None = None,
    z_loss: float = 0.0,
    compiled: bool = False,
    *,
    per_token: bool = False,
    selects: bool = False,
    temperature: float = 1.0,
    entropies: bool = False,
) -> Head:
    """Make the model's output layer a Head.

    chunk: tokens at a time; None: so many that the logits of a chunk take 32 MB on a CPU, 1 GB on a GPU. per_token: the
    single losses are differentiable, and not only their sum. selects: positions without a label are skipped, so that
    the number of tokens differs from batch to batch. With per_token also temperature, by which logits are divided, and
    entropies, which are returned then.
    """
    assert per_token or (temperature == 1 and not entropies), "temperature and entropies belong to single losses"
    assert can_install(model), f"{model.config.model_type} has no output layer that can be computed in chunks"
    head = model.get_output_embeddings()
    head.__class__ = Head
    head.chunk, head.z_loss, head.compiled, head.queue = chunk, z_loss, compiled, []
    head.per_token, head.selects, head.temperature, head.entropies = per_token, selects, temperature, entropies
    return head


def installed(model) -> Head | None:
    """The model's Head, or None. Only the last stage of a pipeline has one."""
    if model is None or not hasattr(model, "get_output_embeddings"):
        return None
    head = model.get_output_embeddings()
    return head if isinstance(head, Head) else None


# ---- the sum of losses -----------------------------------------------------------------------------------------------


class Chunked(torch.autograd.Function):
    """(weighted sum of losses, losses, logsumexps), with gradients that are computed in the forward pass, chunk after
    chunk, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND,
        weight_VD,
        bias_V,
        labels_N,
        weights_N,
        chunk: int,
        z_loss: float,
        dtype: torch.dtype,
        backward: bool,
        step: Callable,
    ):
        nll_N, lse_N = (torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device) for _ in range(2))
        sums = Gradients(hidden_ND, weight_VD, bias_V, [backward and needed for needed in ctx.needs_input_grad[:3]])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                hidden = hidden_ND[part].to(dtype)
                nll_N[part], lse_N[part], grad_logits = step(hidden, weight, bias, labels_N[part], z_loss, backward)
                if weights_N is not None and backward:
                    grad_logits *= weights_N[part, None]
                sums.add(part, grad_logits, hidden, weight)
        ctx.gradients = sums.of_inputs()
        ctx.mark_non_differentiable(nll_N, lse_N)
        total = nll_N.sum() if weights_N is None else (nll_N * weights_N).sum()
        return total, nll_N, lse_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale, *_):
        # They are scaled in place, so a second backward pass must not find them.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if gradient is None else gradient.mul_(scale) for gradient in gradients]
        return (*scaled, None, None, None, None, None, None, None)


class Gradients:
    """Gradients of hidden states, weight and bias of the output layer, as far as they are needed, added up over chunks
    of tokens: those of weight and bias in fp32."""

    def __init__(self, hidden_ND, weight_VD, bias_V, needed: list[bool]):
        self.tensors = hidden_ND, weight_VD, bias_V
        self.hidden = torch.empty_like(hidden_ND) if needed[0] else None
        self.weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needed[1] else None
        self.bias = torch.zeros_like(bias_V, dtype=torch.float32) if needed[2] else None

    def add(self, part: slice, grad_logits, hidden, weight) -> None:
        if self.hidden is not None:
            self.hidden[part] = grad_logits @ weight
        if self.weight is not None:
            self.weight += grad_logits.T @ hidden
        if self.bias is not None:
            self.bias += grad_logits.sum(0, dtype=torch.float32)

    def of_inputs(self) -> list[torch.Tensor | None]:
        """In the dtypes of hidden states, weight and bias."""
        results = []
        for gradient, tensor in zip((self.hidden, self.weight, self.bias), self.tensors, strict=True):
            results.append(None if gradient is None else gradient.to(tensor.dtype))
        return results


def _chunk(hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """(losses [N], logsumexps [N], gradient of the sum of loss + z_loss * logsumexp^2 with respect to the logits [N,
    V], or None)."""
    logits = F.linear(hidden_ND, weight_VD, bias_V)
    counted = labels_N != IGNORE
    index = labels_N.clamp(min=0)[:, None]
    nll, lse, logp = _token_losses(logits, labels_N)
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


# ---- each loss by itself ---------------------------------------------------------------------------------------------


class PerToken(torch.autograd.Function):
    """(losses [N], logsumexps [N], entropies [N]) of logits / temperature. The losses are differentiable, each by
    itself; entropies are 0 unless they are asked for."""

    @staticmethod
    def forward(
        ctx,
        hidden_ND,
        weight_VD,
        bias_V,
        labels_N,
        chunk: int,
        dtype: torch.dtype,
        backward: bool,
        temperature: float,
        entropies: bool,
    ):
        zeros = torch.zeros(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        nll_N, lse_N, entropy_N = zeros, zeros.clone(), zeros.clone()
        needs_hidden, *needs_others = (backward and needed for needed in ctx.needs_input_grad[:3])
        ctx.chunk, ctx.dtype, ctx.again, ctx.temperature = chunk, dtype, any(needs_others), temperature
        sums = Gradients(hidden_ND, weight_VD, bias_V, [needs_hidden and not ctx.again, False, False])
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
            for start in range(0, len(labels_N), chunk):
                part = slice(start, start + chunk)
                hidden = hidden_ND[part].to(dtype)
                logits = _logits(hidden, weight, bias, temperature)
                nll_N[part], lse_N[part], logp = _token_losses(logits, labels_N[part])
                probabilities = None
                if entropies or sums.hidden is not None:
                    probabilities = logp.exp()
                if entropies:
                    entropy_N[part] = -torch.linalg.vecdot(probabilities, logp)
                if sums.hidden is not None:
                    scale_N = torch.full_like(nll_N[part], 1 / temperature)
                    sums.add(part, _scaled(probabilities, labels_N[part], scale_N).to(dtype), hidden, weight)
        if ctx.again:
            # The probabilities of a single chunk are kept, if there are any: with them nothing is computed again.
            kept = probabilities if entropies and 0 < len(labels_N) <= chunk else None
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, labels_N, lse_N, kept)
        else:
            ctx.save_for_backward(sums.hidden)
        ctx.mark_non_differentiable(lse_N, entropy_N)
        return nll_N, lse_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale_N, *_):
        if not ctx.again:
            (grad_hidden,) = ctx.saved_tensors
            return grad_hidden * scale_N[:, None].to(grad_hidden.dtype), *[None] * 8
        hidden_ND, weight_VD, bias_V, labels_N, lse_N, kept = ctx.saved_tensors
        sums = Gradients(hidden_ND, weight_VD, bias_V, ctx.needs_input_grad[:3])
        scale_N = scale_N / ctx.temperature
        with torch.autocast(hidden_ND.device.type, enabled=False):
            weight, bias = weight_VD.to(ctx.dtype), None if bias_V is None else bias_V.to(ctx.dtype)
            for start in range(0, len(labels_N), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                hidden = hidden_ND[part].to(ctx.dtype)
                if kept is None:
                    logits = _logits(hidden, weight, bias, ctx.temperature)
                    probabilities = logits.float().sub_(lse_N[part, None]).exp_()
                else:
                    probabilities = kept.clone()
                grad_logits = _scaled(probabilities, labels_N[part], scale_N[part])
                sums.add(part, grad_logits.to(ctx.dtype), hidden, weight)
        return (*sums.of_inputs(), *[None] * 6)


def _logits(hidden_ND, weight_VD, bias_V, temperature: float) -> torch.Tensor:
    """[N, V]; divided in fp32, as in sampling."""
    logits = F.linear(hidden_ND, weight_VD, bias_V)
    return logits if temperature == 1 else logits.float().div_(temperature)


def _token_losses(logits_NV, labels_N) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses [N], logsumexps [N], log-probabilities [N, V]), fp32; the first two are 0 where the label is -100."""
    counted = labels_N != IGNORE
    index = labels_N.clamp(min=0)[:, None]
    logp = torch.log_softmax(logits_NV, -1, dtype=torch.float32)
    logp_label = logp.gather(1, index)[:, 0]
    lse = torch.where(counted, logits_NV.gather(1, index)[:, 0].float() - logp_label, 0.0)
    return torch.where(counted, -logp_label, 0.0), lse, logp


def _scaled(probabilities_NV, labels_N, scale_N) -> torch.Tensor:
    """Gradient of the sum of scale * loss with respect to the logits [N, V], in place of the probabilities."""
    scale = torch.where(labels_N != IGNORE, scale_N, 0.0)[:, None]
    probabilities_NV *= scale
    return probabilities_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], -scale)
