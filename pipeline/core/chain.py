"""Running the stages of a recipe in order (pipeline/core/status.py says which are out of date).

`alma run` starts each stage as processes of their own (pipeline/core/launch.py), which run its script
(pipeline/core/stage.py).
"""

import contextlib
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import Problems, UserError
from pipeline.core.graph import Node, accepts, ancestors, check, nodes
from pipeline.core.launch import launch
from pipeline.core.output import link
from pipeline.core.partial_runs import NothingToFork, fork_source, tidy
from pipeline.core.precheck import check_sources
from pipeline.core.recipe import Recipe, make_root
from pipeline.core.status import as_run, examine_one, mark_absent, source_identity
from pipeline.core.terminal import say


def run(recipe: Recipe, only: list[str] = (), *, restart: bool = False, fork: bool = False) -> dict[str, Node]:
    """Bring the stages `only` (default: all) and what they need up to date, one after another. Returns the examined
    graph."""
    graph = nodes(recipe)
    for name in only:
        if name not in graph:
            raise UserError(f"recipe {recipe.name}: no stage is called {name!r}; there is {', '.join(graph)}")
    wanted = ancestors(graph, only) if only else set(graph)
    make_root(recipe)
    forced = set(only) if only else set(graph)
    absent = _refuse_early(recipe, graph, wanted, forced if restart else set(), set(only))
    if fork:
        _refuse_forks(graph, wanted - absent)
    for name, node in graph.items():
        if name not in wanted:
            continue
        if name in absent:
            say(f"{name}: {node.state} ({node.reason}); no stage needs it")
            continue
        examine_one(node, graph)
        if node.state == "running":
            raise UserError(f"{node.folder}: another run is writing here: {node.reason}; wait for it, or end it")
        again = restart and name in forced and (node.state != "up to date" or bool(only))
        if node.state == "up to date" and not again:
            if node.reason:
                link(node.folder, node.output.path)
            tidy(node.folder)
            say(f"{name}: up to date{f' ({node.reason})' if node.absent else ''}")
            continue
        say(f"{name}: {node.state}{' (' + node.reason + ')' if node.reason else ''}, running")
        launch(node, recipe, restart=again, fork=fork and _can_fork(node, graph, named=name in only))
        examine_one(node, graph, running=False)  # another run may have started here since
        if node.state != "up to date":
            raise UserError(
                f"stage {name} finished, but is now {node.state}: {node.reason or 'its output is gone'}; another run"
                " started here, or its sources changed meanwhile: run the same command again"
            )
    return graph


def _refuse_early(
    recipe: Recipe, graph: dict[str, Node], wanted: set[str], again: set[str], named: set[str]
) -> set[str]:
    """Refuse before the first hour is spent what can be refused, of all stages that must run, in one UserError.
    Returns the stages that need not run although they have no output here. `again`: stages that are run again even if
    they are up to date; `named`: stages that the command line names."""
    problems = Problems()
    for name in graph:
        if name in wanted:
            examine_one(graph[name], graph)
    absent = mark_absent({name: node for name, node in graph.items() if name in wanted}) - named
    for name, node in graph.items():
        if name not in wanted or name in absent or node.state == "up to date" and name not in again:
            continue
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            check(node, graph)
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            if (node.config.run.nodes or 1) > 1:
                raise UserError(
                    f"stage {name} asks for {node.config.run.nodes} nodes; alma run starts processes on this machine:"
                    f" start launch/slurm/alma.sbatch, or give {name}.run.nodes=1"
                )
            if node.config.run.device == "cuda":
                from pipeline.train.distributed import choose_device

                choose_device(node.config, node.config.run.processes)
        with problems.gather(lambda message, name=name: recipe.located(name, message)):
            source_identity(node)
        for key, source in node.parents.items():
            if source not in graph:
                with problems.gather(lambda message, name=name: recipe.located(name, message)):
                    artifact.external(key, Path(source), accepts(node, key))
            if source in absent:
                problems.add(
                    recipe.located(
                        name,
                        f"stages.{name}.inputs.{key}: {source} has no output on this machine and cannot be run:"
                        f" {graph[source].reason}",
                    )
                )
    must_run = [graph[name] for name in graph if name in wanted - absent]
    check_sources(recipe, graph, [node for node in must_run if node.state != "up to date"], problems)
    problems.refuse()
    return absent


def _refuse_forks(graph: dict[str, Node], wanted: set[str]) -> None:
    """Refuse a --fork whose checkpoints cannot be used before any stage runs, where that can be told already."""
    for name, node in graph.items():
        if name in wanted and node.identity and node.state not in ("up to date", "interrupted") and _trains(node):
            with contextlib.suppress(NothingToFork):
                fork_source(node.folder, as_run(node, graph), name)


def _can_fork(node: Node, graph: dict[str, Node], named: bool) -> bool:
    """Whether --fork gives a stage that is about to run a checkpoint to continue from. Says so if not; a stage that
    the command line names, or one whose checkpoints cannot be used, is refused."""
    if node.state == "interrupted" or not _trains(node):
        return False
    try:
        fork_source(node.folder, as_run(node, graph), node.name)
    except NothingToFork as nothing:
        if named:
            raise
        say(f"{node.name}: --fork has no checkpoint to continue from ({nothing.reason}): it starts from step 0")
        return False
    return True


def _trains(node: Node) -> bool:
    return "save" in type(node.config).model_fields
