"""A run's folder as it is on disk: which stages it has, in which state, and what each recorded.

    run = read_run(Path("runs/quickstart"))
    run.stages["pretrain"].state, run.stages["pretrain"].metrics

Only what is in the folder is read: no source, no recipe from elsewhere, and no file is hashed. So a copy of a run can
be reported on without its data, and a running stage is not disturbed. `alma status RECIPE` also compares with the
recipe and its sources, `alma verify artifacts` hashes every file.
"""

import contextlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.errors import Damaged, UserError
from pipeline.core.lock import describe_holder, lock_holder
from pipeline.core.partial_runs import partials, run_info
from pipeline.core.recipe_file import read as read_recipe

STATES = ("done", "running", "interrupted", "failed", "stale", "damaged", "missing")
OTHER_FOLDERS = {"cache"}  # of a run, that are no stages


@dataclass(frozen=True)
class StageRun:
    """What a stage has in the folder of a run."""

    name: str
    kind: str
    state: str
    """One of STATES."""
    reason: str = ""
    """Why it is in this state, in the words of the run; empty if there is nothing to say."""
    path: Path | None = None
    """The output that is reported on: published, or the unfinished one if that is newer."""
    record: dict = field(default_factory=dict, repr=False)
    """manifest.json of a published output, else run.json."""

    @property
    def is_published(self) -> bool:
        return "digest" in self.record

    @property
    def config(self) -> dict:
        return self.record.get("config", {})

    @property
    def parents(self) -> dict[str, dict]:
        return self.record.get("parents") or {}

    @property
    def metrics(self) -> dict:
        """What a published stage measured."""
        return self.record.get("metrics", {})

    @property
    def seconds(self) -> float | None:
        return self.record.get("seconds")

    @property
    def fingerprint(self) -> str:
        return self.record.get("fingerprint", "")


@dataclass(frozen=True)
class Run:
    """The folder of a recipe's runs."""

    path: Path
    name: str
    stages: dict[str, StageRun]
    """In the order of the newest recipe in the folder."""
    recipe: Path | None
    """The newest recipe.yaml that a stage left."""


def read_run(path: Path) -> Run:
    """The run in a folder such as runs/quickstart. Raises UserError for a folder that is none."""
    if not path.is_dir():
        kind = "a file" if path.exists() else "not there"
        raise UserError(f"{path}: is {kind}; give the folder of a run, such as runs/quickstart")
    folders = stage_folders(path)
    if not folders:
        raise UserError(f"{path}: is not the folder of a run{_hint(path)}; give one such as runs/quickstart")
    found = {folder.name: _read_stage(folder) for folder in folders}
    recipe = _newest_recipe(list(found.values()))
    kinds = _planned_kinds(recipe)
    # Times of starts are whole seconds; stages of the same second are in the order of their names.
    others = sorted((found[name].record.get("started", ""), name) for name in set(found) - set(kinds))
    ordered = {}
    for name in [*kinds, *(name for _, name in others)]:
        ordered[name] = found.get(name) or StageRun(name, kinds[name], "missing")
    return Run(path, path.resolve().name, {name: _judged(stage, ordered) for name, stage in ordered.items()}, recipe)


def stage_folders(path: Path) -> list[Path]:
    """Folders of stages in the folder of a run: those that hold a published or an unfinished output."""
    folders = []
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and folder.name not in OTHER_FOLDERS and not folder.name.startswith("."):
            outputs = [*folder.glob("*/manifest.json"), *folder.glob("*.partial/run.json")]
            if any(_is_output(file.parent) for file in outputs):
                folders.append(folder)
    return folders


def _is_output(path: Path) -> bool:
    return bool(re.fullmatch(r"current|[0-9a-f]{12}(\.partial)?", path.name))


