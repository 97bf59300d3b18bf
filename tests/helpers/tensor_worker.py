"""Runs in each process of one launch: every family whose layers can be split over a tensor group. Results go to the file
named on the command line; in one process `train` is the reference."""

import sys
from pathlib import Path

import families
import worker
from family_batches import LENGTH, ROWS, batch_of

from pipeline.models import build
from pipeline.models.families import supporting

VOCABULARY = 61  # not divisible by two
VARIANTS = {name: {"family": name} for name in supporting("tensor")}
VARIANTS |= {
    "biases": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "tied": {"family": "llama", "tie_word_embeddings": True},
    "mu-P": {"family": "llama", "mup": {"base_width": 8}},
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": None}


def fresh(name: str, **options):
    """A tiny model, with 4 heads that share 2 keys."""
    changes = VARIANTS[name]
    block = families.of_family(changes["family"]) | HEADS | changes
    block = {key: value for key, value in block.items() if value is not None}
    return build.new(block, families.Sized(VOCABULARY), LENGTH, 1, **options)


def settings_of(parallel: dict, **changes):
    from tiny_engine import config

    return config(sequence_length=LENGTH, batch_size=ROWS, micro_batch=1, parallel=parallel, **changes)


def engine_of(name: str, settings, chunks: bool = True, meta: bool = False):
    """meta: the model is never complete."""
    from tiny_engine import loss_fn

    from pipeline.models.initial_values import initialise
    from pipeline.train import chunked_loss, engine

    model = fresh(name, materialise=not meta)
    if chunks:
        chunked_loss.install(model, chunk=7, z_loss=1e-2)
    return engine.build(
        model, loss_fn, settings, fill=lambda part, global_name: initialise(part, 1, global_name, model)
    )


def train(name: str, parallel: dict, folder: Path | None = None) -> dict:
    """Three steps of single rows. folder: also save after two, and repeat the third."""
    from pipeline.core import distributed
    from pipeline.train.loop import share

    settings = settings_of(parallel)

    def step(trainer) -> dict:
        number = trainer.step_count
        parts = [range(part.start % ROWS, part.stop % ROWS or ROWS) for part in share(settings, trainer, number)]
        batches = [batch_of(part, number) for part in parts]
        for batch in batches:
            batch["inputs"]["input_ids"] = batch["inputs"]["input_ids"] % VOCABULARY
            batch["labels"] = batch["labels"] % VOCABULARY
        return trainer.step(batches, lr=3e-3)

    trainer = engine_of(name, settings)
    first = engine_of(name, settings, meta=True).consolidated() if parallel else trainer.consolidated()
    steps = [step(trainer), step(trainer)]
    resumed = None
    if folder is not None:
        folder.mkdir(exist_ok=True)
        trainer.save(folder)
        distributed.barrier()
    steps.append(step(trainer))
    if folder is not None:
        resumed = engine_of(name, settings)
        resumed.load(folder)
        resumed = step(resumed)
    return {"first": first, "steps": steps, "resumed": resumed, "weights": trainer.consolidated()}


def sampled(parallel: dict) -> list:
    """A greedy continuation by the model as the processes hold it."""
    trainer = engine_of("qwen3", settings_of(parallel), chunks=True)
    with trainer.sampling() as model:
        if model is None:
            return []
        return worker.continued(model)


def measured(scratch: Path) -> dict:
    layout = {"shard": "full", "tensor": 2}
    results = {name: train(name, layout, scratch / name) for name in sys.argv[2].split(",")}
    return results | {"sampled": sampled(layout)}


if __name__ == "__main__":
    worker.run(measured)
