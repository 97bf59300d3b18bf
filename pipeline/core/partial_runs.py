"""Unfinished runs in a stage's folder: which there are, whether they are worth keeping, and removing what killed runs
left behind."""

import os
import shutil
import time
import uuid
from pathlib import Path

from pipeline.core.artifact import current
from pipeline.core.checkpoint_folder import complete_checkpoints
from pipeline.core.errors import Damaged, UserError
from pipeline.core.files import read_record
from pipeline.core.lock import Lock, lock_holder
from pipeline.core.recipe import KINDS, module_of

# Keys of run.json, and the types of their values.
RUN = {
    "identity": dict,
    "config": dict,
    "parents": dict,
    "started": str,
    "resumed": int,
    "seconds": (int, float),
    "restart": bool,
}
# Files and folders of a run that hold no work: they are written again, or only describe the run. Tables of rows
# (data/tokens/packing.py) take seconds, and tasks of an array job (data/cleaning/slurm_executor.py) are not results.
NOT_WORK = {"run.json", "recipe.yaml", "metrics.jsonl", "logs", "wandb", "trackers"}
NOT_WORK_FOLDERS = {("work", "tables"), ("work", "tasks")}


def partials(folder: Path) -> list[Path]:
    """Unfinished runs of a stage, oldest first."""
    runs = [path for path in folder.glob("*.partial") if (path / "run.json").exists()]
    return sorted(runs, key=lambda path: (path / "run.json").stat().st_mtime)


def run_info(run: Path) -> dict:
    """run.json of a run. Raises Damaged."""
    path = run / "run.json"
    try:
        return read_record(path, RUN)
    except ValueError as error:
        raise Damaged(f"{path}: {error}") from None
    except OSError as error:
        raise Damaged(f"{path}: cannot be read ({error.strerror})") from None


def restarting(run: Path) -> bool:
    """Whether a run is a --restart that was killed. The published output is then about to be replaced."""
    if not (run / "run.json").exists() or (run / "manifest.json").exists():
        return False
    return run_info(run)["restart"]


def has_work(run: Path) -> bool:
    """Whether an unfinished run has done anything that would have to be done again."""
    return finished_files(run) > 0


def finished_files(run: Path) -> int:
    """Number of files that hold work of an unfinished run. It grows as the stage makes progress."""
    count = 0
    for file in run.rglob("*"):
        parts = file.relative_to(run).parts
        is_work = parts[0] not in NOT_WORK and parts[:2] not in NOT_WORK_FOLDERS
        if is_work and file.is_file() and not file.name.endswith(".tmp"):
            count += 1
    return count


def worth_keeping(run: Path) -> bool:
    """Whether work would be lost if a run of another recipe replaced this one.

    A stage with steps resumes from checkpoints, so a run without one has nothing to lose. A run that ended with a user
    error ends with it again unless its recipe changes.
    """
    if (run / "manifest.json").exists() or complete_checkpoints(run):
        return True
    info = run_info(run)
    kind = info.get("kind")
    has_steps = kind in KINDS and module_of(kind).Config.HAS_STEPS
    return has_work(run) and not has_steps and "ended" not in info


def set_aside(path: Path, why: str = "abandoned") -> Path:
    """Rename an abandoned or damaged run; returns its new path. A run never deletes the work of another."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    target = path.with_name(f"{path.name.removesuffix('.partial')}.{why}-{stamp}")
    os.rename(path, target)
    return target


# ---- leftovers of killed runs ----------------------------------------------------------------------------------------


def tidy(folder: Path) -> None:
    """Remove what killed runs left in the folder of a stage that is up to date, because no later run would open it."""
    published = current(folder)
    leftovers: list[Path] = []
    for pattern in (".*.tmp", "lock.json", ".takeover", ".lock.*", ".ended"):
        leftovers += folder.glob(pattern)
    if published:
        leftovers += published.path.glob("work")
        leftovers += temporary_files(published.path)
    if not leftovers:
        return
    lock, holder = Lock(folder), lock_holder(folder)
    if holder and not holder["dead"]:
        return  # the run that holds it tidies up as well
    try:
        lock.acquire()
    except (UserError, OSError):  # another process was faster, or the folder belongs to another user
        return
    try:
        sweep_folder(folder)
        shutil.rmtree(folder / ".ended", ignore_errors=True)  # of a job (launch/slurm/alma.sbatch) that was lost
        if published:
            shutil.rmtree(published.path / "work", ignore_errors=True)
            sweep_temporary(published.path)
    finally:
        lock.release()


def sweep_folder(folder: Path) -> None:
    """Remove temporary files that killed runs left in a stage's folder and in its unfinished runs. The caller holds the
    lock."""
    for path in folder.glob(".*.tmp"):
        if not path.name.startswith("..lock."):  # of a process that waits for the lock
            path.unlink(missing_ok=True)
    for run in folder.glob("*.partial"):
        sweep_temporary(run)
        if not (run / "run.json").exists() and not has_work(run) and not (run / "logs").exists():
            shutil.rmtree(run)  # killed before run.json was written


def sweep_temporary(run: Path) -> None:
    for path in temporary_files(run):
        path.unlink(missing_ok=True)


def temporary_files(run: Path) -> list[Path]:
    """Files that a killed process was writing (files.write_atomic). Other ranks may be writing theirs in logs/ and in
    the hidden folder of a checkpoint, which train/checkpoints.py removes itself."""
    paths = []
    for path in run.rglob(".*.tmp"):
        *folders, _ = path.relative_to(run).parts
        is_hidden = any(name.startswith(".") and name.endswith(".tmp") for name in folders)
        if path.is_file() and not is_hidden and (not folders or folders[0] not in ("logs", "wandb", "trackers")):
            paths.append(path)
    return paths
