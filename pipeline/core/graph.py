"""The graph of a recipe: its stages, what each one reads, what decides its result, and which are out of date and why.

`nodes` gives the stages in order, `check` says what their recipe alone tells of them, `examine` compares each with what
is published. Running them is pipeline/core/chain.py's.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.artifact import Artifact
from pipeline.core.config import StageConfig
from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe import Recipe, module_of
from pipeline.core.recipe_file import shown


@dataclass
class Node:
    """A stage in its chain. `state` is one of: up to date, stale, interrupted, missing, damaged, waits, running, and
    absent: without output and sources on this machine, which nothing needs."""

    name: str
    config: StageConfig
    parents: dict[str, str]  # input -> stage name, or path of an outside folder
    folder: Path
    inputs: dict[str, Artifact] = field(default_factory=dict)
    identity: dict | None = None
    output: Artifact | None = None
    state: str = "missing"
    reason: str = ""
    absent: list[str] = field(default_factory=list)
    """Sources and inputs that are not on this machine: the stage cannot be run here."""

    @property
    def unavailable(self) -> bool:
        """Whether the stage has no output here and cannot be given one."""
        return bool(self.absent) and self.output is None


def nodes(recipe: Recipe, problems: Problems | None = None) -> dict[str, Node]:
    """Stages in an order in which parents come first. Raises UserError for inputs that cannot be had; with `problems`
    they are added there instead."""
    gathered = Problems() if problems is None else problems
    found: dict[str, Node] = {}
    for name, config in recipe.stages.items():
        found[name] = Node(name, config, _parents(recipe, name, config, gathered), recipe.root / name)
    if problems is None:
        gathered.refuse()
    ordered: dict[str, Node] = {}
    trail: list[str] = []

    def visit(name: str) -> None:
        if name in ordered:
            return
        if name in trail:
            circle = " -> ".join([*trail[trail.index(name) :], name])
            raise UserError(recipe.located(name, f"stages.{name}.inputs: inputs go round in a circle: {circle}"))
        trail.append(name)
        for parent in found[name].parents.values():
            if parent in found:
                visit(parent)
        trail.pop()
        ordered[name] = found[name]

    for name in found:
        visit(name)
    return ordered


def _parents(recipe: Recipe, name: str, config: StageConfig, problems: Problems) -> dict[str, str]:
    """Input -> stage. `INPUTS` of a kind: name -> kinds it accepts; `name?` may be absent; `*` takes any number, by
    default all earlier ones."""
    wanted = dict(module_of(config.kind).INPUTS)
    anything = wanted.pop("*", ())
    optional = {key.removesuffix("?") for key in wanted if key.endswith("?")}
    wanted = {key.removesuffix("?"): kinds for key, kinds in wanted.items()}
    earlier = list(recipe.stages)[: list(recipe.stages).index(name)]
    parents: dict[str, str] = {}
    for key, source in config.inputs.items():
        kinds = wanted.get(key, anything)
        wrong = _wrong_input(recipe, name, key, source, kinds, list(wanted))
        if wrong:
            problems.add(recipe.located(name, wrong))
        elif source not in recipe.broken:
            parents[key] = source
    for key, kinds in wanted.items():
        if key in parents or key in optional or key in config.inputs:
            continue
        nearest = [stage for stage in earlier if recipe.stages[stage].kind in kinds]
        if nearest:
            parents[key] = nearest[-1]
        elif key not in config.optional() and not recipe.broken:  # a stage whose keys are wrong may be the one
            problems.add(
                recipe.located(
                    name,
                    f"stages.{name}: needs the input {key!r}, a stage of kind {' or '.join(kinds)}, and none stands"
                    f" before it; add one or give inputs.{key}",
                )
            )
    if anything and not set(parents) - set(wanted):
        parents.update(
            {stage: stage for stage in earlier if recipe.stages[stage].kind in anything and stage not in parents}
        )
    return parents


def _wrong_input(
    recipe: Recipe, name: str, key: str, source: str, kinds: tuple[str, ...], takes: list[str]
) -> str | None:
    """What is wrong with an input that the recipe names, or None."""
    if not kinds:
        kind = recipe.stages[name].kind
        return f"stages.{name}.inputs: {kind} has no input {key!r}; it takes {', '.join(takes) or 'none'}"
    if source.startswith((".", "/")) or source in recipe.broken:
        return None
    if source not in recipe.stages or source == name:
        return (
            f"stages.{name}.inputs.{key}: {shown(source)} is no other stage of this recipe; it has"
            f" {', '.join(s for s in recipe.stages if s != name)} (the path of a folder begins with . or /)"
        )
    if recipe.stages[source].kind not in kinds:
        return (
            f"stages.{name}.inputs.{key}: stage {source!r} is of kind {recipe.stages[source].kind}, expected"
            f" {' or '.join(kinds)}"
        )
    return None


def check(node: Node, graph: dict[str, Node]) -> None:
    """What can be told of a stage from its recipe alone. Raises UserError with all that is wrong."""
    problems = Problems()
    with problems.gather():
        node.config.check(node.config.run.world)
    if node.config.kind == "tokenizer" and node.config.weights and node.parents.get("data") in graph:
        there = graph[node.parents["data"]].config.sources
        for source in node.config.weights:
            if source not in there:
                problems.add(
                    f"stages.{node.name}.weights: its text has no source {source!r}; it has {', '.join(sorted(there))}"
                )
    known = _packed_sources(node, graph)
    mixtures = [
        ("mixture", getattr(node.config, "mixture", None) or {}),
        *(("mixture_changes", change.mixture) for change in getattr(node.config, "mixture_changes", [])),
    ]
    for key, source in [(key, source) for key, mixture in mixtures for source in mixture] if known else []:
        if source not in known:
            problems.add(
                f"stages.{node.name}.{key}: its text has no source {source!r}; it has {', '.join(sorted(known))}"
            )
    for key, source in node.parents.items():
        with problems.gather():
            _check_parent(node, key, source, graph)
    problems.refuse()


def _check_parent(node: Node, key: str, source: str, graph: dict[str, Node]) -> None:
    if source not in graph and (not os.path.isdir(source) or not os.listdir(source)):
        raise UserError(f"stages.{node.name}.inputs.{key}: {shown(source)} is not a folder with files in it")
    wanted = getattr(node.config, "sequence_length", None)
    if not wanted or not _reads_rows(node, key):
        return
    longest = model_positions(source, graph)
    pretrains = node.config.kind == "pretrain"
    if longest and wanted > longest and not (pretrains and "rope_parameters" in node.config.model_changes):
        if source in graph:
            found = f"{wanted} tokens are more than the {longest} positions that {source} gives its model"
        else:
            found = f"{wanted} is more than the {longest} positions of the model in {shown(source)}"
        raise UserError(
            f"stages.{node.name}.sequence_length: {found}; use {longest} or fewer, or a model that was pretrained with"
            " more" + " (or scale positions, model_changes: {rope_parameters: ...})" * pretrains
        )


def _reads_rows(node: Node, key: str) -> bool:
    """Does this stage give rows of its sequence_length to the model behind this input?"""
    if node.config.kind == "assess":
        return key not in ("tokens", "reward") and "tokens" in node.parents and node.config.max_rows > 0
    return key in ("model", "policy", "reward")


def model_positions(source: str, graph: dict[str, Node]) -> int | None:
    """Most tokens of a row that the model of a stage, or of an outside folder, has positions for; None for any number,
    or if it cannot be told. Pretraining decides it (its sequence_length), and what comes after keeps it."""
    from pipeline.models.families import FAMILIES, UNKNOWN

    if source not in graph:
        return _folder_positions(Path(source))
    config, parents = graph[source].config, graph[source].parents
    above = parents.get("model") or parents.get("policy")
    if config.kind != "pretrain":
        return model_positions(above, graph) if above else None
    if above is None:
        family = FAMILIES.get((config.model or {}).get("family"), UNKNOWN)
        return None if family.unlimited_positions else config.sequence_length
    before = model_positions(above, graph)
    return max(before, config.sequence_length) if before else None


def _folder_positions(path: Path) -> int | None:
    from transformers import AutoConfig

    from pipeline.models.families import positions

    folder = path / "model" if (path / "model").is_dir() else path
    try:
        made = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):  # the stage itself says what is wrong with it
        return None
    return positions(made.get_text_config())


def _packed_sources(node: Node, graph: dict[str, Node]) -> list[str]:
    """Names of the sources in the tokens that a stage reads, as far as they can be told before they are made."""
    tokens = node.parents.get("tokens")
    if tokens in graph:
        data, shards = graph[tokens].parents.get("data"), list(getattr(graph[tokens].config, "shards", {}))
        return [*graph[data].config.sources, *shards] if data in graph else shards if data is None else []
    try:
        return list(json.loads((Path(tokens or "") / "index.json").read_text())["splits"]["train"])
    except (OSError, ValueError, KeyError):  # the stage itself says what is wrong with it
        return []


def accepts(node: Node, key: str) -> tuple[str, ...]:
    wanted = module_of(node.config.kind).INPUTS
    return wanted.get(key) or wanted.get(f"{key}?") or wanted.get("*", ())


def ancestors(graph: dict[str, Node], names: list[str]) -> set[str]:
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [parent for parent in graph[name].parents.values() if parent in graph]
    return found
