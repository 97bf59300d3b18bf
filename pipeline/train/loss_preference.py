"""Losses over answers, their steps, and pairs of answers, with their metrics: reward models, DPO and its relatives,
KTO.

A batch of pairs is [chosen 0..B-1, rejected 0..B-1]. Each loss over pairs is a function of `Pairs` and a row of
`LOSSES`; `pair_losses` adds them up with weights. A stage gives the engine sums over pairs or answers, which it divides
by their number in the global batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.train.chunked_loss import IGNORE
from pipeline.train.loss import token_logprobs


def answer_logprobs(outputs, batch: dict) -> torch.Tensor:
    """Log-probability of each answer, summed over its tokens: the positions whose label is not -100. outputs: logits
    [B, T, V], or TokenLosses. Shape: [B]."""
    return token_logprobs(outputs, batch["labels"]).sum(-1)


def answer_lengths(batch: dict) -> torch.Tensor:
    """Number of tokens of each answer, its end of turn included. Shape: [B]."""
    return (batch["labels"] != IGNORE).sum(-1)


# ---- pairs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """Numbers that losses over pairs read."""

    beta: float
    """Scale of log-probabilities: the strength of the pull towards the reference, where there is one."""
    label_smoothing: float = 0.0
    """Probability that a label is wrong."""
    gamma: float = 0.0
    """Margin that SimPO asks for."""


@dataclass(frozen=True)
class Pairs:
    """What losses read of B pairs."""

    logps: torch.Tensor
    """[2B]: log-probability of each answer under the policy, summed over its tokens."""
    reference: torch.Tensor | None
    """[2B]: the same under the frozen reference; None for losses that need none."""
    lengths: torch.Tensor
    """[2B]: tokens of each answer."""

    def ratio(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected), each [B]: log(policy / reference)."""
        return (self.logps - self.reference).chunk(2)

    def mean_ratio(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected), each [B]: log(policy / reference) per token."""
        return ((self.logps - self.reference) / self.lengths).chunk(2)

    def mean_logp(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected), each [B]: log-probability per token."""
        return (self.logps / self.lengths).chunk(2)


def sigmoid(pairs: Pairs, options: Options) -> torch.Tensor:
    """DPO (Rafailov et al., 2023, eq. 7); with label_smoothing cDPO (Mitchell, 2023, "A note on DPO with noisy
    preferences & relationship to IPO", eq. 3), the cross-entropy with labels that are wrong with that probability."""
    chosen, rejected = pairs.ratio()
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def sigmoid_norm(pairs: Pairs, options: Options) -> torch.Tensor:
    """DPO on log-probabilities per token, so that an answer does not win by its length (Tulu 3: Lambert et
    al., 2024, section 5)."""
    chosen, rejected = pairs.mean_ratio()
    return _smoothed(options.beta * (chosen - rejected), options.label_smoothing)


