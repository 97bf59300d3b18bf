"""The jobs of a run: which there are (`jobs/jobs.json`), and what has become of them, from Slurm's queue or from what
the jobs themselves have noted."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.cluster import slurm
from pipeline.core.errors import UserError
from pipeline.core.files import read_record, write_json

RECORD = {"job": str, "state": str, "reason": str, "restarts": int}  # STAGE.json, see pipeline/cluster/job.py


@dataclass(frozen=True)
class QueuedJob:
    """The newest job of a stage."""

    job: str
    needs: list[str]  # stages whose jobs it waits for
    submitted: str


@dataclass(frozen=True)
class JobView:
    """A job as `alma status` shows it."""

    job: str
    state: str  # as Slurm has it, in capitals; ENDED if it no longer knows the job
    reason: str
    is_live: bool

    @property
    def text(self) -> str:
        return f"job {self.job} {self.state}" + (f": {self.reason}" if self.reason else "")


def read_jobs(folder: Path) -> dict[str, QueuedJob]:
    """Stage -> its newest job; empty if none was submitted. Raises UserError."""
    path = folder / "jobs.json"
    try:
        record = read_record(path, {})
        return {stage: QueuedJob(**entry) for stage, entry in record.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}; remove it: alma then no longer knows the jobs of this run") from None


def write_jobs(folder: Path, new: dict[str, QueuedJob]) -> None:
    """Note the jobs of these stages. Those of other stages stay noted: `alma logs` finds their logs by them."""
    jobs = read_jobs(folder) | new
    write_json(folder / "jobs.json", {stage: asdict(entry) for stage, entry in jobs.items()})


def views(folder: Path) -> dict[str, JobView]:
    """Stage -> its newest job, also after it has left the queue."""
    jobs = read_jobs(folder)
    states = slurm.job_states([entry.job for entry in jobs.values()])
    found: dict[str, JobView] = {}
    for stage, entry in jobs.items():
        state = (states or {}).get(entry.job)
        found[stage] = _view(folder, stage, entry, state, slurm_answers=states is not None)
    for stage, entry in jobs.items():  # why a job never started
        view = found[stage]
        failed = [parent for parent in entry.needs if parent in found and _has_failed(found[parent])]
        if failed and not view.is_live and view.state in ("CANCELLED", "ENDED") and not _record(folder, stage, entry):
            reason = f"{failed[0]} did not succeed (job {found[failed[0]].job})"
            found[stage] = JobView(view.job, view.state, reason, False)
    return found


def _view(folder: Path, stage: str, entry: QueuedJob, state: slurm.JobState | None, slurm_answers: bool) -> JobView:
    record = _record(folder, stage, entry)
    if state is None:
        if not slurm_answers:
            said = f"; its last start: {record['state']}" if record else ""
            return JobView(entry.job, "UNKNOWN", f"squeue does not answer{said}", True)
        if not record:
            return JobView(entry.job, "ENDED", "it left the queue before it started", False)
        if record["state"] in ("running", "queued again"):
            return JobView(entry.job, "ENDED", "it left the queue without a message", False)
        name = {"done": "COMPLETED", "cancelled": "CANCELLED"}.get(record["state"], "FAILED")
        return JobView(entry.job, name, record["reason"], False)
    if state.state == "COMPLETED" or record is None:
        return JobView(entry.job, state.state, state.reason, state.is_live)
    if state.is_live:
        starts = f"start {record['restarts'] + 1}" if record["restarts"] else ""
        why = record["reason"] if record["state"] == "queued again" else starts
        return JobView(entry.job, state.state, "; ".join(part for part in (state.reason, why) if part), True)
    return JobView(entry.job, state.state, record["reason"] or state.reason, False)


def _has_failed(view: JobView) -> bool:
    return not view.is_live and view.state != "COMPLETED"


def _record(folder: Path, stage: str, entry: QueuedJob) -> dict | None:
    """What the job has noted about its last start; None if it has not started."""
    try:
        record = read_record(folder / f"{stage}.json", RECORD)
    except (OSError, ValueError):
        return None
    return record if record["job"] == entry.job else None
