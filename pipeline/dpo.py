"""Direct preference optimisation: a chat model learns from pairs of answers, without a reward model and without
sampling.

    python pipeline/dpo.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/dpo.py recipes/llama-7b.yaml

The reference is the model at the start; its log-probabilities are computed once, kept in work/, and need no second
model in memory. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import functools
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.intervals import change_of, wilson
from pipeline.core.output import Output
from pipeline.data.chat.chat_sources import PreferenceSource
from pipeline.train.finetune_config import FinetuneConfig, FinetuneOptimizer

VERSION = 5  # 5: reasoning, tools and weights of records are learned, not rejected
INPUTS = {"model": ("sft", "pretrain")}
UNIT = 64  # pairs whose reference log-probabilities are written at a time


class DpoOptimizer(FinetuneOptimizer):
    """AdamW for DPO."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate; 5e-7 to 1e-6 is usual for 7B parameters, small models take 1e-5 to 1e-4."""


class Config(FinetuneConfig):
    """Direct preference optimisation."""

    sources: dict[str, PreferenceSource]
    """Pairs by name."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO (Rafailov et al., 2023); ipo: a squared distance that stops pulling at a margin of 1 / (2 beta)
    (Azar et al., 2024), with log-probabilities averaged over the answer's tokens."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference (Rafailov et al., 2023)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair's label is wrong (cDPO: Mitchell, 2023)."""
    optimizer: DpoOptimizer = DpoOptimizer()
    """AdamW."""

    @field_validator("sources")
    @classmethod
    def _no_margins(cls, value: dict[str, PreferenceSource]) -> dict[str, PreferenceSource]:
        for name, source in value.items():
            if source.margin is not None:
                raise ValueError(f"{name}.margin is for reward models; the loss of DPO has no margin; remove the key")
        return value

    @model_validator(mode="after")
    def smoothing_has_an_effect(self):
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing applies only to loss: sigmoid; remove it")
        return self


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import torch

    from pipeline.train import finetune
    from pipeline.train.finetune_data import ShuffledRows, encode_once
    from pipeline.train.loss_preference import answer_lengths, answer_logprobs, dpo, ipo
    from pipeline.train.preference_data import encoded_pairs, pair_batch, pair_counts, pair_work

    # Load and encode
    parent = finetune.load_parent(config, inputs["model"], output.stage)
    encode = functools.partial(encoded_pairs, config, parent.chat, output, margins=False)
    arrays, extra = encode_once(output, config, encode)
    counts = pair_counts(arrays, extra)
    rows = ShuffledRows(config.seed, counts.train)
    config = finetune.in_steps(config, rows.per_epoch)
    pairs = functools.partial(pair_batch, arrays, parent.pad_id)

    # Build
    def objective(logps, reference, lengths):
        if config.loss == "ipo":
            return ipo(logps, reference, lengths, config.beta)
        return dpo(logps, reference, config.beta, config.label_smoothing)

    def loss(logits, batch: dict):
        return objective(answer_logprobs(logits, batch), batch["reference"], answer_lengths(batch))

    def of_each(logits, batch: dict):
        """(loss, margin, 1) of each pair. Shape: [pairs, 3]."""
        logps, reference, lengths = answer_logprobs(logits, batch), batch["reference"], answer_lengths(batch)
        numbers = []
        for pair in range(len(logps) // 2):
            own = slice(pair, None, len(logps) // 2)  # chosen and rejected
            value, metrics = objective(logps[own], reference[own], lengths[own])
            numbers.append(torch.stack([value, metrics["margin"], torch.ones_like(value)]))
        return torch.stack(numbers)

    model = parent.load()
    finetune.adapt(config, parent, model)
    engine, text = finetune.build_engine(model, loss, config, pair_work(config, arrays, reference=True))
    finetune.say_counts(output, counts)

    # Reference: log-probabilities before the first step, of the pairs that the run takes
    taken = min(config.steps * config.batch_size, counts.train)
    used = {"train": sorted({rows.at(index) for index in range(taken)}), "heldout": list(range(counts.heldout))}
    folder = output.path / "work" / f"reference-{inputs['model'].digest[:12]}"
    tables = {}
    for split, indices in used.items():
        table = torch.full((len(arrays[f"{split}.start"]), 2), float("nan"))
        table[indices] = reference(engine, pairs, split, indices, folder, output, config)
        tables[split] = table

    def collate(split: str, indices: list[int]) -> dict:
        batch = pairs(split, indices)
        chosen, rejected = tables[split][indices].unbind(1)
        batch["reference"] = torch.cat([chosen, rejected])
        return batch

    # Fit and publish
    result = finetune.fit(
        engine, config, output, text, rows, range(counts.heldout), collate, unit="pairs", read=of_each
    )
    finetune.publish_model(engine, config, parent, output)

    interval = wilson(result["after"]["accuracy"], counts.heldout)
    changes = changes_of(result)
    measures, nothing = headline(result["before"], result["after"], changes["margin"], interval, counts.heldout)
    metrics = finetune.summarise(config, output, result, rows, counts, unit="pairs", measures=measures, nothing=nothing)
    metrics["heldout_accuracy_interval"] = list(interval)
    for name, change in changes.items():
        metrics[f"heldout_{name}_change_interval"] = change and list(change)
    return metrics


def changes_of(result: dict) -> dict[str, tuple[float, float] | None]:
    """95% intervals of the changes of the held-out loss and margin."""
    before, after = result.get("before_rows"), result.get("after_rows")
    changes = {}
    for column, name in enumerate(("loss", "margin")):
        columns = [rows and [(row[column], row[2]) for row in rows] for rows in (before, after)]
        changes[name] = change_of(*columns)
    return changes


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


def reference(engine, pairs, split: str, indices: list[int], folder, output: Output, config: Config):
    """Log-probabilities [len(indices), 2] (chosen, rejected) under the weights that the engine has now, before any
    step or checkpoint: the frozen reference. Collective.

    Unit by unit into `folder`, each by one process, so that an interrupted run resumes and no unit is computed twice.
    """
    import io

    import numpy as np
    import torch

    from pipeline.core import faults
    from pipeline.core.files import write_atomic
    from pipeline.core.tracking import Progress
    from pipeline.train import distributed
    from pipeline.train.finetune_data import chunks, micro_batch_rows
    from pipeline.train.loss_preference import answer_logprobs

    units = chunks(indices, UNIT)
    paths = [folder / f"{split}-{number:06d}.npy" for number in range(len(units))]
    # forward passes are collective: all processes must agree on what is missing
    missing = distributed.from_main([number for number, path in enumerate(paths) if not path.exists()])
    with Progress(f"{output.stage}: reference, {split}", len(missing) * UNIT, "pairs", is_main=output.is_main) as bar:
        for units_of_all in chunks(missing, engine.data_world):
            # in the last round there may be fewer units than processes: the others compute one and write none
            mine = units_of_all[engine.data_rank :][:1]
            rows = units[mine[0] if mine else units_of_all[0]]
            batches = [pairs(split, part) for part in chunks(rows, micro_batch_rows(config, engine))]
            logps = engine.forward(batches, answer_logprobs)
            if mine:
                table = torch.cat([torch.stack(both.chunk(2), 1) for both in logps])
                buffer = io.BytesIO()
                np.save(buffer, table.numpy())
                write_atomic(paths[mine[0]], buffer.getvalue())
                faults.point("work")
                output.note_time()
            bar.update(UNIT * engine.data_world)
    distributed.barrier()
    return torch.from_numpy(np.concatenate([np.load(path) for path in paths]))


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("dpo")
