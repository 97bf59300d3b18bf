"""`alma verify resume`: a killed run ends as one that was not killed, shown on this machine, through the stage's own
entry point.

Four runs of a small copy of the stage: one undisturbed; one killed twice with SIGKILL, once inside a save and once
between two; one killed and moved from layout to layout with each start; and on GPUs, where sums may come in another
order, a second undisturbed one to measure the others against.
"""

import hashlib
import json
import os
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.checks import launch
from pipeline.checks.layouts import road
from pipeline.checks.small_recipe import prepare, stage_of, workplace
from pipeline.core import artifact
from pipeline.core.artifact import software
from pipeline.core.config import dump
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import say
from pipeline.train.row_trace import read as rows_of

STEPS, SAVE_EVERY = 12, 2
# steps after which a start has left a checkpoint: the second save waits for the first, which is written beside the
# training
SETTLED = 2 * SAVE_EVERY + 1
TOLERANCE = 1e-5  # relative, of losses and gradient norms on other layouts, in fp32
SCRIPT = Path(__file__).parents[1] / "pretrain.py"


def prove(
    recipe: Recipe,
    stage: str | None,
    *,
    seed: int = 0,
    elastic: bool = True,
    full: bool = False,
    width: int = 64,
    layers: int = 4,
    keep: bool = False,
) -> bool:
    """Make the runs, compare them, write runs/NAME/verify/resume.json. Returns whether all is as promised."""
    from pipeline.models import model_block

    stage = stage_of(recipe, stage)
    began = time.time()
    with workplace(recipe, "resume", keep) as work:
        ready = prepare(recipe, stage, work, STEPS, full=full, width=width, layers=layers)
        save = ready.config.save.model_copy(update={"every_steps": SAVE_EVERY, "keep": STEPS})
        config = ready.config.model_copy(
            update={"precision": "fp32", "save": save, "heldout_rows": 8, "evaluate_every": None}
        )
        gpus = launch.gpus()
        if not gpus:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        first, second = kills(seed)
        way, moves = road(recipe.stages[stage], model_block.block_config(config.model))
        for line in (
            *ready.lines,
            (
                f"steps      {STEPS}, a checkpoint after every {SAVE_EVERY}; killed at {first} and {second} (seed"
                f" {seed}); fp32; on {'GPUs' if gpus else 'the CPU'}"
            ),
            *([moves] if elastic else ()),
        ):
            say(line)
        write_recipe(work / "recipe.yaml", stage, config)

        whole = Run(work, "whole", gpus > 0)
        try:
            whole.go([Start()])
        except RunFailed as failure:  # nothing to compare with: what the stage said is what there is to say
            raise UserError(str(failure)) from None
        killed = [Start(fault=first), Start(fault=second), Start()]
        results = [
            compare(
                "killed twice, one process", Run(work, "killed", gpus > 0), killed, whole, TOLERANCE if gpus else 0.0
            )
        ]
        if gpus:
            results.append(
                {
                    **compare(
                        "two undisturbed runs, for comparison", Run(work, "again", True), [Start()], whole, TOLERANCE
                    ),
                    "passed": None,
                }
            )
        if elastic:
            moved = [Start(count, parallel, f"work:{SETTLED}", changes) for _, count, parallel, changes in way]
            moved[-1].fault = None
            results.append(
                compare(" -> ".join(name for name, *_ in way), Run(work, "moved", gpus > 0), moved, whole, TOLERANCE)
            )
    passed = all(row["passed"] is not False for row in results)
    path = recipe.root / "verify" / "resume.json"
    conditions = {
        "recipe": recipe.name,
        "stage": stage,
        "conditions": ready.lines,
        "config": dump(config),
        "kills": [first, second],
        "seed": seed,
        "software": software(),
    }
    write_json(path, conditions | {"passed": passed, "runs": results, "seconds": round(time.time() - began, 1)})
    table(results)
    verdict = (
        f"killed runs end as the undisturbed one, moved ones within {TOLERANCE:g} of it (largest relative difference of"
        " a step)"
    )
    said = verdict if passed else "RUNS DIFFER"
    say(f"{said}; {time.time() - began:.0f} s; every number is in {os.path.relpath(path)}")
    return passed


def kills(seed: int) -> list[str]:
    """Two fault points in random order: inside the writing of a checkpoint, and after a step. The second counts from
    where the first left the run."""
    draw = random.Random(seed)
    found = [f"save:{draw.randint(2, 3)}", f"work:{draw.randint(SETTLED, SETTLED + 1)}"]
    draw.shuffle(found)
    return found


@dataclass
class Start:
    """A launch of the stage, and the fault point at which SIGKILL ends it."""

    processes: int = 1
    parallel: dict = field(default_factory=dict)
    fault: str | None = None
    changes: dict = field(default_factory=dict)  # other keys of the stage that are its layout's

    def __str__(self) -> str:
        layout = ", ".join(f"{key}: {value}" for key, value in (self.parallel | self.changes).items())
        processes = f"{self.processes} process{'es' * (self.processes > 1)}"
        return processes + f", {layout}" * bool(layout) + (f", killed at {self.fault}" if self.fault else "")


