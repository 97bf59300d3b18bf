"""Gradients of one SFT step, by the engine in any variant, and by transformers alone. As a script, in each process of a
launch: all variants of a folder's model, saved by the main process."""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.core import distributed
from pipeline.models import build, lora
from pipeline.models.lora_config import Lora
from pipeline.sft import Config, loss
from pipeline.train import engine, layers
from pipeline.train.conversation_data import conversation_batch
from pipeline.train.finetune_data import Ragged
from pipeline.train.loop import share

LENGTHS = (9, 31, 14, 5, 22, 40, 7, 17, 12, 26, 6, 19)
ROWS = {"alone": [[number] for number in range(8)], "packed": [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9], [10], [11]]}
VARIANTS = list(itertools.product(("alone", "packed"), ("auto", 3, None), (None, 1), (False, True)))
"""rows, loss_chunk, micro_batch, lora."""
NAMES = ["-".join(map(str, variant)) for variant in VARIANTS]


def conversations() -> list[tuple[list[int], list[bool]]]:
    """(ids, which carry loss) of uneven lengths, with one or two answers."""
    source = np.random.default_rng(0)
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = source.integers(5, 300, length).tolist()
        trained = [place >= length // 2 for place in range(length)]
        if number % 3 == 1:
            trained[1:4] = [True] * 3
        rows.append((ids, trained))
    return rows


def adapted(folder: Path, adapters: bool):
    """The model, with adapters that have left their initial values."""
    model = build.load(folder)
    if adapters:
        lora.attach(model, Lora(rank=4), seed=1)
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=source))
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def engine_gradients(folder: Path, rows: str, chunk, micro_batch: int | None, adapters: bool) -> tuple[float, dict]:
    """(loss, gradients) of the engine's step over all rows, before any update."""
    config = Config(
        kind="sft",
        sources={"s": {"path": "x"}},
        batch_size=8,
        micro_batch=micro_batch,
        sequence_length=64,
        steps=1,
        precision="fp32",
        loss_chunk=chunk,
        packing=rows == "packed",
        optimizer={"max_grad_norm": 1e9},
    )
    distributed.setup(config)
    model = adapted(folder, adapters)
    layers.prepare(model, config, selects=True)
    trainer = engine.build(model, loss, config)
    ids, trained = zip(*conversations(), strict=True)
    arrays = {"train.ids": Ragged.of(ids, np.int32), "train.trained": Ragged.of(trained, np.bool_)}
    parts = [[ROWS[rows][index] for index in part] for part in share(config, trainer, 0)]
    found = {}

    def accept(value: float, norm: float) -> bool:
        found.update(gradients(model))
        return False

    stats = trainer.step([conversation_batch(arrays, 2, "train", part) for part in parts], accept=accept)
    assert not stats["applied"] and found
    return stats["loss"], found


def transformers_gradients(folder: Path, rows: str, side: str, adapters: bool) -> tuple[float, dict]:
    """The same of one padded batch, with an attention mask, by transformers and torch alone."""
    numbers = [number for row in ROWS[rows] for number in row]
    own = [conversations()[number] for number in numbers]
    length = max(len(ids) for ids, _ in own)
    ids, mask, labels = (torch.zeros(len(own), length, dtype=torch.long) for _ in range(3))
    labels -= 100
    for number, (row, trained) in enumerate(own):
        first = length - len(row) if side == "left" else 0
        part = slice(first, first + len(row))
        ids[number, part] = torch.tensor(row)
        mask[number, part] = 1
        labels[number, part] = torch.where(torch.tensor(trained), torch.tensor(row), -100)
    labels[:, 0] = -100
    labels[
        torch.arange(len(own)), length - mask.sum(1) if side == "left" else 0
    ] = -100  # nothing predicts a first token
    model = adapted(folder, adapters)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    value = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    value.backward()
    return value.item(), gradients(model)


if __name__ == "__main__":
    folder, target = map(Path, sys.argv[1:])
    for variant, name in zip(VARIANTS, NAMES, strict=True):
        result = engine_gradients(folder, *variant)
        if distributed.is_main():
            torch.save(result, target / f"{name}.pt")
        distributed.barrier()
    distributed.shutdown()
