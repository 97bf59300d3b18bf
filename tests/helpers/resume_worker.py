"""Runs in each of three or four processes of one launch: every layout trains, saves in the middle, and trains again from
there in a new engine. Results go to the file named on the command line.

Two numbers have one sum; from three on the order in which processes are added counts, and a collective may choose it by
where a number is in a buffer. So what is exact for two processes may not be for more.
"""

import sys
from pathlib import Path

import torch

LAYOUTS = {
    "ddp": {},
    "ddp muon": {},
    "ddp frozen": {},
    "ddp chunks": {},
    "zero 0": {"zero": 0},
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "fsdp": {"shard": "full"},
    "fsdp tied": {"shard": "full"},
    "fsdp hybrid": {"shard": "hybrid", "shard_ranks": 2},
    "pipeline": {"pipeline": 2},
}
EVEN = ("fsdp hybrid", "pipeline")  # need an even number of processes
STEPS, SAVED_AFTER = 5, 2


def layouts(processes: int) -> list[str]:
    return [name for name in LAYOUTS if processes % 2 == 0 or name not in EVEN]


def train(name: str, folder: Path) -> dict:
    """Weights and steps of a run, and of one that resumes from what it saved."""
    from parallel_worker import kind_of, micro_batches, model
    from tiny_engine import config, loss_fn

    from pipeline.core import distributed
    from pipeline.train import chunked_loss, engine

    optimizer = {"kind": "muon" if "muon" in name else "adamw", "lr": 3e-3, "max_grad_norm": 0.5}
    rows = 2 * distributed.world() if "pipeline" not in name else 8  # two micro-batches per data rank, or more
    settings = config(parallel=LAYOUTS[name], micro_batch=1, batch_size=rows, optimizer=optimizer)

    def fresh():
        made = model(kind_of(name))
        if "chunks" in name:
            chunked_loss.install(made, chunk=20)
        return engine.build(made, loss_fn, settings)

    def steps(trainer, end: int) -> list[dict]:
        return [trainer.step(micro_batches(settings, trainer, step)) for step in range(trainer.step_count, end)]

    trainer = fresh()
    steps(trainer, SAVED_AFTER)
    if distributed.is_main():
        folder.mkdir(parents=True)
    distributed.barrier()
    trainer.save(folder)
    distributed.barrier()
    found = {"steps": steps(trainer, STEPS), "weights": trainer.consolidated()}
    resumed = fresh()
    resumed.load(folder)
    return found | {"resumed steps": steps(resumed, STEPS), "resumed weights": resumed.consolidated()}


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    path = Path(sys.argv[1])
    results = {name: train(name, path.parent / "checkpoints" / name) for name in layouts(distributed.world())}
    if distributed.is_main():
        torch.save(results, path)
    distributed.barrier()
    distributed.shutdown()
