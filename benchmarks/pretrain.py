"""Pretraining with alma compared with Hugging Face's Trainer and a plain loop: same model, data, batch, threads,
clipping, logging and checkpoints, in one run on a CPU.

    python benchmarks/pretrain.py            # about a quarter of an hour on two cores
    python benchmarks/pretrain.py --quick    # fewer and shorter rounds, a smaller model: shows that it works, its
                                             # numbers say little

Each contestant is a process of its own that trains a window of steps, with one checkpoint in it, when it is its turn;
turns alternate, and medians over the rounds are compared, ratios within a round, since a machine's speed drifts. All
compute in bf16 (autocast) with fp32 weights, AdamW fused, gradients clipped to 1.0, metrics every 5 steps. For
comparison the plain loop is also run in bf16 throughout. The last line is JSON:

    trainer_ratio       tokens/s of alma / the faster of Trainer and Trainer with torch_compile (goal 1.15)
    plain_ratio         tokens/s of alma / a plain compiled loop that guards, evaluates and hashes nothing
    gemm_share          alma's FLOPs per second (6 per multiplying parameter and token, and attention in full) / those
                        of a bf16 product of 4096x1024x4096 on this machine (goal 0.50)
    data_wait_share, metrics_share    share of alma's steps spent on making batches, and on metrics, logging and
                                      checking for signals (goal 0.01 each)
    save_stall_ratio    seconds that training waits for a checkpoint / seconds of one copy of its state into memory
                        that was used before, in the same process and turn
    zero1_overhead, pipeline2_overhead    1 - tokens/s of ZeRO-1, of a pipeline of 2 / those of DDP; two processes of
                                          one thread, not compiled
    logits_peak_ratio   peak memory of output layer and loss with chunks / with complete logits, 2048 tokens of width
                        512, vocabulary 131072, bf16, beyond what 8 tokens take (weights and their gradient)
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
THREADS = 2
LR = 3e-4


def sizes(quick: bool) -> dict:
    """Model, batch and windows."""
    if quick:
        return {
            "layers": 2,
            "width": 128,
            "inner": 344,
            "heads": 4,
            "vocabulary": 2048,
            "rows": 4,
            "length": 128,
            "window": 6,
            "rounds": 2,
        }
    return {
        "layers": 6,
        "width": 384,
        "inner": 1024,
        "heads": 6,
        "vocabulary": 8192,
        "rows": 8,
        "length": 512,
        "window": 10,
        "rounds": 8,
    }


def model_block(size: dict) -> dict:
    return {
        "family": "llama",
        "hidden_size": size["width"],
        "intermediate_size": size["inner"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
    }


def write_tokens(folder: Path, size: dict) -> None:
    """Random tokens in the layout of stage pack: speed does not depend on what is read."""
    import numpy as np

    draw = np.random.Generator(np.random.PCG64(0))
    splits: dict = {}
    for split, rows in (("train", 4000), ("heldout", 8)):
        tokens = draw.integers(3, size["vocabulary"], rows * size["length"] + 1).astype(np.uint16)
        ends = np.append(np.arange(999, len(tokens) - 1, 1000), len(tokens) - 1) + 1
        tokens[ends - 1] = 1
        (folder / split).mkdir(parents=True)
        np.save(folder / split / "a.tokens.npy", tokens)
        np.save(folder / split / "a.documents.npy", np.stack([ends, 4 * np.diff(ends, prepend=0)], 1).astype(np.int64))
        np.save(folder / split / "a.ids.npy", np.full(len(ends), 48, np.uint8))
        np.save(folder / split / "a.id_ends.npy", np.arange(1, len(ends) + 1))
        splits[split] = {
            "a": [
                {
                    "file": f"{split}/a",
                    "tokens": len(tokens),
                    "documents": len(ends),
                    "bytes": 4 * len(tokens),
                    "id_bytes": len(ends),
                }
            ]
        }
    np.save(folder / "token_bytes.npy", np.full(size["vocabulary"], 4, np.int32))
    (folder / "index.json").write_text(
        json.dumps({"vocab_size": size["vocabulary"], "eos_id": 1, "dtype": "uint16", "splits": splits})
    )


class Vocabulary:
    """What a model's configuration asks of a tokenizer."""

    bos_token_id, eos_token_id, pad_token_id = 0, 1, 2

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size


def new_model(size: dict):
    import torch

    from pipeline.models import build

    torch.set_num_threads(THREADS)
    return build.new(model_block(size), Vocabulary(size["vocabulary"]), size["length"], seed=0)


