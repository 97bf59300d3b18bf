"""What is checked before the first stage runs: keys, inputs, layouts and models of a recipe, and the first records of
its local sources. All mistakes are reported at once.

`alma recipe check` and `alma run` call it, so that no mistake in a recipe is found after hours of work.
"""

import functools
from collections.abc import Iterable
from pathlib import Path

from pipeline.core import external_inputs
from pipeline.core.errors import Problems, UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.core.graph import Node, accepted_kinds, check, nodes, planned_inputs
from pipeline.core.recipe import Recipe, load


def checked(path: str | Path, words: list[str] = (), sources: bool = False) -> tuple[Recipe, dict[str, Node]]:
    """A recipe and its graph, checked; with `sources`, the first records of its local sources are read. Raises
    UserError with every mistake of every stage, each with file and line."""
    problems = Problems()
    recipe = load(path, words, problems)
    graph = nodes(recipe, problems)
    for node in graph.values():
        with problems.gather(functools.partial(recipe.located, node.name)):
            check(node, graph)
    if recipe.model is not None:
        from pipeline.models.model_block import check as check_model

        with problems.gather(functools.partial(recipe.located, "")):
            check_model(recipe.model)
    if sources:
        for node in graph.values():
            with problems.gather(functools.partial(recipe.located, node.name)):
                ExternalContent(node.hash_cache).of(node.config)
        check_records(recipe, graph, graph.values(), problems)
    problems.refuse()
    return recipe, graph


def check_runnable(
    recipe: Recipe, graph: dict[str, Node], node: Node, absent: set[str], problems: Problems, *, here: bool
) -> None:
    """Check that a stage can run: on this machine, or with `here=False` on others, which see the same files and have
    the same packages. absent: stages that have no output here and cannot be run here. What is wrong is added to
    `problems`."""
    located = functools.partial(recipe.located, node.name)
    with problems.gather(located):
        check(node, graph)
    if here:
        with problems.gather(located):
            _check_processes(node)
    with problems.gather(located):
        node.config.check_machine()
    with problems.gather(located):
        ExternalContent(node.hash_cache).of(node.config)
    for key, source in node.parents.items():
        if source not in graph and not external_inputs.must_be_fetched(source):
            with problems.gather(located):
                external_inputs.read(key, source, accepted_kinds(node, key))
        if source in absent:
            message = (
                f"stages.{node.name}.inputs.{key}: {source} has no output on this machine and cannot be run:"
                f" {graph[source].reason}"
            )
            problems.add(located(message))


def fetch_inputs(recipe: Recipe, graph: dict[str, Node], stages: Iterable[Node], problems: Problems) -> None:
    """Download the models that these stages name and that are not on this machine, if nothing else is wrong, and check
    what they must fit. What is wrong is added to `problems`."""
    missing = []
    for node in stages:
        for key, source in node.parents.items():
            if source not in graph and external_inputs.must_be_fetched(source):
                missing.append((node, key, source))
    if missing:
        problems.refuse()
    for node, key, source in missing:
        with problems.gather(functools.partial(recipe.located, node.name)):
            external_inputs.fetch(key, source)
            check(node, graph)


def _check_processes(node: Node) -> None:
    """Raise UserError if the processes of a stage cannot be started on this machine."""
    run = node.config.run
    if (run.nodes or 1) > 1:
        raise UserError(
            f"stage {node.name} asks for {run.nodes} nodes, but alma run starts processes on this machine only;"
            f" add --on slurm, or give {node.name}.run.nodes=1"
        )
    if run.device not in ("auto", "cpu"):
        from pipeline.core.distributed import choose_device

        choose_device(node.config, run.processes)
    node.config.check_device()


def lacking(node: Node) -> list[str]:
    """What this machine lacks for a stage, such as optional packages. Not a mistake of the recipe, which may be checked
    on another machine than the one that will run it."""
    problems = Problems()
    with problems.gather():
        node.config.check_machine()
    return [f"not on this machine: {line}" for line in problems.lines]


def check_records(recipe: Recipe, graph: dict[str, Node], stages: Iterable[Node], problems: Problems) -> None:
    """Read the first records of every local source of `stages`, and their chat template if it exists already. What is
    wrong is added to `problems`. Missing files are not reported here, because ExternalContent does."""
    for node in stages:
        with problems.gather(functools.partial(recipe.located, node.name)):
            node.config.check_records(planned_inputs(node, graph))
