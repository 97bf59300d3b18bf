"""Direct preference optimisation: a chat model learns from pairs of answers, with neither a reward model nor sampling.

    python pipeline/dpo.py recipes/quickstart.yaml
    accelerate launch --multi_gpu --num_processes 8 pipeline/dpo.py recipes/llama-7b.yaml

The reference is the model at the start; its log-probabilities are computed once, kept in work/, and need no second
model in memory. Out: model/ (Hugging Face layout), report.json (what became of each record).
"""

import functools
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.intervals import warn, wilson
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.data.chat.chat_sources import PreferenceSource
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.train.config import Optimizer, TuningConfig

VERSION = 4
INPUTS = {"model": ("sft", "pretrain")}
UNIT = 64  # pairs whose reference log-probabilities are kept at a time


class DpoOptimizer(Optimizer):
    """AdamW for DPO."""

    lr: float = Field(1e-6, gt=0)
    """Peak learning rate; 5e-7 to 1e-6 is usual for 7B parameters, small models take 1e-5 to 1e-4."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices."""


class Config(TuningConfig):
    """Direct preference optimisation."""

    sources: dict[str, PreferenceSource]
    """Pairs by name."""
    decontaminate: Decontaminate | None = None
    """Evaluation sets whose text must not be trained on."""
    holdout: float = Field(0.1, gt=0, lt=1)
    """Share of records, chosen by their own hash and so the same in every stage, that is only measured on."""
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
        if name := next((name for name, source in value.items() if source.margin is not None), None):
            raise ValueError(f"{name}.margin is for reward models; the loss of DPO has no margin, so leave it out")
        return value

    @model_validator(mode="after")
    def smoothing_has_an_effect(self):
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing applies only to loss: sigmoid; remove it")
        return self


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    import torch

    from pipeline.core.chain import say
    from pipeline.models.build import load
    from pipeline.models.publish import publish
    from pipeline.reward import rows_of
    from pipeline.train.engine import build
    from pipeline.train.finetune_data import (
        announce,
        chat_of,
        heldout_share,
        model_folder,
        pair_batch,
        pair_work,
        row_at,
        shared,
        tokenizer_of,
    )
    from pipeline.train.loop import fit, share
    from pipeline.train.loss_preference import answer_lengths, answer_logprobs, dpo, ipo

    folder = model_folder(inputs["model"])
    tokenizer = tokenizer_of(folder, config.sequence_length)
    chat = chat_of(tokenizer, config, output.stage)
    arrays, extra = shared(output, config, functools.partial(rows_of, config, chat, output, margins=False))
    count, heldout = len(arrays["train.start"]), len(arrays["heldout.start"])

    def loss(logits, batch: dict):
        logps = answer_logprobs(logits, batch)
        if config.loss == "ipo":
            return ipo(logps, batch["reference"], answer_lengths(batch), config.beta)
        return dpo(logps, batch["reference"], config.beta, config.label_smoothing)

    model = load(folder)
    text = announce(config, model, pair_work(config, arrays, reference=True))
    engine = build(model, loss, config)
    say(
        f"{output.stage}: {many(count, 'pair')} to train on, {heldout} held out;"
        f" {many(extra['rejected'], 'record')} left out"
        " (report.json says why)"
    )
    made_from = inputs["model"].digest[:12]
    used = {
        "train": sorted(
            {row_at(config.seed, index, count) for index in range(min(config.steps * config.batch_size, count))}
        ),
        "heldout": list(range(heldout)),
    }
    frozen = {
        split: reference(engine, arrays, split, rows, tokenizer.pad_token_id, output, made_from, config)
        for split, rows in used.items()
    }

    def pairs(split: str, rows) -> dict:
        known = frozen[split][list(rows)]
        return pair_batch(arrays, split, rows, tokenizer.pad_token_id) | {
            "reference": torch.cat([known[:, 0], known[:, 1]])
        }

    measured = [pairs("heldout", rows) for rows in heldout_share(heldout, config, engine)]

    def batches(step: int) -> list[dict]:
        return [
            pairs("train", [row_at(config.seed, index, count) for index in indices])
            for indices in share(config, engine, step)
        ]

    result = fit(engine, config, output, batches, evaluate=lambda: engine.evaluate(measured), unit="pairs", text=text)
    weights = engine.consolidated()
    if output.is_main:
        publish(weights, engine.model.config, folder, output.path / "model")
    before, after = result["before"], result["after"]
    low, high = wilson(after["accuracy"], heldout)
    margins = f"held-out margin {before['margin']:.2f} -> {after['margin']:.2f}"
    ranked = f"pairs ranked right {after['accuracy']:.0%} (95%: {low:.0%} to {high:.0%}, n={heldout})"
    nothing = [margins] if after["margin"] <= before["margin"] else []
    nothing += [f"{ranked}, which guessing could give"] if low <= 0.5 else []
    return {
        **{
            f"heldout_{key}_{when}": value
            for when, found in (("before", before), ("after", after))
            for key, value in found.items()
            if key != "weight"
        },
        "heldout_accuracy_interval": [low, high],
        "warnings": warn(output.stage, nothing),
        "train_loss": result["last"]["loss"],
        "train_pairs": count,
        "heldout_pairs": heldout,
        "rejected": extra["rejected"],
        "epochs": config.steps * config.batch_size / count,
        "pairs_per_second": result["rate"],
        "summary": {
            "input": f"{many(len(config.sources), 'source')}, {many(count + heldout, 'pair')}",
            "output": f"model/, {many(config.steps, 'step')}",
            "measure": f"{margins}, {ranked}",
        },
    }


def reference(
    engine, arrays: dict, split: str, used: list[int], pad_id: int, output: Output, made_from: str, config: Config
):
    """Log-probabilities [pairs, 2] (chosen, rejected) under the weights that the engine has now, before any step or
    checkpoint: the frozen reference.

    Of the pairs `used` alone; the others' are NaN. Unit by unit into work/reference-MODEL/, one process a unit, so that
    an interrupted run goes on and no unit is computed twice.
    """
    import io

    import numpy as np
    import torch

    from pipeline.core import faults
    from pipeline.core.files import write_atomic
    from pipeline.core.tracking import Progress
    from pipeline.train import distributed
    from pipeline.train.finetune_data import pair_batch
    from pipeline.train.loss_preference import answer_logprobs

    folder = output.path / "work" / f"reference-{made_from}"
    units = [used[start : start + UNIT] for start in range(0, len(used), UNIT)]
    paths = [folder / f"{split}-{index:06d}.npy" for index in range(len(units))]
    # forward passes are collective: all must agree
    missing = distributed.from_main([index for index, path in enumerate(paths) if not path.exists()])
    micro = config.micro_batch or config.batch_size // engine.data_world
    with Progress(f"{output.stage}: reference, {split}", len(missing) * UNIT, "pairs", is_main=output.is_main) as bar:
        for first in range(0, len(missing), engine.data_world):
            mine = missing[first : first + engine.data_world][engine.data_rank :][:1]
            rows = units[mine[0] if mine else missing[first]]
            batches = [
                pair_batch(arrays, split, rows[start : start + micro], pad_id) for start in range(0, len(rows), micro)
            ]
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
    table = torch.full((len(arrays[f"{split}.start"]), 2), float("nan"))
    table[used] = torch.from_numpy(np.concatenate([np.load(path) for path in paths]))
    return table


if __name__ == "__main__":
    from pipeline.core.chain import main

    main("dpo")
