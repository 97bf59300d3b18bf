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
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from pretrain_contestants import CONTESTANTS, Turns  # noqa: E402
from pretrain_parts import parallel_worker, peak_of_loss  # noqa: E402
from pretrain_setup import THREADS, new_model, sizes, write_tokens  # noqa: E402

# ---- turns -----------------------------------------------------------------------------------------------------------


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
                command = [sys.executable, __file__, "--contestant", name, "--folder", str(folder)]
                command += ["--quick"] * quick
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


def parallel(folder: Path, quick: bool) -> dict[str, float]:
    """Tokens/s of each layout, from two processes."""
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


def peaks_of_loss(quick: bool) -> dict[str, int]:
    """Bytes that output layer and loss take, in chunks and whole, each in a new process."""
    peaks = {}
    for kind in ("chunks", "whole"):
        command = [sys.executable, __file__, "--peak", kind] + ["--quick"] * quick
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[kind] = json.loads(done.stdout.splitlines()[-1])
    return peaks


# ---- the result ------------------------------------------------------------------------------------------------------


def figures(size: dict, found: dict[str, list[dict]], layouts: dict[str, float], peaks: dict[str, int]) -> dict:
    """What the docstring of this file lists."""
    from pipeline.models import cost

    rates = median_rates(found)
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

    gemm_rate = statistics.median(turn["gemm"] for turn in found["alma"])
    return {
        "trainer_ratio": ratio(max("trainer", "trainer, compiled", key=rates.get)),
        "plain_ratio": ratio("plain, compiled"),
        "gemm_share": statistics.median(turn["rate"] * flops / turn["gemm"] for turn in found["alma"]),
        "gemm_share_bf16_throughout": rates["plain, compiled, bf16 throughout"] * flops / gemm_rate,
        "data_wait_share": statistics.median(line["data_wait_share"] for line in lines),
        "metrics_share": statistics.median(line.get("seconds/log", 0.0) / line["seconds/step"] for line in lines),
        "save_stall_ratio": statistics.median(stalls) if stalls else None,
        "zero1_overhead": 1 - layouts["zero1"] / layouts["ddp"],
        "pipeline2_overhead": 1 - layouts["pipeline2"] / layouts["ddp"],
        "logits_peak_ratio": peaks["chunks"] / peaks["whole"],
    }


def median_rates(found: dict[str, list[dict]]) -> dict[str, float]:
    return {name: statistics.median(turn["rate"] for turn in turns) for name, turns in found.items()}


def conditions() -> dict:
    from importlib.metadata import version

    cpu, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
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
    size = sizes(given.quick)
    if given.contestant:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a contestant prints goes to its log
        return CONTESTANTS[given.contestant](folder, size, Turns(out))
    if given.peak:
        return peak_of_loss(given.peak == "chunks", given.quick)
    if given.parallel:
        return parallel_worker(folder, given.quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_tokens(folder / "tokens", size)
        found = play(folder, given.quick, given.rounds)
        layouts = parallel(folder, given.quick)
    result = figures(size, found, layouts, peaks_of_loss(given.quick))
    line = {key: None if value is None else round(value, 4) for key, value in result.items()}
    line["tokens_per_second"] = {name: round(rate) for name, rate in median_rates(found).items()}
    print(json.dumps({**line, "quick": given.quick, **conditions()}))


if __name__ == "__main__":
    main()
