"""`alma list`: the runs in a folder, or the stages of one, with their states, sizes and last metrics. Only what is in
the folders is read, so that a list of runs needs neither recipes nor data, and disturbs nothing that runs."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from pipeline.checks.tables import console, new_table
from pipeline.core.chain_summary import seconds as duration
from pipeline.core.errors import UserError
from pipeline.core.terminal import byte_size, show
from pipeline.report.metric_series import last_values
from pipeline.report.run_folder import Run, StageRun, read_run, stage_folders

# Of a stage that has not published: what is shown of its last lines, in this order.
SHOWN = ("heldout_loss", "loss", "heldout_reward", "reward")


@dataclass(frozen=True)
class StageEntry:
    """A stage of a run."""

    stage: str
    kind: str
    state: str
    """One of report.run_folder.STATES."""
    reason: str
    path: str | None
    bytes: int
    """Of all its outputs, also unfinished and old ones."""
    seconds: float | None
    """That its newest output took."""
    changed: float | None
    """Seconds since the epoch; None if it has no output."""
    metric: str
    """What it measured, or of an unfinished stage its last numbers."""


@dataclass(frozen=True)
class RunEntry:
    """A run in a folder."""

    run: str
    path: str
    bytes: int
    changed: float | None
    stages: list[StageEntry]
    problem: str = ""
    """Why it cannot be read, if it cannot."""


def runs_in(folder: Path) -> list[RunEntry]:
    """The runs in a folder, the one that changed last at the end. A run that cannot be read is one of them, with the
    reason. Raises UserError for a folder without runs."""
    paths = run_paths(folder)
    if not paths:
        raise UserError(f"{folder}: has no runs; give a folder such as runs, or the folder of one run")
    entries = []
    for path in paths:
        try:
            entries.append(entry_of(read_run(path)))
        except UserError as error:
            entries.append(RunEntry(path.name, str(path), size(path), path.stat().st_mtime, [], str(error)))
    return sorted(entries, key=lambda entry: entry.changed or 0.0)


def run_paths(folder: Path) -> list[Path]:
    """The folders of runs directly in a folder. Raises UserError if that cannot be read."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "not there"
        raise UserError(f"{folder}: is {kind}; give a folder with runs, such as runs, or the folder of one run")
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        return [path for path in inner if stage_folders(path)]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None


def entry_of(run: Run) -> RunEntry:
    stages = [_stage_entry(run, stage) for stage in run.stages.values()]
    changed = max((stage.changed for stage in stages if stage.changed), default=None)
    return RunEntry(run.name, str(run.path), size(run.path), changed, stages)


def _stage_entry(run: Run, stage: StageRun) -> StageEntry:
    return StageEntry(
        stage.name,
        stage.kind,
        stage.state,
        stage.reason,
        str(stage.path) if stage.path else None,
        size(run.path / stage.name),
        stage.seconds,
        _changed(stage),
        _metric(stage),
    )


def _changed(stage: StageRun) -> float | None:
    if stage.path is None:
        return None
    files = [stage.path / name for name in ("manifest.json", "run.json", "metrics.jsonl")]
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def _metric(stage: StageRun) -> str:
    summary = stage.metrics.get("summary", {})
    if summary.get("measure"):
        return summary["measure"]
    if stage.path is None:
        return ""
    values = last_values(stage.path / "metrics.jsonl")
    parts = [f"{name} {values[name]:.4g}" for name in SHOWN if name in values]
    if not parts:
        return ""
    steps = stage.config.get("steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    return f"step {values['step']:,.0f}{of}: {', '.join(parts)}"


def size(path: Path) -> int:
    """Bytes of the files below a folder; links are not followed. What disappears meanwhile is not counted."""
    total = 0
    pending = [path]
    while pending:
        try:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:  # a checkpoint or a temporary file of a running stage
            continue
        except NotADirectoryError:  # `path` is a file
            total += path.stat().st_size
    return total


# ---- for people ------------------------------------------------------------------------------------------------------


def show_runs(entries: list[RunEntry]) -> None:
    """A row per run."""
    table = new_table("run", "stages", "size", "changed (UTC)", "last metric", text=("run", "stages", "last metric"))
    for entry in entries:
        newest = max((stage for stage in entry.stages if stage.metric), key=lambda one: one.changed or 0, default=None)
        metric = f"{newest.stage}: {newest.metric}" if newest else ""
        table.add_row(entry.run, entry.problem or _states(entry.stages), byte_size(entry.bytes), _time(entry), metric)
    console().print(table)
    total = sum(entry.bytes for entry in entries)
    show(f"{byte_size(total)} in all; the stages of one: alma list {entries[-1].path}")


def show_stages(entry: RunEntry) -> None:
    """A row per stage."""
    columns = ("stage", "state", "size", "time", "changed (UTC)", "last metric")
    table = new_table(*columns, text=("stage", "state", "last metric"))
    for stage in entry.stages:
        state = f"{_word(stage.state)}: {stage.reason}" if stage.reason else _word(stage.state)
        spent = "" if stage.seconds is None else duration(stage.seconds)
        table.add_row(stage.stage, state, byte_size(stage.bytes), spent, _time(stage), stage.metric)
    console().print(table)
    show(f"{entry.path}: {byte_size(entry.bytes)}; what can be removed: alma gc {entry.path}")


def _states(stages: list[StageEntry]) -> str:
    """How many are done, and each of the others that has begun."""
    done = sum(stage.state == "done" for stage in stages)
    parts = [f"{done} of {len(stages)} done"]
    for stage in stages:
        if stage.state not in ("done", "missing"):
            at = f" {stage.reason}" if stage.reason.startswith("at step") else ""
            parts.append(f"{stage.stage} {stage.state}{at}")
    return ", ".join(parts)


def _word(state: str) -> str:
    return "not started" if state == "missing" else state


def _time(entry: RunEntry | StageEntry) -> str:
    return "" if entry.changed is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.changed))
