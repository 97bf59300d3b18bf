"""Why a result is out of date, in words: what changed in the recipe, in the files of its sources, and in the outputs
that it was made from."""

import os
from pathlib import Path

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.fingerprint import differences, file_differences, some


def explain(folder: Path, before: dict, after: dict, keys: tuple[str, ...] = ()) -> list[str]:
    """What changed between two runs of a stage, a phrase each; empty if nothing did.

    `before` and `after` have `identity`, `config` (everything written out) and `parents`, as manifest.json and run.json
    have them. `keys`: the parts of the identity that are compared, default all. `folder` is the stage's.
    """
    old, new = dict(before["identity"]), dict(after["identity"])
    if keys:
        old, new = ({key: value for key, value in side.items() if key in keys} for side in (old, new))
    digests = old.pop("parents", {}), new.pop("parents", {})
    inputs = _inputs(folder, *digests, before.get("parents") or {}, after.get("parents") or {})
    return [*differences(old, new, before.get("config"), after.get("config")), *inputs]


def _inputs(folder: Path, old: dict, new: dict, old_records: dict, new_records: dict) -> list[str]:
    """Differences of what a stage was made from: digests by name of the input, and what the runs recorded of them."""
    found = []
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        before, after = old_records.get(key), new_records.get(key)
        if before and after and before["stage"] == after["stage"]:
            reasons = _reasons(folder, before, after)
            # folders are called by fingerprints; one of the same recipe can have another content all the same
            names = "digest" if before["fingerprint"] == after["fingerprint"] else "fingerprint"
            why = f": {some(reasons, '; ')}" if reasons else ""
            found.append(
                f"inputs.{key}: another result of {after['stage']} ({before[names][:12]} -> {after[names][:12]}{why})"
            )
        else:
            was, now = _called(before, old.get(key)), _called(after, new.get(key))
            found.append(f"inputs.{key}: {was} -> {now}")
    return found


def _called(record: dict | None, digest: str | None) -> str:
    if digest is None:
        return "none"
    return f"{record['stage']} ({record['fingerprint'][:12]})" if record else digest[:12]


def _reasons(folder: Path, before: dict, after: dict) -> list[str]:
    """Why one input has another result than before, as far as it can still be told."""
    old, new = _find(folder, before), _find(folder, after)
    if old and new and "identity" in old.manifest and "identity" in new.manifest:
        reasons = explain(new.path.parent, old.manifest, new.manifest)
        if reasons:
            return reasons
    old_files = before.get("files") or (old and content(old))
    new_files = after.get("files") or (new and content(new))
    return file_differences(old_files, new_files) if old_files and new_files else []


def _find(folder: Path, record: dict) -> Artifact | None:
    try:
        found = artifact.read(folder / record["path"])
    except UserError:  # damaged since: there is less to say
        return None
    return found if found and found.digest == record["digest"] else None


def content(found: Artifact) -> list[list[str]]:
    """Names and sha256 of an artifact's files."""
    return [[name, entry["sha256"]] for name, entry in sorted(found.manifest["files"].items())]


def record(found: Artifact, folder: Path, outside: bool) -> dict:
    """What a run in the stage folder `folder` keeps of an output that it is made from. Of one that is no stage of the
    recipe the files too: nothing else says later what they were."""
    kept = {
        "stage": found.stage,
        "kind": found.kind,
        "fingerprint": found.fingerprint,
        "digest": found.digest,
        "path": os.path.relpath(found.path, folder),
    }
    return {**kept, "files": content(found)} if outside else kept
