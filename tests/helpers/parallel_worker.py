"""Runs in each process of one launch: every layout that two processes can have, one after another. Results go to the
file named on the command line.

A launch costs seconds and a layout a tenth of one, so test_parallel.py starts this once and asserts on what it wrote.
Second word: none runs FAST, `all` LAYOUTS; `compiled` runs COMPILED, for test_layers.py.
"""

import sys
from pathlib import Path

import torch
from counted import Counted

LAYOUTS = {
    "ddp": {},
    "zero 0": {"zero": 0},
    "zero 1": {"zero": 1},
    "zero 2": {"zero": 2},
    "zero 3": {"zero": 3},
    "zero 1 offload": {"zero": 1, "offload": True},
    "zero 3 offload": {"zero": 3, "offload": True},
    "ddp chunks": {},
    "zero 1 chunks selective": {"zero": 1},
    "zero 3 chunks full": {"zero": 3},
    "fsdp": {"shard": "full"},
    "fsdp tied": {"shard": "full"},
    "fsdp hybrid": {"shard": "hybrid", "shard_ranks": 1},
    "fsdp chunks selective": {"shard": "full"},
    "fsdp tied chunks full": {"shard": "full"},
    "fsdp tensor": {"shard": "full", "tensor": 2},
    "fsdp tensor tied": {"shard": "full", "tensor": 2},
    "fsdp tensor chunks selective": {"shard": "full", "tensor": 2},
    "fsdp tensor tied chunks full": {"shard": "full", "tensor": 2},
    "ddp frozen": {},
    "zero 0 frozen": {"zero": 0},
    "zero 1 frozen": {"zero": 1},
    "zero 2 frozen": {"zero": 2},
    "zero 3 frozen": {"zero": 3},
    "fsdp frozen": {"shard": "full"},
    "fsdp tensor frozen": {"shard": "full", "tensor": 2},
    "pipeline": {"pipeline": 2},
    "pipeline tied": {"pipeline": 2},
    "pipeline tied chunks full": {"pipeline": 2},
    "pipeline chunks selective": {"pipeline": 2},
    "pipeline frozen": {"pipeline": 2},
}  # chunks: the output layer computes its losses; full, selective: activation checkpointing;
# frozen: every second parameter has no gradient
COMPILED = {
    "ddp compiled": {},
    "ddp compiled chunks selective": {},
    "ddp compiled chunks full": {},
    "zero 0 compiled": {"zero": 0},
    "zero 1 compiled chunks selective": {"zero": 1},
    "zero 1 offload compiled full": {"zero": 1, "offload": True},
    "zero 2 compiled chunks": {"zero": 2},
    "zero 2 compiled full": {"zero": 2},
    "fsdp compiled chunks": {"shard": "full"},
    "fsdp compiled full": {"shard": "full"},
    "fsdp compiled selective": {"shard": "full"},
    "pipeline compiled chunks": {"pipeline": 2},
    "pipeline compiled selective": {"pipeline": 2},
    "pipeline tied compiled chunks full": {"pipeline": 2},
}
FAST = [
    "ddp",
    "zero 1",
    "zero 3",
    "fsdp",
    "fsdp tensor",
    "ddp chunks",
    "fsdp tensor tied chunks full",
    "fsdp frozen",
    "pipeline",
    "pipeline chunks selective",
    "pipeline frozen",
]  # each engine; frozen, chunked and checkpointed ones; the slow tests run all of LAYOUTS
GENERATING = ("zero 3", "fsdp", "fsdp hybrid", "fsdp tensor")
PLAIN = [name for name in LAYOUTS if "chunks" not in name and "frozen" not in name]
STEPS = 6
NEIGHBOURS = 3  # layouts from whose checkpoints each of FAST resumes


def sources(target: str, layouts: list[str]) -> list[str]:
    """Those of `layouts` from whose checkpoints `target` resumes: one process, and the next ones of FAST or all."""
    alike = [name for name in PLAIN if name in layouts and ("tied" in name) == ("tied" in target)]
    at = alike.index(target)
    others = alike[at + 1 :] + alike[:at]
    return [f"one{' tied' * ('tied' in target)}", *(others[:NEIGHBOURS] if layouts == FAST else others)]


