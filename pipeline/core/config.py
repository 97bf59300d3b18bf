"""What all blocks of a recipe share, and what the core asks of a stage.

The `Config` of a stage is in its script (`pipeline/KIND.py`). The core knows no stage by name: whatever it needs to
know of one is an attribute or a method of `StageConfig`."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, model_validator

from pipeline.core.artifact import Artifact
from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe_file import short_repr
from pipeline.core.run_config import MEMORY, WORD, Resources, RunConfig
from pipeline.core.strict import Strict

# Marks a key that changes how a stage is run and not what comes out (ranks, workers, saving, logging): it is recorded,
# but is not part of the fingerprint.
EXECUTION = Field(json_schema_extra={"execution": True})

NAME, PACKAGE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$", r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$"
# What messages say instead of a regular expression.
PATTERNS = {
    NAME: "Latin letters, digits, '.', '_' and '-', beginning with a letter or a digit, because files get this name",
    PACKAGE: "NAME==VERSION",
    WORD: "a word without spaces, quotes and backslashes",
    MEMORY: "a number and K, M, G or T, such as 64G",
}
MAX_NAME_LENGTH = 100  # characters of the name of a recipe, stage or source, because files and folders get this name
Name = Annotated[str, Field(pattern=NAME, max_length=MAX_NAME_LENGTH)]


def refuse_unused(block: Strict, key: str, why: str) -> None:
    """Refuse a key that would have no effect, because it would change the identity of a run and not its result. The
    default value is allowed, because a recipe that is written out in full has every key. Raises ValueError."""
    value = dict(block)[key]
    if value != type(block).model_fields[key].get_default(call_default_factory=True):
        raise ValueError(f"{key}: {short_repr(value, 40)} {why}; remove it")


def _without_duplicates(values: list) -> list:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"names {short_repr(value, 40)} twice; remove one")
    return values


# For lists in which a second mention would change the identity of a run and not its result.
Distinct = AfterValidator(_without_duplicates)


# ---- what a stage reads from outside the run folder ------------------------------------------------------------------


class ExternalSource(Strict):
    """One entry of a block of sources: data from outside the run folder. Its options and the contents of its files are
    part of the stage's identity."""

    UNUSED: ClassVar[frozenset[str]] = frozenset()
    """Keys of the recipe's top-level `sources` that mean nothing to stages that read sources of this class."""

    def content(self, where: str, sha256: Callable[[Path], str]) -> list[list[str]] | None:
        """[name, sha256] of each file, in order; None if the options alone determine the content. `where` is the key of
        the source in the recipe, for messages. Raises Absent for files that are not on this machine."""
        raise NotImplementedError

    def check_machine(self, where: str) -> None:
        """Check that this machine has the packages that read this source."""


@dataclass(frozen=True)
class SourceBlock:
    """A block of a stage's keys that names sources."""

    key: str
    """In the recipe, such as `decontaminate.sets`."""
    sources: Callable[[Any], dict[str, ExternalSource]]
    """From the stage's config: name -> source."""
    prefix: str = ""
    """Of each name in the stage's identity."""
    group: str = ""
    """Entry of the identity that holds the whole block; by default each source is an entry."""
    drop_key: bool = True
    """The entries replace the key in the identity, so that only the content counts. False where the identity has had
    both from the start: a fingerprint must not change."""


@dataclass(frozen=True)
class ExternalFiles:
    """Files that a key of a stage names. They count by name and content."""

    key: str
    """In the recipe."""
    files: Callable[[Any], list[Path]]
    """From the stage's config. May raise Absent with a better message than that a file is missing."""
    entry: str = ""
    """Of the identity; by default `@key`."""
    drop_key: bool = True
    """As for SourceBlock."""

    @property
    def name_of_entry(self) -> str:
        return self.entry or f"@{self.key}"


@dataclass(frozen=True)
class PlannedInput:
    """An input of a stage, as far as it is known before the stage runs."""

    name: str
    """Of the stage that publishes it; or the path of a folder made elsewhere, or a model's name."""
    config: "StageConfig | None" = None
    """Of that stage; None for an input from outside of the recipe."""
    inputs: dict[str, "PlannedInput"] = field(default_factory=dict)
    """Of that stage."""
    folder: Path | None = None
    """The published output, if it is up to date, or what is on this machine of an input from outside."""


