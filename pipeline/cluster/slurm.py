"""Slurm's commands, and what their answers mean: partitions, jobs in the queue, submitting, cancelling."""

import math
import re
import shutil
import subprocess
from dataclasses import dataclass, field

from pipeline.core.config import StageConfig
from pipeline.core.errors import UserError

PATIENCE = 60  # seconds for one command; a busy controller may take tens
NODES = "%P|%a|%l|%c|%m|%G|%D"  # of sinfo --exact: one line per partition and kind of node
LIVE = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RUNNING", "COMPLETING", "SUSPENDED"}
LIVE |= {"STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING", "RESIZING", "RESV_DEL_HOLD"}
"""States of jobs that have not ended."""


@dataclass
class NodeKind:
    """Nodes of a partition that are alike."""

    count: int
    cpus: int
    memory: int  # MiB
    gpus: dict[str, int]  # by type; "" if the cluster names none


@dataclass
class Partition:
    name: str
    is_default: bool
    is_up: bool
    minutes: float  # longest job; infinity without a limit
    kinds: list[NodeKind] = field(default_factory=list)


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job: its state in capitals, and why it is in it (empty if it says nothing)."""

    state: str
    reason: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def text(self) -> str:
        return f"{self.state} ({self.reason})" if self.reason else self.state


def call(*words: str) -> subprocess.CompletedProcess:
    """Run one of Slurm's commands. Raises UserError if there is none, or if it does not answer."""
    if not shutil.which(words[0]):
        raise UserError(
            f"--on slurm: no Slurm here: {words[0]} is not on the PATH; run this on a login node of the cluster, or add"
            " --dry-run to see the jobs"
        )
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer for {PATIENCE} s; try again when Slurm's controller answers"
        ) from None


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sinfo") is not None


def message_of(answer: subprocess.CompletedProcess) -> str:
    """What a command that failed said, on one line."""
    lines = (answer.stderr.strip() or answer.stdout.strip() or f"exit code {answer.returncode}").splitlines()
    return "; ".join(line.removeprefix("sbatch: error: ").removeprefix("sbatch: ") for line in lines)


# ---- partitions ------------------------------------------------------------------------------------------------------


def partitions() -> dict[str, Partition]:
    """The cluster's partitions. Raises UserError if Slurm cannot be asked."""
    answer = call("sinfo", "--noheader", "--exact", f"--format={NODES}")
    if answer.returncode:
        raise UserError(f"sinfo failed: {message_of(answer)}")
    found: dict[str, Partition] = {}
    for line in answer.stdout.splitlines():
        words = line.strip().split("|")
        if len(words) != 7:
            continue
        name, available, limit, cpus, memory, gres, count = words
        partition = found.setdefault(
            name.rstrip("*"), Partition(name.rstrip("*"), name.endswith("*"), available == "up", _minutes(limit))
        )
        partition.kinds.append(NodeKind(int(count), _number(cpus), _number(memory), gpus_of(gres)))
    return found


def _number(text: str) -> int:
    """`64` or, for nodes that differ, `64+`."""
    return int(text.rstrip("+"))


def _minutes(text: str) -> float:
    """Minutes of a limit as sinfo and squeue have it: [days-]hours:minutes:seconds, minutes:seconds, or infinite."""
    parts = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not parts:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return (days * 24 + hours) * 60 + minutes + seconds / 60


def gpus_of(gres: str) -> dict[str, int]:
    """GPUs by type of a node's resources, such as `gpu:a100:8(S:0-1),nvme:1`."""
    found: dict[str, int] = {}
    for kind, count in re.findall(r"\bgpu(?::([^:,(]+))??:(\d+)(?=[,(]|$)", gres):
        found[kind] = found.get(kind, 0) + int(count)
    return found


def check_request(stage: str, config: StageConfig, cluster: dict[str, Partition]) -> None:
    """Raise UserError if no partition that the stage's job may run in has nodes for it."""
    resources = config.resources
    names = resources.partition.split(",") if resources.partition else []
    unknown = [name for name in names if name not in cluster]
    if unknown:
        raise UserError(
            f"stages.{stage}.resources.partition: this cluster has no partition {unknown[0]}; it has"
            f" {', '.join(cluster) or 'none'}"
        )
    chosen = [cluster[name] for name in names] or [part for part in cluster.values() if part.is_default]
    if not chosen:
        raise UserError(
            f"stages.{stage}.resources.partition: this cluster has no default partition; give one of"
            f" {', '.join(cluster)}"
        )
    problems = [_problem(config, partition) for partition in chosen]
    if all(problems):
        raise UserError(f"stages.{stage}.{problems[0]}")


