"""Runs in both processes of one launch: adapters on a base in 4 bits, in layouts that keep it complete and that split it.
Results go to the file named on the command line.

    four_bits_worker.py RESULTS.pt MODEL
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from parallel_worker import micro_batches
from tiny_engine import VOCABULARY, config, loss_fn

LAYOUTS = {
    "ddp": {},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "zero 3 full": {"zero": 3},
    "fsdp": {"shard": "full"},
    "fsdp full": {"shard": "full"},
    "fsdp dora": {"shard": "full"},
    "zero 3 dora": {"zero": 3},
}  # full: activation checkpointing


def trainer_of(folder: Path, name: str):
    """An engine as sft builds it, of a model that is read in parts where the layout splits it."""
    from pipeline.models import build
    from pipeline.models.lora_config import Lora
    from pipeline.train import engine, finetune
    from pipeline.train.layouts import starts_in_parts

    parallel = {} if name.startswith("one") else LAYOUTS[name]
    checkpointing = "full" if name.endswith("full") else "none"
    settings = config(parallel=parallel, micro_batch=2, activation_checkpointing=checkpointing)
    model, weights = build.skeleton(folder) if starts_in_parts(settings) else (build.load(folder), None)
    lora = Lora(rank=4, base="nf4", dora=name.endswith("dora"))
    keys = SimpleNamespace(kind="sft", seed=7, precision="fp32", lora=lora)
    finetune.adapt(keys, SimpleNamespace(folder=folder, new_tokens={}), model, weights)
    return engine.build(model, loss_fn, settings, fill=weights)


def packed_bytes(trainer, name: str) -> int:
    """Bytes of packed weights that this process keeps between two steps."""
    if "fsdp" in name:
        kept = [piece.values for piece in trainer.pieces.values()]
    elif "zero 3" in name:
        kept = [parameter.ds_tensor for parameter in trainer.model.parameters()]
    else:
        kept = list(trainer.model.parameters())
    return sum(values.nbytes for values in kept if values.dtype == torch.uint8)


@torch.no_grad()
def logits_of(trainer) -> torch.Tensor:
    """Of the model that is put together for sampling."""
    ids = torch.arange(24).view(2, 12) % VOCABULARY
    with trainer.gathered():
        trainer.model.eval()
        return trainer.model(ids).logits


def observed(folder: Path, name: str) -> dict:
    trainer = trainer_of(folder, name)
    kept = packed_bytes(trainer, name)
    steps = [trainer.step(micro_batches(trainer.config, trainer, step)) for step in range(3)]
    weights = trainer.trained_weights()
    return {"steps": steps, "weights": weights, "logits": logits_of(trainer), "packed": kept}


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    results = {name: observed(Path(sys.argv[2]), name) for name in LAYOUTS}
    if distributed.is_main():
        torch.save(results, sys.argv[1])
    distributed.barrier()
    distributed.shutdown()