@dataclass(frozen=True)
class PublishedModel:
    """A model for `from_pretrained` in a stage's output."""

    folder: str
    """Relative to the output; empty if it is the output."""
    use: Literal["chat", "completion", "score"]
    """What its user can do: ask it, have it continue a text, or have it score an answer."""
    for_users: bool = False
    """It was made to be handed to users, so it is named before later ones."""


class StageConfig(Strict):
    """Keys that every stage has, and what the core asks of a stage."""

    kind: str = ""
    """Which kind of stage this is; defaults to the name that the recipe gives it."""
    inputs: dict[str, str] = {}
    """Name of an input -> a stage of this recipe, the path of a folder made elsewhere or of a GGUF file (begins with
    `.` or `/`), or a model by name: ORG/NAME@REVISION of the Hugging Face hub, modelscope:ORG/NAME@REVISION, or
    package:NAME==VERSION/FILE.gguf@SHA256."""
    seed: int | None = Field(None, ge=0)
    """Seed of everything random in this stage; defaults to the recipe's."""
    run: Annotated[RunConfig, EXECUTION] = RunConfig()
    """Processes, nodes, threads."""
    resources: Annotated[Resources, EXECUTION] = Resources()
    """What the stage's job asks of a cluster."""

    HAS_STEPS: ClassVar[bool] = False
    """Whether the stage works in steps, in one or more processes, and resumes from checkpoints. Other stages run in one
    process and resume from finished files."""
    KEPT: ClassVar[str | None] = "this stage starts over"
    """What a stopped run keeps, for messages. None for a stage with steps: the message names the step."""

    MODEL: ClassVar[PublishedModel | None] = None
    """The model in its output."""

    # ---- keys

    @model_validator(mode="before")
    @classmethod
    def _take_over_from_resources(cls, block: Any) -> Any:
        """`nodes` and `time` of `resources` are those of `run`, by which everything else goes."""
        resources, run = (block.get(key, {}) for key in ("resources", "run")) if isinstance(block, dict) else ({}, {})
        if not isinstance(resources, dict) or not isinstance(run, dict):
            return block
        filled = dict(run)
        for key in ("nodes", "time"):
            value = resources.get(key)
            if value is None:
                continue
            if run.get(key) not in (None, value):
                raise ValueError(
                    f"resources.{key} is {short_repr(value)} and run.{key} is {short_repr(run[key])}: give one of the"
                    " two"
                )
            filled[key] = value
        return block if filled == run else block | {"run": filled}

    @model_validator(mode="after")
    def _resources_fit_the_processes(self) -> Self:
        gpus, processes = self.resources.gpus, self.run.processes
        if gpus and not self.uses_device():
            raise ValueError(f"resources.gpus: {gpus} would be idle, because stage {self.kind} uses no GPU; remove it")
        if gpus and self.run.device == "cpu":
            raise ValueError(f"resources.gpus: {gpus} would be idle with run.device: cpu; remove one of the two")
        if gpus == 0 and self.run.device == "cuda":
            raise ValueError("resources.gpus: 0 leaves no GPU for run.device: cuda; remove one of the two")
        if gpus and gpus != processes:
            raise ValueError(
                f"resources.gpus: {gpus} per node and run.processes: {processes} do not fit, because each process uses"
                " one GPU; give both the same number"
            )
        if self.resources.mounts and not self.resources.container:
            raise ValueError("resources.mounts: are folders that a container sees, and there is none; remove it")
        if self.resources.gpu_type and not self.gpus_per_node:
            raise ValueError(f"resources.gpu_type: {self.resources.gpu_type} has no effect without GPUs; remove it")
        return self

    @property
    def gpus_per_node(self) -> int:
        """GPUs of each node that the stage's job asks for."""
        if self.resources.gpus is not None:
            return self.resources.gpus
        return self.run.processes if self.uses_device() and self.run.device in ("auto", "cuda") else 0

    def optional(self) -> set[str]:
        """Names of inputs that this stage, with these keys, does not need."""
        return set()

    def unread(self) -> set[str]:
        """Names of inputs that this stage, with these keys, does not read."""
        return set()

    @classmethod
    def uses_device(cls) -> bool:
        """Whether the stage computes on `run.device`."""
        return False

    def obstacle_on(self, kind: str) -> str | None:
        """A key of this stage, with its value, that devices of a kind (pipeline/core/accelerators.py) cannot do; None
        if there is none."""
        return None

    @classmethod
    def uses_seed(cls, block: dict) -> bool:
        """Whether the result of a stage with these keys, as they are in the recipe, depends on its seed."""
        return True

    @classmethod
    def external(cls) -> list[SourceBlock | ExternalFiles]:
        """What the stage reads from outside the run folder. It is hashed into the fingerprint."""
        return []

    # ---- checks before anything expensive; each raises UserError

    def check(self, world: int) -> None:
        """Check that this stage can run in `world` processes."""
        if self.run.device != "auto" and not self.uses_device():
            raise UserError(
                f"stage {self.kind}: run.device: {self.run.device} has no effect, because only stages that train or"
                " assess use a GPU; remove it"
            )
        if world != 1:
            raise UserError(
                f"stage {self.kind}: {world} processes were launched, but it runs in one process (`workers` spreads its"
                " work over cores); launch one"
            )

    def check_machine(self) -> None:
        """Check that this machine has what this stage needs, such as an optional package."""
        problems = Problems()
        for block in self.external():
            if not isinstance(block, SourceBlock):
                continue
            for name, source in block.sources(self).items():
                with problems.gather():
                    source.check_machine(f"stage {self.kind}: {block.key}.{name}")
        problems.refuse()

    def check_device(self) -> None:
        """Check that the devices of this machine, on which the stage will run, have what it needs."""

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        """Check what this stage needs of its inputs, as far as it is known. Messages begin with a key of the stage."""

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        """Read the first records of every source that is on this machine. A missing file is reported elsewhere."""

    def warnings(self) -> list[str]:
        """What is allowed but unusual in the keys, as sentences that begin with a key."""
        return []

    # ---- what is known of the output before the stage has run

    def planned_sources(self, inputs: dict[str, PlannedInput]) -> list[str] | None:
        """Names of the sources in the text or tokens that this stage publishes; None if they are not known."""
        return None

    def planned_positions(self, inputs: dict[str, PlannedInput]) -> int | None:
        """Most tokens of a row that the published model has positions for; None if there is no limit or it is not
        known."""
        return None

    def planned_tokenizer(self, inputs: dict[str, PlannedInput]) -> Any:
        """The tokenizer that this stage publishes, if its files are there already; else None."""
        return None

    def planned_vocabulary(self, inputs: dict[str, PlannedInput]) -> int | None:
        """Tokens in the vocabulary of what this stage publishes; None if it is not known."""
        return None

    # ---- running

    def last_step(self) -> int | None:
        """The step that the stage ends with; None if it has no steps, or if only the running stage can tell."""
        return None

    def supervised(self, output) -> contextlib.AbstractContextManager:
        """Context around the run, such as a watchdog. output: where it writes (core/output.py)."""
        return contextlib.nullcontext()

    @classmethod
    def published_model(cls, artifact: Artifact) -> PublishedModel | None:
        """The model in this output, if it has one."""
        return cls.MODEL


def check_source_names(named: dict[str, Iterable[str]], names: list[str]) -> None:
    """Raise UserError for sources that a stage's text does not have. named: key of the stage -> sources that it names;
    names: the sources of its text."""
    problems = Problems()
    for key, sources in named.items():
        for source in sources:
            if source not in names:
                problems.add(f"{key}: its text has no source {source!r}; it has {', '.join(sorted(names))}")
    problems.refuse()


# ---- JSON of a config ------------------------------------------------------------------------------------------------


def identity(value: Any) -> Any:
    """The part of a config that decides the result: without execution keys and without keys at their default. JSON
    types only."""
    if isinstance(value, BaseModel):
        kept = {}
        fields = type(value).model_fields
        for name, item in value:
            extra = fields[name].json_schema_extra
            if isinstance(extra, dict) and extra.get("execution"):
                continue
            if fields[name].is_required() or item != fields[name].get_default(call_default_factory=True):
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
    """A config as plain JSON types, with every key written out."""
    return config.model_dump(mode="json")
