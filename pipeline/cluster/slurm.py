"""Slurm's commands, and what their answers mean: partitions, jobs in the queue, submitting, cancelling."""

import math
import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field

from pipeline.core.config import StageConfig
from pipeline.core.errors import UserError

PATIENCE = 60  # seconds for one command; a busy controller may take tens
RESTART = 600.0  # seconds for which a command is tried again while the controller cannot be reached
AGAIN_AFTER = 15.0  # seconds between two tries
UNREACHABLE = (
    "unable to contact",
    "socket timed out",
    "connection refused",
    "zero bytes",
    "communication",
    "try again",
)
UNREACHABLE += ("temporarily", "did not answer", "backup controller", "connection reset", "connection timed out")
"""In messages of commands, if the controller is restarting or too busy; any other refusal is final."""
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


def call(*words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Run one of Slurm's commands. Raises UserError if there is none, or if it does not answer."""
    if not shutil.which(words[0]):
        raise UserError(
            f"--on slurm: no Slurm here: {words[0]} is not on the PATH; run this on a login node of the cluster, or add"
            " --dry-run to see the jobs"
        )
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE, env=environment
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{words[0]} did not answer for {PATIENCE} s; try again when Slurm's controller answers"
        ) from None


def call_patiently(*words: str) -> subprocess.CompletedProcess:
    """`call` inside a job, where nobody could try again: up to RESTART seconds while the controller cannot be reached.
    Only for commands that may be done twice. The last answer is returned, with what went wrong in stderr."""
    deadline = time.monotonic() + RESTART
    while True:
        try:
            answer = call(*words)
        except UserError as error:
            answer = subprocess.CompletedProcess(words, 1, "", str(error))
        message = answer.stderr.lower()
        is_busy = answer.returncode != 0 and any(sign in message for sign in UNREACHABLE)
        if not is_busy or time.monotonic() > deadline:
            return answer
        time.sleep(AGAIN_AFTER)


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
        partition.kinds.append(NodeKind(_number(count), _number(cpus), _number(memory), gpus_of(gres)))
    return found


def _number(text: str) -> int:
    """`64`; for nodes that differ, `64+`; in units of 1024, `2K`; 0 if Slurm does not say, as `N/A` of no nodes."""
    parts = re.fullmatch(r"(\d+)(?:\.(\d+))?([KMGT]?)\+?", text)
    if not parts:
        return 0
    return int(float(f"{parts[1]}.{parts[2] or 0}") * 1024 ** " KMGT".index(parts[3] or " "))


def _minutes(text: str) -> float:
    """Minutes of a limit as sinfo and squeue have it: days-hours:minutes:seconds, hours:minutes:seconds,
    minutes:seconds. Infinity for UNLIMITED, infinite, and whatever says nothing (NOT_SET, INVALID, n/a)."""
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
    asked = config.resources.partition or os.environ.get("SBATCH_PARTITION", "")
    names = [name for name in asked.split(",") if name]
    unknown = [name for name in names if name not in cluster]
    if unknown:
        where = "" if config.resources.partition else " (from SBATCH_PARTITION)"
        raise UserError(
            f"stages.{stage}.resources.partition: this cluster has no partition {unknown[0]}{where}; it has"
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


# Of a job in which alma is started, and of no meaning to the jobs that it submits: srun would refuse SLURM_MEM_PER_CPU
# of an interactive job beside --mem of the new one. Where the cluster is, and how its answers look, stays.
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT")
# Variables that win over the lines #SBATCH of a job script: option -> its variables. Those of `own` are alma's.
VARIABLES = {
    "partition": ["PARTITION"], "account": ["ACCOUNT"], "qos": ["QOS"], "constraint": ["CONSTRAINT"],
    "time": ["TIMELIMIT"], "exclusive": ["EXCLUSIVE"], "mem": ["MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"],
    "gpus-per-node": ["GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK", "GRES"], "reservation": ["RESERVATION"],
    "own": ["JOB_NAME", "OUTPUT", "ERROR", "OPEN_MODE", "SIGNAL", "REQUEUE", "NO_REQUEUE", "WAIT", "ARRAY_INX"],
}  # fmt: skip


def environment_for(file: str) -> dict[str, str]:
    """The environment for sbatch, and so of the job: without what would override the lines #SBATCH of its script, and
    without what is of another job, in which this process may run."""
    with open(file, encoding="utf-8") as script:
        given = re.findall(r"^#SBATCH --([a-z-]+)", script.read(), re.M)
    names = {f"SBATCH_{name}" for option in ("own", *given) for name in VARIABLES.get(option, ())}
    inside = "SLURM_JOB_ID" in os.environ
    variables = {}
    for name, value in os.environ.items():
        of_this_job = inside and name.startswith(("SLURM_", "SRUN_")) and name not in KEPT
        if name not in names and not of_this_job:
            variables[name] = value
    return variables


def submit(file: str, after: list[str]) -> str:
    """Submit a job that starts when the jobs `after` have succeeded, and is cancelled if one does not. Returns its
    number. Raises UserError."""
    answer = call("sbatch", "--parsable", *dependency(after), file, environment=environment_for(file))
    if answer.returncode:
        raise UserError(f"sbatch refused {file}: {message_of(answer)}")
    return number_in(answer.stdout)


def number_in(text: str) -> str:
    """The job's number in what `sbatch --parsable` prints: NUMBER, or NUMBER;CLUSTER, on a line of its own, beside
    which a site's plugins may print others. Raises UserError."""
    found = re.findall(r"^\s*(\d+)(?:;\S*)?\s*$", text, re.M)
    if not found:
        raise UserError(
            f"sbatch --parsable printed no job number, but {text.strip()[-300:]!r}; see squeue whether the job is"
            " queued (scancel ends it)"
        )
    return found[-1]


def dependency(after: list[str]) -> list[str]:
    """sbatch's options for a job that needs others."""
    return [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []


def test(file: str) -> None:
    """Raise UserError if Slurm would refuse a job, without submitting it."""
    answer = call("sbatch", "--test-only", file, environment=environment_for(file))
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
    lines = answer.stdout.strip().splitlines()
    return 60 * _minutes(lines[-1].strip()) if lines else math.inf


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
        try:
            answer = call(*words, "--format=JobID,State,Reason")
        except UserError:  # its database is another server, which may be down while the queue is not
            return states
        states |= _parse(answer.stdout) if answer.returncode == 0 else {}
    return states


def _parse(text: str) -> dict[str, JobState]:
    """Lines NUMBER|STATE|REASON of squeue or sacct; sacct adds `by UID` to CANCELLED. A job script that somebody
    submits as an array or as a part of another job has several lines, NUMBER_TASK or NUMBER+PART: it lives as long as
    one of them does."""
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        words = line.strip().split("|", 2)
        number = re.match(r"\d+", words[0])
        if len(words) != 3 or not number or "." in words[0]:  # `.`: a step
            continue
        reason = words[2] if words[2] not in ("None", "NONE") else ""
        state = JobState(words[1].split()[0].upper() if words[1].strip() else "UNKNOWN", reason)
        if number[0] not in states or not states[number[0]].is_live:
            states[number[0]] = state
    return states
