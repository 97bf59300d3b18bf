"""Where a stage runs (`run`), and what its job asks of a cluster (`resources`)."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.recipe_file import short_repr
from pipeline.core.strict import Strict

WORD, MEMORY = r"^[^\s\"'\\]+$", r"^[1-9]\d*[KMGT]$"
# Options of sbatch that alma gives itself, and the key to use in their place.
OWN_OPTIONS = {
    "nodes": "nodes", "ntasks-per-node": "run.processes", "gpus-per-node": "gpus", "cpus-per-task": "cpus",
    "mem": "memory", "time": "time", "partition": "partition", "account": "account", "qos": "qos",
    "constraint": "constraint", "exclude": "exclude", "exclusive": "exclusive",
}  # fmt: skip
FIXED_OPTIONS = {
    "ntasks", "job-name", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "chdir", "dependency",
    "kill-on-invalid-dep", "array", "wrap",
}  # fmt: skip


# Devices that torch has and stages cannot compute on, and what to write in their place.
OTHER_DEVICES = {
    "rocm": "GPUs of AMD are cuda, as torch's builds for ROCm call them",
    "hip": "GPUs of AMD are cuda, as torch's builds for ROCm call them",
    "xpu": "Intel's GPUs are not supported; write cpu",
}

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def seconds_of(text: str) -> float:
    """Seconds of a duration such as 2h, 90m, 1h30m or 1.5d. Raises ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError(f"{short_repr(text)} is not a duration; write for example 2h, 90m or 1h30m (d, h, m, s)")
    seconds = sum(float(number) * SECONDS_PER_UNIT[unit] for number, unit in parts)
    if not 0 < seconds < 10 * 365 * SECONDS_PER_UNIT["d"]:
        raise ValueError(f"{short_repr(text)} is not between a second and ten years")
    return seconds


class RunConfig(Strict):
    """Where a stage runs. `alma run` starts this many processes; under `accelerate launch`, torchrun or srun the
    launcher decides."""

    processes: int = Field(1, ge=1, le=1024)
    """Processes per node: one per GPU, or one per group of CPU cores."""
    nodes: int | None = Field(None, ge=1, le=100_000)
    """Nodes. More than one needs a launcher that spans them: the job script (launch/slurm/alma.sbatch) asks Slurm for
    this many, uses this many of its job's, and refuses a job that has fewer. By default all nodes of the job, or one
    without Slurm."""
    threads: int | None = Field(None, ge=1)
    """CPU threads per process; by default the cores of the machine divided by `processes`."""
    device: Literal["auto", "cpu", "cuda", "npu", "mps"] = "auto"
    """What training computes on. cuda: one GPU per process, and an error if there are fewer; cpu: no GPU even if there
    is one; auto: a GPU if there is one. npu: one of Ascend's NPUs per process, with the package torch_npu; mps: the GPU
    of a Mac, one process. These two are untested, and auto takes them where they are."""
    time: str | None = None
    """Wall-clock limit of one start of the stage under Slurm, such as 48h. The job script asks for a job of this length
    and gives it to srun, which has the stage save two minutes before the end. The job is then queued again."""

    @field_validator("device", mode="before")
    @classmethod
    def _is_supported(cls, value: Any) -> Any:
        if isinstance(value, str) and value in OTHER_DEVICES:
            raise ValueError(f"{OTHER_DEVICES[value]} (docs/install.md)")
        return value

    @field_validator("time")
    @classmethod
    def _is_duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @property
    def minutes(self) -> int | None:
        """`time` in the unit that Slurm takes."""
        return None if self.time is None else math.ceil(seconds_of(self.time) / 60)

    @property
    def world(self) -> int:
        """Processes on all nodes."""
        return self.processes * (self.nodes or 1)


