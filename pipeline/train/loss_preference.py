"""Losses over pairs of answers, with their metrics. A batch of pairs is [chosen 0..B-1, rejected 0..B-1].

Each loss returns (sum over pairs, sums of metrics); the engine divides both by the number of pairs of the global batch.
"""

import torch
import torch.nn.functional as F

from pipeline.train.chunked_loss import IGNORE
from pipeline.train.loss import token_logprobs


def answer_logprobs(logits_BTV: torch.Tensor, batch: dict) -> torch.Tensor:
    """Log-probability of each answer, summed over its tokens: the positions whose label is not -100. Shape: [B]."""
    return token_logprobs(logits_BTV, batch["labels"]).sum(-1)


def answer_lengths(batch: dict) -> torch.Tensor:
    """Number of tokens of each answer, its end of turn included. Shape: [B]."""
    return (batch["labels"] != IGNORE).sum(-1)


def bradley_terry(
    scores: torch.Tensor, margin: torch.Tensor | None = None, centering: float = 0.0
) -> tuple[torch.Tensor, dict]:
    """-log P(chosen beats rejected) under Bradley & Terry (1952): -log sigmoid(s_chosen - s_rejected - margin).

    scores: [2B]. margin: [B], how much better the chosen answer is, according to its labels (Llama 2, section 3.2.2).
    centering: coefficient of (s_chosen + s_rejected)^2, which keeps the scores' free offset near 0 (Eisenstein et al.,
    2023).
    """
    chosen, rejected = scores.float().chunk(2)
    difference = chosen - rejected
    logits = difference if margin is None else difference - margin
    losses = -F.logsigmoid(logits)
    if centering:
        losses = losses + centering * (chosen + rejected) ** 2
    with torch.no_grad():
        metrics = {"accuracy": _wins(difference), "margin": difference.sum(), "score": ((chosen + rejected) / 2).sum()}
    return losses.sum(), metrics


def dpo(
    logps: torch.Tensor, reference: torch.Tensor, beta: float, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, dict]:
    """Direct preference optimisation (Rafailov et al., 2023, eq. 7).

    logps, reference: [2B], log-probability of each answer, summed over its tokens, under the policy and under the
    frozen reference. label_smoothing: probability that a label is wrong (cDPO: Mitchell, 2023, "A note on DPO with
    noisy preferences & relationship to IPO", eq. 3); 0 is plain DPO.
    """
    ratios = logps.float() - reference.float()
    chosen, rejected = ratios.chunk(2)
    logits = beta * (chosen - rejected)
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    with torch.no_grad():
        policy_chosen, policy_rejected = logps.float().chunk(2)
        metrics = {
            "accuracy": _wins(logits),
            "margin": logits.sum(),
            "reward_chosen": (beta * chosen).sum(),
            "reward_rejected": (beta * rejected).sum(),
            "logp_chosen": policy_chosen.sum(),
            "logp_rejected": policy_rejected.sum(),
        }
    return losses.sum(), metrics


def ipo(logps: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor, beta: float) -> tuple[torch.Tensor, dict]:
    """Identity preference optimisation (Azar et al., 2024, eq. 17): the target of the log ratio of chosen to rejected
    is 1 / (2 beta), not as much as possible, so that pairs that are always won do not overrule the reference.

    logps, reference: [2B] as in `dpo`. lengths: [2B], answer tokens; log-probabilities are averaged over them, as in
    TRL, because sums of long answers would need another beta.
    """
    ratios = (logps.float() - reference.float()) / lengths
    chosen, rejected = ratios.chunk(2)
    difference = chosen - rejected
    losses = (difference - 1 / (2 * beta)) ** 2
    with torch.no_grad():
        metrics = {"accuracy": _wins(difference), "margin": beta * difference.sum()}
    return losses.sum(), metrics


def _wins(difference: torch.Tensor) -> torch.Tensor:
    """Number of pairs ranked right. A tie counts half, so that a model that ranks nothing has an accuracy of 0.5."""
    wins = (difference > 0).float()
    ties = (difference == 0).float()
    return (wins + ties / 2).sum()