def _smoothed(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    losses = -F.logsigmoid(logits)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def robust(pairs: Pairs, options: Options) -> torch.Tensor:
    """Robust DPO (Chowdhury et al., 2024): its expectation over labels that are flipped with probability
    label_smoothing is the DPO loss of the true labels."""
    chosen, rejected = pairs.ratio()
    logits, flipped = options.beta * (chosen - rejected), options.label_smoothing
    return (flipped * F.logsigmoid(-logits) - (1 - flipped) * F.logsigmoid(logits)) / (1 - 2 * flipped)


def ipo(pairs: Pairs, options: Options) -> torch.Tensor:
    """Identity preference optimisation (Azar et al., 2024, eq. 17): the target of the log ratio of chosen to rejected
    is 1 / (2 beta), not as much as possible, so that pairs that are always won do not overrule the reference. Per
    token, as in TRL, because sums of long answers would need another beta."""
    chosen, rejected = pairs.mean_ratio()
    return (chosen - rejected - 1 / (2 * options.beta)) ** 2


def hinge(pairs: Pairs, options: Options) -> torch.Tensor:
    """SLiC's hinge (Zhao et al., 2023) on DPO's logits (RSO: Liu et al., 2024): no pull beyond a margin of 1."""
    chosen, rejected = pairs.ratio()
    return torch.relu(1 - options.beta * (chosen - rejected))


def apo_zero(pairs: Pairs, options: Options) -> torch.Tensor:
    """Anchored preference optimisation, APO-zero (D'Oosterlinck et al., 2024, eq. 7), for chosen answers that are
    better than the model's: chosen becomes likelier than under the reference, rejected less likely."""
    chosen, rejected = pairs.ratio()
    return torch.sigmoid(-options.beta * chosen) + torch.sigmoid(options.beta * rejected)


def apo_down(pairs: Pairs, options: Options) -> torch.Tensor:
    """APO-down (D'Oosterlinck et al., 2024, eq. 8), for chosen answers that are worse than the model's: both become
    less likely, rejected more so."""
    chosen, rejected = pairs.ratio()
    return torch.sigmoid(options.beta * chosen) + torch.sigmoid(-options.beta * (chosen - rejected))


def simpo(pairs: Pairs, options: Options) -> torch.Tensor:
    """SimPO (Meng et al., 2024, eq. 6): log-probabilities per token without a reference, and a margin gamma."""
    chosen, rejected = pairs.mean_logp()
    return -F.logsigmoid(options.beta * (chosen - rejected) - options.gamma)


def orpo(pairs: Pairs, options: Options) -> torch.Tensor:
    """ORPO (Hong et al., 2024, eqs. 6 and 7): cross-entropy of the chosen answer plus beta times the log odds ratio
    loss, without a reference."""
    chosen, rejected = pairs.mean_logp()
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - options.beta * F.logsigmoid(log_odds)


def _log1mexp(logp: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(logp)) for logp < 0, without cancellation (Maechler, 2012). A probability that fp32 rounds to 1 is
    taken for the largest one below."""
    logp = logp.clamp(max=-(2.0**-24))
    return torch.where(logp < -0.693, torch.log1p(-logp.exp()), torch.log(-torch.expm1(logp)))


def sft(pairs: Pairs, options: Options) -> torch.Tensor:
    """Cross-entropy of the chosen answer, per token (Pang et al., 2024, Iterative RPO, eq. 1; Ouyang et al., 2022). A
    mean over each answer's tokens first, so that it does not depend on how a batch is divided."""
    chosen, _ = pairs.mean_logp()
    return -chosen


@dataclass(frozen=True)
class PairLoss:
    """A row of LOSSES."""

    function: Callable[[Pairs, Options], torch.Tensor]
    """(pairs, options) -> losses [B]."""
    score: Callable[[Pairs], tuple[torch.Tensor, torch.Tensor]]
    """(chosen, rejected), each [B]: what it compares answers by. Metrics are of beta times it."""
    smoothed: bool = False
    """Whether label_smoothing has an effect."""

    @property
    def needs_reference(self) -> bool:
        return self.score is not Pairs.mean_logp


LOSSES = {
    "sigmoid": PairLoss(sigmoid, Pairs.ratio, smoothed=True),
    "sigmoid_norm": PairLoss(sigmoid_norm, Pairs.mean_ratio, smoothed=True),
    "robust": PairLoss(robust, Pairs.ratio, smoothed=True),
    "ipo": PairLoss(ipo, Pairs.mean_ratio),
    "hinge": PairLoss(hinge, Pairs.ratio),
    "apo_zero": PairLoss(apo_zero, Pairs.ratio),
    "apo_down": PairLoss(apo_down, Pairs.ratio),
    "simpo": PairLoss(simpo, Pairs.mean_logp),
    "orpo": PairLoss(orpo, Pairs.mean_logp),
    "sft": PairLoss(sft, Pairs.mean_logp),
}


def pair_losses(weights: dict[str, float], pairs: Pairs, options: Options) -> tuple[torch.Tensor, dict]:
    """(weighted sum of the losses named in `weights`, [B]; metrics [B] without a gradient).

    Metrics: `accuracy` (does the chosen answer have the higher score; a tie counts half), `margin` and `reward_*` (beta
    times scores), `logp_*`; with several losses also each of them by name. The score is that of the loss with the
    largest weight.
    """
    losses = {name: LOSSES[name].function(pairs, options) for name in weights}
    total = sum(weights[name] * values for name, values in losses.items())
    with torch.no_grad():
        chosen, rejected = LOSSES[_leading(weights)].score(pairs)
        policy_chosen, policy_rejected = pairs.logps.detach().chunk(2)
        metrics = {
            "accuracy": _wins(chosen - rejected),
            "margin": options.beta * (chosen - rejected),
            "reward_chosen": options.beta * chosen,
            "reward_rejected": options.beta * rejected,
            "logp_chosen": policy_chosen,
            "logp_rejected": policy_rejected,
        }
        if len(losses) > 1:
            metrics |= {f"loss_{name}": values.detach() for name, values in losses.items()}
    return total, metrics


def _leading(weights: dict[str, float]) -> str:
    """The loss over pairs with the largest weight, the first by name of equal ones."""
    return min((name for name in weights if name != "sft"), key=lambda name: (-weights[name], name))


def needs_reference(weights: dict[str, float]) -> bool:
    return any(LOSSES[name].needs_reference for name in weights)


# ---- single answers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KtoOptions:
    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kto(
    logps: torch.Tensor, reference: torch.Tensor, is_desirable: torch.Tensor, kl: torch.Tensor, options: KtoOptions
) -> torch.Tensor:
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2024, section 4): the value of an answer, measured from
    the point that `kl` is, saturates in both directions. Returns losses [B].

    logps, reference: [B], log-probability of each answer under the policy and under the reference. is_desirable: [B]
    bool. kl: [], estimate of the KL divergence from the reference, at least 0, a constant for the gradient; 0 gives
    APO-zero for single answers (D'Oosterlinck et al., 2024).
    """
    signs = torch.where(is_desirable, 1.0, -1.0)
    weights = torch.where(is_desirable, options.desirable_weight, options.undesirable_weight)
    return weights * torch.sigmoid(-signs * options.beta * (logps - reference - kl))


def kto_metrics(logps: torch.Tensor, batch: dict, options: KtoOptions) -> dict:
    """Metrics [B] without a gradient, of a batch as stage kto prepares it.

    `reward_*` are beta times log(policy / reference), divided by the share of answers of their kind, so that their mean
    over all answers is the mean over that kind; `margin` is their difference.
    """
    is_desirable, share = batch["is_desirable"], batch["desirable_share"]
    with torch.no_grad():
        ratio = logps - batch["reference"]
        desirable = options.beta * ratio * is_desirable / share.clamp(min=1e-9)
        undesirable = options.beta * ratio * ~is_desirable / (1 - share).clamp(min=1e-9)
        return {
            "margin": desirable - undesirable,
            "reward_desirable": desirable,
            "reward_undesirable": undesirable,
            "kl": batch["kl"].expand_as(ratio),
        }


# ---- reward models ---------------------------------------------------------------------------------------------------


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
        metrics = {
            "accuracy": _wins(difference).sum(),
            "margin": difference.sum(),
            "score": ((chosen + rejected) / 2).sum(),
        }
    return losses.sum(), metrics


def step_losses(logits: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each step, whether it is judged right), both [S]: the cross-entropy of wrong and right at the last token
    of each step (Lightman et al., 2023; Wang et al., 2024, eq. 3). All other positions carry no loss.

    logits: [B, T, 2]. batch: `step_places` [S], where in B x T each step ends, and `step_labels` [S], 1 for right.
    """
    logits_S2 = logits.flatten(0, 1)[batch["step_places"]].float()
    losses = F.cross_entropy(logits_S2, batch["step_labels"], reduction="none")
    return losses, logits_S2[:, 1] > logits_S2[:, 0]


def step_cross_entropy(logits: torch.Tensor, batch: dict) -> tuple[torch.Tensor, dict]:
    """The sum of `step_losses`, and how many steps are judged as their labels say."""
    losses, judged = step_losses(logits, batch)
    return losses.sum(), {"accuracy": (judged == (batch["step_labels"] == 1)).sum()}


def read_steps(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """Of each answer of a micro-batch: the loss, the number of steps judged right as their labels say, whether the
    first wrong step is found, or that there is none (Zheng et al., 2024, ProcessBench), the number of steps that are
    right, and the number of steps. Shape: [B, 5]."""
    losses, judged = step_losses(logits, batch)
    labels, counts = batch["step_labels"] == 1, batch["steps"]
    rows = []
    for loss, ours, truth in zip(losses.split(counts), judged.split(counts), labels.split(counts), strict=True):
        # The product of the steps so far: equal exactly where both have the same first wrong step.
        found = torch.equal(ours.long().cumprod(0), truth.long().cumprod(0))
        numbers = [loss.sum(), (ours == truth).sum(), torch.tensor(found), truth.sum(), torch.tensor(len(truth))]
        rows.append(torch.stack([number.float().to(loss.device) for number in numbers]))
    return torch.stack(rows)


def _wins(difference: torch.Tensor) -> torch.Tensor:
    """1 for each pair that is ranked right. A tie counts half, so that a model that ranks nothing has an accuracy of
    0.5."""
    return (difference > 0).float() + (difference == 0).float() / 2