def _problem(config: StageConfig, partition: Partition) -> str | None:
    """Why a stage's job can never run in a partition, beginning with the key to change; or None."""
    resources, where = config.resources, f"partition {partition.name}"
    if not partition.is_up:
        return f"resources.partition: {where} is down; choose another one"
    if config.run.minutes and config.run.minutes > partition.minutes:
        return f"run.time: {config.run.time} is more than the limit of {where}, {partition.minutes:.0f} minutes"
    fitting = partition.kinds
    gpus = config.gpus_per_node
    if gpus:
        if not any(kind.gpus for kind in fitting):
            return (
                f"resources.gpus: {gpus} per node are needed, but {where} has no GPUs; give another partition, or"
                " run.device: cpu"
            )
        fitting = [kind for kind in fitting if _gpus(kind, resources.gpu_type) >= gpus]
        if not fitting:
            most = max(_gpus(kind, resources.gpu_type) for kind in partition.kinds)
            of_type = f" of type {resources.gpu_type}" if resources.gpu_type else ""
            return f"run.processes: {gpus} GPUs per node are needed, and a node of {where} has at most {most}{of_type}"
    cpus = (resources.cpus or 1) * config.run.processes
    if not any(kind.cpus >= cpus for kind in fitting):
        most = max(kind.cpus for kind in fitting)
        return (
            f"resources.cpus: {resources.cpus or 1} for each of {config.run.processes} processes are {cpus} per node,"
            f" and a node of {where} has {most}"
        )
    fitting = [kind for kind in fitting if kind.cpus >= cpus]
    memory = mebibytes(resources.memory)
    if not any(kind.memory >= memory for kind in fitting):
        most = max(kind.memory for kind in fitting)
        return f"resources.memory: {resources.memory} is more than a node of {where} has, {most}M"
    count = sum(kind.count for kind in fitting if kind.memory >= memory)
    if count < (config.run.nodes or 1):
        return f"run.nodes: {config.run.nodes} are more than {where} has for this stage, {count}"
    return None


def _gpus(kind: NodeKind, gpu_type: str | None) -> int:
    return sum(kind.gpus.values()) if gpu_type is None else kind.gpus.get(gpu_type, 0)


def mebibytes(memory: str | None) -> float:
    """`64G` in MiB; 0 if none is given."""
    return int(memory[:-1]) * 1024.0 ** ("KMGT".index(memory[-1]) - 1) if memory else 0


# ---- jobs ------------------------------------------------------------------------------------------------------------


def submit(file: str, after: list[str]) -> str:
    """Submit a job that starts when the jobs `after` have succeeded, and is cancelled if one does not. Returns its
    number. Raises UserError."""
    answer = call("sbatch", "--parsable", *dependency(after), file)
    if answer.returncode:
        raise UserError(f"sbatch refused {file}: {message_of(answer)}")
    return answer.stdout.strip().splitlines()[-1].partition(";")[0]


def dependency(after: list[str]) -> list[str]:
    """sbatch's options for a job that needs others."""
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []


def test(file: str) -> None:
    """Raise UserError if Slurm would refuse a job, without submitting it."""
    answer = call("sbatch", "--test-only", file)
    if answer.returncode:
        raise UserError(f"sbatch would refuse {file}: {message_of(answer)}; nothing was submitted")


def cancel(jobs: list[str]) -> None:
    """Cancel jobs. Raises UserError."""
    answer = call("scancel", *jobs)
    if answer.returncode:
        raise UserError(f"scancel failed: {message_of(answer)}")


def hostnames(nodes: str) -> list[str]:
    """Names of the nodes in Slurm's short form, such as n[1-3]. Raises UserError."""
    answer = call("scontrol", "show", "hostnames", nodes)
    if answer.returncode:
        raise UserError(f"scontrol show hostnames failed: {message_of(answer)}")
    return answer.stdout.split()


def seconds_left(job: str) -> float:
    """Seconds until the time limit of a job that runs; infinity without a limit, or if Slurm does not answer."""
    try:
        answer = call("squeue", "--noheader", f"--jobs={job}", "--format=%L")
    except UserError:
        return math.inf
    return 60 * _minutes(answer.stdout.strip())


def job_states(jobs: list[str]) -> dict[str, JobState] | None:
    """What Slurm knows of these jobs, which may be nothing of those that ended long ago: squeue has jobs of the last
    minutes, sacct all of them where the cluster keeps accounts. None if Slurm cannot be asked."""
    if not jobs or not shutil.which("squeue"):
        return None if jobs else {}
    words = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r"]
    try:
        answer = call(*words)
    except UserError:
        return None
    if answer.returncode and "invalid job id" not in answer.stderr.lower():
        return None
    states = _parse(answer.stdout)
    missing = [job for job in jobs if job not in states]
    if missing and shutil.which("sacct"):
        words = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={','.join(missing)}"]
        answer = call(*words, "--format=JobID,State,Reason")
        states |= _parse(answer.stdout) if answer.returncode == 0 else {}
    return states


def _parse(text: str) -> dict[str, JobState]:
    """Lines NUMBER|STATE|REASON of squeue or sacct; sacct adds `by UID` to CANCELLED."""
    states = {}
    for line in text.splitlines():
        words = line.strip().split("|", 2)
        if len(words) == 3:
            reason = words[2] if words[2] not in ("None", "NONE") else ""
            states[words[0]] = JobState(words[1].split()[0].upper() if words[1] else "UNKNOWN", reason)
    return states
