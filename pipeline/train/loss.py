"""Next-token losses, in fp32 whatever the model computed in. Logits are already shifted by the caller's labels: logits_BTV[b, t] predicts labels_BT[b, t]."""

import torch
import torch.nn.functional as F

IGNORE = -100


def cross_entropy_sum(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label) in nats over all positions whose label is not -100. Shape: []."""
    return F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def token_logprobs(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """log p(label) in nats at each position, 0 where the label is -100. Shape: [B, T], fp32."""
    loss = F.cross_entropy(logits_BTV.flatten(0, -2).float(), labels_BT.flatten(), ignore_index=IGNORE, reduction="none")
    return -loss.view(labels_BT.shape)