def _hint(path: Path) -> str:
    """What a folder is instead, as far as that is easy to say."""
    resolved = path.resolve()
    if _is_output(resolved) and stage_folders(resolved.parent.parent):
        return f", it is one output of a stage of {resolved.parent.parent}"
    if any(path.glob("*/manifest.json")) and stage_folders(resolved.parent):
        return f", it is a stage of {resolved.parent}"
    runs = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and stage_folders(folder)]
    if runs:
        return f", it contains the runs {', '.join(runs[:5])}"
    return ": no folder in it holds the output of a stage"


def _newest_recipe(stages: list[StageRun]) -> Path | None:
    """recipe.yaml of the output that was written last."""
    recipes = [stage.path / "recipe.yaml" for stage in stages if stage.path and (stage.path / "recipe.yaml").exists()]
    return max(recipes, key=lambda path: path.stat().st_mtime, default=None)


def _planned_kinds(recipe: Path | None) -> dict[str, str]:
    """Stage -> kind, of the recipe; empty if it cannot be read."""
    if recipe is None:
        return {}
    try:
        blocks = read_recipe(recipe, {}).get("stages", {})
    except UserError:
        return {}
    return {name: block.get("kind", name) for name, block in blocks.items() if isinstance(block, dict)}


# ---- one stage -------------------------------------------------------------------------------------------------------


def _read_stage(folder: Path) -> StageRun:
    """A stage by itself; whether its inputs are still the current ones is judged later."""
    try:
        published = artifact.current(folder)
    except Damaged as error:
        return StageRun(folder.name, folder.name, "damaged", error.problem)
    unfinished = _newest_unfinished(folder)
    if unfinished and not (published and _is_older(unfinished[0], published)):
        return _unfinished(folder, *unfinished)
    holder = lock_holder(folder)
    if published is None:
        # the link is swapped last, so a run that was killed just before has an output without one
        return StageRun(folder.name, folder.name, "interrupted", "published, but `current` does not lead to it")
    stage = StageRun(folder.name, published.kind, "done", "", published.path, published.manifest)
    if holder and not holder["dead"]:
        return _with_state(stage, "running", describe_holder(holder))
    missing = _missing_file(published)
    return _with_state(stage, "damaged", missing) if missing else stage


def _with_state(stage: StageRun, state: str, reason: str) -> StageRun:
    return StageRun(stage.name, stage.kind, state, reason, stage.path, stage.record)


def _newest_unfinished(folder: Path) -> tuple[Path, dict] | None:
    for path in reversed(partials(folder)):
        with contextlib.suppress(Damaged):
            return path, run_info(path)
    return None


def _is_older(run: Path, published: Artifact) -> bool:
    return (run / "run.json").stat().st_mtime < (published.path / "manifest.json").stat().st_mtime


def _unfinished(folder: Path, path: Path, info: dict) -> StageRun:
    holder = lock_holder(folder)
    step = newest_step(path)
    at = f"at step {step}" if step else ""
    kind = info.get("kind") or info["config"].get("kind", folder.name)
    if holder and not holder["dead"]:
        state, reason = "running", describe_holder(holder)
    elif "ended" in info:
        state, reason = "failed", str(info["ended"])
    else:
        state, reason = "interrupted", at
    return StageRun(folder.name, kind, state, reason, path, info)


def _missing_file(published: Artifact) -> str | None:
    """A file of the manifest that is gone or has another size, or None."""
    for name, entry in published.manifest["files"].items():
        file = published.path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, not {entry['size']}"
    return None


def _judged(stage: StageRun, stages: dict[str, StageRun]) -> StageRun:
    """A published stage is stale if an input from the same run has another content now."""
    if stage.state != "done":
        return stage
    for key, parent in stage.parents.items():
        now = stages.get(parent.get("stage", ""))
        if not is_internal(parent) or now is None or not now.is_published:
            continue
        if now.record["digest"] != parent["digest"]:
            return _with_state(stage, "stale", f"inputs.{key}: {now.name} has another result now")
    return stage


def is_internal(parent: dict) -> bool:
    """Whether an input was made by a stage of the same run."""
    return str(parent.get("path", "")).startswith("../")
