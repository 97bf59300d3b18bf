"""Which runs `alma sweep` makes: the members of a grid or of a random search over keys of a recipe, and which stages
they share.

    plan = sweep_plan("my.yaml", ["pretrain.optimizer.lr=1e-3,3e-3", "pretrain.steps=200"])
    plan.members[0].name, plan.members[0].recipe

A member is a run like any other, named after its values, so that a sweep with more values keeps the members that it
has. Stages that no swept key reaches are run once, under the recipe's own name, and members read their outputs.
"""

import hashlib
import json
import math
import os
import random
import re
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from pipeline.core.config import MAX_NAME_LENGTH
from pipeline.core.errors import Problems, UserError
from pipeline.core.graph import Node, ancestors, nodes
from pipeline.core.recipe import Recipe, load
from pipeline.core.recipe_file import short_repr
from pipeline.core.seeds import derive

MOST_MEMBERS = 1000


@dataclass(frozen=True)
class Range:
    """Numbers between two others, for random search."""

    low: float
    high: float
    is_log: bool
    is_whole: bool

    def draw(self, generator: random.Random) -> str:
        if self.is_log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        return str(round(value)) if self.is_whole else f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """A key that differs between members."""

    key: str
    values: list[str]
    """As they are written on the command line; empty for a range."""
    range: Range | None = None


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    values: dict[str, str]
    """Key -> value, as on the command line."""
    recipe: Recipe
    """With all of its stages."""


@dataclass(frozen=True)
class SweepPlan:
    """The runs of a sweep."""

    recipe: str
    """As the command line names it."""
    axes: list[Axis]
    fixed: list[str]
    """Overrides that all members have."""
    base: Recipe
    members: list[Member]
    shared: list[str]
    """Stages that are the same in all members and that they read, in order."""
    varied: list[str]
    """Stages that each member runs, in order."""
    folder: Path = field(default=Path())
    """For the results."""

    def words(self, member: Member) -> list[str]:
        """Overrides with which `alma run` makes this member's values in one run of the whole recipe."""
        return [*self.fixed, *(f"{key}={value}" for key, value in member.values.items())]


def sweep_plan(recipe: str, words: list[str], stages: list[str], count: int | None, seed: int) -> SweepPlan:
    """count: members of a random search; None: all of the grid. stages: run only these and what they need. Raises
    UserError with the mistakes of all members."""
    axes, fixed = _axes(words, is_random=count is not None)
    base = load(recipe, fixed)
    problems = Problems()
    members = []
    for values in _combinations(axes, count, seed):
        name = _member_name(base.name, values, fixed)
        overrides = [*fixed, *(f"{key}={value}" for key, value in values.items()), f"name={name}"]
        with problems.gather():
            members.append(Member(name, values, load(recipe, overrides)))
    problems.refuse()
    shared, varied = _split(base, [member.recipe for member in members], stages)
    mark = _mark([base.name, *sorted(words), *stages, str(count), str(seed if count else "")])
    folder = base.output / f"{base.name}.sweep-{mark}"
    return SweepPlan(recipe, axes, fixed, base, members, shared, varied, folder)


# ---- words of the command line ---------------------------------------------------------------------------------------


def _axes(words: list[str], is_random: bool) -> tuple[list[Axis], list[str]]:
    """(keys that differ, overrides that all members have)."""
    axes: list[Axis] = []
    fixed: list[str] = []
    for word in words:
        key, _, text = word.partition("=")
        if key == "name":
            raise UserError("name: the members of a sweep are named after their values; remove name=")
        if key in [axis.key for axis in axes]:
            raise UserError(f"{key} is given twice; write all its values in one word")
        values = _values(text)
        scope = _range(key, text)
        if scope:
            if not is_random:
                raise UserError(f"{short_repr(word)}: a grid needs values, such as {key}=1,2; ranges need --random N")
            axes.append(Axis(key, [], scope))
        elif len(values) > 1:
            if "" in values:
                raise UserError(f"{short_repr(word)}: one of its values is empty")
            if len(set(values)) < len(values):
                raise UserError(f"{short_repr(word)}: a value is given twice")
            axes.append(Axis(key, values))
        else:
            fixed.append(word)
    if not axes:
        raise UserError(
            "nothing differs between members: give a key several values, such as pretrain.optimizer.lr=1e-4,3e-4"
        )
    return axes, fixed


def _values(text: str) -> list[str]:
    """The values between commas that are in no brackets and no quotes."""
    values, depth, quote, begin = [], 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == "," and depth == 0:
            values.append(text[begin:place].strip())
            begin = place + 1
    return [*values, text[begin:].strip()]


