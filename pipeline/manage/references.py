"""What the outputs of runs refer to: what they were made from, and which checkpoints something branches off.

An output is needed if it is in use (`current`), if a run that can be resumed or another needed output was made from
it, or if it may still become the one in use. References are followed from run to run, because an input may be the
output of another recipe. A recorded path holds only from the folder as it was given to the run, which may have been a
link, so inputs are found by their content as well.
"""

import functools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.errors import Damaged, UserError
from pipeline.core.partial_runs import partials, run_info
from pipeline.core.recipe_file import read as read_recipe
from pipeline.models.references import is_reference, parse
from pipeline.report.run_folder import stage_folders

OUTPUT_NAME = re.compile(r"[0-9a-f]{12}")
NAMES_OUTPUTS = re.compile(r"from_step:\s*\d|/[0-9a-f]{12}\b")
"""In the text of a recipe: a branch, or the folder of an output that may be an old one."""


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
    """Old outputs whose manifest cannot be read -> why. They are left alone, and nothing needed was made from them."""
    folders: dict[Path, set[Path]] = field(default_factory=dict)
    """Output -> folders of its stage as the runs have them, which may be links."""
    contents: dict[tuple[str, str], set[Path]] = field(default_factory=dict)
    """Fingerprint and digest -> published outputs that have both: copies of one another."""

    def add(self, output: Path, folder: Path, record: dict) -> None:
        """Note an output in a stage's folder."""
        self.records[output] = record
        self.folders.setdefault(output, set()).add(folder)
        if "digest" in record:
            self.contents.setdefault((record["fingerprint"], record["digest"]), set()).add(output)


def references(runs: list[Path]) -> References:
    """Read the records of all outputs of these runs. Raises UserError for one in use that cannot be read, and for one
    whose input cannot be found, because then nobody knows what it needs."""
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
        pending += _named_in_recipe(output, found)
        _add_branches(output, found)
    return found


def _read_stage(folder: Path, found: References) -> list[Path]:
    """Read the outputs of a stage. Returns those that are needed even if no other output refers to them."""
    roots = []
    try:
        in_use = artifact.current(folder)
        if in_use:
            found.add(in_use.path, folder, in_use.manifest)
            roots.append(in_use.path)
        for path in partials(folder):
            output = path.resolve()
            found.add(output, folder, run_info(path))
            roots.append(output)
    except Damaged as error:
        raise UserError(
            f"{error.problem}; so it is not known what it was made from, and nothing is removed. Run this stage again"
            f" with --restart, or move {folder.parent} to another folder"
        ) from None
    for path in sorted(folder.iterdir()):
        output = path.resolve()
        if not OUTPUT_NAME.fullmatch(path.name) or output in roots:
            continue
        try:
            old = artifact.read(path)
        except Damaged as error:
            found.unreadable[output] = error.problem
            continue
        if old is None:
            continue
        found.add(output, folder, old.manifest)
        if not in_use or _may_be_linked(folder, path):
            roots.append(output)
    return roots


def _may_be_linked(folder: Path, output: Path) -> bool:
    """Whether an output is newer than the link to the one in use: a run that was killed while it published leaves this,
    and the next start finishes it."""
    link = folder / "current"
    return not link.is_symlink() or (output / "manifest.json").stat().st_mtime > link.lstat().st_mtime


def _sources(output: Path, found: References) -> set[Path]:
    """The outputs that an output was made from or forked from, as far as they are in these runs. Raises UserError for
    an input that a stage of its run made and that is not there."""
    record = found.records[output]
    sources = set()
    for key, parent in (record.get("parents") or {}).items():
        owners = _owners_of_input(output, parent, found)
        # What was made elsewhere is recorded with its files, and need not be in these runs.
        is_needed = "files" not in parent or any(
            parent["fingerprint"].startswith(path.name) for path in found.unreadable
        )
        if not owners and is_needed:
            raise UserError(
                f"{output}: its inputs.{key} ({parent['stage']}, {parent['fingerprint'][:12]}) is not in these runs or"
                " cannot be read; so it is not known what that was made from, and nothing is removed. Put it back, run"
                f" this stage again with --restart, or move {output.parent} to another folder"
            )
        sources |= owners
    if record.get("forked_from"):  # a run that was forked is set aside, and then its path leads nowhere
        sources |= _owner((output.parent / record["forked_from"]).resolve(), found)
    return sources


