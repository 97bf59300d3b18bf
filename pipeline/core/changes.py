"""Why a result is out of date: what changed in the recipe, in the files of its sources, and in the outputs that it was
made from."""

import os
from pathlib import Path
from typing import Any

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.config import ExternalFiles, SourceBlock
from pipeline.core.errors import UserError
from pipeline.core.fingerprint import without_key
from pipeline.core.recipe import KINDS, module_of
from pipeline.core.terminal import plural
from pipeline.core.value_differences import Missing, file_differences, same, some, value_differences


def explain(folder: Path, before: dict, after: dict, keys: tuple[str, ...] = ()) -> list[str]:
    """What changed between two runs of a stage, one phrase per change; empty if nothing did.

    `before` and `after` have `identity`, `config` (everything written out) and `parents`, as manifest.json and run.json
    have them. `keys`: the parts of the identity that are compared, by default all. `folder` is the stage's.
    """
    old, new = dict(before["identity"]), dict(after["identity"])
    kind = new.get("kind", old.get("kind", ""))
    if keys:
        old = {key: value for key, value in old.items() if key in keys}
        new = {key: value for key, value in new.items() if key in keys}
    old_digests, new_digests = old.pop("parents", {}), new.pop("parents", {})
    phrases = differences(old, new, before.get("config"), after.get("config"), kind)
    phrases += _parent_differences(
        folder, old_digests, new_digests, before.get("parents") or {}, after.get("parents") or {}
    )
    return phrases


# ---- inputs ----------------------------------------------------------------------------------------------------------


def _parent_differences(folder: Path, old: dict, new: dict, old_records: dict, new_records: dict) -> list[str]:
    """Differences of the inputs. old, new: input -> digest; the records are what the runs kept of them (`record`)."""
    phrases = []
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        before, after = old_records.get(key), new_records.get(key)
        if before and after and before["stage"] == after["stage"]:
            reasons = _reasons(folder, before, after)
            # Folders have the names of fingerprints. Two results with one fingerprint can still differ in content.
            name = "digest" if before["fingerprint"] == after["fingerprint"] else "fingerprint"
            why = f": {some(reasons, '; ')}" if reasons else ""
            names = f"{before[name][:12]} -> {after[name][:12]}"
            phrases.append(f"inputs.{key}: another result of {after['stage']} ({names}{why})")
        else:
            phrases.append(f"inputs.{key}: {_described(before, old.get(key))} -> {_described(after, new.get(key))}")
    return phrases


def _described(record: dict | None, digest: str | None) -> str:
    if digest is None:
        return "none"
    return f"{record['stage']} ({record['fingerprint'][:12]})" if record else digest[:12]


def _reasons(folder: Path, before: dict, after: dict) -> list[str]:
    """Why one input has another result than before, as far as it is still known."""
    old, new = _recorded_artifact(folder, before), _recorded_artifact(folder, after)
    if old and new and "identity" in old.manifest and "identity" in new.manifest:
        reasons = explain(new.path.parent, old.manifest, new.manifest)
        if reasons:
            return reasons
    old_files = before.get("files") or (old and content(old))
    new_files = after.get("files") or (new and content(new))
    return file_differences(old_files, new_files) if old_files and new_files else []


def _recorded_artifact(folder: Path, record: dict) -> Artifact | None:
    try:
        parent = artifact.read(folder / record["path"])
    except UserError:  # damaged since then
        return None
    return parent if parent and parent.digest == record["digest"] else None


def content(parent: Artifact) -> list[list[str]]:
    """Name and sha256 of an artifact's files."""
    return [[name, entry["sha256"]] for name, entry in sorted(parent.manifest["files"].items())]


def record(parent: Artifact, folder: Path, made_elsewhere: bool) -> dict:
    """What a run in the stage folder `folder` keeps of an input. Of one made elsewhere it keeps the files as well,
    because nothing else will tell later what they were, and where a model by name came from."""
    kept = {
        "stage": parent.stage,
        "kind": parent.kind,
        "fingerprint": parent.fingerprint,
        "digest": parent.digest,
        "path": os.path.relpath(parent.path, folder),
    }
    if made_elsewhere:
        kept["files"] = content(parent)
    if "origin" in parent.manifest:
        kept["origin"] = parent.manifest["origin"]
    return kept