class Resources(Strict):
    """What the job of a stage asks of a cluster (`alma run RECIPE --on slurm`). The recipe's top level may have the
    same block: its keys count for every stage that does not give its own."""

    nodes: int | None = Field(None, ge=1, le=100_000)
    """Nodes of the job; the same as `run.nodes`. By default one."""
    gpus: int | None = Field(None, ge=0, le=1024)
    """GPUs per node. By default one per process for stages that use a GPU, unless `run.device: cpu`, and none for the
    others. 0: run on CPUs."""
    gpu_type: Annotated[str, Field(pattern=WORD)] | None = None
    """Name of the GPUs as the cluster has it, such as h100; by default any."""
    cpus: int | None = Field(None, ge=1, le=4096)
    """CPU cores per process. By default the job has its nodes to itself, and each process gets its share of their
    cores."""
    memory: Annotated[str, Field(pattern=MEMORY)] | None = None
    """Memory per node, such as 64G. By default all of it if the job has its nodes to itself, or else what the cluster
    gives per core."""
    time: str | None = None
    """Wall-clock limit of one start of the job, such as 48h; the same as `run.time`. The stage saves before it ends,
    two minutes or as much earlier as steps and checkpoints have been measured to need, and the job is queued again. By
    default the limit of the partition."""
    partition: Annotated[str, Field(pattern=WORD)] | None = None
    """Partition, or several with commas; by default the cluster's."""
    account: Annotated[str, Field(pattern=WORD)] | None = None
    """Account that is charged."""
    qos: Annotated[str, Field(pattern=WORD)] | None = None
    """Quality of service."""
    constraint: Annotated[str, Field(pattern=WORD)] | None = None
    """Features that the nodes must have, such as a100&nvlink."""
    exclude: Annotated[str, Field(pattern=WORD)] | None = None
    """Nodes that are not used, such as n[3-5]."""
    exclude_failed: bool = False
    """After an error of a GPU, or when the look at the nodes before a start finds one that is bad, queue the job again
    without this node. The tries without progress are bounded as for every other failure."""
    preflight: bool | None = None
    """Whether each start of the job looks at its nodes first: the run folder, temporary files, GPUs and their memory, a
    sum over all nodes, clocks. By default jobs with several nodes or with GPUs do."""
    exclusive: bool | None = None
    """Whether the job has its nodes to itself; by default it does unless `cpus` is given."""
    modules: list[Annotated[str, Field(pattern=WORD)]] = []
    """Environment modules that the job loads first."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Environment variables of the job, such as NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME or NCCL_IB_HCA. The files of a
    job are kept in the run folder, so this is no place for secrets."""
    container: Annotated[str, Field(pattern=WORD)] | None = None
    """Image in which the processes run: a file .sif is started with Apptainer, anything else (.sqsh, or the address of
    an image) with srun's --container-image of enroot and pyxis."""
    mounts: list[Annotated[str, Field(pattern=WORD)]] = []
    """Folders that the container sees besides the run folder and the folder in which the job was submitted."""
    sbatch: list[str] = []
    """Further options of sbatch, such as --reservation=course."""

    @field_validator("time")
    @classmethod
    def _is_duration(cls, value: str | None) -> str | None:
        if value is not None:
            seconds_of(value)
        return value

    @field_validator("environment")
    @classmethod
    def _is_one_line(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not text.isprintable():
                raise ValueError(f"{name} is {short_repr(text)}, expected one line of text")
        return value

    @field_validator("sbatch")
    @classmethod
    def _are_options(cls, value: list[str]) -> list[str]:
        for option in value:
            name = option.partition("=")[0].removeprefix("--")
            if not option.startswith("--") or not option.isprintable():
                raise ValueError(f"{short_repr(option)} is not an option; write it in full, as in --reservation=course")
            if name in OWN_OPTIONS:
                raise ValueError(f"{short_repr(option)}: give the key {OWN_OPTIONS[name]} instead")
            if name == "clusters":
                raise ValueError(
                    f"{short_repr(option)}: set the variable SLURM_CLUSTERS in its place, which squeue and scancel"
                    " read, too"
                )
            if name in FIXED_OPTIONS:
                raise ValueError(f"{short_repr(option)}: alma gives --{name} itself; remove it")
        return value

    @model_validator(mode="after")
    def _has_one_memory(self):
        if self.memory and self.has_memory_per_part:
            raise ValueError("sbatch: --mem-per-cpu or --mem-per-gpu beside the key memory; remove one of the two")
        return self

    @property
    def has_memory_per_part(self) -> bool:
        """Whether the options of sbatch ask for memory per core or GPU, beside which Slurm takes none per node."""
        return any(option.startswith(("--mem-per-cpu", "--mem-per-gpu")) for option in self.sbatch)

    @property
    def has_whole_nodes(self) -> bool:
        """Whether the job has its nodes to itself."""
        return self.cpus is None if self.exclusive is None else self.exclusive
