"""The files of a run's jobs, `runs/NAME/jobs/`: one job script per stage, and a script that submits them by hand.

STAGE.sbatch            what the stage asks of the cluster, and the command of its job
submit.sh               submits them all with their dependencies
recipe.yaml             the recipe as it was when they were written, with every key
jobs.json               stage -> its job, and those that it waits for (pipeline/cluster/submit.py)
STAGE.json              how the last start of the stage's job ended (pipeline/cluster/job.py)
STAGE-JOB.log           what the job says; STAGE-JOB-rank-N.log: what a process of the stage says
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.core.config import StageConfig
from pipeline.core.errors import UserError
from pipeline.core.graph import Node
from pipeline.core.recipe import Recipe

FOLDER = "jobs"
LEAD = 120  # seconds before the time limit at which Slurm has the stage save


def folder_of(recipe: Recipe) -> Path:
    return recipe.root / FOLDER


def script_path(recipe: Recipe, stage: str) -> Path:
    return folder_of(recipe) / f"{stage}.sbatch"


def log_path(folder: Path, stage: str, job: str, rank: int | str | None = None) -> Path:
    """What a job (rank None) or a process of its stage has printed."""
    return folder / f"{stage}-{job}{'' if rank is None else f'-rank-{rank}'}.log"


def options_of(config: StageConfig) -> list[str]:
    """What a stage asks of the cluster, as options of sbatch."""
    resources, run = config.resources, config.run
    options = [f"--nodes={run.nodes or 1}", f"--ntasks-per-node={run.processes}"]
    if config.gpus_per_node:
        kind = f"{resources.gpu_type}:" if resources.gpu_type else ""
        options.append(f"--gpus-per-node={kind}{config.gpus_per_node}")
    if resources.cpus:
        options.append(f"--cpus-per-task={resources.cpus}")
    if resources.has_whole_nodes:
        options.append("--exclusive")
    if resources.memory or (resources.has_whole_nodes and not resources.has_memory_per_part):
        options.append(f"--mem={resources.memory or 0}")
    if run.minutes:
        options.append(f"--time={run.minutes}")
    for name, value in resources:
        if name in ("partition", "account", "qos", "constraint", "exclude") and value:
            options.append(f"--{name}={value}")
    return options + resources.sbatch


def script(recipe: Recipe, node: Node, folder: Path, stage_options: Sequence[str] = ()) -> str:
    """The job script of a stage. folder: the one that the user is in, for the paths of the recipe. stage_options:
    --restart or --fork."""
    jobs = folder_of(recipe).absolute()
    _check_container(node, [folder, jobs.parent])
    name = f"{recipe.name}.{node.name}"
    log = log_path(jobs, node.name, "%j")
    options = [
        *options_of(node.config),
        f"--job-name={name}",
        f"--chdir={quoted(folder)}",
        f"--output={quoted(pattern_of(log))}",
        "--open-mode=append",
        f"--signal=B:USR1@{LEAD}",
        "--requeue",
    ]
    setup = []
    if node.config.resources.modules:
        setup += [f"module load {shlex.join(node.config.resources.modules)}"]
    for key, value in node.config.resources.environment.items():
        setup.append(f"export {key}={shlex.quote(value)}")
    snapshot = jobs / "recipe.yaml"
    program = f"exec {shlex.quote(sys.executable)} -P -m pipeline.cluster.job"
    lines = [
        "#!/usr/bin/env bash",
        f"# Stage {node.name} of {recipe.name}, written by `alma run --on slurm`. To submit it by hand:",
        f"#   sbatch {shlex.quote(str(jobs / node.name))}.sbatch",
        *(f"#SBATCH {option}" for option in options),
        "set -uo pipefail",
        "trap '' USR1   # the program below handles it: the stage saves, and the job is queued again",
        *setup,
        f"recipe={shlex.quote(str(snapshot))}",
        '[ -r "$recipe" ] || {',
        '    echo "$(hostname) cannot read $recipe; give an \\`output\\` on a file system that all nodes see" >&2',
        "    exit 2",
        "}",
        " ".join([f'{program} "$recipe" {node.name}', *stage_options]),
    ]
    return "\n".join(lines) + "\n"


def _check_container(node: Node, folders: list[Path]) -> None:
    """Raise UserError if a container cannot be given one of these folders, or one of its mounts."""
    resources = node.config.resources
    for folder in [*map(str, folders), *resources.mounts] if resources.container else []:
        if "," in folder or ":" in folder:
            raise UserError(
                f"stages.{node.name}.resources.container: {folder} has a comma or a colon, where Apptainer and pyxis"
                " take a path to end; rename it, or leave out the container"
            )


def pattern_of(log: Path) -> Path:
    """A log's path as sbatch and srun read it: %j, %t are replaced in the name, and nothing in its folder."""
    return Path(str(log.parent).replace("%", "%%")) / log.name


def quoted(path: Path) -> str:
    """A path as sbatch reads it after #SBATCH."""
    text = str(path)
    return f'"{text}"' if any(letter in text for letter in " '#") else text


def submit_script(recipe: Recipe, needs: dict[str, list[str]]) -> str:
    """A shell script that submits the jobs of these stages, each after those that it needs."""
    lines = [
        "#!/usr/bin/env bash",
        f"# Submits the jobs of {recipe.name} by hand, each to start when those that it needs have succeeded.",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder_of(recipe).absolute()))}",
        "number() { sed -nE 's/^([0-9]+)(;.*)?$/\\1/p' | tail -n 1; }   # of NUMBER;CLUSTER, among other lines",
    ]
    variables = {stage: f"job{number}" for number, stage in enumerate(needs, 1)}  # any name may be a stage's
    for stage, parents in needs.items():
        after = ":".join(f"${variables[parent]}" for parent in parents)
        options = f" --dependency=afterok:{after} --kill-on-invalid-dep=yes" if parents else ""
        lines.append(f"{variables[stage]}=$(sbatch --parsable{options} {stage}.sbatch | number)")
        lines.append(f'echo "{stage}: job ${variables[stage]}"')
    return "\n".join(lines) + "\n"
