"""What benchmarks/pretrain.py compares: alma, Hugging Face's Trainer and a plain loop. Each is a process of its own
that works when it is its turn."""

import json
import os
import sys
import threading
import time
from pathlib import Path

from pretrain_setup import LR, model_block, new_model, sampler_of


class Turns:
    """A contestant's side of taking turns. `begin` waits for its turn; `end` reports the time since then, and the
    values of `more`, which may be functions. The process ends when there is no further turn."""

    def __init__(self, out):
        self.out, self.begun = out, None

    def begin(self) -> None:
        if sys.stdin.readline() != "go\n":
            self.out.flush()
            os._exit(0)
        self.begun = time.perf_counter()

    def end(self, **more) -> None:
        if self.begun is not None:
            seconds = time.perf_counter() - self.begun
            more = {key: value() if callable(value) else value for key, value in more.items()}
            print(json.dumps({"seconds": seconds, **more}), file=self.out, flush=True)
        self.begun = None


def alma(folder: Path, size: dict, turns: Turns) -> None:
    """Through pretraining's own parts: layers, engine, sampler, loss, loop with metrics, checkpoints with sha256,
    signals. A window begins halfway between two saves, so that it contains what a save costs while it is written in
    the background, and none of that cost is in the turns of others."""
    from pipeline import pretrain
    from pipeline.core import distributed
    from pipeline.core.output import Output
    from pipeline.models import cost
    from pipeline.train import engine, layers, phases
    from pipeline.train.batches import loss_of, to_batch
    from pipeline.train.loop import fit, share
    from pipeline.train.metrics import Expected

    window = size["window"]
    options = {
        "kind": "pretrain",
        "seed": 0,
        "model": model_block(size),
        "sequence_length": size["length"],
        "batch_size": size["rows"],
        "steps": window * 1000,
        "precision": "bf16",
        "compile": True,
        "optimizer": {"lr": LR, "max_grad_norm": 1.0},
        "schedule": {"kind": "constant"},
        "save": {"every_steps": window, "keep": 1},
        "log": {"every_steps": 5},
    }
    config = pretrain.Config(**options)
    distributed.setup(config)
    model = new_model(size)
    flops = cost.training_flops(model, cost.count(model), size["length"])
    layers.prepare(model, config)
    store, sampler = sampler_of(folder, size)
    trainer = engine.build(model, loss_of(store.sources), config)
    output = Output(folder / "alma", "pretrain", "pretrain", {}).open(config={}, parents={})
    memory: list = []

    def copy_seconds() -> float:
        """One copy of weights and moments, where a save makes its own and as cold, into memory that exists."""
        values = [fragment.values for fragment in trainer.part().fragments]
        if not memory:
            memory.extend(value.clone() for value in values)
        begun = time.perf_counter()
        for place, value in zip(memory, values, strict=True):
            place.copy_(value)
        return time.perf_counter() - begun

    def lines(step: int) -> list[dict]:
        found = [json.loads(line) for line in (output.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in found if line["step"] > step - window]

    def batches(step: int) -> list[dict]:
        if step == 0:
            turns.begin()
        elif step % window == window // 2:
            phases.enter("turn")  # waiting for the others is not part of a step
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            turns.end(lines=lambda: lines(step), copy=copy_seconds)
            turns.begin()
            phases.enter("data", step + 1)
        return [to_batch([sampler.row(index) for index in rows], store, False) for rows in share(config, trainer, step)]

    fit(trainer, config, output, batches, expected=Expected({"a": store.num_tokens("a")}, flops))


def plain_batches(folder: Path, size: dict):
    import numpy as np
    import torch

    _, sampler = sampler_of(folder, size)

    def batch(step: int):
        tokens = torch.from_numpy(
            np.stack([sampler.row(index).tokens for index in range(step * size["rows"], (step + 1) * size["rows"])])
        )
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def plain(folder: Path, size: dict, turns: Turns, bf16: bool = False) -> None:
    """A loop as one writes it by hand, the model compiled whole. bf16: weights, gradients and moments too."""
    import torch
    import torch.nn.functional as F

    model, batch = new_model(size).train(), plain_batches(folder, size)
    model = model.bfloat16() if bf16 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model, dynamic=False)
    step = 0
    while True:
        turns.begin()
        for _ in range(size["window"]):
            ids, labels = batch(step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not bf16):
                logits = compiled(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 5 == 0:
                loss.item()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / f"plain-{bf16}.pt")
        turns.end()


def trainer(folder: Path, size: dict, turns: Turns, compiled: bool = False) -> None:
    """Hugging Face's Trainer as its documentation has it; it shifts labels itself, so its rows are one token shorter
    in the loss."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, batch = new_model(size), plain_batches(folder, size)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return size["rows"] * size["window"] * 1000

        def __getitem__(self, index):
            ids, _ = batch(index // size["rows"])
            return {"input_ids": ids[index % size["rows"]], "labels": ids[index % size["rows"]]}

        def __getitems__(self, indices):  # a step's rows at once
            ids, _ = batch(indices[0] // size["rows"])
            return [{"input_ids": row, "labels": row} for row in ids]

    class Windows(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_save(self, *_, **__):
            turns.end()
            turns.begin()

    options = {
        "output_dir": str(folder / f"trainer-{compiled}"),
        "per_device_train_batch_size": size["rows"],
        "max_steps": size["window"] * 1000,
        "bf16": True,
        "use_cpu": True,
        "torch_compile": compiled,
        "optim": "adamw_torch_fused",
        "learning_rate": LR,
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "constant",
        "logging_steps": 5,
        "save_steps": size["window"],
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "train_sampling_strategy": "sequential",
    }
    arguments = TrainingArguments(
        **{key: value for key, value in options.items() if key in TrainingArguments.__dataclass_fields__}
    )
    Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Windows()]).train()


CONTESTANTS = {
    "alma": alma,
    "trainer": trainer,
    "trainer, compiled": lambda *a: trainer(*a, compiled=True),
    "plain, compiled": plain,
    "plain, compiled, bf16 throughout": lambda *a: plain(*a, bf16=True),
}
