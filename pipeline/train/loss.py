"""Next-token losses and the distillation of one model from another, in fp32 whatever the model computed in. Logits are
already shifted by the caller's labels: logits_BTV[b, t] predicts labels_BT[b, t]."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from pipeline.train.chunked_loss import IGNORE, TokenLosses


class Tally(NamedTuple):
    """Key of a sum that a loss function returns to be counted, not logged: Meters and the spike report read it. A sum
    under a string is a metric: it is divided by the step's weight and logged.

    quantity: nats, tokens or bytes. group: name of a source, number of a row in the global batch, or None for all.
    """

    quantity: str
    group: str | int | None = None


def cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) in nats over all positions whose label is not -100. Shape: []."""
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def weighted_cross_entropy_sum(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, weights_BT: torch.Tensor
) -> torch.Tensor:
    """Sum of -weight * log p(label) in nats over all positions whose label is not -100. Shape: []."""
    return -(token_logprobs(logits_BTV, labels_BT) * weights_BT).sum()


def token_logprobs(outputs, labels_BT: torch.Tensor) -> torch.Tensor:
    """log p(label) in nats at each position, 0 where the label is -100. outputs: logits [B, T, V], or TokenLosses of a
    layer that is `per_token` (chunked_loss.py). Shape: [B, T], fp32."""
    if isinstance(outputs, TokenLosses):
        return -outputs.nll_BT
    return -_token_losses(outputs, labels_BT)


def _token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    logits_NV = logits_BTV.flatten(0, -2).float()
    losses_N = F.cross_entropy(logits_NV, labels_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return losses_N.view(labels_BT.shape)


def divergence(
    student_BTV: torch.Tensor,
    teacher_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    direction: Literal["forward", "reverse"],
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL divergence between two models' distributions of the next token in nats, at each position whose label is not
    -100, 0 elsewhere; over the tokens that both have logits for. Shape: [B, T], fp32.

    forward: KL(teacher || student) (Hinton et al., 2015); reverse: KL(student || teacher) (Gu et al., 2024, MiniLLM).
    Both logits are divided by the temperature, and the result is multiplied by its square, so that the gradient's scale
    does not depend on it (Hinton et al., 2015, section 2). The teacher gets no gradient.
    """
    places = labels_BT != IGNORE
    shared = min(student_BTV.shape[-1], teacher_BTV.shape[-1])
    student_NV = (student_BTV[places][:, :shared].float() / temperature).log_softmax(-1)
    teacher_NV = (teacher_BTV[places][:, :shared].detach().float() / temperature).log_softmax(-1)
    ours, theirs = (student_NV, teacher_NV) if direction == "forward" else (teacher_NV, student_NV)
    losses_N = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2
    return losses_N.new_zeros(labels_BT.shape).index_put((places,), losses_N)


def next_token(outputs, labels_BT: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(sum of cross-entropy, losses [B, T] without gradient, further sums) of logits, or of TokenLosses that were
    computed with the same `z_loss` (chunked_loss.py).

    z_loss * logsumexp(logits)^2 (PaLM: Chowdhery et al., 2022, section 5) is in the gradient and in the further sums,
    but not in the value of the first.
    """
    sums = {}
    if isinstance(outputs, TokenLosses):
        total, nll_BT, lse_BT, _ = outputs
        if z_loss:
            sums["z_loss"] = z_loss * lse_BT.square().sum()
        return total, nll_BT, sums
    nll_BT = _token_losses(outputs, labels_BT)
    total = nll_BT.sum()
    if z_loss:
        extra = z_loss * (outputs.float().logsumexp(-1).square() * (labels_BT != IGNORE)).sum()
        total = total + (extra - extra.detach())
        sums["z_loss"] = extra.detach()
    return total, nll_BT.detach(), sums
