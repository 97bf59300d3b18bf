"""`alma verify parallel`: the layouts of a recipe's pretraining compute the same thing, shown on this machine.

From one seed checkpoint, the loss and the gradient norm of every step in every layout are compared with those of one
process that takes all rows at once, compiles nothing and recomputes no activations. The layout that the recipe asks for
is among them. Every step is clipped. A NaN in one gradient of the last process (the last stage of a pipeline) must
reach the weights of none.
"""

import json
import math
import os
import re
import time
from pathlib import Path

from pipeline.checks import launch
from pipeline.checks.layouts import REFERENCE, trials, with_own
from pipeline.checks.small_recipe import ROWS, prepare, stage_of, workplace
from pipeline.core.artifact import software
from pipeline.core.config import dump
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import many, say

STEPS = 10
MAX_GRAD_NORM = 0.1  # at most: low enough that every step is clipped
# Relative, for losses and gradient norms. In fp32 layouts differ by the order of sums. In bf16 a micro-batch's
# gradients are rounded (2^-9 = 0.2% a number) before they are added up, so that accumulation alone moves them.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
WORKER = "pipeline.checks.verify_worker"


def prove(
    recipe: Recipe, stage: str | None, *, full: bool = False, width: int = 64, layers: int = 4, keep: bool = False
) -> bool:
    """Train every layout, print a table, write runs/NAME/verify/parallel.json. Returns whether all agree."""
    from pipeline.models import model_block

    stage = stage_of(recipe, stage)
    began = time.time()
    with workplace(recipe, "parallel", keep) as work:
        ready = prepare(recipe, stage, work, STEPS + 2, full=full, width=width, layers=layers)
        precisions = ["fp32"] + ["bf16"] * (ready.config.precision == "bf16")
        optimizer = ready.config.optimizer.model_copy(
            update={"max_grad_norm": min(MAX_GRAD_NORM, ready.config.optimizer.max_grad_norm)}
        )
        config = ready.config.model_copy(update={"optimizer": optimizer})
        layouts, chosen_line = with_own(recipe.stages[stage], model_block.block_config(config.model).num_hidden_layers)
        worlds = sorted({processes for _, processes, *_ in layouts})
        gpus = launch.gpus()
        if not gpus:
            # DeepSpeed, which transformers imports, would warn that it found none
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for line in (
            *ready.lines,
            (
                f"steps      {STEPS} of {ROWS} rows x {config.sequence_length} tokens, learning rate"
                f" {config.optimizer.lr:g} from the first, clipped at {optimizer.max_grad_norm:g};"
                f" {', '.join(precisions)}"
            ),
            chosen_line,
            f"processes  on {f'{gpus} GPUs' if gpus else 'the CPU'}: {', '.join(map(str, worlds))}",
        ):
            say(line)
        seeds = _seeds(config, ready, work)
        found = []
        for world in worlds:
            chosen = [
                trial
                for trial in trials(precisions, layouts)
                if trial["processes"] == world and trial["embeddings"] in seeds
            ]
            if gpus and world > gpus:
                found += [{**trial, "refused": f"needs {world} GPUs, this machine has {gpus}"} for trial in chosen]
                continue
            since = time.time()
            found += _launch(
                {
                    "config": dump(config),
                    "tokens": str(ready.tokens),
                    "tokenizer": str(ready.tokenizer),
                    "seeds": seeds,
                    "steps": STEPS,
                    "trials": chosen,
                },
                world,
                work,
                on_gpu=gpus > 0,
            )
            say(f"{many(world, 'process/processes')}: {many(len(chosen), 'run')} in {time.time() - since:.0f} s")
            if refused := [trial["refused"] for trial in found if trial["layout"] == REFERENCE and "refused" in trial]:
                raise UserError(refused[0])
        rows = judge(found, optimizer.max_grad_norm)
    passed = all(row["passed"] is not False for row in rows) and any(
        row["passed"] for row in rows if row["layout"] != REFERENCE
    )
    report = {
        "recipe": recipe.name,
        "stage": stage,
        "conditions": ready.lines,
        "config": dump(config),
        "device": "gpu" if gpus else "cpu",
        "tolerance": TOLERANCE,
        "passed": passed,
    }
    path = recipe.root / "verify" / "parallel.json"
    write_json(
        path,
        report | {"software": software(), "layouts": rows, "trials": found, "seconds": round(time.time() - began, 1)},
    )
    table(rows)
    say(
        f"{'all layouts agree' if passed else 'LAYOUTS DIFFER'}: {time.time() - began:.0f} s; every number is in"
        f" {os.path.relpath(path)}"
    )
    return passed


