"""`alma cancel` and `alma logs`: the jobs of a run that `alma run --on slurm` has queued."""

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cluster import slurm
from pipeline.cluster.job_files import folder_of, log_path
from pipeline.cluster.queue import QueuedJob, read_jobs, views
from pipeline.core.cli_arguments import RecipeFile, Words, check_stage_names, split
from pipeline.core.errors import UserError
from pipeline.core.recipe import Recipe, load
from pipeline.core.terminal import plural, show

LOOK_EVERY = 1.0  # seconds between two looks at a log
ASK_EVERY = 20.0  # seconds between two questions to Slurm whether a job lives


def cancel(recipe: RecipeFile, words: Words = None) -> None:
    """End the jobs of a run that are queued or running, or those of some stages. Jobs that need a cancelled one are
    cancelled by Slurm."""
    stages, overrides = split(words)
    loaded = load(recipe, overrides)
    jobs = _jobs(loaded, stages)
    states = slurm.job_states([entry.job for entry in jobs.values()])
    if states is None:
        raise UserError("alma cancel: squeue does not answer; run this on a login node of the cluster")
    live = {name: entry.job for name, entry in jobs.items() if entry.job in states and states[entry.job].is_live}
    if not live:
        show(f"{loaded.name}: no job is queued or running")
        return
    slurm.cancel(list(live.values()))
    for name, job in live.items():
        show(f"{name:<12} job {job} cancelled")
    show(f"checkpoints stay: alma run {recipe} --on slurm continues from them")


def logs(
    recipe: RecipeFile,
    words: Annotated[
        list[str] | None, typer.Argument(help="A stage, and the key=value words of its run.", metavar="STAGE")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what is added until the job ends.")] = False,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Which process of the stage.")] = 0,
) -> None:
    """What the newest job of a stage has printed: the job itself, then one process of the stage."""
    stages, overrides = split(words)
    loaded = load(recipe, overrides)
    if len(stages) != 1:
        raise UserError(f"alma logs RECIPE STAGE: name one stage; the recipe has {', '.join(loaded.stages)}")
    (stage,) = stages
    (entry,) = _jobs(loaded, stages).values()
    folder = folder_of(loaded)
    files = {log_path(folder, stage, entry.job): 0, log_path(folder, stage, entry.job, rank): 0}
    if rank and not follow and not list(files)[1].exists():
        here = len(list(folder.glob(f"{stage}-{entry.job}-rank-*.log")))
        raise UserError(f"{list(files)[1]}: does not exist; job {entry.job} has logs of {plural(here, 'rank')}")
    _print_new(files)
    if not follow:
        if not any(files.values()):
            show(f"{stage}: {views(folder)[stage].text}; it has printed nothing yet")
        return
    asked = time.monotonic()
    while True:
        time.sleep(LOOK_EVERY)
        _print_new(files)
        if time.monotonic() - asked < ASK_EVERY:
            continue
        asked = time.monotonic()
        view = views(folder)[stage]
        if not view.is_live:
            _print_new(files)
            show(f"{stage}: {view.text}")
            return


def _jobs(recipe: Recipe, stages: list[str]) -> dict[str, QueuedJob]:
    """Stage -> its newest job, of these stages or of all. Raises UserError if there is none."""
    check_stage_names(stages, recipe.stages, f"recipe {recipe.name}")
    folder = folder_of(recipe)
    jobs = read_jobs(folder)
    if not jobs:
        raise UserError(
            f"{os.path.relpath(folder)}: no job of this run was queued here; alma run RECIPE --on slurm does"
        )
    for stage in stages:
        if stage not in jobs:
            raise UserError(f"{recipe.name}: stage {stage} has no job; there are jobs of {', '.join(jobs)}")
    return {name: jobs[name] for name in stages or jobs}


def _print_new(files: dict[Path, int]) -> None:
    """Print what was added to each file since the last time, as far as lines are complete. files: path -> bytes that
    are printed."""
    for path, done in files.items():
        try:
            with open(path, "rb") as file:
                file.seek(done)
                text = file.read()
        except FileNotFoundError:
            continue
        end = text.rfind(b"\n") + 1
        if not end:
            continue
        if len(files) > 1 and done == 0:
            show(f"==> {os.path.relpath(path)} <==")
        show(text[: end - 1].decode(errors="replace"))
        files[path] = done + end
