"""What a recipe may say: YAML 1.2 in, one strict pydantic model per stage out.

    recipe = load("recipes/quickstart.yaml", ["pretrain.optimizer.lr=3e-4"])
    recipe.stages["pretrain"].optimizer.lr

A mistake ends in a UserError that names file, line, key, what was found and the nearest key that would have been right.
The models of the stages stand beside the code that uses them (`pipeline/STAGE.py: Config`); this file holds what all
share.
"""

import importlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from pipeline.errors import UserError
from pipeline.recipe_file import nearest, override, place_of, read

KINDS = ("clean", "tokenizer", "pack", "pretrain", "sft", "reward", "dpo", "ppo", "assess", "export")

# Marks a key that changes how a stage is run and not what comes out (ranks, workers, saving, logging): recorded, not
# fingerprinted.
EXECUTION = Field(json_schema_extra={"execution": True})


NAME, PACKAGE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$", r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$"
PATTERNS = {
    NAME: "Latin letters, digits, '.', '_' and '-', of which the first is a letter or a digit: files are called so",
    PACKAGE: "NAME==VERSION",
}
Name = Annotated[str, Field(pattern=NAME)]


class Strict(BaseModel):
    """A block of a recipe. Unknown keys are refused; the docstring under a field is its help text in the JSON
    schema (recipe_schema.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        wanted = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in wanted and ("int" in wanted or "float" in wanted):
            raise ValueError(f"is {str(value).lower()}, expected a number")
        return value


class RunConfig(Strict):
    """Where a stage runs. `alma run` starts the processes; under `accelerate launch`, torchrun or srun the
    launcher's count is taken."""

    processes: int = Field(1, ge=1)
    """Processes on each node: one per GPU, or one per group of CPU cores."""
    nodes: int = Field(1, ge=1)
    """Nodes; more than one needs a launcher that spans them (see launch/slurm)."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of one process; by default the cores of the machine divided by `processes`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What training computes on. cuda: a GPU for each process, or the stage is refused; cpu: no GPU even where there
    is one; auto: a GPU if there is one."""
    time: str | None = None
    """Wall-clock limit handed to the cluster's scheduler, such as 48h."""


class StageConfig(Strict):
    """Keys that every stage has."""

    kind: str = ""
    """Which stage this is; defaults to the name that the recipe gives it."""
    inputs: dict[str, str] = {}
    """Input name -> stage of this recipe, or the path of a folder made elsewhere (begins with `.` or `/`)."""
    seed: int | None = Field(None, ge=0)
    """Seed of everything random here; defaults to the recipe's."""
    run: Annotated[RunConfig, EXECUTION] = RunConfig()
    """Processes, nodes, threads."""

    def optional(self) -> set[str]:
        """Inputs that this stage, as its keys stand, can do without where no earlier stage has them."""
        return set()

    def check(self, world: int) -> None:
        """Raise UserError if this stage cannot run in `world` processes. Called before anything expensive."""
        if world != 1:
            raise UserError(
                f"stage {self.kind} runs in one process and spreads its work over `workers`, but {world} processes were"
                " launched; launch it with one"
            )


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

    @property
    def root(self) -> Path:
        return self.output / self.name


