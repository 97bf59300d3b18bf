"""Preference optimisation: a chat model learns from pairs of answers, without a reward model and without sampling.

    python pipeline/dpo.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/dpo.py recipes/llama-7b.yaml

DPO and its relatives, alone or as a weighted sum (pipeline/train/loss_preference.py). The reference is the model at the
start; its log-probabilities are computed once, kept in cache/ next to the stage's folder, and need no second model in
memory. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import functools
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.config import refuse_unused
from pipeline.core.intervals import changes_of, wilson
from pipeline.core.output import Output
from pipeline.data.chat.chat_sources import PreferenceSource
from pipeline.train.config import LossChunk
from pipeline.train.finetune_config import FinetuneConfig, FinetuneOptimizer

VERSION = 8  # 8: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"model": ("sft", "pretrain")}

PairLossName = Literal[
    "sigmoid", "sigmoid_norm", "robust", "ipo", "hinge", "apo_zero", "apo_down", "simpo", "orpo", "sft"
]
LABEL_SMOOTHING = ("sigmoid", "sigmoid_norm", "robust")  # losses that read label_smoothing


class DpoOptimizer(FinetuneOptimizer):
    """AdamW for DPO."""

    USUAL_LR = (1e-7, 2e-4)

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate; 5e-7 to 1e-6 is usual for 7B parameters, small models take 1e-5 to 1e-4."""


class Config(FinetuneConfig):
    """Preference optimisation."""

    sources: dict[str, PreferenceSource]
    """Pairs by name."""
    evaluate: dict[str, PreferenceSource] = {}
    """Held-out pairs by name, with metrics of their own (loss/NAME)."""
    loss: PairLossName | dict[PairLossName, Annotated[float, Field(gt=0)]] = "sigmoid"
    """One loss, or several with their weights, such as {sigmoid: 1.0, sft: 0.2}. sigmoid: DPO (Rafailov et al., 2023);
    sigmoid_norm: the same per token (Tulu 3); robust: unbiased for noisy labels (Chowdhury et al., 2024); ipo: a
    squared distance that stops pulling at a margin of 1 / (2 beta), per token (Azar et al., 2024); hinge (SLiC: Zhao et
    al., 2023); apo_zero, apo_down (D'Oosterlinck et al., 2024); simpo (Meng et al., 2024) and orpo (Hong et al., 2024):
    without a reference; sft: cross-entropy of the chosen answer, next to another loss."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (Rafailov et al., 2023). simpo: scale of log-probabilities per token,
    2 to 10; orpo: weight of the odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair's label is wrong, with sigmoid and sigmoid_norm (cDPO: Mitchell, 2023) and robust."""
    gamma: float = Field(1.0, ge=0)
    """simpo only: margin between the scores of both answers; half of beta is usual (Meng et al., 2024)."""
    loss_chunk: LossChunk = "auto"
    """Answer tokens whose logits exist at a time; none: all logits of a micro-batch. auto: in chunks if the family
    allows it."""
    optimizer: DpoOptimizer = DpoOptimizer()
    """AdamW."""

    @property
    def losses(self) -> dict[PairLossName, float]:
        """The weight of each loss."""
        return self.loss if isinstance(self.loss, dict) else {self.loss: 1.0}

    @field_validator("sources")
    @classmethod
    def _no_margins(cls, value: dict[str, PreferenceSource]) -> dict[str, PreferenceSource]:
        for name, source in value.items():
            if source.margin is not None:
                raise ValueError(f"{name}.margin is for reward models; the loss of DPO has no margin; remove the key")
        return value

    @field_validator("loss")
    @classmethod
    def _compares_answers(cls, value: PairLossName | dict[PairLossName, float]):
        if value in ({}, "sft") or set(value) == {"sft"}:
            raise ValueError(
                "needs a loss that compares both answers, such as {sigmoid: 1.0, sft: 0.2}; a stage of kind sft learns"
                " from chosen answers alone"
            )
        if isinstance(value, dict) and len(value) == 1 and set(value.values()) == {1.0}:
            return next(iter(value))
        return value

    @model_validator(mode="after")
    def no_unused_keys_of_losses(self):
        if not set(LABEL_SMOOTHING) & set(self.losses):
            refuse_unused(self, "label_smoothing", f"applies only to loss: {', '.join(LABEL_SMOOTHING)}")
        if "robust" in self.losses and not self.label_smoothing:
            raise ValueError("loss: robust needs label_smoothing, the share of wrong labels; with 0 it is sigmoid")
        if "simpo" not in self.losses:
            refuse_unused(self, "gamma", "applies only to loss: simpo")
        return self

    def head_chunk(self) -> Literal["auto"] | int | None:
        return self.loss_chunk

    def sequences_per_row(self) -> int:
        return 2

    def warnings(self) -> list[str]:
        warnings = super().warnings()
        if "simpo" in self.losses and "beta" not in self.model_fields_set:
            warnings.append(f"beta: {self.beta:g} is for losses with a reference; simpo usually takes 2 to 10")
        return warnings


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import torch

    from pipeline.train import finetune
    from pipeline.train.finetune_data import encode_once, heldout_sets
    from pipeline.train.loss_preference import needs_reference
    from pipeline.train.preference_data import (
        encoded_pairs,
        pair_batch,
        pair_counts,
        pair_length,
        pair_lengths,
        pair_work,
    )

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_pairs, config, parent.chat, output, margins=False)
    arrays, extra = encode_once(output, config, encode)
    sets = heldout_sets(config, arrays, len(arrays["heldout.start"]))
    counts = pair_counts(arrays, extra, sets)
    rows = finetune.shuffled_rows(config, arrays, pair_lengths(arrays))
    config = finetune.in_steps(config, rows.per_epoch)
    has_reference = needs_reference(config.losses)

    # Build
    model, weights = finetune.load_model(config, parent)
    finetune.adapt(config, parent, model, weights)
    work = pair_work(config, arrays, reference=has_reference)
    loss, read = objective(config)
    engine, text = finetune.build_engine(model, loss, config, work, weights=weights, per_token=True, selects=True)
    finetune.say_counts(output, counts)
    finetune.say_sources(config, arrays, rows)

    # Reference: log-probabilities before the first step, of the pairs that the run takes
    tables = {}
    if has_reference:
        taken = rows.taken(config.steps * config.batch_size)
        used = {"train": taken.nonzero()[0].tolist(), "heldout": list(range(len(arrays["heldout.start"])))}
        cache = finetune.reference_cache(config, parent, inputs["model"], output)
        for split, indices in used.items():
            tables[split] = reference(engine, arrays, split, indices, parent.pad_id, cache, output)

    def collate(split: str, indices: list[int]) -> dict:
        batch = pair_batch(arrays, parent.pad_id, split, indices, config.fixed_length())
        if has_reference:
            chosen, rejected = tables[split][indices].unbind(1)
            batch["reference"] = torch.cat([chosen, rejected])
        return batch

    # Fit and publish
    length = functools.partial(pair_length, arrays)
    result = finetune.fit(engine, config, output, text, rows, sets, collate, unit="pairs", read=read, length=length)
    finetune.publish_model(engine, config, parent, output)

    interval = wilson(result["after"]["accuracy"], counts.heldout)
    changes = changes_of(result, ("loss", "margin"))
    measures, nothing = headline(result["before"], result["after"], changes["margin"], interval, counts.heldout)
    metrics = finetune.summarise(
        config, output, result, rows, counts, unit="pairs", measures=measures, nothing=nothing, arrays=arrays
    )
    metrics["heldout_accuracy_interval"] = list(interval)
    for name, change in changes.items():
        metrics[f"heldout_{name}_change_interval"] = change and list(change)
    return metrics


