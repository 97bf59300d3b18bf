"""`alma verify parallel`: all layouts of a recipe's pretraining compute the same, proved on this machine.

From one seed checkpoint, the loss and the gradient norm of every step in every layout are compared with those of one
process that takes all rows at once, compiles nothing and recomputes no activations. The layout of the recipe is among
them. A recipe with Muon is proved twice: with AdamW in all layouts, and with Muon in those that have it. Every step is
clipped. A NaN in one gradient of the last process (the last stage of a pipeline) must not reach the weights of any
process.
"""

import json
import math
import os
import re
import time
from pathlib import Path

from pipeline.checks import launch, tables
from pipeline.checks.layouts import REFERENCES, trials, with_muon, with_own
from pipeline.checks.small_recipe import ROWS, Prepared, prepare, stage_of, workplace
from pipeline.core.artifact import software
from pipeline.core.config import dump
from pipeline.core.errors import UserError
from pipeline.core.files import write_json
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import plural, say

STEPS = 10
MAX_GRAD_NORM = 0.1  # at most: low enough that every step is clipped
# Relative, for losses and gradient norms. In fp32, layouts differ by the order of sums. In bf16, the gradients of a
# micro-batch are rounded (2^-9 = 0.2% per number) before they are added up, so accumulation alone changes them.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
WORKER = "pipeline.checks.verify_worker"
ERROR_LINE = re.compile(r"(\[rank\d+\]: )?\w[\w.]*(Error|Exception)\b|error:")


def verify(
    recipe: Recipe, stage: str | None, *, full: bool = False, width: int = 64, layers: int = 4, keep: bool = False
) -> bool:
    """Train every layout, print a table, write runs/NAME/verify/parallel.json. Returns whether all agree."""
    from pipeline.models import model_block

    stage = stage_of(recipe, stage)
    began = time.time()
    with workplace(recipe, "parallel", keep) as work:
        ready = prepare(recipe, stage, work, STEPS + 2, full=full, width=width, layers=layers)
        precisions = ["fp32", "bf16"] if ready.config.wide_precision == "bf16" else ["fp32"]
        max_grad_norm = min(MAX_GRAD_NORM, ready.config.optimizer.max_grad_norm)
        optimizer = ready.config.optimizer.model_copy(update={"max_grad_norm": max_grad_norm})
        config = ready.config.model_copy(update={"optimizer": optimizer})
        num_layers = model_block.block_config(config.model).num_hidden_layers
        layouts, layouts_line = with_own(recipe.stages[stage], num_layers)
        if recipe.stages[stage].optimizer.kind == "muon":
            # products in bf16 would make more of the last bits than is allowed here
            changes = {"products": "fp32", "max_grad_norm": max_grad_norm}
            layouts = with_muon(layouts, dump(recipe.stages[stage].optimizer.model_copy(update=changes)))
        gpus = launch.gpus()
        if not gpus:
            # DeepSpeed, which transformers imports, would warn that there is no GPU
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        worlds = sorted({layout.processes for layout in layouts})
        steps_line = (
            f"steps      {STEPS} of {ROWS} rows x {config.sequence_length} tokens, learning rate"
            f" {config.optimizer.lr:g} from the first step, clipped at {max_grad_norm:g}; {', '.join(precisions)}"
        )
        device = f"{gpus} GPUs" if gpus else "the CPU"
        processes_line = f"processes  on {device}: {', '.join(map(str, worlds))}"
        for line in (*ready.lines, steps_line, layouts_line, processes_line):
            say(line)
        results = _train(config, ready, work, trials(precisions, layouts), gpus)
        rows = judge(results, max_grad_norm)
    others = [row["passed"] for row in rows if row["layout"] not in REFERENCES]
    passed = all(row["passed"] is not False for row in rows) and any(others)
    report = {
        "recipe": recipe.name,
        "stage": stage,
        "conditions": ready.lines,
        "config": dump(config),
        "device": "gpu" if gpus else "cpu",
        "tolerance": TOLERANCE,
        "passed": passed,
        "software": software(),
        "layouts": rows,
        "trials": results,
        "seconds": round(time.time() - began, 1),
    }
    path = recipe.root / "verify" / "parallel.json"
    write_json(path, report)
    print_table(rows)
    verdict = "all layouts agree" if passed else "LAYOUTS DIFFER"
    say(f"{verdict}: {time.time() - began:.0f} s; every number is in {os.path.relpath(path)}")
    return passed


def _train(config, ready: Prepared, work: Path, all_trials: list[dict], gpus: int) -> list[dict]:
    """The results of all trials. Those with the same number of processes share a launch."""
    seeds = _seeds(config, ready.tokenizer, work)
    job = {
        "config": dump(config),
        "tokens": str(ready.tokens),
        "tokenizer": str(ready.tokenizer),
        "seeds": seeds,
        "steps": STEPS,
    }
    results = []
    for world in sorted({trial["processes"] for trial in all_trials}):
        possible = [trial for trial in all_trials if trial["processes"] == world and trial["embeddings"] in seeds]
        results += [trial for trial in possible if "refused" in trial]
        chosen = [trial for trial in possible if "refused" not in trial]
        if not chosen:
            continue
        if gpus and world > gpus:
            refusal = {"refused": f"needs {world} GPUs, this machine has {gpus}"}
            results += [trial | refusal for trial in chosen]
            continue
        began = time.time()
        results += _launch(job | {"trials": chosen}, world, work, on_gpu=gpus > 0)
        say(f"{plural(world, 'process/processes')}: {plural(len(chosen), 'run')} in {time.time() - began:.0f} s")
        for trial in results:
            if trial["layout"] in REFERENCES and "refused" in trial:  # there is nothing to compare with
                raise UserError(trial["refused"])
    return results


