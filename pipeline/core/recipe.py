"""What a recipe may say: YAML 1.2 in, one strict pydantic model per stage out.

    recipe = load("recipes/quickstart.yaml", ["pretrain.optimizer.lr=3e-4"])
    recipe.stages["pretrain"].optimizer.lr

A mistake ends in a UserError that names file, line, key, what was found and the nearest key that would have been right.
The models of the stages stand beside the code that uses them (`pipeline/STAGE.py: Config`); this file holds what all
share.
"""

import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator
from ruamel.yaml import YAML

from pipeline.core.config import LONGEST_NAME, PATTERNS, Name, StageConfig, Strict, dump
from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe_file import nearest, override, place_of, read, shown

KINDS = ("clean", "tokenizer", "pack", "pretrain", "sft", "reward", "dpo", "ppo", "assess", "export")


class Recipe(Strict):
    """A whole recipe. Build it with `load`, which injects `seed` and `model` into the stages that have these keys."""

    name: Name
    """Folder of this recipe's runs below `output`."""
    output: Path = Path("runs")
    """Where runs are kept, relative to the folder the command is started in."""
    seed: int = Field(0, ge=0)
    """Seed of every stage that does not give its own."""
    sources: dict[str, dict[str, Any]] = {}
    """Places of records that several stages read: a stage's source takes one over with `from: NAME` and adds its own
    keys."""
    model: dict[str, Any] | None = None
    """The model that `pretrain` builds: `family` and the keys of its `transformers` configuration. A stage's own
    `model` changes single keys of it, or is another with its own `family` or `from`."""
    stages: dict[str, Any]
    """Stages in order; each key is a name, and its kind unless `kind` says otherwise."""

    _places: dict[tuple, str] = PrivateAttr(default_factory=dict)
    _path: str = PrivateAttr("")
    _broken: frozenset[str] = PrivateAttr(frozenset())

    @field_validator("output")
    @classmethod
    def _can_be_a_path(cls, value: Path) -> Path:
        if any(len(os.fsencode(part)) > 255 for part in value.parts) or len(os.fsencode(value)) > 3000:
            raise ValueError(f"is too long for a path ({len(str(value)):,} characters)")
        return value

    @property
    def root(self) -> Path:
        return self.output / self.name

    @property
    def broken(self) -> frozenset[str]:
        """Stages whose keys are wrong and that `stages` therefore lacks (`load` with `problems`)."""
        return self._broken

    def _place(self, key: tuple) -> str:
        """Where a key or block was given: on the command line, if a word changed something of it."""
        within = [place for inner, place in self._places.items() if inner[: len(key)] == key]
        return next((place for place in reversed(within) if place.startswith("command line")), self._places[key])

    def located(self, stage: str, message: str) -> str:
        """A message about a stage with file and line before it: of the first key that the message names, else of the
        stage's block."""
        if not self._path:
            return message
        for word in re.findall(r"[A-Za-z_][\w.-]*", message):
            key = tuple(word.rstrip(".").split("."))
            for candidate in ((*key,) if key[0] == "stages" else ("stages", stage, *key), key):
                if candidate in self._places and candidate != ("stages", stage):
                    return f"{self._place(candidate)}: {message}"
        return f"{place_of(('stages', stage), self._places, self._path)}: {message}"


def module_of(kind: str):
    """The module of a stage kind: it has `Config`, `VERSION`, `INPUTS` and `run`. Heavy imports stay inside its
    functions."""
    return importlib.import_module(f"pipeline.{kind}")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), problems: Problems | None = None) -> Recipe:
    """Read a recipe, apply `extends` and `key=value` overrides, check every key.

    Raises UserError with all mistakes. With `problems` they are added there instead, and the recipe has the stages
    that are right; what leaves no recipe at all is raised all the same.
    """
    found = Problems()
    places: dict[tuple, str] = {}
    tree = read(Path(path), places)
    for word in overrides:
        with found.gather():
            override(tree, word, places, list(Recipe.model_fields))
    top = {key: value for key, value in tree.items() if key != "stages"}
    recipe = None
    with found.gather():
        recipe = _validated(Recipe, {**top, "stages": {}}, (), places, str(path))
    stages = tree.get("stages")
    if not isinstance(stages, dict) or not stages:
        found.add(
            f"{place_of(('stages',), places, path)}: `stages` must name at least one stage; the kinds are"
            f" {', '.join(KINDS)}"
        )
        stages = {}
    # With a mistake at the top, the stages are checked against a recipe that has none of it.
    shared = recipe or Recipe(name="unnamed", stages={}, sources=_blocks(top.get("sources")))
    parsed: dict[str, StageConfig] = {}
    broken: set[str] = set()
    for name, block in stages.items():
        if block is None:  # `dpo: ~` in a recipe that extends another takes the stage out
            continue
        try:
            parsed[name] = _stage(name, block, shared, places, path)
        except UserError as error:
            found.take(error)
            broken.add(name)
    if stages and not parsed and not broken:
        found.add(f"{path}: every stage was taken out; keep at least one")
    if problems is None or recipe is None:
        found.refuse()
    else:
        for line in found.lines:
            problems.add(line)
    recipe = recipe.model_copy(update={"stages": parsed})
    recipe._places, recipe._path, recipe._broken = places, str(path), frozenset(broken)
    return recipe


