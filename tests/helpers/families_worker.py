"""Runs in each process of one torchrun launch: every family, sharded and, where it can be cut, in a pipeline.
Results go to the file named on the command line."""

import sys

import families
import torch
from family_batches import LENGTH, ROWS, batch_of, fresh, loss_fn

PIPELINE = [
    name
    for name in families.PUBLISHED
    if name
    not in (
        "gpt1-117m",
        "opt-125m",
        "bloom-560m",
        "gemma-2b",
        "gemma-2-2b",
        "gemma-3-1b",
        "mamba-130m",
        "mamba2-130m",
        "rwkv-169m",
    )
]
FAMILIES = {families.load(name).model["family"]: name for name in families.PUBLISHED}.values()  # one recipe a family
LAYOUTS = {
    "ddp": {},
    "zero 1": {"zero": 1},
    "zero 3": {"zero": 3},
    "fsdp": {"shard": "full"},
    "pipeline": {"pipeline": 2},
}


def train(name: str, layout: str, forget: bool = False) -> dict:
    """Three steps of 2 micro-batches on each data rank; for one process too, which is the reference. forget: all
    parameters learn at one rate."""
    from tiny_engine import config

    from pipeline.train import engine
    from pipeline.train.loop import share

    settings = config(sequence_length=LENGTH, batch_size=ROWS, micro_batch=1, parallel=LAYOUTS.get(layout, {}))
    model = fresh(name)
    for parameter in model.parameters() if forget else ():
        parameter.lr_scale = 1.0
    trainer = engine.build(model, loss_fn, settings)
    steps = []
    for step in range(3):
        parts = [range(part.start % ROWS, part.start % ROWS + len(part)) for part in share(settings, trainer, step)]
        steps.append(trainer.step([batch_of(part, step) for part in parts], lr=3e-3))
    weights = trainer.consolidated()
    return {"steps": steps, "weights": weights, "measured": trainer.measured(), "advice": trainer.advice()}


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    chosen, layouts = sys.argv[2].split(","), sys.argv[3].split(",")
    results = {
        (name, layout): train(name, layout)
        for layout in layouts
        for name in (chosen if chosen != ["all"] else PIPELINE if layout == "pipeline" else FAMILIES)
    }
    if distributed.is_main():
        torch.save(results, sys.argv[1])
    distributed.barrier()
    distributed.shutdown()
