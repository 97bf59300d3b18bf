"""Next-token losses, in fp32 whatever the model computed in. Logits are already shifted by the caller's labels:
logits_BTV[b, t] predicts labels_BT[b, t]."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from pipeline.train.chunked_loss import IGNORE, TokenLosses


class Tally(NamedTuple):
    """Key of a sum that a loss function returns for counting, not for the log: the meters and the spike report read
    it. A plain string as key is a metric that is divided by the step's weight and logged.

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


def token_logprobs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """log p(label) in nats at each position, 0 where the label is -100. Shape: [B, T], fp32."""
    loss = F.cross_entropy(
        logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return -loss.view(labels_BT.shape)


def next_token(outputs, labels_BT: torch.Tensor, z_loss: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(sum of cross-entropy, losses [B, T] without gradient, further sums) of logits, or of TokenLosses (head.py),
    which were made with the same `z_loss`.

    z_loss * logsumexp(logits)^2 (PaLM: Chowdhery et al., 2022, section 5) is in the gradient and in the sums, but not
    in the value of the first.
    """
    if isinstance(outputs, TokenLosses):
        total, nll, lse = outputs
        return total, nll, {"z_loss": z_loss * lse.square().sum()} if z_loss else {}
    loss = F.cross_entropy(
        outputs.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="none"
    ).view(labels_BT.shape)
    total, metrics = loss.sum(), {}
    if z_loss:
        extra = z_loss * (outputs.float().logsumexp(-1).square() * (labels_BT != IGNORE)).sum()
        total, metrics = total + (extra - extra.detach()), {"z_loss": extra.detach()}
    return total, loss.detach(), metrics
