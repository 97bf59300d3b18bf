"""What the outputs of runs refer to: what they were made from, and which checkpoints something branches off.

An output is needed if it is in use (`current`), if a run that can be resumed or another needed output was made from
it, or if it may still become the one in use. References are followed from run to run, because an input may be the
output of another recipe.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import Damaged, UserError
from pipeline.core.partial_runs import partials, run_info
from pipeline.core.recipe_file import read as read_recipe
from pipeline.report.run_folder import stage_folders

OUTPUT_NAME = re.compile(r"[0-9a-f]{12}")
HAS_BRANCH = re.compile(r"from_step:\s*\d")


@dataclass
class References:
    """Of all outputs of some runs."""

    records: dict[Path, dict] = field(default_factory=dict)
    """Resolved folder of every output that can be read -> its manifest.json or run.json."""
    needed: set[Path] = field(default_factory=set)
    """Those of them that something needs."""
    steps: dict[Path, set[int]] = field(default_factory=dict)
    """Output -> steps of its checkpoints that a branch starts from or a fork was made from."""
    unreadable: dict[Path, str] = field(default_factory=dict)
    """Old outputs whose manifest cannot be read -> why. Nothing can depend on them, and they are left alone."""


def references(runs: list[Path]) -> References:
    """Read the records of all outputs of these runs. Raises UserError for one in use that cannot be read, because then
    nobody knows what it needs."""
    found = References()
    roots: list[Path] = []
    for run in runs:
        for folder in stage_folders(run):
            roots += _read_stage(folder, found)
    pending = list(roots)
    while pending:
        output = pending.pop()
        if output in found.needed:
            continue
        found.needed.add(output)
        pending += _sources(output, found)
    for output in found.needed:
        _add_branches(output, found)
    return found


def _read_stage(folder: Path, found: References) -> list[Path]:
    """Read the outputs of a stage. Returns those that are needed even if no other output refers to them."""
    roots = []
    try:
        in_use = artifact.current(folder)
        if in_use:
            found.records[in_use.path] = in_use.manifest
            roots.append(in_use.path)
        for path in partials(folder):
            output = path.resolve()
            found.records[output] = run_info(path)
            roots.append(output)
    except Damaged as error:
        raise UserError(
            f"{error.problem}; so it is not known what it was made from, and nothing is removed. Run this stage again"
            f" with --restart, or move {folder.parent} to another folder"
        ) from None
    for path in sorted(folder.iterdir()):
        output = path.resolve()
        if not OUTPUT_NAME.fullmatch(path.name) or output in found.records:
            continue
        try:
            old = artifact.read(path)
        except Damaged as error:
            found.unreadable[output] = error.problem
            continue
        if old is None:
            continue
        found.records[output] = old.manifest
        if not in_use or _may_be_linked(folder, path):
            roots.append(output)
    return roots


def _may_be_linked(folder: Path, output: Path) -> bool:
    """Whether an output is newer than the link to the one in use: a run that was killed while it published leaves this,
    and the next start finishes it."""
    link = folder / "current"
    return not link.is_symlink() or (output / "manifest.json").stat().st_mtime > link.lstat().st_mtime


def _sources(output: Path, found: References) -> list[Path]:
    """The outputs that an output was made from or forked from, as far as they are in these runs."""
    record, folder = found.records[output], output.parent
    paths = [folder / str(parent.get("path", "")) for parent in (record.get("parents") or {}).values()]
    if record.get("forked_from"):
        paths.append(folder / record["forked_from"])
    owners = [_owner(path.resolve(), found) for path in paths]
    return [owner for owner in owners if owner]


def _owner(path: Path, found: References) -> Path | None:
    """The output that a path is or is in."""
    for folder in (path, *path.parents):
        if folder in found.records:
            return folder
    return None


def _add_branches(output: Path, found: References) -> None:
    """Note the checkpoints that an output continues from (`from_step`, --fork), and those that stages of its recipe
    will continue from."""
    record = found.records[output]
    step = record.get("config", {}).get("from_step")
    model = (record.get("parents") or {}).get("model")
    if step and model:
        owner = _owner((output.parent / model["path"]).resolve(), found)
        found.steps.setdefault(owner, set()).add(step)
    fork = re.search(r"step-(\d+)$", record.get("forked_from") or "")
    if fork:
        owner = _owner((output.parent / record["forked_from"]).resolve(), found)
        found.steps.setdefault(owner, set()).add(int(fork[1]))
    recipe = output / "recipe.yaml"
    if not recipe.is_file() or not HAS_BRANCH.search(recipe.read_text(encoding="utf-8", errors="replace")):
        return
    for block in read_recipe(recipe, {}).get("stages", {}).values():
        name = block.get("inputs", {}).get("model")
        if block.get("from_step") and name:
            owner = (output.parents[1] / name / "current").resolve()
            found.steps.setdefault(owner, set()).add(block["from_step"])
