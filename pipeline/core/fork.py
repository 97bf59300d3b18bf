"""--fork: the checkpoint of an earlier run that a stage continues from under a changed recipe."""

from pathlib import Path

from pipeline.core.artifact import current
from pipeline.core.changes import explain
from pipeline.core.checkpoint_folder import complete_checkpoints, damage, step_of
from pipeline.core.errors import UserError
from pipeline.core.partial_runs import partials, run_info
from pipeline.core.terminal import show


class NothingToFork(UserError):
    """No earlier run of a stage has a checkpoint that --fork could continue from, on the same inputs; `reason` says
    what there is."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def fork_source(folder: Path, after: dict, stage: str, last_step: int | None) -> Path:
    """The checkpoint that --fork continues from: the newest one of the newest run on the same inputs, before the last
    step.

    after: the run that would continue (changes.explain). last_step: the step that it ends with, if that is known.
    Raises NothingToFork; or UserError if there are such checkpoints and none of them can be used.
    """
    published = current(folder)
    runs = list(reversed(partials(folder)))
    if published:
        runs.append(published.path)
    reasons, unusable = [], []
    for run in runs:
        checkpoints = complete_checkpoints(run)
        if not checkpoints:
            continue
        changes = explain(folder, run_info(run), after, keys=("parents", "sources"))
        if changes:
            reasons.append(f"{run.name} was made from other inputs ({'; '.join(changes)})")
            continue
        early = [path for path in checkpoints if last_step is None or step_of(path) < last_step]
        if not early:
            unusable.append(
                f"{run.name} is at {checkpoints[-1].name} already and the recipe asks for {last_step} steps (its oldest"
                f" checkpoint is {checkpoints[0].name}); ask for more steps"
            )
            continue
        for path in reversed(early):
            problem = damage(path)
            if problem is None:
                return path.resolve()
            show(f"checkpoint {path} is damaged ({problem}), skipping it")
        unusable.append(f"every checkpoint of {run.name} is damaged")
    reason = "; ".join([*unusable, *reasons]) or "there is none"
    message = (
        f"{folder}: --fork found no complete checkpoint of stage {stage} to continue from: {reason}. Remove --fork, or"
        " give --restart, to start from step 0"
    )
    raise UserError(message) if unusable else NothingToFork(message, reason)


def can_fork(folder: Path, after: dict, stage: str, last_step: int | None) -> bool:
    """Whether --fork would find a checkpoint to continue from."""
    try:
        fork_source(folder, after, stage, last_step)
        return True
    except UserError:
        return False