def objective(config: Config):
    """(loss function of an engine, function that reads (loss, margin, 1) of each pair [B, 3]), both of outputs and a
    batch with `labels` and, if a loss needs it, `reference`."""
    import torch

    from pipeline.train.loss_preference import Options, Pairs, answer_lengths, answer_logprobs, pair_losses

    options = Options(config.beta, config.label_smoothing, config.gamma)

    def of_pairs(outputs, batch: dict):
        pairs = Pairs(answer_logprobs(outputs, batch), batch.get("reference"), answer_lengths(batch))
        return pair_losses(config.losses, pairs, options)

    def loss(outputs, batch: dict):
        losses, metrics = of_pairs(outputs, batch)
        return losses.sum(), {name: values.sum() for name, values in metrics.items()}

    def read(outputs, batch: dict):
        losses, metrics = of_pairs(outputs, batch)
        return torch.stack([losses, metrics["margin"], torch.ones_like(losses)], 1)

    return loss, read


def reference(engine, arrays: dict, split: str, indices: list[int], pad_id: int, cache, output: Output):
    """Log-probabilities under the reference [pairs of the split, 2] (chosen, rejected); NaN for pairs that are not
    among `indices`. Collective."""
    import torch

    from pipeline.train.preference_data import pair_rows
    from pipeline.train.reference_logprobs import reference_logprobs

    logps = reference_logprobs(engine, pair_rows(arrays, split, indices), pad_id, cache, output, split)
    table = torch.full((len(arrays[f"{split}.start"]), 2), float("nan"))
    table[indices] = torch.from_numpy(logps).view(2, -1).T
    return table


def headline(
    before: dict, after: dict, change: tuple[float, float] | None, interval: tuple[float, float], pairs: int
) -> tuple[list[str], list[str]]:
    """(parts of the closing line, those of them that show nothing learned). change, interval: 95% intervals of the
    margin's change and of the accuracy after."""
    low, high = interval
    words = f" (95% of the change: {change[0]:+.2f} to {change[1]:+.2f})" if change else ""
    margins = f"held-out margin {before['margin']:.2f} -> {after['margin']:.2f}{words}"
    ranked = f"pairs ranked right {after['accuracy']:.0%} (95%: {low:.0%} to {high:.0%}, n={pairs})"
    has_risen = change[0] > 0 if change else after["margin"] > before["margin"]
    nothing = [] if has_risen else [margins]
    if low <= 0.5:
        nothing.append(f"{ranked}, which guessing could give")
    return [margins, ranked], nothing


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("dpo")
