"""Kahneman-Tversky optimisation (KTO): a chat model learns from single answers that were judged good or bad, without
pairs, without a reward model and without sampling.

    python pipeline/kto.py recipe.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/kto.py recipe.yaml

The reference is the model at the start; its log-probabilities are computed once, kept in cache/ next to the stage's
folder, and need no second model in memory. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import bisect
import functools
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from pipeline.core.artifact import Artifact
from pipeline.core.intervals import changes_of
from pipeline.core.output import Output
from pipeline.core.terminal import say
from pipeline.data.chat.chat_sources import LabelledSource
from pipeline.train.config import LossChunk
from pipeline.train.finetune_config import FinetuneConfig, FinetuneOptimizer

VERSION = 4  # 4: thoughts that a template writes otherwise than its prompt, ids and ends of tool calls
INPUTS = {"model": ("sft", "pretrain")}


class KtoOptimizer(FinetuneOptimizer):
    """AdamW for KTO."""

    USUAL_LR = (1e-7, 2e-4)

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate; 5e-7 to 5e-6 is usual for 7B parameters, small models take 1e-5 to 1e-4."""


class Config(FinetuneConfig):
    """Learning from judged answers."""

    sources: dict[str, LabelledSource]
    """Judged answers by name."""
    evaluate: dict[str, LabelledSource] = {}
    """Held-out judged answers by name, with metrics of their own (loss/NAME)."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """kto: values relative to an estimate of the KL divergence from the reference (Ethayarajh et al., 2024);
    apo_zero_unpaired: relative to 0, without that estimate (D'Oosterlinck et al., 2024)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of the losses of good answers."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of the losses of bad answers."""
    loss_chunk: LossChunk = "auto"
    """Answer tokens whose logits exist at a time; none: all logits of a micro-batch. auto: in chunks if the family
    allows it."""
    optimizer: KtoOptimizer = KtoOptimizer()
    """AdamW."""

    def head_chunk(self) -> Literal["auto"] | int | None:
        return self.loss_chunk


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.train import finetune
    from pipeline.train.finetune_data import encode_once, heldout_sets
    from pipeline.train.labelled_data import answer_counts, answer_work, encoded_answers, labelled_batch

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_answers, config, parent.chat, output)
    arrays, extra = encode_once(output, config, encode)
    sets = heldout_sets(config, arrays, len(arrays["heldout.start"]))
    counts = answer_counts(arrays, extra, sets)
    rows = finetune.shuffled_rows(config, arrays, arrays["train.ids"].lengths)
    config = finetune.in_steps(config, rows.per_epoch)
    say_balance(config, output, arrays["train.label"])

    # Build
    model, weights = finetune.load_model(config, parent)
    finetune.adapt(config, parent, model, weights)
    work = answer_work(config, arrays, mismatched=config.loss == "kto")
    loss, read = objective(config)
    engine, text = finetune.build_engine(model, loss, config, work, weights=weights, per_token=True, selects=True)
    finetune.say_counts(output, counts)
    finetune.say_sources(config, arrays, rows)

    # Reference: log-probabilities before the first step, of the answers that the run takes
    taken = rows.taken(config.steps * config.batch_size)
    used = {"train": taken.nonzero()[0].tolist(), "heldout": list(range(len(arrays["heldout.start"])))}
    cache = finetune.reference_cache(config, parent, inputs["model"], output)
    tables = {}
    for split, indices in used.items():
        tables[split] = reference(engine, config, arrays, split, indices, parent.pad_id, cache, output)

    def collate(split: str, indices: list[int]) -> dict:
        batch = labelled_batch(arrays, parent.pad_id, split, indices, config.fixed_length())
        batch["reference"] = tables[split][indices, 0]
        return batch

    def length(split: str, index: int) -> int:
        return len(arrays[f"{split}.ids"][index])

    # Fit and publish
    prepare = baseline(engine, config, arrays, tables, parent.pad_id)
    result = finetune.fit(
        engine, config, output, text, rows, sets, collate, unit="answers", read=read, length=length, prepare=prepare
    )
    finetune.publish_model(engine, config, parent, output)

    ranked = ranked_right(result["after_rows"])
    changes = changes_of(result, ("loss", "margin"))
    measures, nothing = headline(result["before"], result["after"], changes["margin"], ranked, counts.heldout)
    metrics = finetune.summarise(
        config, output, result, rows, counts, unit="answers", measures=measures, nothing=nothing, arrays=arrays
    )
    metrics["heldout_auc_after"] = ranked
    for name, change in changes.items():
        metrics[f"heldout_{name}_change_interval"] = change and list(change)
    return metrics


def say_balance(config: Config, output: Output, is_desirable) -> None:
    """Name weights for a set with many more good answers than bad ones, or the reverse. Losses of both kinds should
    weigh about the same, good ones up to 4/3 (Ethayarajh et al., 2024, section 4)."""
    good = int(is_desirable.sum())
    bad = len(is_desirable) - good
    if not good or not bad:
        only = "good" if good else "bad"
        say(f"{output.stage}: WARNING: all {good + bad:,} answers are {only} ones; the loss needs both kinds")
        return
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    if not 0.99 <= ratio <= 1.34:
        balanced = config.undesirable_weight * bad / good
        say(
            f"{output.stage}: {good:,} good and {bad:,} bad answers to train on, which weigh {ratio:.3g} to 1;"
            f" desirable_weight: {balanced:.3g} to {balanced * 4 / 3:.3g} would balance them"
        )


