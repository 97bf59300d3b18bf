"""Runs in each process of one launch: rows of pretraining whose tokens several processes share. Results go to the file
named on the command line; in one process `train` is the reference."""

import sys
from pathlib import Path

import torch
import worker
from tensor_worker import fresh
from tiny_engine import ROWS, VOCABULARY

LENGTH = 16
VARIANTS = {
    "qwen3 documents full": {"document_mask": True, "activation_checkpointing": "full"},
    "llama": {},
    "llama logits": {"loss_chunk": None},
    "qwen2 documents": {"document_mask": True},
    "llama documents selective": {"document_mask": True, "activation_checkpointing": "selective"},
    "tied": {},
    "biases documents": {"document_mask": True},
}


def batch_of(step: int, part: range, documents: bool) -> dict:
    """As pretraining makes it: rows of two sources, of which the first tokens carry no loss."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    labels, places = tokens[:, 1:].clone(), slice(part.start % ROWS, part.start % ROWS + len(part))
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    for row in range(ROWS):
        labels[row, : (row + step) % LENGTH] = -100
        positions[row, 3 + row :] -= 3 + row
    inputs = {"input_ids": tokens[places, :-1]}
    if documents:
        inputs["position_ids"] = positions[places]
    labels = labels[places]
    sums = {"source": torch.arange(ROWS)[places] % 2, "bytes": labels.clamp(min=0).sum(1)}
    return {"inputs": inputs, "labels": labels, "weight": float((labels >= 0).sum())} | sums


def settings_of(name: str, parallel: dict):
    from pipeline.train.pretrain_config import Config

    keys = {"kind": "pretrain", "steps": 6, "batch_size": ROWS, "micro_batch": 2, "sequence_length": LENGTH}
    keys |= {"precision": "fp32", "seed": 0, "z_loss": 1e-2, "parallel": parallel, **VARIANTS[name]}
    return Config.model_validate(keys | {"optimizer": {"lr": 3e-3, "max_grad_norm": 0.5}})


def engine_of(name: str, settings):
    from pipeline.train import engine, layers
    from pipeline.train.batches import loss_of

    model = fresh(name.split()[0])
    layers.prepare_rows(model, settings, z_loss=settings.z_loss)
    return engine.build(model, loss_of(["one", "two"], settings.z_loss), settings)


def train(name: str, parallel: dict, folder: Path | None = None) -> dict:
    """Three steps and an evaluation. folder: also save after two, and repeat the third."""
    from pipeline.core import distributed
    from pipeline.train.loop import share

    settings = settings_of(name, parallel)

    def batches(trainer, number: int) -> list[dict]:
        return [batch_of(number, part, settings.document_mask) for part in share(settings, trainer, number)]

    trainer, resumed = engine_of(name, settings), None
    steps = [trainer.step(batches(trainer, number)) for number in range(2)]
    if folder is not None:
        folder.mkdir(exist_ok=True)
        trainer.save(folder)
        distributed.barrier()
    steps.append(trainer.step(batches(trainer, 2)))
    if folder is not None:
        again = engine_of(name, settings)
        again.load(folder)
        resumed = again.step(batches(again, 2))
    means = trainer.evaluate(batches(trainer, 9))
    return {"steps": steps, "resumed": resumed, "means": means, "weights": trainer.consolidated()}


def sampled(parallel: dict) -> list:
    """A greedy continuation by the model as the processes hold it."""
    from pipeline.models import row_attention

    trainer = engine_of("llama", settings_of("llama", parallel))
    with trainer.sampling() as model, row_attention.padded(trainer.model):
        return worker.continued(model)


def measured(scratch: Path) -> dict:
    layout = {"shard": "full", "context": 2}
    results = {name: train(name, layout, scratch / name) for name in sys.argv[2].split(",")}
    return results | {"sampled": sampled(layout)}


if __name__ == "__main__":
    worker.run(measured)
