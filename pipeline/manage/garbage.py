"""`alma gc`: what can be removed from runs, why, and how much it frees.

    plan = removable([Path("runs/quickstart")])       # looks only
    freed = remove(plan, [Path("runs/quickstart")])   # under the locks of the stages, after looking again

What is never removed: outputs in use and whatever they were made from (references.py), unfinished runs with their
checkpoints, the newest checkpoint of a published stage, those of the grid (`save.keep_every`), the best one, those that
a branch or a fork starts from, and anything of a stage that is running.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipeline.core import checkpoint_folder, faults
from pipeline.core.checkpoint_folder import complete_checkpoints, step_of
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock, describe_holder, lock_holder
from pipeline.core.partial_runs import partials
from pipeline.manage.listing import run_paths, size
from pipeline.manage.references import References, references
from pipeline.report.run_folder import stage_folders

STAMP = r"-\d{8}-\d{6}-[0-9a-f]{4}"
SET_ASIDE = re.compile(rf"(?:[0-9a-f]{{12}}|current)\.(abandoned|failed|replaced|damaged|copied){STAMP}")
WHY_ASIDE = {
    "abandoned": "unfinished run, set aside by --restart or --fork",
    "failed": "run of another recipe that ended with an error",
    "replaced": "output that --restart has replaced",
    "damaged": "damaged output, set aside",
    "copied": "copy of an output that links were followed for",
}
BEING_REMOVED = ".gc-"  # name of a folder that is being removed
WHY_LEFT = "left by an alma gc that was interrupted"


@dataclass(frozen=True)
class Item:
    """A folder that can go."""

    run: str
    stage: str
    """Empty for what belongs to no stage."""
    path: Path
    why: str
    locks: tuple[Path, ...]
    """Folders of stages that must not run while it is renamed, before it is deleted."""
    bytes: int = 0


@dataclass
class Plan:
    """What can be removed."""

    items: list[Item] = field(default_factory=list)
    left_alone: list[str] = field(default_factory=list)
    """What was not looked at or cannot be judged, and why."""

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.items)


def removable(runs: list[Path]) -> Plan:
    """What can be removed from these runs. Outputs of all runs in the same folders count as what may refer to them.
    Raises UserError if an output in use cannot be read."""
    plan = _removable(_distinct(runs), _references(runs), frozenset())
    distinct: dict[Path, Item] = {}
    for item in plan.items:  # runs may share the folder of a stage
        distinct.setdefault(item.path.resolve(), item)
    plan.items = [replace(item, bytes=size(item.path)) for item in distinct.values()]
    return plan


def _distinct(folders: list[Path]) -> list[Path]:
    """Folders without further names of the same one: of `a` and `latest -> a`, `a`."""
    found: dict[Path, Path] = {}
    for folder in sorted(folders, key=lambda path: path.is_symlink()):
        found.setdefault(folder.resolve(), folder)
    return [folder for folder in folders if found[folder.resolve()] is folder]


def _references(runs: list[Path]) -> References:
    beside = list(runs)
    for run in runs:
        for parent in {run.absolute().parent, run.resolve().parent}:  # two, if the run is a link
            beside += run_paths(parent)
    return references(_distinct(beside))


def _removable(runs: list[Path], found: References, held: frozenset[Path]) -> Plan:
    """What can be removed, without sizes. held: folders of stages whose locks this process has."""
    plan = Plan()
    for run in runs:
        folders = _distinct(stage_folders(run))
        is_busy = False
        for folder in folders:
            holder = lock_holder(folder)
            if holder and not holder["dead"] and folder not in held:
                plan.left_alone.append(f"{folder}: in use by {describe_holder(holder)}")
                is_busy = True
                continue
            is_busy |= bool(partials(folder))
            plan.items += _of_stage(folder, found)
            for path, why in found.unreadable.items():
                if path.parent == folder.resolve():
                    plan.left_alone.append(f"{why}: an old output that cannot be read")
        for path in sorted(run.glob(f"{BEING_REMOVED}*")):
            plan.items.append(Item(run.name, "", path, WHY_LEFT, tuple(folders)))
        cache = run / "cache"
        if cache.is_dir() and not is_busy:
            why = "cache, computed again if a stage needs it"
            plan.items.append(Item(run.name, "", cache, why, tuple(folders)))
    links = [item for item in plan.items if item.path.is_symlink()]
    plan.items = [item for item in plan.items if not item.path.is_symlink()]
    plan.left_alone += [f"{item.path}: a link, which gc does not follow ({item.why})" for item in links]
    return plan


def _item(folder: Path, path: Path, why: str) -> Item:
    return Item(folder.parent.name, folder.name, path, why, (folder,))


def _of_stage(folder: Path, found: References) -> list[Item]:
    items = []
    for path in sorted(folder.iterdir()):
        if not path.is_dir() or path.is_symlink():
            continue
        aside = SET_ASIDE.fullmatch(path.name)
        if aside:
            items.append(_item(folder, path, WHY_ASIDE[aside[1]]))
        elif path.name.startswith(BEING_REMOVED):
            items.append(_item(folder, path, WHY_LEFT))
        elif path.resolve() not in found.records:
            continue
        elif path.resolve() in found.needed:
            items += _checkpoints(folder, path, found)
        else:
            made = found.records[path.resolve()].get("finished", "an unknown time")
            items.append(_item(folder, path, f"old output of {made} that nothing refers to"))
    return items


def _checkpoints(folder: Path, output: Path, found: References) -> list[Item]:
    """Checkpoints of an output that is kept: of a published one those that are superseded, of any one those that are
    damaged."""
    items = []
    for path in sorted(checkpoint_folder.folder_of(output).glob(f"{BEING_REMOVED}*")):
        items.append(_item(folder, path, WHY_LEFT))
    for path in sorted(checkpoint_folder.folder_of(output).glob("damaged-step-*")):
        items.append(_item(folder, path, "damaged checkpoint, never resumed from"))
    if output.name.endswith(".partial"):
        return items
    for path in sorted(checkpoint_folder.leftovers(output)):
        items.append(_item(folder, path, "checkpoint that was being written or removed"))
    checkpoints = complete_checkpoints(output)
    if not checkpoints:
        return items
    newest = step_of(checkpoints[-1])
    kept = {newest} | found.steps.get(output.resolve(), set()) | _best(output, checkpoints)
    every = (found.records[output.resolve()]["config"].get("save") or {}).get("keep_every")
    for path in checkpoints:
        step = step_of(path)
        if step not in kept and not (every and step % every == 0):
            items.append(_item(folder, path, f"checkpoint superseded by that of step {newest}"))
    return items


def _best(output: Path, checkpoints: list[Path]) -> set[int]:
    """The step with the lowest held-out loss, if the run has recorded these for save.keep_best."""
    try:
        losses = json.loads((checkpoint_folder.folder_of(output) / "losses.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return set()
    except ValueError:  # cut off: any of them may be the best
        return {step_of(path) for path in checkpoints}
    evaluated = [step_of(path) for path in checkpoints if str(step_of(path)) in losses]
    return {min(evaluated, key=lambda step: losses[str(step)])} if evaluated else set()


# ---- removing --------------------------------------------------------------------------------------------------------


def remove(plan: Plan, runs: list[Path]) -> Plan:
    """Remove what is in `plan` and can still go now that its stages are locked. Returns what was removed, and what was
    not and why. A kill leaves every folder complete, or under a name that nothing reads.

    Stages are locked one by one, and only while their folders get such names: deleting may take hours, in which other
    stages, and this one, can start.
    """
    done = Plan()
    hidden: list[tuple[Item, Path]] = []
    by_locks: dict[tuple[Path, ...], list[Item]] = {}
    for item in plan.items:
        if item.path.name.startswith(BEING_REMOVED):
            hidden.append((item, item.path))
        else:
            by_locks.setdefault(item.locks, []).append(item)
    for locks, items in by_locks.items():
        hidden += _hide(items, locks, runs, done)
    for item, path in hidden:
        faults.point("gc")
        try:
            _delete(path)
        except OSError as error:
            done.left_alone.append(f"{error.filename or path}: cannot be removed ({error.strerror})")
            continue
        done.items.append(item)
    return done


def _hide(items: list[Item], locks: tuple[Path, ...], runs: list[Path], done: Plan) -> list[tuple[Item, Path]]:
    """Rename what can still go of the items with these locks. Returns them with their new paths; notes in `done` what
    is left alone."""
    hidden = []
    with contextlib.ExitStack() as stack:
        for folder in locks:
            lock = Lock(folder)
            try:
                lock.acquire()
            except UserError as error:
                done.left_alone.append(str(error))
                return []
            except OSError as error:
                done.left_alone.append(f"{folder}: cannot be locked ({error.strerror})")
                return []
            stack.callback(lock.release)
        try:
            now = _removable([locks[0].parent], _references(runs), frozenset(locks))
        except UserError as error:  # a record was damaged since the plan was made
            done.left_alone.append(str(error))
            return []
        still = {item.path for item in now.items}
        for item in items:
            if item.path not in still:
                done.left_alone.append(f"{item.path}: something refers to it by now")
                continue
            path = item.path.with_name(f"{BEING_REMOVED}{item.path.name.lstrip('.')}-{uuid.uuid4().hex[:8]}")
            try:
                os.rename(item.path, path)
            except OSError as error:
                done.left_alone.append(f"{item.path}: cannot be removed ({error.strerror})")
                continue
            faults.point("gc")
            hidden.append((item, path))
    return hidden


def _delete(path: Path) -> None:
    """Delete a folder that another gc may be deleting as well."""
    while path.exists():
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)
