"""Running the stages of a recipe in order (pipeline/core/status.py says which are out of date).

`alma run` starts each stage as processes of their own (pipeline/core/launch.py), which run its script
(pipeline/core/stage.py).
"""

import contextlib

from pipeline.core.cli_arguments import check_stage_names
from pipeline.core.errors import Problems, UserError
from pipeline.core.fork import NothingToFork, fork_source
from pipeline.core.graph import Node, ancestors, nodes
from pipeline.core.launch import launch
from pipeline.core.output import link
from pipeline.core.partial_runs import tidy
from pipeline.core.precheck import check_records, check_runnable, fetch_inputs
from pipeline.core.recipe import Recipe, make_root
from pipeline.core.status import as_run, examine_one, mark_absent
from pipeline.core.terminal import say


def run(recipe: Recipe, only: list[str] = (), *, restart: bool = False, fork: bool = False) -> dict[str, Node]:
    """Bring the stages `only` (default: all) and what they need up to date, one after another. Returns the examined
    graph."""
    graph = nodes(recipe)
    check_stage_names(only, graph, f"recipe {recipe.name}")
    needed = ancestors(graph, only) if only else set(graph)
    make_root(recipe)
    forced = set(only) if only else set(graph)
    absent = check_first(recipe, graph, needed, forced if restart else set(), set(only))
    if fork:
        check_forks(graph, needed - absent)
    for name, node in graph.items():
        if name not in needed:
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
            say(f"{name}: up to date ({node.reason})" if node.absent else f"{name}: up to date")
            continue
        reason = f" ({node.reason})" if node.reason else ""
        say(f"{name}: {node.state}{reason}, running")
        launch(node, recipe, restart=again, fork=fork and can_fork(node, graph, named=name in only))
        examine_one(node, graph, running=False)
        if node.state != "up to date":  # another run may have started here since
            raise UserError(
                f"stage {name} finished, but is now {node.state}: {node.reason or 'its output is gone'}; another run"
                " started here, or its sources changed meanwhile: run the same command again"
            )
    return graph


def check_first(
    recipe: Recipe,
    graph: dict[str, Node],
    needed: set[str],
    again: set[str],
    named: set[str],
    *,
    here: bool = True,
    fetch: bool = True,
) -> set[str]:
    """Check all stages that must run before the first one does. Raises one UserError with everything that is wrong.
    Returns the stages that need not run although they have no output here.

    again: stages that are run even if they are up to date. named: stages that the command line names. here: they run on
    this machine. fetch: download the models that they name.
    """
    problems = Problems()
    for name, node in graph.items():
        if name in needed:
            examine_one(node, graph)
    absent = mark_absent({name: node for name, node in graph.items() if name in needed}) - named
    runnable = [node for name, node in graph.items() if name in needed - absent]
    for node in runnable:
        if node.state != "up to date" or node.name in again:
            check_runnable(recipe, graph, node, absent, problems, here=here)
    out_of_date = [node for node in runnable if node.state != "up to date"]
    if fetch:
        fetch_inputs(recipe, graph, out_of_date, problems)
    check_records(recipe, graph, out_of_date, problems)
    problems.refuse()
    return absent


def check_forks(graph: dict[str, Node], needed: set[str]) -> None:
    """Raise UserError for a --fork whose checkpoints cannot be used, before any stage runs, where that is known by
    now."""
    for name, node in graph.items():
        is_forked = node.config.HAS_STEPS and node.state not in ("up to date", "interrupted")
        if name in needed and node.identity and is_forked:
            with contextlib.suppress(NothingToFork):
                fork_source(node.folder, as_run(node, graph), name, node.config.last_step())


def can_fork(node: Node, graph: dict[str, Node], named: bool) -> bool:
    """Whether --fork gives a stage that is about to run a checkpoint to continue from. If not, says so; raises
    UserError for a stage that the command line names, or whose checkpoints cannot be used."""
    if node.state == "interrupted" or not node.config.HAS_STEPS:
        return False
    try:
        fork_source(node.folder, as_run(node, graph), node.name, node.config.last_step())
    except NothingToFork as nothing:
        if named:
            raise
        say(f"{node.name}: --fork has no checkpoint to continue from ({nothing.reason}): it starts from step 0")
        return False
    return True
