"""`alma run RECIPE --on slurm`: one job per stage that is out of date, each to start when those that it needs have
succeeded."""

import os
import sys
from pathlib import Path

from pipeline.cluster import job_files, shared_storage, slurm
from pipeline.cluster.queue import QueuedJob, read_jobs, write_jobs
from pipeline.core.chain import can_fork, check_first, check_forks
from pipeline.core.cli_arguments import check_stage_names
from pipeline.core.errors import Problems, UserError
from pipeline.core.files import now, write_atomic
from pipeline.core.graph import Node, ancestors, check, nodes
from pipeline.core.lock import Lock
from pipeline.core.recipe import Recipe, make_root, resolved
from pipeline.core.status import examine_one, mark_absent
from pipeline.core.terminal import plural, show


def submit(recipe: Recipe, only: list[str], *, restart: bool = False, fork: bool = False) -> None:
    """Submit the jobs of the stages `only` (default: all) and of what they need. Raises UserError with everything that
    is wrong before anything is queued."""
    graph, needed = _graph(recipe, only)
    cluster = slurm.partitions()
    make_root(recipe)
    folder = job_files.folder_of(recipe)
    _refuse_live_jobs(folder)
    again = set(only) if restart else set()
    absent = check_first(recipe, graph, needed, again, set(only), here=False)
    if fork:
        _check_forks(graph, needed - absent, only)
    stages = _to_run(graph, needed - absent, again)
    if not stages:
        show(f"{recipe.name}: everything is up to date; nothing was submitted")
        return
    _check_requests(recipe, stages, cluster)
    shared_storage.check(recipe.root)
    lock = Lock(folder)
    lock.acquire()  # another submission of this run at the same time is refused
    try:
        _refuse_live_jobs(folder)  # it may have just ended
        needs = _needs(stages)
        _write_files(recipe, stages, needs, _stage_options(stages, only, restart=restart, fork=fork))
        for stage in stages:
            slurm.test(str(job_files.script_path(recipe, stage)))
        _submit_all(recipe, stages, needs)
    finally:
        lock.release()


def show_jobs(recipe: Recipe, only: list[str], *, restart: bool = False, fork: bool = False) -> None:
    """Print the files that `submit` would write, and write nothing. Without Slurm what the recipe asks for is not
    compared with what the cluster has."""
    graph, needed = _graph(recipe, only)
    problems = Problems()
    for name, node in graph.items():
        if name in needed:
            examine_one(node, graph)
            with problems.gather(lambda message, name=name: recipe.located(name, message)):
                check(node, graph)
    problems.refuse()
    absent = mark_absent({name: node for name, node in graph.items() if name in needed}) - set(only)
    stages = _to_run(graph, needed - absent, set(only) if restart else set())
    options = _stage_options(stages, only, restart=restart, fork=fork)
    if slurm.is_here():
        try:
            found = slurm.partitions()
        except UserError as error:  # its commands are here, and its controller is not
            show(f"# resources were not compared with the cluster: {error}", sys.stderr)
        else:
            _check_requests(recipe, stages, found)
    needs = _needs(stages)
    for name, node in stages.items():
        _print_file(job_files.script_path(recipe, name), job_files.script(recipe, node, Path.cwd(), options[name]))
    if stages:
        _print_file(job_files.folder_of(recipe) / "submit.sh", job_files.submit_script(recipe, needs))
    for name, node in stages.items():
        if node.reason and not needs[name]:
            show(f"# {name}: {node.state} ({node.reason})", sys.stderr)
    show(f"# {plural(len(stages), 'job')}; nothing was written or submitted", sys.stderr)


def _graph(recipe: Recipe, only: list[str]) -> tuple[dict[str, Node], set[str]]:
    """The recipe's stages, and the names of those that must be up to date."""
    if job_files.FOLDER in recipe.stages:
        raise UserError(
            f"--on slurm keeps its files in {job_files.folder_of(recipe)}, so no stage may be called"
            f" {job_files.FOLDER}; rename it"
        )
    graph = nodes(recipe)
    check_stage_names(only, graph, f"recipe {recipe.name}")
    return graph, ancestors(graph, only) if only else set(graph)