def _range(key: str, text: str) -> Range | None:
    found = re.fullmatch(r"(log|linear):(.+?)\.\.(.+)", text)
    if not found:
        return None
    scale, *bounds = found.groups()
    try:
        low, high = (float(bound) for bound in bounds)
    except ValueError:
        raise UserError(f"{key}: {short_repr(text)} is not a range; write for example log:1e-4..1e-2") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (scale == "log" and low <= 0):
        raise UserError(
            f"{key}: {short_repr(text)}: a range goes from a number to a larger one, and one by log begins above 0"
        )
    return Range(low, high, scale == "log", all(re.fullmatch(r"-?\d+", bound) for bound in bounds))


def _combinations(axes: list[Axis], count: int | None, seed: int) -> list[dict[str, str]]:
    """The values of each member. Random ones are drawn without repetition, each a function of the seed and its number,
    so that a larger count adds members."""
    if count is None:
        total = math.prod(len(axis.values) for axis in axes)
        if total > MOST_MEMBERS:
            raise UserError(f"the grid has {total:,} members, more than {MOST_MEMBERS:,}; use --random N")
        return [dict(zip([axis.key for axis in axes], values)) for values in product(*(axis.values for axis in axes))]
    chosen: list[dict[str, str]] = []
    for number in range(100 * count):
        generator = random.Random(derive(seed, "sweep", number))
        values = {
            axis.key: axis.range.draw(generator) if axis.range else generator.choice(axis.values) for axis in axes
        }
        if values not in chosen:
            chosen.append(values)
        if len(chosen) == count:
            return chosen
    raise UserError(f"--random {count}: these keys have only {len(chosen)} combinations; use fewer, or a grid")


def _member_name(name: str, values: dict[str, str], fixed: list[str]) -> str:
    """NAME.lr0.001-steps200: a name of a run, the same whenever the values are the same."""
    parts = []
    for key, value in values.items():
        parts.append(key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._-]+", "_", value).strip("_"))
    label = "-".join(parts)
    short = [key.rpartition(".")[2] for key in values]
    is_exact = all(re.fullmatch(r"[A-Za-z0-9._-]+", value) for value in values.values())
    if fixed:
        label = f"{label}.{_mark(sorted(fixed))}"
    room = MAX_NAME_LENGTH - len(name) - 1
    if not is_exact or len(set(short)) < len(short) or len(label) > room:
        label = f"{label[: max(0, room - 9)]}-{_mark([json.dumps(values, sort_keys=True), *sorted(fixed)])}"
    return f"{name}.{label}"


def _mark(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:8]


# ---- stages ----------------------------------------------------------------------------------------------------------


def _split(base: Recipe, recipes: list[Recipe], stages: list[str]) -> tuple[list[str], list[str]]:
    """(shared stages, varied stages). A stage varies if its keys differ between members, or if one that it reads
    varies. Raises UserError if the members have other stages or inputs than each other."""
    graphs = [nodes(recipe) for recipe in recipes]
    first = graphs[0]
    parents = {name: node.parents for name, node in first.items()}
    for graph in graphs[1:]:
        if {name: node.parents for name, node in graph.items()} != parents:
            raise UserError(
                "a swept key changes which stages there are or what they read; compare such recipes with alma run and"
                " alma compare"
            )
    unknown = [stage for stage in stages if stage not in first]
    if unknown:
        raise UserError(f"{base.name}: no stage is called {unknown[0]!r}; expected one of {', '.join(first)}")
    needed = ancestors(first, stages) if stages else set(first)
    varied: list[str] = []
    for name, node in first.items():  # parents come first
        differs = any(recipe.stages[name] != recipes[0].stages[name] for recipe in recipes[1:])
        if differs or any(parent in varied for parent in node.parents.values()):
            varied.append(name)
    if len(recipes) > 1 and not set(varied) & needed:
        raise UserError("the swept keys change none of the stages that are run")
    if len(recipes) == 1:  # a random search of one: everything is its own
        varied = list(first)
    varied = [name for name in first if name in varied and name in needed]
    read = {parent for name in varied for parent in first[name].parents.values()}
    shared = [name for name in first if name in ancestors(first, [name for name in read if name in first])]
    return [name for name in shared if name not in varied], varied


def own_recipe(plan: SweepPlan, member: Member, outputs: dict[str, Path]) -> Recipe:
    """The recipe of a member's varied stages, which reads what the shared ones have published. outputs: their
    folders."""
    graph = nodes(member.recipe)
    words = [*plan.words(member), f"name={member.name}"]
    words += [f"{name}=" for name in graph if name not in plan.varied]
    for name in plan.varied:
        words += _input_words(graph[name], outputs)
    return load(plan.recipe, words)


def _input_words(node: Node, outputs: dict[str, Path]) -> list[str]:
    """Overrides that name all inputs of a stage, if it reads a shared one."""
    if not any(parent in outputs for parent in node.parents.values()):
        return []
    words = []
    for key, parent in node.parents.items():
        source = parent
        if parent in outputs:
            path = os.path.relpath(outputs[parent])
            source = path if path.startswith("..") else f"./{path}"
        words.append(f"{node.name}.inputs.{key}={json.dumps(source)}")
    return words