def _owners_of_input(output: Path, parent: dict, found: References) -> set[Path]:
    """The outputs that an input may be: the one that its path leads to if that has its content, otherwise also all
    others that have its content."""
    by_path: set[Path] = set()
    for folder in (output.parent, *(os.path.abspath(folder) for folder in found.folders[output])):
        # Without following links, as the path was made.
        by_path |= _owner(Path(os.path.normpath(os.path.join(folder, parent["path"]))).resolve(), found)
    by_content = found.contents.get((parent["fingerprint"], parent["digest"]), set())
    return (by_path & by_content) or (by_path | by_content)


def _owner(path: Path, found: References) -> set[Path]:
    """The output that a path is or is in; empty if there is none."""
    for folder in (path, *path.parents):
        if folder in found.records:
            return {folder}
    return set()


def _add_branches(output: Path, found: References) -> None:
    """Note the checkpoints that an output continues from (`from_step`, --fork)."""
    record = found.records[output]
    step = record.get("config", {}).get("from_step")
    model = (record.get("parents") or {}).get("model")
    if step and model:
        _add_step(_owners_of_input(output, model, found), step, found)
    fork = re.search(r"step-(\d+)$", record.get("forked_from") or "")
    if fork:
        _add_step(_owner((output.parent / record["forked_from"]).resolve(), found), int(fork[1]), found)


def _add_step(outputs: Iterable[Path], step: int, found: References) -> None:
    for output in outputs:
        found.steps.setdefault(output, set()).add(step)


# ---- stages that may not have run yet --------------------------------------------------------------------------------


def _named_in_recipe(output: Path, found: References) -> set[Path]:
    """The outputs that the recipe of an output names by their folders. Notes the checkpoints that its stages will
    continue from."""
    path = output / "recipe.yaml"
    if not path.is_file() or not NAMES_OUTPUTS.search(path.read_text(encoding="utf-8", errors="replace")):
        return set()
    recipe = _recipe(path, path.stat().st_mtime_ns)
    named: set[Path] = set()
    for block in (recipe.get("stages") or {}).values():
        block = block or {}  # a stage without keys
        for key, source in (block.get("inputs") or {}).items():
            if is_reference(source):
                owners, is_known = _owners_of_folder(source, output, recipe, found)
                named |= owners
            else:
                paths = [folder.parent / source / "current" for folder in found.folders[output]]
                owners, is_known = _owners_of_any(paths, found), True
            if key == "model" and block.get("from_step"):
                # Any output with this checkpoint may be meant by a folder that is not there.
                _add_step(owners if is_known else found.records, block["from_step"], found)
    return named


@functools.cache
def _recipe(path: Path, changed: int) -> dict:
    """The blocks of a recipe; each is read once, because gc looks at all of them again under each lock."""
    return read_recipe(path, {})


def _owners_of_folder(source: str, output: Path, recipe: dict, found: References) -> tuple[set[Path], bool]:
    """The outputs that an input from outside of a recipe is, and whether it is known what it is. A relative path begins
    where the run was started: in the folder that has the recipe's `output`, or where this process was."""
    reference = parse(source)
    if reference.place != "path":
        return set(), True
    bases = {Path.cwd()}
    below = Path(recipe.get("output") or "runs", str(recipe.get("name"))).parts
    for folder in found.folders[output]:
        run = Path(os.path.abspath(folder.parent)).parts
        if run[-len(below) :] == below:
            bases.add(Path(*run[: -len(below)]))
    paths = [base / reference.name for base in bases]
    owners = _owners_of_any(paths, found)
    return owners, bool(owners) or any(path.exists() for path in paths)


def _owners_of_any(paths: list[Path], found: References) -> set[Path]:
    owners: set[Path] = set()
    for path in paths:
        owners |= _owner(path.resolve(), found)
    return owners