def kind_of(layout: str) -> str:
    """Which model a layout trains."""
    for kind in ("tied", "frozen"):
        if kind in layout:
            return kind
    return "plain"


def model(kind: str = "plain"):
    from tiny_engine import tiny

    made = tiny(tie_word_embeddings=kind == "tied", pad_token_id=0)
    if kind == "frozen":
        for parameter in list(made.parameters())[::2]:
            parameter.requires_grad_(False)
    return made


def micro_batches(settings, engine, step: int, spoil: str | None = None) -> list[dict]:
    from tiny_engine import batch_of

    from pipeline.train.loop import share

    found = [batch_of(step, part) for part in share(settings, engine, step)]
    found[-1]["spoil"] = spoil
    return found


def with_positions(batches: list[dict]) -> list[dict]:
    """The same, said: as with document_mask, whose steps have positions and whose evaluations have none, so that a
    pipeline sends now two tensors and now one."""
    places = [
        torch.arange(batch["inputs"]["input_ids"].shape[1]).expand_as(batch["inputs"]["input_ids"]) for batch in batches
    ]
    return [
        {**batch, "inputs": {**batch["inputs"], "position_ids": at.contiguous()}}
        for batch, at in zip(batches, places, strict=True)
    ]


def train(name: str, micro: int | None, folder: Path | None = None) -> dict:
    """Six steps with an evaluation before and after; for one process too, which is the reference. `folder`: also
    save in the middle, resume and compare."""
    from tiny_engine import config, spoiled

    from pipeline.checks.verify_worker import fresh_compiler
    from pipeline.core import distributed
    from pipeline.train import chunked_loss, engine, layers

    kept = name.split()[-1] if name.endswith(("full", "selective")) else "none"
    settings = config(parallel=(LAYOUTS | COMPILED).get(name, {}), micro_batch=micro, activation_checkpointing=kept)
    compiled = "compiled" in name

    def fresh():
        made = model(kind_of(name))
        if "chunks" in name:
            chunked_loss.install(made, chunk=20, compiled=compiled)
        if compiled:
            fresh_compiler()
            layers.compile(made)
        return engine.build(made, spoiled, settings)

    trainer = fresh()
    found = {"before": trainer.evaluate(with_positions(micro_batches(settings, trainer, 90)))["loss"], "steps": []}
    for step in range(STEPS):
        found["steps"].append(trainer.step(micro_batches(settings, trainer, step)))
        if folder and step == 2:
            if distributed.is_main():
                folder.mkdir()
            distributed.barrier()
            trainer.save(folder)
            distributed.barrier()
    found["after"] = trainer.evaluate(micro_batches(settings, trainer, 91))["loss"]
    if "chunks" not in name:  # there the outputs are losses, not logits
        first_logits = trainer.forward(micro_batches(settings, trainer, 92), lambda logits, _: logits[:, -1, :4])
        found["forward"] = torch.cat(first_logits)
    found["weights"] = trainer.consolidated()
    found["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"] if compiled else 0
    if folder:
        resumed = fresh()
        found["said"] = resumed.load(folder)
        found["resumed steps"] = [
            resumed.step(micro_batches(settings, resumed, step)) for step in range(resumed.step_count, STEPS - 1)
        ]
        batches = micro_batches(settings, resumed, STEPS - 1)
        if compiled:  # under a dispatch mode other code would run, which rounds otherwise
            found["resumed steps"].append(resumed.step(batches))
        else:
            with Counted() as counted:
                found["resumed steps"].append(resumed.step(batches))
            found["counted"] = distributed.all_gather_object((dict(counted.bytes), dict(counted.calls), counted.reads))
        found["resumed weights"] = resumed.consolidated()
        # Harm on one process alone: each must leave the weights alone, everywhere
        for spoil in ("nan loss", "infinite loss, finite gradient", "nan gradient"):
            stats = resumed.step(
                micro_batches(
                    settings,
                    resumed,
                    7,
                    spoil if distributed.rank() == distributed.world() - 1 or trainer.layout == "pipelined" else None,
                )
            )
            found[spoil] = stats["applied"]
        # An update that one process alone refuses is made by none
        asked = []
        stats = resumed.step(
            micro_batches(settings, resumed, 7),
            accept=lambda loss, norm: asked.append((loss, norm)) or distributed.rank() < distributed.world() - 1,
        )
        found["refused"] = (stats["applied"], stats["refused"], stats["loss"], stats["grad_norm"], asked)
        found["harmed weights"] = resumed.consolidated()
        found["step after harm"] = resumed.step(micro_batches(settings, resumed, 8))
        if name in PLAIN:
            ENGINES[name] = resumed
    return found