# ---- keys and sources ------------------------------------------------------------------------------------------------


def differences(
    before: dict, after: dict, config_before: dict | None = None, config_after: dict | None = None, kind: str = ""
) -> list[str]:
    """What changed between two identities without their parents, one phrase per change: `optimizer.lr: 0.001 (default)
    -> 0.0003`, or `sources.web: 2 files added (c.jsonl, d.jsonl)`.

    Keys at their default are not in an identity; the configs with everything written out say what they were. kind: of
    the stage.
    """
    parts = module_of(kind).Config.external() if kind in KINDS else []
    phrases = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, Missing()), after.get(key, Missing())
        if same(old, new):
            continue
        if key == "config":
            old, new = _without_sources(old, parts), _without_sources(new, parts)
            phrases += value_differences(old, new, "", config_before, config_after)
        elif key == "version":
            phrases.append(f"version of this kind of stage in alma: {old} -> {new}")
        elif key == "sources":
            old = {} if isinstance(old, Missing) else old
            new = {} if isinstance(new, Missing) else new
            phrases += _external_differences(old, new, config_before or {}, config_after or {}, parts)
        else:
            phrases += value_differences(old, new, key)
    return phrases


def _without_sources(config: Any, parts: list[SourceBlock | ExternalFiles]) -> Any:
    """A stage's own keys without its blocks of sources, which `sources` of the identity has with their files."""
    if isinstance(config, Missing):
        return config
    for part in parts:
        if isinstance(part, SourceBlock):
            config = without_key(config, part.key)
    return config


def _external_differences(
    before: dict, after: dict, config_before: dict, config_after: dict, parts: list[SourceBlock | ExternalFiles]
) -> list[str]:
    """Differences of what was read from outside the run folder (fingerprint.ExternalContent)."""
    phrases = []
    for entry in sorted({*before, *after}):
        old, new = before.get(entry), after.get(entry)
        if same(old, new):
            continue
        part = _part_of(entry, parts)
        if isinstance(part, ExternalFiles):
            phrases.append(f"{part.key}: {', '.join(file_differences(old or [], new or []))}")
            continue
        full_before, full_after = _block_at(config_before, part.key), _block_at(config_after, part.key)
        if part.group:
            old, new = old or {}, new or {}
        else:
            name = entry.removeprefix(part.prefix)
            old, new = {name: old}, {name: new}
        for name in sorted({*old, *new}):
            key = f"{part.key}.{name}"
            phrases += _source_differences(
                key, old.get(name), new.get(name), full_before.get(name), full_after.get(name)
            )
    return phrases


def _part_of(entry: str, parts: list[SourceBlock | ExternalFiles]) -> SourceBlock | ExternalFiles:
    """What an entry of an identity's `sources` was made from."""
    unnamed = SourceBlock("sources", dict)
    for part in parts:
        if isinstance(part, ExternalFiles):
            if entry == part.name_of_entry:
                return part
        elif part.group or part.prefix:
            if entry == part.group or part.prefix and entry.startswith(part.prefix):
                return part
        else:
            unnamed = part
    return unnamed


def _block_at(config: dict, key: str) -> dict:
    """The block at a dotted key; empty if there is none."""
    for name in key.split("."):
        config = config.get(name) or {}
    return config


def _source_differences(
    key: str, before: dict | None, after: dict | None, full_before: dict | None, full_after: dict | None
) -> list[str]:
    """Differences of one source, whose entries in the identity are `before` and `after`."""
    if same(before, after):
        return []
    if before is None or after is None:
        files = (before or after).get("files", [])
        names = f" ({plural(len(files), 'file')}: {some([file[0] for file in files])})" if files else ""
        return [f"{key}: {'removed' if after is None else 'added'}{names}"]
    old_options = {option: value for option, value in before.items() if option != "files"}
    new_options = {option: value for option, value in after.items() if option != "files"}
    phrases = []
    if not same(old_options, new_options):
        phrases += value_differences(old_options, new_options, key, full_before, full_after)
    changed_files = file_differences(before.get("files", []), after.get("files", []))
    if changed_files:
        phrases.append(f"{key}: {', '.join(changed_files)}")
    return phrases