def _to_run(graph: dict[str, Node], names: set[str], again: set[str]) -> dict[str, Node]:
    """The stages that must run: those that are out of date, those in `again`, and those that need one of these, which
    may be out of date after it. Raises UserError if another run is writing to one of them."""
    stages: dict[str, Node] = {}
    for name, node in graph.items():
        needs_one = not again.isdisjoint(ancestors(graph, [name])) and not stages.keys().isdisjoint(
            node.parents.values()
        )
        if name in names and (node.state != "up to date" or name in again or needs_one):
            stages[name] = node
    for node in stages.values():
        if node.state == "running":
            raise UserError(f"{node.folder}: another run is writing here: {node.reason}; wait for it, or end it")
    return stages


def _check_forks(graph: dict[str, Node], needed: set[str], only: list[str]) -> None:
    """Raise UserError for a --fork that is known to be impossible: no job is queued for it."""
    check_forks(graph, needed)
    for name in only:
        if graph[name].identity:
            can_fork(graph[name], graph, named=True)


def _stage_options(stages: dict[str, Node], only: list[str], *, restart: bool, fork: bool) -> dict[str, list[str]]:
    """Stage -> --restart, --fork or nothing, as `alma run` without a cluster would give it to the stage."""
    options = {}
    for name, node in stages.items():
        options[name] = []
        if restart and (not only or name in only):
            options[name].append("--restart")
        if fork and node.config.HAS_STEPS:
            options[name].append("--fork")
    return options


def _needs(stages: dict[str, Node]) -> dict[str, list[str]]:
    """Stage -> those of the others that it is made from directly."""
    needs = {}
    for name, node in stages.items():
        needs[name] = [parent for parent in dict.fromkeys(node.parents.values()) if parent in stages]
    return needs


def _check_requests(recipe: Recipe, stages: dict[str, Node], cluster: dict[str, slurm.Partition]) -> None:
    problems = Problems()
    for name, node in stages.items():
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            slurm.check_request(name, node.config, cluster)
    problems.refuse()


def _refuse_live_jobs(folder: Path) -> None:
    """Raise UserError if jobs of an earlier submission of this run have not ended."""
    jobs = read_jobs(folder)
    states = slurm.job_states([entry.job for entry in jobs.values()])
    if states is None:
        raise UserError(
            "squeue does not answer, so it is not known whether jobs of this run are queued; try again later"
        )
    live = []
    for stage, entry in jobs.items():
        state = states.get(entry.job)
        if state and state.is_live:
            live.append(f"{stage} (job {entry.job}, {state.text})")
    if live:
        raise UserError(
            f"{folder.parent}: jobs of this run are queued or running: {', '.join(live)}; wait for them, or"
            " end them (alma cancel) and run the same command again"
        )


def _write_files(
    recipe: Recipe, stages: dict[str, Node], needs: dict[str, list[str]], options: dict[str, list[str]]
) -> None:
    folder = job_files.folder_of(recipe)
    for path in folder.glob("*.sbatch"):  # of stages that are up to date by now, or that the recipe no longer has
        path.unlink()
    write_atomic(folder / "recipe.yaml", resolved(recipe))
    for name, node in stages.items():
        write_atomic(job_files.script_path(recipe, name), job_files.script(recipe, node, Path.cwd(), options[name]))
        (folder / f"{name}.json").unlink(missing_ok=True)  # how an earlier job ended
    write_atomic(folder / "submit.sh", job_files.submit_script(recipe, needs))


def _submit_all(recipe: Recipe, stages: dict[str, Node], needs: dict[str, list[str]]) -> None:
    """Submit in order; if one is refused, cancel those before it."""
    folder, jobs = job_files.folder_of(recipe), {}
    try:
        for name in stages:
            parents = [jobs[parent].job for parent in needs[name]]
            number = slurm.submit(str(job_files.script_path(recipe, name)), parents)
            jobs[name] = QueuedJob(number, needs[name], now())
            write_jobs(folder, jobs)
    except BaseException:
        if jobs:
            slurm.cancel([entry.job for entry in jobs.values()])
            show(f"the jobs that were queued before it are cancelled: {', '.join(jobs)}", sys.stderr)
        raise
    for name, entry in jobs.items():
        after = f" after {', '.join(entry.needs)}" if entry.needs else ""
        show(f"{name:<12} job {entry.job}{after}")
    show(
        f"{recipe.name}: {plural(len(jobs), 'job')} queued; their files are in {os.path.relpath(folder)}. alma"
        " status shows how far they are, alma logs what they print, alma cancel ends them"
    )


def _print_file(path: Path, text: str) -> None:
    print(f"# ---- {os.path.relpath(path)}\n{text}", flush=True)