def objective(config: Config):
    """(loss function of an engine, function that reads (loss, margin, reward, is it desirable, 1) of each answer [B,
    5]), both of outputs and a batch with `labels`, `is_desirable` and `reference` [B], and what `baseline` adds."""
    import torch

    from pipeline.train.loss_preference import KtoOptions, answer_logprobs, kto, kto_metrics

    options = KtoOptions(config.beta, config.desirable_weight, config.undesirable_weight)

    def of_answers(outputs, batch: dict):
        logps = answer_logprobs(outputs, batch)
        losses = kto(logps, batch["reference"], batch["is_desirable"], batch["kl"], options)
        return losses, kto_metrics(logps, batch, options)

    def loss(outputs, batch: dict):
        losses, metrics = of_answers(outputs, batch)
        return losses.sum(), {name: values.sum() for name, values in metrics.items()}

    def read(outputs, batch: dict):
        losses, metrics = of_answers(outputs, batch)
        reward = config.beta * (answer_logprobs(outputs, batch) - batch["reference"])
        columns = [losses, metrics["margin"], reward, batch["is_desirable"].float(), torch.ones_like(losses)]
        return torch.stack(columns, 1)

    return loss, read


def reference(engine, config: Config, arrays: dict, split: str, indices: list[int], pad_id: int, cache, output: Output):
    """Log-probabilities under the reference [answers of the split, 2]: of an answer, and of the answer that its prompt
    is mismatched with. NaN for rows that are not among `indices`, and for what the loss does not read. Collective."""
    import torch

    from pipeline.train.labelled_data import answer_row, mismatched_row, partners
    from pipeline.train.reference_logprobs import reference_logprobs

    rows = [answer_row(arrays, split, index) for index in indices]
    count = len(arrays[f"{split}.start"])
    if config.loss == "kto":
        partner = partners(config.seed, split, count)
        rows += [mismatched_row(arrays, split, index, partner[index], config.sequence_length) for index in indices]
    logps = torch.from_numpy(reference_logprobs(engine, rows, pad_id, cache, output, split))
    table = torch.full((count, 2), float("nan"))
    table[indices, : len(rows) // len(indices)] = logps.view(-1, len(indices)).T
    return table


def baseline(engine, config: Config, arrays: dict, tables: dict, pad_id: int) -> Callable:
    """A function for `finetune.fit` that adds to all micro-batches of a step, or of an evaluation, what the loss needs
    of all its answers: `kl`, the mean of log(policy / reference) of prompts with the answer of another prompt, at least
    0 (Ethayarajh et al., 2024, section 4.1); and the share of answers that are desirable, which metrics are divided by.

    TRL takes the mean over a micro-batch of each process and then over processes. Here it is over the global batch, so
    that it does not depend on how a batch is divided.
    """
    import torch

    from pipeline.core import distributed
    from pipeline.train.answer_rows import answer_batch
    from pipeline.train.labelled_data import mismatched_row, partners
    from pipeline.train.loss_preference import answer_logprobs

    def mismatched_batch(split: str, indices: list[int]) -> dict:
        partner = partners(config.seed, split, len(arrays[f"{split}.start"]))
        rows = [mismatched_row(arrays, split, index, partner[index], config.sequence_length) for index in indices]
        return answer_batch(rows, pad_id) | {"weight": 0.0}

    def prepare(split: str, parts: list[list[int]], micro_batches: list[dict]) -> None:
        total = 0.0
        if config.loss == "kto":
            logps = engine.forward([mismatched_batch(split, part) for part in parts], answer_logprobs)
            ratios = torch.cat(logps) - tables[split][[index for part in parts for index in part], 1]
            total = float(ratios.double().sum())
        good = sum(float(batch["is_desirable"].sum()) for batch in micro_batches)
        total, count, good = distributed.all_reduce_sum([total, float(sum(map(len, parts))), good])
        for batch in micro_batches:
            batch["kl"] = torch.tensor(max(0.0, total / count))
            batch["desirable_share"] = torch.tensor(good / count)

    return prepare


def ranked_right(rows: list) -> float | None:
    """Share of all (good, bad) pairs of held-out answers of which the good one has the higher reward, a tie counting
    half: the area under the ROC curve. None if there is only one kind. rows: as `objective` reads them."""
    good = [row[2] for row in rows if row[3]]
    bad = sorted(row[2] for row in rows if not row[3])
    if not good or not bad:
        return None
    wins = sum(bisect.bisect_left(bad, reward) + bisect.bisect_right(bad, reward) for reward in good) / 2
    return wins / (len(good) * len(bad))


def headline(
    before: dict, after: dict, change: tuple[float, float] | None, ranked: float | None, answers: int
) -> tuple[list[str], list[str]]:
    """(parts of the closing line, those of them that show nothing learned). change: 95% interval of the margin's
    change. ranked: as `ranked_right`."""
    words = f"95% of the change: {change[0]:+.2f} to {change[1]:+.2f}, " if change else ""
    margins = f"held-out margin {before['margin']:.2f} -> {after['margin']:.2f} ({words}n={answers})"
    measures = [margins]
    if ranked is not None:
        measures.append(f"good above bad in {ranked:.0%} of pairs")
    has_risen = change[0] > 0 if change else after["margin"] > before["margin"]
    return measures, [] if has_risen else [margins]


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("kto")