def module_of(kind: str):
    """The module of a stage kind: it has `Config`, `VERSION`, `INPUTS` and `run`. Heavy imports stay inside its
    functions."""
    return importlib.import_module(f"pipeline.{kind}")


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply `extends` and `key=value` overrides, check every key. Raises UserError."""
    places: dict[tuple, str] = {}
    tree = read(Path(path), places)
    for word in overrides:
        override(tree, word, places, list(Recipe.model_fields))
    top = {key: value for key, value in tree.items() if key != "stages"}
    recipe = _validated(Recipe, {**top, "stages": {}}, (), places, str(path))
    stages = tree.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{path}: `stages` must name at least one stage; the kinds are {', '.join(KINDS)}")
    parsed: dict[str, StageConfig] = {}
    for name, block in stages.items():
        where = ("stages", name)
        if block is None:  # `dpo: ~` in a recipe that extends another takes the stage out
            continue
        if not isinstance(block, dict):
            raise UserError(
                f"{place_of(where, places, path)}: stages.{name} must be a block of keys, found {block!r}; an empty"
                " stage is written {}"
            )
        if name in Recipe.model_fields:
            raise UserError(
                f"{place_of(where, places, path)}: no stage may be called {name}, because that is a top-level key;"
                " choose another name and give `kind`"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", str(name)):
            raise UserError(f"{place_of(where, places, path)}: stage name {name!r} must be letters, digits, - and _")
        kind = block.get("kind", name)
        if kind not in KINDS:
            raise UserError(
                f"{place_of(where, places, path)}: stages.{name} has the unknown kind {kind!r};"
                f" {nearest(str(kind), KINDS)}"
            )
        model = module_of(kind).Config
        filled = {**block, "kind": kind}
        filled.setdefault("seed", recipe.seed)
        if isinstance(block.get("sources"), dict):
            filled["sources"] = {
                key: _from(source, (*where, "sources", key), recipe.sources, places, path)
                for key, source in block["sources"].items()
            }
        if "model" in model.model_fields and recipe.model is not None:
            own = filled.get("model", {})
            # a few keys, as in pretrain.model.hidden_size=64, and not a model of its own
            if isinstance(own, dict) and not {"family", "from"} & own.keys():
                filled["model"] = {**recipe.model, **own}
        parsed[name] = _validated(model, filled, where, places, str(path))
    if not parsed:
        raise UserError(f"{path}: every stage was taken out; keep at least one")
    return recipe.model_copy(update={"stages": parsed})


def _from(source: Any, where: tuple, shared: dict, places: dict, path: Any) -> Any:
    """A stage's source with `from: NAME` replaced by what the top-level `sources` say of NAME; the stage's own keys
    win."""
    if not isinstance(source, dict) or "from" not in source:
        return source
    name = source["from"]
    if name not in shared:
        raise UserError(
            f"{place_of((*where, 'from'), places, path)}: {'.'.join(where)}.from: the recipe's `sources` have no"
            f" {name!r}; {nearest(str(name), shared) if shared else 'there are none'}"
        )
    for key in list(places):
        if key[:2] == ("sources", name):
            places.setdefault((*where, *key[2:]), places[key])
    return {**shared[name], **{key: value for key, value in source.items() if key != "from"}}


def identity(value: Any) -> Any:
    """What of a config decides the result: execution keys and keys at their default are left out. JSON types only."""
    if isinstance(value, BaseModel):
        kept = {}
        for name, field in type(value).model_fields.items():
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution"):
                continue
            item = getattr(value, name)
            if field.is_required() or item != field.get_default(call_default_factory=True):
                kept[name] = identity(item)
        return kept
    if isinstance(value, dict):
        return {str(key): identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def dump(config: BaseModel) -> dict:
    """A config as plain JSON types, everything written out."""
    return config.model_dump(mode="json")


# ---- messages --------------------------------------------------------------------------------------------------------


def _validated(model: type[BaseModel], tree: dict, prefix: tuple, places: dict, path: str):
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        lines = [_sentence(item, model, prefix, places, path) for item in error.errors()]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def _sentence(item: dict, model: type[BaseModel], prefix: tuple, places: dict, path: str) -> str:
    # pydantic's location holds names of union members too; only what stands in the file is a key
    location = [part for part in item["loc"]]
    key = (*prefix, *location)
    shown = ".".join(str(part) for part in key)
    place = place_of(key, places, path)
    found = item.get("input")
    if item["type"] == "extra_forbidden":
        owner = _fields_at(model, location[:-1])
        return f"{place}: unknown key {shown}; {nearest(str(location[-1]), owner)}"
    if item["type"] == "missing":
        return f"{place}: the key {shown} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {shown + ': ' if location else ''}{message}"
    wanted = PATTERNS.get(item.get("ctx", {}).get("pattern")) or {"path_type": "a path"}.get(
        item["type"],
        message.removeprefix("Input should be ").replace("a valid integer", "a whole number").replace("a valid ", "a "),
    )
    if location[-1:] == ["[key]"]:
        return f"{place}: {shown.removesuffix(f'.{found}.[key]')} has the name {found!r}, expected {wanted}"
    return f"{place}: {shown} is {found!r}, expected {wanted}"


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