def judge(found: list[dict], max_grad_norm: float) -> list[dict]:
    """A row for each layout and precision: the worst of its trials, against the reference with the same embeddings.
    `passed` is None where it was refused."""
    reference = {(trial["precision"], trial["embeddings"]): trial for trial in found if trial["layout"] == REFERENCE}
    rows: dict[tuple, dict] = {}
    for trial in found:
        row = rows.setdefault(
            (trial["layout"], trial["precision"]),
            {
                "layout": trial["layout"],
                "processes": trial["processes"],
                "precision": trial["precision"],
                "loss": 0.0,
                "grad_norm": 0.0,
                "nan_kept_out": True,
                "passed": True,
                "reason": "",
            },
        )
        if "refused" in trial:
            row.update(passed=None, reason=trial["refused"])
            continue
        if "died" in trial:
            row.update(passed=False, reason=trial["died"])
            continue
        expected = reference[trial["precision"], trial["embeddings"]]
        reasons = []
        for key in ("loss", "grad_norm"):
            difference = _difference(trial.get("steps", []), expected.get("steps", []), key)
            row[key] = max(row[key], difference)
            if not difference <= TOLERANCE[trial["precision"]]:
                reasons.append(f"{key} differs by {difference:.1e}")
        taken = [step for step in trial["steps"] if step["grad_norm"] is not None]
        if not all(step["applied"] and step["grad_norm"] > max_grad_norm for step in taken):
            reasons.append("a step was not clipped or not applied")
        if trial["changes"].get("compile") and not trial["compiled_graphs"]:
            reasons.append("nothing was compiled")
        if not trial["from_seed"]:
            reasons.append("it did not begin from the seed checkpoint")
        if not trial["nan_kept_out"]:
            row["nan_kept_out"] = False
            reasons.append("a NaN reached the weights")
        if reasons:
            row["passed"] = False
            row["reason"] = "; ".join(
                dict.fromkeys(
                    [*filter(None, [row["reason"]]), *(f"{trial['embeddings']}: {reason}" for reason in reasons)]
                )
            )
    return list(rows.values())


def _difference(found: list[dict], expected: list[dict], key: str) -> float:
    """Largest relative difference over the steps; infinite where one is not a number or is missing."""
    if len(found) != len(expected):
        return math.inf
    pairs = [(one[key], other[key]) for one, other in zip(found, expected, strict=True) if other[key] is not None]
    return max(
        (abs(one - other) / abs(other) if one is not None and math.isfinite(one) else math.inf for one, other in pairs),
        default=math.inf,
    )


def _seeds(config, ready, work: Path) -> dict[str, str]:
    """One checkpoint with tied and one with untied embeddings, in the Hugging Face layout; every layout starts from
    these files."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build, model_block
    from pipeline.models.publish import publish

    found = {}
    for name in ("tied", "untied"):
        try:
            model_block.check({**config.model, "tie_word_embeddings": name == "tied"})
        except UserError as error:  # mu-P wants them untied
            say(f"embeddings {name}: left out, {error}")
            continue
        model = build.new(
            {**config.model, "tie_word_embeddings": name == "tied"},
            load_tokenizer(ready.tokenizer),
            config.sequence_length,
            config.seed,
        )
        publish(model.state_dict(), model.config, ready.tokenizer, work / name)
        found[name] = str(work / name)
    return found


def _launch(job: dict, world: int, work: Path, *, on_gpu: bool) -> list[dict]:
    """The results of one launch, in order; a launch that dies fails the layout it was at and those behind it."""
    results = work / f"results-{world}.jsonl"
    write_json(work / f"job-{world}.json", {**job, "results": str(results)})
    code, text = launch.run(["-m", WORKER, str(work / f"job-{world}.json")], world, on_gpu=on_gpu)
    found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    if code or len(found) < len(job["trials"]):
        (work.parent / f"parallel-{world}.log").write_text(text, encoding="utf-8")
        last = next(
            (
                line
                for line in text.splitlines()
                if re.match(r"(\[rank\d+\]: )?\w[\w.]*(Error|Exception)\b|error:", line)
            ),
            f"exit code {code}",
        )
        if len(found) == len(job["trials"]):
            raise UserError(
                f"the launch of {world} processes ended with code {code} after its work was done ({last.strip()}); its"
                f" output is in {work.parent}/parallel-{world}.log"
            )
        found += [{**trial, "died": f"{last.strip()} (parallel-{world}.log)"} for trial in job["trials"][len(found) :]]
    return found


def table(rows: list[dict]) -> None:
    """A line a layout: the largest relative differences over all steps, tied and untied, with and without
    accumulation."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("layout", "processes", "", "loss", "gradient norm", "NaN kept out", "result"):
        shown.add_column(
            title, overflow="fold", justify="right" if title in ("processes", "loss", "gradient norm") else "left"
        )
    for row in rows:
        if row["layout"] == REFERENCE and row["passed"]:
            numbers = ("", "", "yes", "compared with")
        elif row["passed"] is None:
            numbers = ("", "", "", f"refused: {row['reason']}")
        else:
            numbers = (
                f"{row['loss']:.1e}",
                f"{row['grad_norm']:.1e}",
                "yes" if row["nan_kept_out"] else "NO",
                "passed" if row["passed"] else f"FAILED: {row['reason']}",
            )
        shown.add_row(row["layout"], str(row["processes"]), row["precision"], *numbers)
    Console(width=None if os.isatty(1) else 160).print(shown)
