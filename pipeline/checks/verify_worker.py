"""Runs in each process of a launch of `alma verify parallel`: trains every layout of a job from the same seed
checkpoint.

    torchrun --nproc-per-node 2 -m pipeline.checks.verify_worker job.json

A launch takes ten seconds and a layout one or two, so all layouts with the same number of processes share a launch. The
main process appends a line to the job's results when a layout ends.
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
    from pipeline.core import distributed
    from pipeline.core.errors import UserError

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
            result = train(config, job, Path(job["seeds"][trial["embeddings"]]))
        except UserError as error:  # raised by every process, before the first collective
            result = {"refused": str(error)}
        if distributed.is_main():
            with open(job["results"], "a", encoding="utf-8") as handle:
                handle.write(json.dumps(trial | result) + "\n")
        gc.collect()
    distributed.barrier()
    distributed.shutdown()


def train(config, job: dict, seed: Path) -> dict:
    """`job["steps"]` steps from the seed checkpoint, one step with a NaN in one gradient of the last process, and one
    more step."""
    import torch

    from pipeline.core import distributed
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokens.store import TokenStore
    from pipeline.models import build, mup
    from pipeline.train import engine, layers
    from pipeline.train.batches import loss_of, sampler_of, to_batch
    from pipeline.train.loop import seed_step, share

    store = TokenStore(job["tokens"])
    sampler = sampler_of(config, store, load_tokenizer(job["tokenizer"]))
    model = build.load(seed)
    mup.scale_learning_rates(model)
    seed_weights = {}
    if distributed.is_main():
        seed_weights = {key: value.clone() for key, value in model.state_dict().items()}
    layers.prepare_rows(model, config, z_loss=config.z_loss)
    trainer = engine.build(model, loss_of(store.sources, config.z_loss), config)
    first_weights = trainer.consolidated() or {}
    from_seed = all(torch.equal(value, seed_weights[key]) for key, value in first_weights.items())

    def step() -> dict:
        number = trainer.step_count
        seed_step(config, number, trainer.data_rank)
        micro_batches = []
        for indices in share(config, trainer, number):
            rows = [sampler.row(index) for index in indices]
            micro_batches.append(to_batch(rows, store, config.document_mask))
        stats = trainer.step(micro_batches, lr=config.optimizer.lr)
        return {key: stats[key] for key in NUMBERS}

    steps = [step() for _ in range(job["steps"])]
    digest_before = digest(trainer)
    hook = None
    # not noticed by a layout that looks only at the norm of one process, or at the sum before it is complete
    if distributed.rank() == distributed.world() - 1:
        hook = last_vector(trainer).register_hook(lambda gradient: gradient * float("nan"))
    nan_step = step()
    if hook:
        hook.remove()
    is_unchanged = digest_before == digest(trainer)
    next_step = step()
    steps += [nan_step | {"grad_norm": None}, next_step]
    return {
        "compiled_graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"] if config.compile else 0,
        "steps": steps,
        "from_seed": from_seed,
        "nan_kept_out": not nan_step["applied"] and is_unchanged and next_step["applied"],
        "weights": digest_before,
    }


def fresh_compiler() -> None:
    """Forget what earlier trials compiled. torch keeps eight variants of a function, and runs the ninth without
    compiling it and without saying so; here each trial has its own eight."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def last_vector(trainer):
    """The last parameter of this process that is on no other pipeline stage: in most families that of the final
    norm."""
    module = trainer.stage if trainer.layout == "pipelined" else trainer.model
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # with ZeRO-3 the true shape is ds_shape
    vectors = [parameter for parameter in trainable if len(getattr(parameter, "ds_shape", parameter.shape)) == 1]
    return (vectors or trainable)[-1]


def digest(trainer) -> str | None:
    """sha256 of all weights, on the main process. Collective."""
    state = trainer.consolidated()
    if state is None:
        return None
    sha256 = hashlib.sha256()
    for key in sorted(state):
        sha256.update(key.encode() + state[key].contiguous().numpy().tobytes())
    return sha256.hexdigest()


if __name__ == "__main__":
    main(sys.argv[1])
