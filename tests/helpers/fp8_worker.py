"""FP8 emulated on a CPU. Runs in each process of a launch, under DDP and FSDP; losses go to the file named on the
command line."""

from pathlib import Path

import tiny_engine
import worker

from pipeline.pretrain import Config
from pipeline.train import engine, fp8
from pipeline.train.loop import share

STEPS = 5
LAYOUTS = {"ddp": {}, "full": {"shard": "full"}}


def config(**changes) -> Config:
    keys = tiny_engine.config().model_dump(exclude_defaults=True) | {"precision": "fp8", "sequence_length": 16}
    return Config(**(keys | changes))


def built(precision: str, **changes):
    model = tiny_engine.tiny()
    if precision == "fp8":
        fp8.convert(model, "stage pretrain", emulate=True)
    return engine.build(model, tiny_engine.loss_fn, config(precision=precision, **changes))


def trained(trainer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        batches = [tiny_engine.batch_of(step, part) for part in share(trainer.config, trainer, step)]
        losses.append(trainer.step(batches)["loss"])
    return losses


def measured(scratch: Path) -> dict:
    return {name: trained(built("fp8", parallel=parallel), range(STEPS)) for name, parallel in LAYOUTS.items()}


if __name__ == "__main__":
    worker.run(measured)
