"""Turns of benchmarks that compare two sides: each is a process of its own, with equal threads, seen from outside."""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path

from meter import measured, python

THREADS = 2
SAME = "trl-same"
"""The side that is TRL without the gradient checkpointing that its configurations turn on: it computes activations
once, as alma does by default."""


def turn(script: str, side: str, task: str, folder: Path, model: str, **variables: str) -> dict:
    """One run of a side, `script --side SIDE ...`: what it returned (units, seconds, rows, ...), its rate in units per
    second, and the peak memory of the process in GB. variables: of its environment."""
    words = ["--side", side, "--task", task, "--folder", str(folder), "--model", model]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", **variables}
    cost = measured(python(script, *words), env=environment, cwd=folder)
    numbers = json.loads((folder / "result.json").read_text())
    numbers |= {"rate": numbers["units"] / numbers["seconds"], "peak": cost.peak}
    print(
        f"{task:7s} {model:6s} {side:8s} {numbers['rate']:8.2f} per s, {numbers['units']:,.0f} of {numbers['rows']}"
        f" rows in {numbers['seconds']:.0f} s, peak {cost.peak:.2f} GB",
        flush=True,
    )
    return numbers


def ratio(key: str, rounds: list[tuple[dict, dict]]) -> float:
    """Median over rounds of the first side's number divided by the second's."""
    return statistics.median(first[key] / second[key] for first, second in rounds)


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options of a turn, hidden."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name in ("--side", "--task", "--folder", "--model"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def serve(given: argparse.Namespace, sides: dict[str, Callable[[str, Path, str], dict]]) -> bool:
    """Take a turn, if this process was started for one."""
    if not given.side:
        return False
    folder = Path(given.folder)
    result = sides[given.side](given.task, folder, given.model)
    (folder / "result.json").write_text(json.dumps(result))
    return True
