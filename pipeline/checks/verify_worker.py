"""Runs in each process of a launch of `alma verify parallel`: trains every layout of a job, one after another, from the
same seed checkpoint.

    torchrun --nproc-per-node 2 -m pipeline.checks.verify_worker job.json

A launch costs ten seconds and a layout one or two, so that all layouts of one number of processes share a launch. The
main process appends a line to the job's results as each layout ends.
"""

import gc
import hashlib
import json
import sys
import warnings
from pathlib import Path

NUMBERS = ("loss", "grad_norm", "applied")


def main(path: str) -> None:
    from pipeline import pretrain
    from pipeline.core.errors import UserError
    from pipeline.train import distributed

    warnings.simplefilter("ignore")
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    distributed.setup()
    for trial in job["trials"]:
        changes = {key: trial[key] for key in ("parallel", "micro_batch", "precision")} | trial["changes"]
        config = pretrain.Config.model_validate(job["config"] | changes)
        if config.compile:
            fresh_compiler()
        try:
            config.check(distributed.world())
            found = train(config, job, Path(job["seeds"][trial["embeddings"]]))
        except UserError as error:  # raised alike on every process, before anything collective
            found = {"refused": str(error)}
        if distributed.is_main():
            with open(job["results"], "a", encoding="utf-8") as handle:
                handle.write(json.dumps({**trial, **found}) + "\n")
        gc.collect()
    distributed.barrier()
    distributed.shutdown()


def train(config, job: dict, seed: Path) -> dict:
    """`job["steps"]` steps from the seed checkpoint, one with a NaN in one gradient of the last process, and one
    more."""
    import torch

    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokens.store import TokenStore
    from pipeline.models import build, mup
    from pipeline.train import distributed, engine, layers
    from pipeline.train.batches import loss_of, sampler_of, to_batch
    from pipeline.train.loop import seed_step, share

    store = TokenStore(job["tokens"])
    sampler = sampler_of(config, store, load_tokenizer(job["tokenizer"]))
    model = build.load(seed)
    mup.scale_learning_rates(model)
    expected = {key: value.clone() for key, value in model.state_dict().items()} if distributed.is_main() else {}
    layers.prepare(model, config)
    trainer = engine.build(model, loss_of(store.sources, config.z_loss), config)
    begun = trainer.consolidated()
    from_seed = all(torch.equal(value, expected[key]) for key, value in (begun or {}).items())

    def step() -> dict:
        number = trainer.step_count
        seed_step(config, number, trainer.data_rank)
        stats = trainer.step(
            [
                to_batch([sampler.row(index) for index in rows], store, config.document_mask)
                for rows in share(config, trainer, number)
            ],
            lr=config.optimizer.lr,
        )
        return {key: stats[key] for key in NUMBERS}

    steps = [step() for _ in range(job["steps"])]
    before = digest(trainer)
    poison = None
    # a layout that looks at one process's norm alone, or at the sum before it is whole, lets this pass
    if distributed.rank() == distributed.world() - 1:
        poison = last_vector(trainer).register_hook(lambda gradient: gradient * float("nan"))
    harmed = step()
    if poison:
        poison.remove()
    unharmed = before == digest(trainer)
    after = step()
    kept_out = not harmed["applied"] and unharmed and after["applied"]
    return {
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if config.compile else 0,
        "steps": [*steps, {**harmed, "grad_norm": None}, after],
        "from_seed": from_seed,
        "nan_kept_out": kept_out,
        "weights": before,
    }


def fresh_compiler() -> None:
    """Forget what earlier trials compiled. Of one function torch keeps eight variants and runs the ninth without
    compiling it, and says nothing: here each trial has its own."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def last_vector(trainer):
    """The last parameter of this process that no other stage shares: of the final norm in most families."""
    module = trainer.part if trainer.layout == "pipelined" else trainer.model
    found = [parameter for parameter in module.parameters() if parameter.requires_grad]
    vectors = [parameter for parameter in found if len(getattr(parameter, "ds_shape", parameter.shape)) == 1]
    return (vectors or found)[-1]


def digest(trainer) -> str | None:
    """sha256 of all weights, on the main process. Collective."""
    state = trainer.consolidated()
    if state is None:
        return None
    whole = hashlib.sha256()
    for key in sorted(state):
        whole.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return whole.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])
