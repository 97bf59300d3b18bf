"""A recipe: one strict pydantic model per stage, from a YAML 1.2 file.

    recipe = load("recipes/quickstart.yaml", ["pretrain.optimizer.lr=3e-4"])
    recipe.stages["pretrain"].optimizer.lr

A mistake raises a UserError with file, line, key, what was found and the nearest key or value that is valid. The models
of the stages are next to the code that uses them (`pipeline/STAGE.py: Config`); core/config.py has what they share.
"""

import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, field_validator
from ruamel.yaml import YAML

from pipeline.core.config import MAX_NAME_LENGTH, Name, StageConfig, Strict, dump
from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe_file import override, place_of, read, short_repr, suggestion
from pipeline.core.recipe_messages import block_class, validated
from pipeline.core.shipped_recipes import located

# Kinds of stages, each a script `pipeline/KIND.py`. To add one, write the script and add its name here.
KINDS = (
    "clean",
    "tokenizer",
    "pack",
    "pretrain",
    "sft",
    "reward",
    "prm",
    "dpo",
    "kto",
    "ppo",
    "grpo",
    "soup",
    "assess",
    "export",
)

# Blocks of a stage in which an entry may take over one of the recipe's `sources` with `from: NAME`.
SOURCE_BLOCKS = ("sources", "evaluate")

MAX_FILE_NAME, MAX_PATH = 255, 3000  # bytes


class Recipe(Strict):
    """A whole recipe. Build it with `load`, which gives `seed`, `sources` and `model` to the stages that have these
    keys."""

    name: Name
    """Folder of this recipe's runs below `output`."""
    output: Path = Path("runs")
    """Where runs are kept, relative to the folder in which the command is started."""
    seed: int = Field(0, ge=0)
    """Seed of every stage that does not set its own."""
    sources: dict[str, dict[str, Any]] = {}
    """Sources of records that several stages read: a stage's source takes one over with `from: NAME` and adds its own
    keys."""
    model: dict[str, Any] | None = None
    """The model that `pretrain` builds: `family` and the keys of its `transformers` configuration. A stage's own
    `model` changes single keys of it, or replaces it if it has `family` or `from`."""
    resources: dict[str, Any] = {}
    """What the jobs of all stages ask of a cluster, such as `partition` and `account`: keys of a stage's `resources`,
    which win. `nodes` and `gpus` differ between stages, so they are given per stage."""
    stages: dict[str, Any]
    """Stages in order; each key is the name of a stage, and its kind unless `kind` gives another."""

    _places: dict[tuple, str] = PrivateAttr(default_factory=dict)
    _path: str = PrivateAttr("")
    _broken: frozenset[str] = PrivateAttr(frozenset())

    @field_validator("output")
    @classmethod
    def _fits_a_path(cls, value: Path) -> Path:
        if any(len(os.fsencode(part)) > MAX_FILE_NAME for part in value.parts) or len(os.fsencode(value)) > MAX_PATH:
            raise ValueError(f"is too long for a path ({len(str(value)):,} characters)")
        return value

    @field_validator("resources")
    @classmethod
    def _is_not_of_a_stage(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in ("nodes", "gpus"):
            if key in value:
                raise ValueError(f"{key} differs between stages; give it in the `resources` of a stage")
        return value

    @property
    def root(self) -> Path:
        return self.output / self.name

    @property
    def broken(self) -> frozenset[str]:
        """Stages with wrong keys, which `stages` therefore does not have (`load` with `problems`)."""
        return self._broken

    def _place(self, key: tuple) -> str:
        """Where a key or block was given: on the command line if an override changed something of it."""
        places = [place for inner, place in self._places.items() if inner[: len(key)] == key]
        for place in reversed(places):
            if place.startswith("command line"):
                return place
        return self._places[key]

    def located(self, stage: str, message: str) -> str:
        """A message about a stage, with file and line in front: of the first key that the message names, or else of the
        stage's block."""
        if not self._path:
            return message
        for word in re.findall(r"[A-Za-z_][\w.-]*", message):
            key = tuple(word.rstrip(".").split("."))
            in_stage = key if key[0] == "stages" else ("stages", stage, *key)
            for candidate in (in_stage, key):
                if candidate in self._places and candidate != ("stages", stage):
                    return f"{self._place(candidate)}: {message}"
        return f"{place_of(('stages', stage), self._places, self._path)}: {message}"


def module_of(kind: str):
    """The module of a kind of stage: it has `Config`, `VERSION`, `INPUTS` and `run`. Its heavy imports are inside
    functions."""
    return importlib.import_module(f"pipeline.{kind}")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = (), problems: Problems | None = None) -> Recipe:
    """Read a recipe, apply `extends` and `key=value` overrides, check every key.

    path: a file, or the name of a recipe that comes with alma. Raises UserError with all mistakes. With `problems` they
    are added there instead, and the recipe has the stages without mistakes; only what leaves no recipe at all is
    raised.
    """
    collected = Problems()
    places: dict[tuple, str] = {}
    path = located(Path(path))
    tree = read(path, places)
    for word in overrides:
        with collected.gather():
            override(tree, word, places, list(Recipe.model_fields))
    top = {key: value for key, value in tree.items() if key != "stages"}
    recipe = None
    with collected.gather():
        recipe = validated(Recipe, top | {"stages": {}}, (), places, str(path))
    blocks = tree.get("stages")
    if not isinstance(blocks, dict) or not blocks:
        collected.add(
            f"{place_of(('stages',), places, path)}: `stages` must name at least one stage; the kinds are"
            f" {', '.join(KINDS)}"
        )
        blocks = {}
    # If the top level has mistakes, the stages are checked without it.
    shared = recipe or Recipe(name="unnamed", stages={}, sources=_inner_blocks(top.get("sources")))
    stages: dict[str, StageConfig] = {}
    broken: set[str] = set()
    for name, block in blocks.items():
        if block is None:  # `dpo: ~` in a recipe that extends another removes the stage
            continue
        try:
            stages[name] = _stage(name, block, shared, places, path)
        except UserError as error:
            collected.take(error)
            broken.add(name)
    if blocks and not stages and not broken:
        collected.add(f"{path}: every stage was removed; keep at least one")
    if problems is None or recipe is None:
        collected.refuse()
    else:
        for line in collected.lines:
            problems.add(line)
    recipe = recipe.model_copy(update={"stages": stages})
    recipe._places, recipe._path, recipe._broken = places, str(path), frozenset(broken)
    return recipe


