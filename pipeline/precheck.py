"""What can be refused before the first stage runs: keys, inputs, layouts and models of a recipe, all mistakes at once.

`alma recipe check` and `alma run` call it, so that nothing that a recipe says is found wrong after hours.
"""

from pathlib import Path

from pipeline.errors import Problems
from pipeline.graph import Node, check, nodes
from pipeline.recipe import Recipe, load


def checked(path: str | Path, words: list[str] = ()) -> tuple[Recipe, dict[str, Node]]:
    """A recipe and its graph. Raises UserError with every mistake of every stage, file and line before each."""
    problems = Problems()
    recipe = load(path, words, problems)
    graph = nodes(recipe, problems)
    for node in graph.values():
        with problems.gather(lambda message, name=node.name: recipe.located(name, message)):
            check(node, graph)
    if recipe.model is not None:
        from pipeline.models.build import check as check_model

        with problems.gather(lambda message: recipe.located("", message)):
            check_model(recipe.model)
    problems.refuse()
    return recipe, graph