def _seeds(config, tokenizer: Path, work: Path) -> dict[str, str]:
    """One checkpoint with tied and one with untied embeddings, in the Hugging Face layout; every layout starts from
    these files."""
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.models import build, model_block, publish

    folders = {}
    for name in ("tied", "untied"):
        block = config.model | {"tie_word_embeddings": name == "tied"}
        try:
            model_block.check(block)
        except UserError as error:  # mu-P needs untied ones
            say(f"embeddings {name}: skipped, {error}")
            continue
        model = build.new(block, load_tokenizer(tokenizer), config.sequence_length, config.seed)
        publish.publish(model.state_dict(), model.config, tokenizer, work / name)
        folders[name] = str(work / name)
    return folders


def _launch(job: dict, world: int, work: Path, *, on_gpu: bool) -> list[dict]:
    """The results of one launch, in order. A launch that dies fails the layout that it was training and those after
    it."""
    results_file = work / f"results-{world}.jsonl"
    job_file = work / f"job-{world}.json"
    write_json(job_file, job | {"results": str(results_file)})
    code, text = launch.run(["-m", WORKER, str(job_file)], world, on_gpu=on_gpu)
    results = []
    if results_file.exists():
        results = [json.loads(line) for line in results_file.read_text(encoding="utf-8").splitlines()]
    missing = job["trials"][len(results) :]
    if not code and not missing:
        return results
    log = work.parent / f"parallel-{world}.log"
    log.write_text(text, encoding="utf-8")
    errors = [line.strip() for line in text.splitlines() if ERROR_LINE.match(line)]
    error = errors[0] if errors else f"exit code {code}"
    if not missing:
        raise UserError(
            f"the launch of {world} processes ended with code {code} after its work was done ({error}); its output is"
            f" in {log}"
        )
    return results + [trial | {"died": f"{error} ({log.name})"} for trial in missing]


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(results: list[dict], max_grad_norm: float) -> list[dict]:
    """One row per layout and precision: the worst of its trials, compared with the reference with the same embeddings.
    `passed` is None where it was refused."""
    references = {}
    for trial in results:
        if trial["layout"] in REFERENCES:
            references[_compared(trial)] = trial
    rows: dict[tuple, dict] = {}
    for trial in results:
        empty = {
            "layout": trial["layout"],
            "processes": trial["processes"],
            "precision": trial["precision"],
            "loss": 0.0,
            "grad_norm": 0.0,
            "nan_kept_out": True,
            "passed": True,
            "reason": "",
        }
        row = rows.setdefault((trial["layout"], trial["precision"]), empty)
        if "refused" in trial:
            row.update(passed=None, reason=trial["refused"])
        elif "died" in trial:
            row.update(passed=False, reason=trial["died"])
        else:
            _add_trial(row, trial, references[_compared(trial)], max_grad_norm)
    return list(rows.values())


def _compared(trial: dict) -> tuple:
    """What a trial and its reference have in common."""
    optimizer = trial["changes"].get("optimizer", {}).get("kind", "adamw")
    return optimizer, trial["precision"], trial["embeddings"]


def _add_trial(row: dict, trial: dict, reference: dict, max_grad_norm: float) -> None:
    reasons = []
    for key in ("loss", "grad_norm"):
        difference = _difference(trial["steps"], reference.get("steps", []), key)
        row[key] = max(row[key], difference)
        if not difference <= TOLERANCE[trial["precision"]]:
            reasons.append(f"{key} differs by {difference:.1e}")
    updates = [step for step in trial["steps"] if step["grad_norm"] is not None]
    if not all(step["applied"] and step["grad_norm"] > max_grad_norm for step in updates):
        reasons.append("a step was not clipped or not applied")
    if trial["changes"].get("compile") and not trial["compiled_graphs"]:
        reasons.append("nothing was compiled")
    if not trial["from_seed"]:
        reasons.append("it did not start from the seed checkpoint")
    if not trial["nan_kept_out"]:
        row["nan_kept_out"] = False
        reasons.append("a NaN reached the weights")
    if reasons:
        row["passed"] = False
        earlier = [row["reason"]] if row["reason"] else []
        row["reason"] = "; ".join([*earlier, *(f"{trial['embeddings']}: {reason}" for reason in reasons)])


def _difference(steps: list[dict], expected: list[dict], key: str) -> float:
    """Largest relative difference over the steps; infinite where a number is missing or not finite."""
    if len(steps) != len(expected):
        return math.inf
    differences = []
    for step, reference in zip(steps, expected, strict=True):
        if reference[key] is None:
            continue
        if step[key] is None or not math.isfinite(step[key]):
            return math.inf
        differences.append(abs(step[key] - reference[key]) / abs(reference[key]))
    return max(differences, default=math.inf)


def print_table(rows: list[dict]) -> None:
    """A line per layout: the largest relative differences over all steps, tied and untied, with and without
    accumulation."""
    columns = ("layout", "processes", "precision", "loss", "gradient norm", "NaN kept out", "result")
    table = tables.new_table(*columns, text=("layout", "precision", "NaN kept out", "result"))
    for row in rows:
        loss, grad_norm = f"{row['loss']:.1e}", f"{row['grad_norm']:.1e}"
        kept_out = "yes" if row["nan_kept_out"] else "NO"
        result = "passed"
        if row["passed"] is None:
            loss = grad_norm = kept_out = ""
            result = f"refused: {row['reason']}"
        elif not row["passed"]:
            result = f"FAILED: {row['reason']}"
        elif row["layout"] in REFERENCES:
            loss = grad_norm = ""
            result = "reference"
        table.add_row(row["layout"], str(row["processes"]), row["precision"], loss, grad_norm, kept_out, result)
    tables.console().print(table)