ENGINES: dict = {}  # one of each layout: DeepSpeed cannot build a plain engine in a process that has had a pipeline


def muon(folder: Path | None = None, parallel: dict | None = None, products: str = "auto"):
    """An engine with Muon and three steps of it, saved."""
    from tiny_engine import config, spoiled

    from pipeline.core import distributed
    from pipeline.train import engine

    optimizer = {"kind": "muon", "lr": 3e-3, "max_grad_norm": 0.5, "products": products}
    settings = config(optimizer=optimizer, micro_batch=2, parallel=parallel or {})
    trainer = engine.build(model(), spoiled, settings)
    for step in range(3):
        trainer.step(micro_batches(settings, trainer, step))
    if folder:
        if distributed.is_main():
            folder.mkdir()
        distributed.barrier()
        trainer.save(folder)
    return trainer


def go_on(trainer, folder: Path) -> tuple[str, list[dict]]:
    """What loading another layout's checkpoint says, and the three steps after it."""
    said = trainer.load(folder)
    return said, [
        trainer.step(micro_batches(trainer.config, trainer, step)) for step in range(trainer.step_count, STEPS)
    ]


def generate(parallel: dict) -> list:
    """Greedy continuation under a layout whose parameters are in shards: gathered, and a step afterwards."""
    from tiny_engine import config, loss_fn

    from pipeline.train import engine

    settings = config(parallel=parallel)
    trainer = engine.build(model(), loss_fn, settings)
    trainer.step(micro_batches(settings, trainer, 0))
    with trainer.gathered():
        ids = trainer.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False, eos_token_id=None)[
            0
        ].tolist()
    return [ids, trainer.step(micro_batches(settings, trainer, 1))["loss"]]


if __name__ == "__main__":
    import warnings

    from pipeline.core import distributed

    warnings.simplefilter("ignore")
    distributed.setup()
    scratch = Path(sys.argv[1]).parent / "checkpoints"  # where one process has left its own
    if sys.argv[2:] == ["compiled"]:
        results = {layout: train(layout, 2, scratch / layout) for layout in COMPILED}
    else:
        MUON = muon(scratch / "ddp muon")
        results = {"elastic": {("one muon", "ddp muon"): go_on(MUON, scratch / "one muon")}}
        # first: DeepSpeed cannot build a plain engine in a process that has had a pipeline
        results["generated"] = {name: generate(LAYOUTS[name]) for name in GENERATING}
        layouts = list(LAYOUTS) if sys.argv[2:] == ["all"] else FAST
        for layout in layouts:
            results[layout] = train(layout, 2, scratch / layout)
            # before there is a pipeline, after which DeepSpeed sums its gradients over other processes
            if layout == "zero 0":
                trainer = ENGINES.pop(layout)
                results["elastic"] |= {(source, layout): go_on(trainer, scratch / source) for source in ("one", "ddp")}
        for target, trainer in ENGINES.items():
            for source in sources(target, layouts):
                results["elastic"][source, target] = go_on(trainer, scratch / source)
    if distributed.is_main():
        torch.save(results, sys.argv[1])
    distributed.barrier()
    distributed.shutdown()