class Run:
    """A run of the stage in a folder of its own, in as many starts as it takes."""

    def __init__(self, work: Path, name: str, on_gpu: bool):
        self.work, self.name, self.on_gpu = work, name, on_gpu
        self.folder, self.rows = work / name, work / f"{name}.rows"
        self.said: list[str] = []

    def go(self, starts: list[Start]) -> None:
        """Start it again and again. Raises RunFailed if one ends in another way than it should."""
        for start in starts:
            begun = time.time()
            words = [
                str(SCRIPT),
                str(self.work / "recipe.yaml"),
                f"output={self.folder}",
                f"pretrain.parallel={json.dumps(start.parallel)}",
                *(f"pretrain.{key}={json.dumps(value)}" for key, value in start.changes.items()),
            ]
            settings = {"ALMA_WITNESS": str(self.rows)} | ({"ALMA_FAULT": start.fault} if start.fault else {})
            code, text = launch.run(words, start.processes, on_gpu=self.on_gpu, environment=settings)
            self.said.append(text)
            if bool(code) != bool(start.fault) or "error:" in text:
                log = self.work.parent / f"resume-{self.name}.log"
                log.write_text("\n".join(self.said), encoding="utf-8")
                wrong = next(
                    (line for line in text.splitlines() if line.startswith("error:")),
                    f"exit code {code}{f', to be killed at {start.fault}' if start.fault else ''}",
                )
                raise RunFailed(f"{wrong.removeprefix('error: ')} ({os.path.relpath(log)})")
            found = re.search(r"resuming from step-0*(\d+)", text)
            if start is not starts[0] and not found:  # else nothing would have been resumed, and all would be equal
                raise RunFailed(f"start {starts.index(start) + 1} began anew, where it was to go on from a checkpoint")
            say(f"{self.name:<7} {start}{f', from step {found[1]}' if found else ''}: {time.time() - begun:.0f} s")

    @property
    def published(self) -> artifact.Artifact:
        return artifact.current(self.folder / "proof" / "pretrain")

    def curve(self) -> dict[int, tuple[float, float]]:
        """Step -> loss and gradient norm, as the stage logged them."""
        lines = [
            json.loads(line)
            for line in (self.published.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "grad_norm" in line}

    def weights(self) -> str:
        """sha256 over the published model's tensors."""
        whole = hashlib.sha256()
        for path in sorted((self.published.path / "model").glob("*.safetensors")):
            whole.update(path.read_bytes())
        return whole.hexdigest()


class RunFailed(Exception):
    """A start did not end as it should have."""


def compare(name: str, run: Run, starts: list[Start], expected: Run, tolerance: float) -> dict:
    """Make a run and compare rows read, losses, gradient norms and weights. With a tolerance of 0 all must be equal
    to the bit."""
    found = {
        "run": name,
        "tolerance": tolerance,
        "starts": [str(start) for start in starts],
        "passed": False,
        "reason": "",
    }
    try:
        run.go(starts)
    except RunFailed as failure:
        return {**found, "loss": None, "reason": str(failure)}
    one, other = run.curve(), expected.curve()
    losses, norms = (
        (
            max(_relative(one[step][place], other[step][place]) for step in other)
            if one.keys() == other.keys()
            else float("inf")
        )
        for place in (0, 1)
    )
    rows, weights = rows_of(run.rows) == rows_of(expected.rows), run.weights() == expected.weights()
    passed = rows and losses <= tolerance and norms <= tolerance and (weights or tolerance > 0)
    return {
        **found,
        "rows": rows,
        "loss": losses,
        "grad_norm": norms,
        "weights": weights,
        "sha256": run.weights(),
        "passed": passed,
    }


def _relative(one: float | None, other: float | None) -> float:
    return float("inf") if one is None or other is None else abs(one - other) / abs(other)


def write_recipe(path: Path, stage: str, config) -> None:
    """The stage alone, under the name `pretrain`, with its tokens as a folder made elsewhere."""
    block = {key: value for key, value in dump(config).items() if value is not None and key != "kind"}
    with open(path, "w", encoding="utf-8") as handle:
        YAML(typ="safe", pure=True).dump({"name": "proof", "seed": config.seed, "stages": {"pretrain": block}}, handle)


def table(rows: Iterable[dict]) -> None:
    """A line a run: what it shares with the undisturbed one."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("run", "rows read", "loss", "gradient norm", "weights", "result"):
        shown.add_column(title, overflow="fold", justify="right" if title in ("loss", "gradient norm") else "left")
    for row in rows:
        if row["loss"] is None:
            shown.add_row(row["run"], "", "", "", "", f"FAILED: {row['reason']}")
            continue
        numbers = ("equal" if value == 0 else f"{value:.1e}" for value in (row["loss"], row["grad_norm"]))
        verdict = "compared with" if row["passed"] is None else "passed" if row["passed"] else "FAILED"
        shown.add_row(
            row["run"], "same" if row["rows"] else "OTHERS", *numbers, "equal" if row["weights"] else "differ", verdict
        )
    Console(width=None if os.isatty(1) else 160).print(shown)
