"""`alma verify resume`: a killed run ends like one that was not killed, proved on this machine through the stage's own
entry point.

Three runs of a small copy of the stage: one undisturbed; one killed twice with SIGKILL, once during a save and once
between two saves; one killed and moved to another layout with each start. On GPUs, where sums may be in another order,
a second undisturbed run shows how much two such runs differ.
"""

import hashlib
import json
import os
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from ruamel.yaml import YAML

from pipeline.checks import launch, tables
from pipeline.checks.layouts import route
from pipeline.checks.small_recipe import prepare, stage_of, workplace
from pipeline.core import artifact
from pipeline.core.artifact import Artifact, software
from pipeline.core.config import dump
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import plural, say
from pipeline.train import row_trace

STEPS, SAVE_EVERY = 14, 2
# Steps after which a start has left a checkpoint: a save is written during the next steps, and the second one waits for
# the first.
SETTLED = 2 * SAVE_EVERY + 1
TOLERANCE = 1e-5  # relative, of losses and gradient norms in other layouts, in fp32
SCRIPT = Path(__file__).parents[1] / "pretrain.py"


def verify(
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
    """Make the runs, compare them, write runs/NAME/verify/resume.json. Returns whether all agree."""
    from pipeline.models import model_block

    stage = stage_of(recipe, stage)
    began = time.time()
    with workplace(recipe, "resume", keep) as work:
        ready = prepare(recipe, stage, work, STEPS, full=full, width=width, layers=layers)
        save = ready.config.save.model_copy(update={"every_steps": SAVE_EVERY, "keep": STEPS})
        update = {"precision": "fp32", "save": save, "heldout_rows": 8, "evaluate_every": None}
        config = ready.config.model_copy(update=update)
        on_gpu = launch.gpus() > 0
        if not on_gpu:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        first, second = kills(seed)
        layouts, layouts_line = route(recipe.stages[stage], model_block.block_config(config.model))
        for line in ready.lines:
            say(line)
        say(
            f"steps      {STEPS}, a checkpoint after every {SAVE_EVERY}; killed at {first} and {second} (seed {seed});"
            f" fp32; on {'GPUs' if on_gpu else 'the CPU'}"
        )
        if elastic:
            say(layouts_line)
        write_recipe(work / "recipe.yaml", stage, config)

        undisturbed = Run(work, "undisturbed", on_gpu)
        try:
            undisturbed.start_all([Start()])
        except RunFailed as failure:  # there is nothing to compare with
            raise UserError(str(failure)) from None
        starts = [Start(fault=first), Start(fault=second), Start()]
        tolerance = TOLERANCE if on_gpu else 0.0
        results = [compare("killed twice, one process", Run(work, "killed", on_gpu), starts, undisturbed, tolerance)]
        if on_gpu:
            name = "two undisturbed runs, for comparison"
            result = compare(name, Run(work, "again", True), [Start()], undisturbed, TOLERANCE)
            result["passed"] = None
            results.append(result)
        if elastic:
            starts = [Start(layout.processes, layout.parallel, f"work:{SETTLED}", layout.changes) for layout in layouts]
            starts[-1].fault = None
            name = " -> ".join(layout.name for layout in layouts)
            results.append(compare(name, Run(work, "moved", on_gpu), starts, undisturbed, TOLERANCE))
    passed = all(result["passed"] is not False for result in results)
    report = {
        "recipe": recipe.name,
        "stage": stage,
        "conditions": ready.lines,
        "config": dump(config),
        "kills": [first, second],
        "seed": seed,
        "software": software(),
        "passed": passed,
        "runs": results,
        "seconds": round(time.time() - began, 1),
    }
    path = recipe.root / "verify" / "resume.json"
    write_json(path, report)
    print_table(results)
    verdict = "RUNS DIFFER"
    if passed:
        verdict = (
            f"killed runs end like the undisturbed one, moved ones within {TOLERANCE:g} of it (largest relative"
            " difference of a step)"
        )
    say(f"{verdict}; {time.time() - began:.0f} s; every number is in {os.path.relpath(path)}")
    return passed


def kills(seed: int) -> list[str]:
    """Two fault points in random order: during the writing of a checkpoint, and after a step. The second one counts
    from where the first one left the run."""
    generator = random.Random(seed)
    faults = [f"save:{generator.randint(2, 3)}", f"work:{generator.randint(SETTLED, SETTLED + 1)}"]
    generator.shuffle(faults)
    return faults


def write_recipe(path: Path, stage: str, config) -> None:
    """Only this stage, under the name `pretrain`, with its tokens as a folder outside the recipe."""
    block = {key: value for key, value in dump(config).items() if value is not None and key != "kind"}
    recipe = {"name": "proof", "seed": config.seed, "stages": {"pretrain": block}}
    with open(path, "w", encoding="utf-8") as handle:
        YAML(typ="safe", pure=True).dump(recipe, handle)


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Start:
    """A launch of the stage, and the fault point at which SIGKILL ends it."""

    processes: int = 1
    parallel: dict = field(default_factory=dict)
    fault: str | None = None
    changes: dict = field(default_factory=dict)
    """Other keys of the stage that belong to its layout."""

    def __str__(self) -> str:
        parts = [plural(self.processes, "process/processes")]
        parts += [f"{key}: {value}" for key, value in (self.parallel | self.changes).items()]
        if self.fault:
            parts.append(f"killed at {self.fault}")
        return ", ".join(parts)


class RunFailed(Exception):
    """A start did not end as it should have."""


class Run:
    """A run of the stage in its own folder, with as many starts as it takes."""

    def __init__(self, work: Path, name: str, on_gpu: bool):
        self.work, self.name, self.on_gpu = work, name, on_gpu
        self.folder, self.row_folder = work / name, work / f"{name}.rows"
        self.outputs: list[str] = []

    def start_all(self, starts: list[Start]) -> None:
        """Start it once for each of `starts`. Raises RunFailed if one ends in another way than expected."""
        for number, start in enumerate(starts, 1):
            began = time.time()
            text = self._start(start)
            resumed = re.search(r"resuming from step-0*(\d+)", text)
            if number > 1 and not resumed:  # a run that starts over would be equal without proving anything
                raise RunFailed(f"start {number} began at the first step, expected to resume from a checkpoint")
            position = f", from step {resumed[1]}" if resumed else ""
            say(f"{self.name:<11} {start}{position}: {time.time() - began:.0f} s")

    def _start(self, start: Start) -> str:
        words = [
            str(SCRIPT),
            str(self.work / "recipe.yaml"),
            f"output={self.folder}",
            f"pretrain.parallel={json.dumps(start.parallel)}",
        ]
        words += [f"pretrain.{key}={json.dumps(value)}" for key, value in start.changes.items()]
        environment = {row_trace.VARIABLE: str(self.row_folder)}
        if start.fault:
            environment["ALMA_FAULT"] = start.fault
        code, text = launch.run(words, start.processes, on_gpu=self.on_gpu, environment=environment)
        self.outputs.append(text)
        if bool(code) == bool(start.fault) and "error:" not in text:
            return text
        log = self.work.parent / f"resume-{self.name}.log"
        log.write_text("\n".join(self.outputs), encoding="utf-8")
        errors = [line.removeprefix("error: ") for line in text.splitlines() if line.startswith("error:")]
        expected = f", expected to be killed at {start.fault}" if start.fault else ""
        reason = errors[0] if errors else f"exit code {code}{expected}"
        raise RunFailed(f"{reason} ({os.path.relpath(log)})")

    @property
    def published(self) -> Artifact:
        return artifact.current(self.folder / "proof" / "pretrain")

    def curve(self) -> dict[int, tuple[float, float]]:
        """Step -> loss and gradient norm, as the stage logged them."""
        curve = {}
        for line in (self.published.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            if "grad_norm" in values:
                curve[values["step"]] = (values["loss"], values["grad_norm"])
        return curve

    def weights(self) -> str:
        """sha256 over the files of the published model."""
        sha256 = hashlib.sha256()
        for path in sorted((self.published.path / "model").glob("*.safetensors")):
            sha256.update(path.read_bytes())
        return sha256.hexdigest()


def compare(name: str, run: Run, starts: list[Start], expected: Run, tolerance: float) -> dict:
    """Make a run and compare the rows it read, losses, gradient norms and weights. With a tolerance of 0 all must be
    equal bit for bit."""
    result = {"run": name, "tolerance": tolerance, "starts": [str(start) for start in starts]}
    result |= {"passed": False, "reason": ""}
    try:
        run.start_all(starts)
    except RunFailed as failure:
        result["loss"] = None
        result["reason"] = str(failure)
        return result
    curve, expected_curve = run.curve(), expected.curve()
    loss_difference = _largest_difference(curve, expected_curve, 0)
    norm_difference = _largest_difference(curve, expected_curve, 1)
    same_rows = row_trace.read(run.row_folder) == row_trace.read(expected.row_folder)
    same_weights = run.weights() == expected.weights()
    result["rows"] = same_rows
    result["loss"] = loss_difference
    result["grad_norm"] = norm_difference
    result["weights"] = same_weights
    result["sha256"] = run.weights()
    is_close = loss_difference <= tolerance and norm_difference <= tolerance
    result["passed"] = same_rows and is_close and (same_weights or tolerance > 0)
    return result


def _largest_difference(curve: dict, expected: dict, place: int) -> float:
    """Largest relative difference over the steps; infinite where a step or a number is missing."""
    if curve.keys() != expected.keys():
        return float("inf")
    largest = 0.0
    for step, numbers in expected.items():
        number, reference = curve[step][place], numbers[place]
        if number is None or reference is None:
            return float("inf")
        largest = max(largest, abs(number - reference) / abs(reference))
    return largest


def print_table(results: list[dict]) -> None:
    """A line per run: how it compares with the undisturbed one."""
    columns = ("run", "rows read", "loss", "gradient norm", "weights", "result")
    table = tables.new_table(*columns, text=("run", "rows read", "weights", "result"))
    for result in results:
        if result["loss"] is None:
            table.add_row(result["run"], "", "", "", "", f"FAILED: {result['reason']}")
            continue
        differences = []
        for key in ("loss", "grad_norm"):
            differences.append("equal" if result[key] == 0 else f"{result[key]:.1e}")
        verdict = {None: "for comparison", True: "passed", False: "FAILED"}[result["passed"]]
        rows = "same" if result["rows"] else "OTHERS"
        table.add_row(result["run"], rows, *differences, "equal" if result["weights"] else "differ", verdict)
    tables.console().print(table)