def sampler_of(folder: Path, size: dict):
    from pipeline.data.tokens.row_sampler import RowSampler
    from pipeline.data.tokens.store import TokenStore

    store = TokenStore(folder / "tokens")
    return store, RowSampler(store, size["length"], None, 0)


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


# ---- contestants -----------------------------------------------------------------------------------------------------


def alma(folder: Path, size: dict, turns: Turns) -> None:
    """Through pretraining's own parts: layers, engine, sampler, loss, loop with metrics, checkpoints with sha256,
    signals. A window begins halfway between two saves, so that it contains what a save costs while it is written in
    the background, and none of that cost is in the turns of others."""
    from pipeline import pretrain
    from pipeline.core.output import Output
    from pipeline.models import cost
    from pipeline.train import distributed, engine, layers, phases
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


def play(folder: Path, quick: bool, rounds: int | None) -> dict[str, list[dict]]:
    """All contestants in turns: the windows of each, except the first (compilation)."""
    size, found, playing = sizes(quick), {name: [] for name in CONTESTANTS}, {}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for turn in range((rounds or size["rounds"]) + 1):
        for name in CONTESTANTS:
            if name not in playing:
                command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)] + [
                    "--quick"
                ] * quick
                log = open(folder / f"{name}.log", "w")
                playing[name] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
            child = playing[name]
            child.stdin.write("go\n")
            child.stdin.flush()
            answer = child.stdout.readline()
            if not answer:
                raise SystemExit(f"{name} ended:\n{(folder / f'{name}.log').read_text()[-3000:]}")
            result = json.loads(answer)
            rate = size["window"] * size["rows"] * size["length"] / result["seconds"]
            print(f"{'warm-up' if turn == 0 else f'round {turn}'}  {name:34s} {rate:9.0f} tokens/s", flush=True)
            if turn:
                found[name].append({**result, "rate": rate, "gemm": gemm() if name == "alma" else None})
    for child in playing.values():
        child.stdin.close()
        child.wait(60)
    return found


def gemm() -> float:
    """FLOP/s of a bf16 product of 4096x1024x4096: median of 10."""
    import torch

    torch.set_num_threads(THREADS)
    a, b, times = torch.randn(4096, 1024).bfloat16(), torch.randn(1024, 4096).bfloat16(), []
    for _ in range(12):
        begun = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begun)
    return 2 * 4096 * 1024 * 4096 / statistics.median(times[2:])


# ---- the other figures -----------------------------------------------------------------------------------------------


