"""Runs in each process of a launch: Muon under FSDP, in both of its forms, and under DDP. Results go to the file named
on the command line, checkpoints next to it."""

from pathlib import Path

import worker
from parallel_worker import STEPS, go_on, micro_batches, model
from tiny_engine import config, spoiled

from pipeline.core import distributed
from pipeline.train import engine, muon_sharded

LAYOUTS = {"ddp": {}, "full": {"shard": "full"}, "hybrid": {"shard": "hybrid", "shard_ranks": 2}}


def built(parallel: dict, products: str = "fp32", kind: str = "plain"):
    optimizer = {"kind": "muon", "lr": 3e-3, "max_grad_norm": 0.5, "products": products}
    return engine.build(model(kind), spoiled, config(optimizer=optimizer, micro_batch=2, parallel=parallel))


def train(parallel: dict, folder: Path, products: str = "fp32", kind: str = "plain") -> dict:
    """Six steps, saved after the third, and the last three again from there."""
    trainer, steps = built(parallel, products, kind), []
    for step in range(STEPS):
        steps.append(trainer.step(micro_batches(trainer.config, trainer, step)))
        if step == 2:
            if distributed.is_main():
                folder.mkdir()
            distributed.barrier()
            trainer.save(folder)
            distributed.barrier()
    resumed = built(parallel, products, kind)
    said, again = go_on(resumed, folder)
    weights, weights_again = trainer.consolidated(), resumed.consolidated()
    stats = resumed.step(micro_batches(resumed.config, resumed, 7, "nan gradient" if spoils() else None))
    return {
        "steps": steps,
        "said": said,
        "again": again,
        "weights": weights,
        "weights again": weights_again,
        "state bytes": trainer.state_bytes(),
        "nan applied": stats["applied"],
        "after nan": resumed.consolidated(),
    }


def spoils() -> bool:
    return distributed.rank() == distributed.world() - 1


def measured(scratch: Path) -> dict:
    world, results = distributed.world(), {}
    layouts = LAYOUTS if world == 4 else {"full": LAYOUTS["full"]}
    results["bf16"] = train({"shard": "full"}, scratch / f"{world} bf16", "bf16")["steps"]
    for name, parallel in layouts.items():
        results[name, "plain"] = train(parallel, scratch / f"{world} {name} plain")
    muon_sharded.MUON_BUCKET = 1  # one matrix at a time
    for name, parallel in layouts.items():
        results[name, "tied"] = train(parallel, scratch / f"{world} {name} tied", kind="tied")
    results["from one"] = {name: go_on(built(parallel), scratch / "one") for name, parallel in layouts.items()}
    return results


if __name__ == "__main__":
    worker.run(measured)
