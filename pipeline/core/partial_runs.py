"""Outputs that are not published yet: which a stage's folder has, whether they are worth keeping, and the checkpoint
that --fork goes on from. Nothing is written here."""

import json
import shutil
from pathlib import Path

from pipeline.core.artifact import current
from pipeline.core.changes import explain
from pipeline.core.errors import Damaged, UserError
from pipeline.core.files import damage_of, read_record
from pipeline.core.lock import Lock, lock_holder
from pipeline.core.terminal import show


def partials(folder: Path) -> list[Path]:
    """Unfinished outputs of a stage, oldest first."""
    found = [path for path in folder.glob("*.partial") if (path / "run.json").exists()]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime)


RUN = {
    "identity": dict,
    "config": dict,
    "parents": dict,
    "started": str,
    "resumed": int,
    "seconds": (int, float),
    "restart": bool,
}


def run_info(output: Path) -> dict:
    """What is known of a run, from its run.json. Raises Damaged."""
    known = output / "run.json"
    try:
        return read_record(known, RUN)
    except ValueError as error:
        raise Damaged(f"{known}: {error}; run the stage again with --restart") from None
    except OSError as error:
        raise Damaged(f"{known}: cannot be read ({error.strerror}); run the stage again with --restart") from None


def restarting(partial: Path) -> bool:
    """Whether an unfinished output is a --restart that was killed: what is published beside it is then not the end
    of the story."""
    if not (partial / "run.json").exists() or (partial / "manifest.json").exists():
        return False
    return run_info(partial)["restart"]


class NothingToFork(UserError):
    """No earlier run of a stage has a checkpoint that --fork could continue from, on the same inputs; `reason` says
    what there is."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def fork_source(folder: Path, after: dict, stage: str) -> Path:
    """The checkpoint that --fork continues from: the newest of the newest run, before the wanted last step, of a run
    on the same inputs. `after` is the wanted run (changes.explain).

    Raises NothingToFork; or UserError if there are such checkpoints and none of them can be used.
    """
    published = current(folder)
    last = _last_step(after["config"])
    reasons, unusable = [], []
    for run in [*reversed(partials(folder)), *([published.path] if published else [])]:
        steps = sorted((path.parent for path in run.glob("checkpoints/step-*/complete.json")), key=_number)
        if not steps:
            continue
        before = run_info(run)
        changed = explain(folder, before, after, keys=("parents", "sources"))
        if changed:
            reasons.append(f"{run.name} was made from other inputs ({'; '.join(changed)})")
            continue
        early = [step for step in steps if last is None or _number(step) < last]
        if not early:
            unusable.append(
                f"{run.name} is at {steps[-1].name} already and the recipe asks for {last} steps (its"
                f" first checkpoint that is left is {steps[0].name}); ask for more steps"
            )
        for path in reversed(early):
            damaged = _torn(path)
            if damaged is None:
                return folder.resolve() / run.name / "checkpoints" / path.name
            show(f"checkpoint {path} is damaged ({damaged}) and passed over")
        if early:
            unusable.append(f"every one of {run.name} is damaged")
    reason = "; ".join([*unusable, *reasons]) or "there is none"
    message = (
        f"{folder}: --fork found no complete checkpoint of stage {stage} to continue from: {reason}. Leave --fork out,"
        " or give --restart, to start from step 0"
    )
    raise UserError(message) if unusable else NothingToFork(message, reason)


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _last_step(config: dict) -> int | None:
    """The last step that a recipe asks for; None where only the stage itself can tell, which checks it again."""
    if config.get("tokens"):
        return -(-config["tokens"] // (config["batch_size"] * config["sequence_length"]))
    return config.get("steps")


def _torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its own marker."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
        return next((words for name, entry in files.items() if (words := damage_of(checkpoint / name, entry))), None)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"complete.json cannot be read: {error}"


def has_work(path: Path) -> bool:
    """Whether an unfinished output holds anything that was worked for."""
    return finished_files(path) > 0


def finished_files(path: Path) -> int:
    """How many files of an unfinished output were worked for: a number that grows as a stage makes progress. Tables of
    rows (data/packing.py) are made again in seconds, and tasks of an array job (data/executors.py) are no results."""
    idle = {"run.json", "recipe.yaml", "metrics.jsonl", "logs", "wandb"}
    return sum(
        file.is_file()
        and not file.name.endswith(".tmp")
        and file.relative_to(path).parts[0] not in idle
        and file.relative_to(path).parts[:2] not in (("work", "tables"), ("work", "tasks"))
        for file in path.rglob("*")
    )


def can_fork(folder: Path, after: dict, stage: str) -> bool:
    """Whether --fork would find a checkpoint to continue from."""
    try:
        fork_source(folder, after, stage)
        return True
    except UserError:
        return False


def worth_keeping(path: Path) -> bool:
    """Whether work would be lost if another recipe took the place of an unfinished output.

    Training resumes from a checkpoint, so without one there is nothing to lose. A run that ended with a user error ends
    with it again, unless its recipe is changed.
    """
    if (path / "manifest.json").exists() or any(path.glob("checkpoints/step-*/complete.json")):
        return True
    run = run_info(path)
    trains = "save" in run["config"]
    return has_work(path) and not trains and "ended" not in run


def tidy(folder: Path) -> None:
    """Remove what killed runs left behind in the folder of a stage that is not run now: it is published, and nobody
    would open it for writing again."""
    published = current(folder)
    names = (".*.tmp", "lock.json", ".takeover", ".lock.*", ".ended")
    left = [path for name in names for path in folder.glob(name)]
    if published:
        left += [published.path / "work"] if (published.path / "work").exists() else []
        left += _temporary(published.path)
    if not left:
        return
    lock, holder = Lock(folder), lock_holder(folder)
    if holder and not holder["dead"]:
        return  # who writes here tidies up too
    try:
        lock.acquire()
    except (UserError, OSError):  # somebody was faster; or the folder is another user's, and its rest harms nobody
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
    """Remove temporary files that killed runs left in a stage's folder, and in its unfinished outputs. The lock is
    held."""
    for path in folder.glob(".*.tmp"):
        if not path.name.startswith("..lock."):  # of who waits for the lock
            path.unlink(missing_ok=True)
    for path in folder.glob("*.partial"):
        sweep_temporary(path)
        if not (path / "run.json").exists() and not has_work(path) and not (path / "logs").exists():
            shutil.rmtree(path)  # killed before it was begun


def sweep_temporary(path: Path) -> None:
    for left in _temporary(path):
        left.unlink(missing_ok=True)


def _temporary(path: Path) -> list[Path]:
    """Files that were being written (files.write_atomic) when their process was killed. Other ranks may be writing
    theirs in logs/ and in a checkpoint's hidden folder, which train/checkpoints.py removes itself."""
    found = []
    for left in path.rglob(".*.tmp"):
        inside = left.relative_to(path).parts
        hidden = any(part.startswith(".") and part.endswith(".tmp") for part in inside[:-1])
        if left.is_file() and inside[0] not in ("logs", "wandb") and not hidden:
            found.append(left)
    return found