def peak_of_loss(chunks: bool, quick: bool) -> None:
    """Prints by how many bytes resident memory grew, at most, over forward and backward of output layer and loss."""
    import resource

    import torch

    from pipeline.models import build
    from pipeline.train import chunked_loss
    from pipeline.train.loss import next_token

    torch.set_num_threads(THREADS)
    vocabulary, tokens, width = (16384, 512, 64) if quick else (131072, 2048, 512)
    model = build.new(
        {
            "family": "llama",
            "hidden_size": width,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
        Vocabulary(vocabulary),
        64,
        seed=0,
    )
    layer = model.get_output_embeddings()
    if chunks:
        chunked_loss.install(model)
    hidden, labels = torch.randn(1, tokens, width, requires_grad=True), torch.randint(0, vocabulary, (1, tokens))

    def loss(hidden, labels):
        if chunks:
            layer.expect([labels])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = layer(hidden)
        next_token(outputs, labels)[0].backward()
        layer.weight.grad = None

    loss(hidden[:, :8].detach().requires_grad_(), labels[:, :8])  # kernels and buffers that any size needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loss(hidden, labels)
    print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def parallel_worker(folder: Path, quick: bool) -> None:
    """In each of two processes: DDP, ZeRO-1 and a pipeline of two take turns; prints tokens/s of each turn."""
    import torch

    from pipeline import pretrain
    from pipeline.train import distributed, engine, layers
    from pipeline.train.batches import loss_of, to_batch
    from pipeline.train.loop import share

    size, found, engines = sizes(quick), {}, {}
    store, sampler = sampler_of(folder, size)
    # in this order: DeepSpeed builds no plain engine after a pipeline
    for name, parallel in {"ddp": {}, "zero1": {"zero": 1}, "pipeline2": {"pipeline": 2}}.items():
        config = pretrain.Config(
            kind="pretrain",
            seed=0,
            model=model_block(size),
            sequence_length=size["length"],
            batch_size=size["rows"],
            micro_batch=max(1, size["rows"] // 4),
            steps=1000,
            parallel=parallel,
        )
        distributed.setup(config)
        torch.manual_seed(0)
        model = new_model(size)
        torch.set_num_threads(1)
        layers.prepare(model, config)
        engines[name] = engine.build(model, loss_of(store.sources), config), config
        found[name] = []
    steps = 2 if quick else 4
    for turn in range(size["rounds"] + 1):
        for name, (trainer, config) in engines.items():
            distributed.barrier()
            begun = time.perf_counter()
            for step in range(turn * steps, (turn + 1) * steps):
                trainer.step(
                    [
                        to_batch([sampler.row(index) for index in rows], store, False)
                        for rows in share(config, trainer, step)
                    ],
                    lr=LR,
                )
            if turn:
                found[name].append(steps * size["rows"] * size["length"] / (time.perf_counter() - begun))
    if distributed.is_main():
        (folder / "parallel.json").write_text(
            json.dumps({name: statistics.median(rates) for name, rates in found.items()})
        )
    distributed.barrier()
    distributed.shutdown()


def parallel(folder: Path, quick: bool) -> dict:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        __file__,
        "--parallel",
        "--folder",
        str(folder),
    ] + ["--quick"] * quick
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads((folder / "parallel.json").read_text())


def conditions() -> dict:
    from importlib.metadata import version

    cpu = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "cpu": cpu,
        "threads": THREADS,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "deepspeed")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer and shorter rounds")
    parser.add_argument("--rounds", type=int, help="of turns of all contestants; 8 by default, 2 with --quick")
    for hidden in ("--contestant", "--folder", "--peak"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--parallel", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = Path(given.folder) if given.folder else None
    if given.contestant:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a contestant prints goes to its log
        return CONTESTANTS[given.contestant](folder, sizes(given.quick), Turns(out))
    if given.peak:
        return peak_of_loss(given.peak == "chunks", given.quick)
    if given.parallel:
        return parallel_worker(folder, given.quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder, size = Path(scratch), sizes(given.quick)
        write_tokens(folder / "tokens", size)
        found = play(folder, given.quick, given.rounds)
        rates = {name: statistics.median(turn["rate"] for turn in turns) for name, turns in found.items()}
        layouts = parallel(folder, given.quick)
    peaks = {}
    for kind in ("chunks", "whole"):
        command = [sys.executable, __file__, "--peak", kind] + ["--quick"] * given.quick
        peaks[kind] = json.loads(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )
    from pipeline.models import cost

    model = new_model(size)
    flops = cost.training_flops(model, cost.count(model), size["length"]).full
    lines = [line for turn in found["alma"] for line in turn["lines"] if "seconds/step" in line]
    stalls = [
        line["seconds/save"] / turn["copy"]
        for turn in found["alma"]
        for line in turn["lines"]
        if "seconds/save" in line
    ]

    def ratio(other: str) -> float:
        return statistics.median(
            mine["rate"] / its["rate"] for mine, its in zip(found["alma"], found[other], strict=True)
        )

    result = {
        "trainer_ratio": ratio(max("trainer", "trainer, compiled", key=rates.get)),
        "plain_ratio": ratio("plain, compiled"),
        "gemm_share": statistics.median(turn["rate"] * flops / turn["gemm"] for turn in found["alma"]),
        "gemm_share_bf16_throughout": (
            rates["plain, compiled, bf16 throughout"]
            * flops
            / statistics.median(turn["gemm"] for turn in found["alma"])
        ),
        "data_wait_share": statistics.median(line["data_wait_share"] for line in lines),
        "metrics_share": statistics.median(line.get("seconds/log", 0.0) / line["seconds/step"] for line in lines),
        "save_stall_ratio": statistics.median(stalls) if stalls else None,
        "zero1_overhead": 1 - layouts["zero1"] / layouts["ddp"],
        "pipeline2_overhead": 1 - layouts["pipeline2"] / layouts["ddp"],
        "logits_peak_ratio": peaks["chunks"] / peaks["whole"],
    }
    print(
        json.dumps(
            {
                **{key: None if value is None else round(value, 4) for key, value in result.items()},
                "tokens_per_second": {name: round(rate) for name, rate in rates.items()},
                "quick": given.quick,
                **conditions(),
            }
        )
    )


if __name__ == "__main__":
    main()