def _blocks(value: Any) -> dict:
    """The blocks of a block, where some of it may be anything."""
    return {key: block for key, block in value.items() if isinstance(block, dict)} if isinstance(value, dict) else {}


def _stage(name: str, block: Any, recipe: Recipe, places: dict, path: Any) -> StageConfig:
    """One stage of a recipe, with what it takes over from the top. Raises UserError."""
    where = ("stages", name)
    place = place_of(where, places, path)
    if not isinstance(block, dict):
        raise UserError(
            f"{place}: stages.{name} must be a block of keys, found {shown(block)}; an empty stage is written {{}}"
        )
    if name in Recipe.model_fields:
        raise UserError(
            f"{place}: no stage may be called {name}, because that is a top-level key; choose another name and give"
            " `kind`"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > LONGEST_NAME:
        raise UserError(f"{place}: stage name {shown(name)} must be letters, digits, - and _, at most {LONGEST_NAME}")
    kind = block.get("kind", name)
    if kind not in KINDS:
        raise UserError(f"{place}: stages.{name} has the unknown kind {shown(kind)}; {nearest(str(kind), KINDS)}")
    model = module_of(kind).Config
    filled = {**block, "kind": kind}
    filled.setdefault("seed", recipe.seed if model.uses_seed(block) else 0)
    problems = Problems()
    if isinstance(block.get("sources"), dict) and "sources" in model.model_fields:
        unused = _inner_model(model.model_fields["sources"].annotation, None).UNUSED
        filled["sources"] = {}
        for key, source in block["sources"].items():
            with problems.gather():
                filled["sources"][key] = _from(source, (*where, "sources", key), recipe.sources, unused, places, path)
    if "model" in model.model_fields and recipe.model is not None:
        own = filled.get("model", {})
        # a few keys, as in pretrain.model.hidden_size=64, and not a model of its own
        if isinstance(own, dict) and not {"family", "from"} & own.keys():
            filled["model"] = {**recipe.model, **own}
    config = None
    with problems.gather():
        config = _validated(model, filled, where, places, str(path))
    problems.refuse()
    return config


def _from(source: Any, where: tuple, shared: dict, without: frozenset[str], places: dict, path: Any) -> Any:
    """A stage's source with `from: NAME` replaced by what the top-level `sources` say of NAME, but for the keys
    `without`, which mean nothing to this stage; the stage's own keys win."""
    if not isinstance(source, dict) or "from" not in source:
        return source
    name = source["from"]
    if not isinstance(name, str) or name not in shared:
        raise UserError(
            f"{place_of((*where, 'from'), places, path)}: {'.'.join(where)}.from: the recipe's `sources` have no"
            f" {shown(name)}; {nearest(str(name), shared) if shared else 'there are none'}"
        )
    for key in list(places):
        if key[:2] == ("sources", name):
            places.setdefault((*where, *key[2:]), places[key])
    taken = {key: value for key, value in shared[name].items() if key not in without}
    return {**taken, **{key: value for key, value in source.items() if key != "from"}}


# ---- messages --------------------------------------------------------------------------------------------------------


def _validated(model: type[BaseModel], tree: dict, prefix: tuple, places: dict, path: str):
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problems = Problems()
        for item in error.errors():
            problems.add(_sentence(item, model, prefix, places, path))
    problems.refuse()


def _sentence(item: dict, model: type[BaseModel], prefix: tuple, places: dict, path: str) -> str:
    # pydantic's location holds names of union members too; only what stands in the file is a key
    location = list(item["loc"])
    key = (*prefix, *location)
    dotted = ".".join(str(part) for part in key)
    place = place_of(key, places, path)
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        owner = _fields_at(model, location[:-1])
        return f"{place}: unknown key {dotted[:300]}; {nearest(str(location[-1])[:300], owner)}"
    if item["type"] == "missing":
        return f"{place}: the key {dotted} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {dotted + ': ' if location else ''}{message}"
    wanted = PATTERNS.get(item.get("ctx", {}).get("pattern")) or {"path_type": "a path"}.get(
        item["type"],
        message.removeprefix("Input should be ").replace("a valid integer", "a whole number").replace("a valid ", "a "),
    )
    if location[-1:] == ["[key]"]:
        return f"{place}: {dotted.removesuffix(f'.{found}.[key]')} has the name {shown(found)}, expected {wanted}"
    return f"{place}: {dotted} is {shown(found)}, expected {wanted}"


def _fields_at(model: Any, location: list) -> list[str]:
    """Names of the keys that the block at `location` may have."""
    for part in location:
        field = getattr(model, "model_fields", {}).get(part)
        annotation = field.annotation if field else model
        model = _inner_model(annotation, model)
    return list(getattr(model, "model_fields", {}))


def _inner_model(annotation: Any, fallback: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _inner_model(inner, None)
        if found is not None:
            return found
    return fallback


def resolved(recipe: Recipe) -> str:
    """The recipe with everything written out, in its order (the order of stages decides their default inputs)."""
    buffer = io.StringIO()
    YAML(typ="rt", pure=True).dump(
        {
            **dump(recipe.model_copy(update={"stages": {}})),
            "stages": {name: dump(config) for name, config in recipe.stages.items()},
        },
        buffer,
    )
    return buffer.getvalue()


def make_root(recipe: Recipe) -> None:
    try:
        recipe.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: the folder {recipe.root} cannot be made ({error.strerror}); give another `output`"
        ) from None
