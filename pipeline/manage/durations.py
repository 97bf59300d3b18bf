"""How long a stage may take, from what earlier runs of stages of its kind took."""

import contextlib
import os
import re
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
from pipeline.core.fingerprint import fingerprint_of
from pipeline.core.graph import Node
from pipeline.core.partial_runs import run_info
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


def inherited_steps(record: dict) -> int:
    """Steps that a run took over from the one that it was forked from or continues (`from_step`), in which it spent no
    time itself. record: manifest.json or run.json."""
    fork = re.search(r"step-(\d+)$", record.get("forked_from") or "")
    return int(fork[1]) if fork else record["config"].get("from_step") or 0


def estimate(node: Node, earlier: list[Artifact], resumes: bool, forked_at: int = 0) -> Estimate | None:
    """The time that a stage will take, None if nothing of its kind has run. earlier: outputs of its kind. resumes: an
    unfinished run of it continues, whose own steps are the best measure. forked_at: the step that --fork continues
    from.
    """
    spent, last = 0.0, node.config.last_step()
    first = forked_at or inherited_steps({"config": dump(node.config)})
    if resumes:
        own = node.folder / f"{fingerprint_of(node.identity)[:12]}.partial"
        record = run_info(own)
        spent, first = record["seconds"], inherited_steps(record)
        step = newest_step(own)
        if step > first and last and spent:
            made = step - first
            return Estimate(spent / made * max(0, last - step), f"as its first {made:,} steps")
    best: Estimate | None = None
    for published in sorted(earlier, key=lambda output: output.manifest.get("finished", ""), reverse=True):
        candidate = _like(node, published, last and max(0, last - first))
        if candidate and (best is None or len(candidate.other) < len(best.other)):
            best = candidate
    if best is None or not spent:
        return best
    return Estimate(max(0.0, best.seconds - spent), f"{best.basis}, less what is done", best.other)


def _like(node: Node, published: Artifact, steps: int | None) -> Estimate | None:
    """As long as an earlier output took, in proportion to the steps that both make themselves. None for one of an older
    alma with other keys."""
    record = published.manifest
    try:
        before = module_of(node.config.kind).Config.model_validate(record["config"])
    except ValidationError:
        return None
    seconds, last_before = record["seconds"], before.last_step()
    made = last_before and last_before - inherited_steps(record)
    basis = f"as {os.path.relpath(published.path)}"
    if steps and made and steps != made:
        seconds *= steps / made
        basis += f" per step (it made {made:,})"
    return Estimate(seconds, basis, _other_keys(node, record, steps is not None))


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
