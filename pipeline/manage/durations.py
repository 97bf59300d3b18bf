"""How long a stage may take, from what earlier runs of stages of its kind took."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.changes import differences
from pipeline.core.checkpoint_folder import newest_step
from pipeline.core.config import dump
from pipeline.core.config import identity as identity_of_keys
from pipeline.core.errors import UserError
from pipeline.core.graph import Node
from pipeline.core.partial_runs import partials, run_info
from pipeline.core.recipe import module_of
from pipeline.manage.listing import run_paths
from pipeline.report.run_folder import stage_folders

MOST_NAMED = 3  # keys that differ


@dataclass(frozen=True)
class Estimate:
    """The time that a stage may take."""

    seconds: float
    basis: str
    """What it is taken from, for people."""
    other: list[str] = field(default_factory=list)
    """Keys in which that run differs, apart from the number of steps, by which its time was scaled."""

    @property
    def text(self) -> str:
        if not self.other:
            return self.basis
        more = len(self.other) - MOST_NAMED
        names = ", ".join(self.other[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        return f"{self.basis}, with another {names}"


def earlier_runs(output: Path) -> dict[str, list[Artifact]]:
    """Kind of stage -> all published outputs in the runs of a folder."""
    found: dict[str, list[Artifact]] = {}
    if not output.is_dir():
        return found
    for run in run_paths(output):
        for folder in stage_folders(run):
            with contextlib.suppress(UserError):  # of a newer alma, or damaged: it tells no time
                for published in artifact.published(folder):
                    found.setdefault(published.kind, []).append(published)
    return found


def estimate(node: Node, earlier: list[Artifact], resumes: bool) -> Estimate | None:
    """The time that a stage will take, None if nothing of its kind has run. earlier: outputs of its kind. resumes: an
    unfinished run of it continues, whose own steps are the best measure.
    """
    spent, step, last = 0.0, 0, node.config.last_step()
    if resumes:
        own = partials(node.folder)[-1]
        spent, step = run_info(own)["seconds"], newest_step(own)
        if step and last and spent:
            return Estimate(spent / step * max(0, last - step), f"as its first {step:,} steps")
    best: Estimate | None = None
    for published in sorted(earlier, key=lambda output: output.manifest.get("finished", ""), reverse=True):
        candidate = _like(node, published, last)
        if candidate and (best is None or len(candidate.other) < len(best.other)):
            best = candidate
    if best is None or not spent:
        return best
    return Estimate(max(0.0, best.seconds - spent), f"{best.basis}, less what is done", best.other)


def _like(node: Node, published: Artifact, last: int | None) -> Estimate | None:
    """As long as an earlier output took, in proportion to its steps. None for one of an older alma with other keys."""
    record = published.manifest
    try:
        before = module_of(node.config.kind).Config.model_validate(record["config"])
    except ValidationError:
        return None
    seconds, last_before = record["seconds"], before.last_step()
    basis = f"as {os.path.relpath(published.path)}"
    if last and last_before and last != last_before:
        seconds *= last / last_before
        basis += f" per step (it made {last_before:,})"
    return Estimate(seconds, basis, _other_keys(node, record, last is not None))


def _other_keys(node: Node, record: dict, scaled: bool) -> list[str]:
    """Keys that decide the result and differ from those of an earlier run; `processes` if it ran in another number."""
    old = {key: value for key, value in record["identity"].items() if key != "parents"}
    if node.identity:
        new = {key: value for key, value in node.identity.items() if key != "parents"}
    else:  # its inputs are not there yet, so that its sources have not been read
        keys = identity_of_keys(node.config)
        keys.pop("inputs", None)
        old.pop("sources", None)
        new = {"kind": node.config.kind, "version": module_of(node.config.kind).VERSION, "config": keys}
    phrases = differences(old, new, record["config"], dump(node.config), node.config.kind)
    names = [phrase.partition(":")[0] for phrase in phrases]
    if scaled:
        names = [name for name in names if name not in ("steps", "tokens")]
    if record.get("processes", 1) != node.config.run.world:
        names.append("number of processes")
    return names