def _shared_resources(shared: dict[str, Any], uses_device: bool) -> dict[str, Any]:
    """The recipe's `resources` for one stage: stages that use no GPU do not ask for a type of them."""
    return {key: value for key, value in shared.items() if uses_device or key != "gpu_type"}


def _inner_blocks(value: Any) -> dict:
    """The blocks in a block that may be anything."""
    if not isinstance(value, dict):
        return {}
    return {key: block for key, block in value.items() if isinstance(block, dict)}


def _stage(name: str, block: Any, recipe: Recipe, places: dict, path: Any) -> StageConfig:
    """One stage of a recipe, with what it takes over from the top level. Raises UserError."""
    where = ("stages", name)
    place = place_of(where, places, path)
    if not isinstance(block, dict):
        raise UserError(
            f"{place}: stages.{name} must be a block of keys, found {short_repr(block)}; an empty stage is written {{}}"
        )
    if name in Recipe.model_fields:
        raise UserError(
            f"{place}: no stage may be called {name}, because that is a top-level key; choose another name and give"
            " `kind`"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > MAX_NAME_LENGTH:
        raise UserError(
            f"{place}: stage name {short_repr(name)} must be letters, digits, - and _, at most {MAX_NAME_LENGTH}"
        )
    kind = block.get("kind", name)
    if kind not in KINDS:
        raise UserError(
            f"{place}: stages.{name} has the unknown kind {short_repr(kind)}; {suggestion(str(kind), KINDS)}"
        )
    model = module_of(kind).Config
    filled = block | {"kind": kind}
    filled.setdefault("seed", recipe.seed if model.uses_seed(block) else 0)
    problems = Problems()
    for name in SOURCE_BLOCKS:
        if not isinstance(block.get(name), dict) or name not in model.model_fields:
            continue
        unused = block_class(model.model_fields[name].annotation).UNUSED
        filled[name] = {}
        for key, source in block[name].items():
            with problems.gather():
                filled[name][key] = _with_shared_keys(source, (*where, name, key), recipe.sources, unused, places, path)
    if "model" in model.model_fields and recipe.model is not None:
        own = filled.get("model", {})
        # A few keys, as in pretrain.model.hidden_size=64, and not another model.
        if isinstance(own, dict) and not {"family", "from"} & own.keys():
            filled["model"] = recipe.model | own
    if recipe.resources and isinstance(filled.get("resources", {}), dict):
        filled["resources"] = _shared_resources(recipe.resources, model.uses_device()) | filled.get("resources", {})
        for key in recipe.resources:
            if ("resources", key) in places:
                places.setdefault((*where, "resources", key), places["resources", key])
    config = None
    with problems.gather():
        config = validated(model, filled, where, places, str(path))
    problems.refuse()
    return config


def _with_shared_keys(source: Any, where: tuple, shared: dict, unused: frozenset[str], places: dict, path: Any) -> Any:
    """A stage's source with `from: NAME` replaced by the keys of NAME in the top-level `sources`, except those that are
    `unused` by this stage. The stage's own keys win."""
    if not isinstance(source, dict) or "from" not in source:
        return source
    name = source["from"]
    if not isinstance(name, str) or name not in shared:
        alternatives = suggestion(str(name), shared) if shared else "there are none"
        raise UserError(
            f"{place_of((*where, 'from'), places, path)}: {'.'.join(where)}.from: the recipe's `sources` have no"
            f" {short_repr(name)}; {alternatives}"
        )
    for key in list(places):
        if key[:2] == ("sources", name):
            places.setdefault((*where, *key[2:]), places[key])
    filled = {key: value for key, value in shared[name].items() if key not in unused}
    filled.update(source)
    del filled["from"]
    return filled


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out. The order of stages is kept, because it decides default inputs."""
    tree = dump(recipe.model_copy(update={"stages": {}}))
    tree["stages"] = {name: dump(config) for name, config in recipe.stages.items()}
    buffer = io.StringIO()
    YAML(typ="rt", pure=True).dump(tree, buffer)
    return buffer.getvalue()


def make_root(recipe: Recipe) -> None:
    """Create the folder of a recipe's runs. Raises UserError."""
    try:
        recipe.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"output: the folder {recipe.root} cannot be created ({error.strerror}); give another `output`"
        ) from None
