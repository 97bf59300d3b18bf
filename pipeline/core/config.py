"""What a recipe may contain, as far as all stages share it: the base of every block, and the keys that every stage has.

The `Config` of a stage is next to the code that uses it (`pipeline/STAGE.py`).
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.core.errors import UserError
from pipeline.core.recipe_file import shown

# Marks a key that changes how a stage is run and not what comes out (ranks, workers, saving, logging): recorded, not
# fingerprinted.
EXECUTION = Field(json_schema_extra={"execution": True})


NAME, PACKAGE = r"^[A-Za-z0-9][A-Za-z0-9._-]*$", r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$"
PATTERNS = {
    NAME: "Latin letters, digits, '.', '_' and '-', of which the first is a letter or a digit: files are called so",
    PACKAGE: "NAME==VERSION",
}
LONGEST_NAME = 100  # of a recipe, stage or source, in characters: folders and files are called so
Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)]


class Strict(BaseModel):
    """A block of a recipe. Unknown keys are refused; the docstring under a field is its help text in the JSON
    schema (recipe_schema.py)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for 1."""
        wanted = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in wanted and ("int" in wanted or "float" in wanted):
            raise ValueError(f"is {str(value).lower()}, expected a number")
        return value


def idle(block: Strict, key: str, why: str) -> None:
    """Refuse a key that would change a run's identity, or be read by nobody, and not its result. At its default it may
    stand: a recipe that is written out has all keys. Raises ValueError."""
    value = getattr(block, key)
    if value != type(block).model_fields[key].get_default(call_default_factory=True):
        raise ValueError(f"{key}: {shown(value, 40)} {why}; leave it out")


UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float:
    """Seconds of a duration such as 2h, 90m, 1h30m or 1.5d. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError(f"{shown(text)} is no length of time; write for example 2h, 90m or 1h30m (d, h, m, s)")
    seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not 0 < seconds < 10 * 365 * UNITS["d"]:
        raise ValueError(f"{shown(text)} is not between a second and ten years")
    return seconds


class RunConfig(Strict):
    """Where a stage runs. `alma run` starts the processes; under `accelerate launch`, torchrun or srun the
    launcher's count is taken."""

    processes: int = Field(1, ge=1, le=1024)
    """Processes on each node: one per GPU, or one per group of CPU cores."""
    nodes: int | None = Field(None, ge=1, le=100_000)
    """Nodes; more than one needs a launcher that spans them. The job script (launch/slurm/alma.sbatch) asks Slurm for
    so many, uses so many of its job's, and refuses a job that has fewer; none: all nodes of the job, elsewhere one."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of one process; by default the cores of the machine divided by `processes`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What training computes on. cuda: a GPU for each process, or the stage is refused; cpu: no GPU even where there
    is one; auto: a GPU if there is one."""
    time: str | None = None
    """Wall-clock limit of one start of the stage under Slurm, such as 48h: the job script asks for a job of this length
    and gives it to srun, which has the stage save two minutes before. It is then queued again."""

    @field_validator("time")
    @classmethod
    def _a_duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @property
    def minutes(self) -> int | None:
        """`time` as Slurm takes it."""
        return None if self.time is None else math.ceil(seconds_of(self.time) / 60)

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.processes * (self.nodes or 1)


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

    @classmethod
    def uses_device(cls) -> bool:
        """Whether the stage computes on `run.device`."""
        return False

    @classmethod
    def uses_seed(cls, block: dict) -> bool:
        """Whether the result of a stage with these keys, as the recipe has them, depends on its seed."""
        return True

    def check(self, world: int) -> None:
        """Raise UserError if this stage cannot run in `world` processes. Called before anything expensive."""
        if self.run.device != "auto" and not self.uses_device():
            raise UserError(
                f"stage {self.kind}: run.device: {self.run.device} is for stages that train or assess, and this one"
                " computes on the CPU; leave it out"
            )
        if world != 1:
            raise UserError(
                f"stage {self.kind} runs in one process and spreads its work over `workers`, but {world} processes were"
                " launched; launch it with one"
            )


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
