"""The graph of a recipe: its stages, and which inputs each of them reads.

`nodes` returns the stages in order, and `check` finds what the recipe alone shows to be wrong. Which stages are out of
date is decided in pipeline/core/status.py, and pipeline/core/chain.py runs them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.core import external_inputs
from pipeline.core.artifact import Artifact
from pipeline.core.config import PlannedInput, StageConfig
from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe import Recipe, module_of
from pipeline.core.recipe_file import short_repr
from pipeline.models.references import is_reference, parse

State = Literal["up to date", "stale", "interrupted", "missing", "damaged", "waits", "running", "absent"]
"""waits: a stage before it is not up to date. absent: no output and no sources on this machine, and nothing needs
them."""


@dataclass
class Node:
    """A stage in its chain."""

    name: str
    config: StageConfig
    parents: dict[str, str]  # input -> name of a stage, or what external_inputs.py reads
    folder: Path
    inputs: dict[str, Artifact] = field(default_factory=dict)
    identity: dict | None = None
    output: Artifact | None = None
    state: State = "missing"
    reason: str = ""
    absent: list[str] = field(default_factory=list)
    """Sources and inputs that are not on this machine: the stage cannot be run here."""

    @property
    def unavailable(self) -> bool:
        """Whether the stage has no output here and cannot be run here either."""
        return bool(self.absent) and self.output is None

    @property
    def hash_cache(self) -> Path:
        """File with the hashes of external files, shared by the stages of a recipe."""
        return self.folder.parent / ".hashes.json"


def nodes(recipe: Recipe, problems: Problems | None = None) -> dict[str, Node]:
    """Stages in an order in which parents come first. Raises UserError for inputs that do not exist; with `problems`
    they are added there instead."""
    collected = Problems() if problems is None else problems
    unordered: dict[str, Node] = {}
    for name, config in recipe.stages.items():
        parents = _parents(recipe, name, config, collected)
        unordered[name] = Node(name, config, parents, recipe.root / name)
    if problems is None:
        collected.refuse()
    ordered: dict[str, Node] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in trail:
            cycle = " -> ".join([*trail[trail.index(name) :], name])
            raise UserError(recipe.located(name, f"stages.{name}.inputs: cyclic inputs: {cycle}"))
        trail.append(name)
        for parent in unordered[name].parents.values():
            if parent in unordered:
                visit(parent)
        trail.pop()
        ordered[name] = unordered[name]

    for name in unordered:
        visit(name)
    return ordered


def _parents(recipe: Recipe, name: str, config: StageConfig, problems: Problems) -> dict[str, str]:
    """Input -> stage or folder.

    `INPUTS` of a kind: name of an input -> kinds of stages that it accepts. `name?` is optional; `*` stands for any
    number of inputs, by default all earlier stages of these kinds.
    """
    declared = dict(module_of(config.kind).INPUTS)
    any_number = declared.pop("*", ())
    optional = {key.removesuffix("?") for key in declared if key.endswith("?")}
    declared = {key.removesuffix("?"): kinds for key, kinds in declared.items()}
    earlier = list(recipe.stages)[: list(recipe.stages).index(name)]
    parents: dict[str, str] = {}
    for key, source in config.inputs.items():
        kinds = declared.get(key, any_number)
        problem = _input_problem(recipe, name, key, source, kinds, list(declared))
        if problem:
            problems.add(recipe.located(name, problem))
        elif source not in recipe.broken:
            parents[key] = source
    for key, kinds in declared.items():
        if key in parents or key in optional or key in config.inputs or key in config.unread():
            continue
        candidates = [stage for stage in earlier if recipe.stages[stage].kind in kinds]
        if candidates:
            parents[key] = candidates[-1]
        elif key not in config.optional() and not recipe.broken:  # a stage with wrong keys may be the one that is meant
            message = (
                f"stages.{name}: needs the input {key!r}, a stage of kind {' or '.join(kinds)}, but there is none"
                f" before it; add one or give inputs.{key}"
            )
            problems.add(recipe.located(name, message))
    if any_number and not set(parents) - set(declared):
        for stage in earlier:
            if recipe.stages[stage].kind in any_number and stage not in parents:
                parents[stage] = stage
    return parents


def _input_problem(
    recipe: Recipe, name: str, key: str, source: str, kinds: tuple[str, ...], declared: list[str]
) -> str | None:
    """What is wrong with an input that the recipe names, or None."""
    kind = recipe.stages[name].kind
    if not kinds:
        return f"stages.{name}.inputs: {kind} has no input {key!r}; expected {', '.join(declared) or 'none'}"
    if source in recipe.broken:
        return None
    if is_reference(source):
        try:
            parse(source)
        except UserError as error:
            return f"stages.{name}.inputs.{key}: {error}"
        return None
    if source not in recipe.stages or source == name:
        others = ", ".join(stage for stage in recipe.stages if stage != name)
        return (
            f"stages.{name}.inputs.{key}: {short_repr(source)} is not another stage of this recipe; expected one of"
            f" {others} (the path of a folder begins with . or /, a model of a hub is written ORG/NAME@REVISION)"
        )
    if recipe.stages[source].kind not in kinds:
        return (
            f"stages.{name}.inputs.{key}: stage {source!r} is of kind {recipe.stages[source].kind}, expected"
            f" {' or '.join(kinds)}"
        )
    return None


def accepted_kinds(node: Node, key: str) -> tuple[str, ...]:
    """Kinds of stages that an input may come from."""
    declared = module_of(node.config.kind).INPUTS
    return declared.get(key) or declared.get(f"{key}?") or declared.get("*", ())


def planned_inputs(node: Node, graph: dict[str, Node]) -> dict[str, PlannedInput]:
    """The inputs of a stage, as far as they are known before it runs."""
    views: dict[str, PlannedInput] = {}

    def view(source: str) -> PlannedInput:
        if source not in graph:
            return PlannedInput(source, folder=external_inputs.folder_of(source))
        if source not in views:
            parent = graph[source]
            is_current = parent.state == "up to date" and parent.output is not None
            folder = parent.output.path if is_current else None
            inputs = {key: view(name) for key, name in parent.parents.items()}
            views[source] = PlannedInput(source, parent.config, inputs, folder)
        return views[source]

    return {key: view(source) for key, source in node.parents.items()}


def check(node: Node, graph: dict[str, Node]) -> None:
    """Check what the recipe alone says of a stage. Raises UserError with everything that is wrong."""
    problems = Problems()
    with problems.gather():
        node.config.check(node.config.run.world)
    for key, source in node.parents.items():
        reason = None if source in graph else external_inputs.problem(source)
        if reason:
            problems.add(f"stages.{node.name}.inputs.{key}: {reason}")
    with problems.gather(lambda message: f"stages.{node.name}.{message}"):
        node.config.check_inputs(planned_inputs(node, graph))
    problems.refuse()


def ancestors(graph: dict[str, Node], names: list[str]) -> set[str]:
    """These stages and all that they are made from."""
    visited: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        if name not in visited:
            visited.add(name)
            pending += [parent for parent in graph[name].parents.values() if parent in graph]
    return visited
