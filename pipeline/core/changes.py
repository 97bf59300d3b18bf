"""Why a result is out of date, in words: what changed in the recipe, in the files of its sources, and in the outputs
that it was made from."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from pipeline.core import artifact
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.fingerprint import canonical
from pipeline.core.terminal import many


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


NAMED = 3  # files, entries of a list, or reasons that a message names; the rest are counted
LONGEST = 80  # characters of a value that are shown


class _Missing:
    """A key that an identity does not have. `default` is the value that counts then, if it is known."""

    def __init__(self, default: Any = None, known: bool = False):
        self.default, self.known = default, known


def differences(before: dict, after: dict, config_before: dict | None = None, config_after: dict | None = None) -> list:
    """What changed between two identities, a phrase each: `optimizer.lr: 0.001 (default) -> 0.0003`, or
    `sources.web: 2 files added (c.jsonl, d.jsonl)`.

    Keys at their default are not in an identity; the configs with everything written out say what they were.
    """
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key, _Missing()), after.get(key, _Missing())
        if _same(old, new):
            continue
        if key == "config":
            found += _changed(_without_files(old), _without_files(new), "", config_before, config_after)
        elif key == "version":
            found.append(f"version of this kind of stage in alma: {old} -> {new}")
        elif key == "sources":
            old, new = ({} if isinstance(side, _Missing) else side for side in (old, new))
            found += _sources(old, new, config_before or {}, config_after or {})
        elif key == "parents":
            found += _changed(old, new, "inputs", {}, {})
        else:
            found += _changed(old, new, key, None, None)
    return found


def _without_files(config: Any) -> Any:
    """A stage's own keys, without blocks of sources: `sources` in the identity has them with their files."""
    if isinstance(config, _Missing):
        return config
    kept = {key: value for key, value in config.items() if key != "examples"}
    if isinstance(kept.get("decontaminate"), dict):
        rest = {key: value for key, value in kept.pop("decontaminate").items() if key != "sets"}
        if rest:
            kept["decontaminate"] = rest
    return kept


def file_differences(before: list[list[str]], after: list[list[str]]) -> list[str]:
    """What changed between two lists of files, each a name and one or more hashes: `1 file added (b.jsonl)`."""
    old, new = _numbered(before), _numbered(after)
    removed, added = [key for key in old if key not in new], [key for key in new if key not in old]
    changed = [name for name, number in old if (name, number) in new and old[name, number] != new[name, number]]
    renamed = []
    for key in list(added):
        source = next((other for other in removed if old[other] == new[key]), None)
        if source:
            renamed.append(f"{source[0]} -> {key[0]}")
            removed.remove(source)
            added.remove(key)
    found = [
        f"{many(len(names), 'file')} {verb} ({some(names)})"
        for verb, names in (
            ("added", [name for name, _ in added]),
            ("removed", [name for name, _ in removed]),
            ("changed", changed),
            ("renamed", renamed),
        )
        if names
    ]
    if not found and before != after:
        return [f"{many(len(after), 'file')} in another order"]
    return found


def some(texts: list[str], mark: str = ", ") -> str:
    """The first few of a list, and how many more there are."""
    more = len(texts) - NAMED
    return mark.join(texts[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _numbered(files: list[list[str]]) -> dict[tuple[str, int], list[str]]:
    """Hashes by name, and by how many files of the same name (in other folders) come before."""
    seen: Counter[str] = Counter()
    found = {}
    for name, *hashes in files:
        found[name, seen[name]] = hashes
        seen[name] += 1
    return found


def _sources(before: dict, after: dict, config_before: dict, config_after: dict) -> list[str]:
    """Differences of what was read from outside the run folder (graph.source_identity)."""
    found = []
    for name in sorted({*before, *after}):
        old, new = before.get(name), after.get(name)
        if _same(old, new):
            continue
        if name in ("@lists", "@outside"):
            at = "block" if name == "@lists" else "adopt"
            found.append(f"{at}: {', '.join(file_differences(old or [], new or []))}")
        elif name == "@examples":
            both = [config.get("examples") or {} for config in (config_before, config_after)]
            for example in sorted({*(old or {}), *(new or {})}):
                sides = ((old or {}).get(example), (new or {}).get(example))
                found += _source(f"examples.{example}", *sides, *both)
        elif name.startswith("decontaminate."):
            short = name.removeprefix("decontaminate.")
            both = ((config.get("decontaminate") or {}).get("sets", {}) for config in (config_before, config_after))
            found += _source(f"decontaminate.sets.{short}", old, new, *both)
        else:
            shards = any(name in (config.get("shards") or {}) for config in (config_before, config_after))
            block = "shards" if shards else "sources"
            both = (config.get(block) or {} for config in (config_before, config_after))
            found += _source(f"{block}.{name}", old, new, *both)
    return found


def _source(at: str, before: dict | None, after: dict | None, all_before: dict, all_after: dict) -> list[str]:
    """Differences of one source. `all_before` and `all_after`: the sources of its block, everything written out."""
    if _same(before, after):
        return []
    if before is None or after is None:
        files = (before or after).get("files", [])
        names = f" ({many(len(files), 'file')}: {some([file[0] for file in files])})" if files else ""
        return [f"{at}: {'removed' if after is None else 'added'}{names}"]
    name = at.rpartition(".")[2]
    old, new = ({key: value for key, value in side.items() if key != "files"} for side in (before, after))
    found = [] if _same(old, new) else _changed(old, new, at, all_before.get(name), all_after.get(name))
    files = file_differences(before.get("files", []), after.get("files", []))
    return [*found, f"{at}: {', '.join(files)}"] if files else found


def _changed(before: Any, after: Any, at: str, full_before: Any, full_after: Any) -> list[str]:
    """Differences of two values that are not the same. `full_before` and `full_after`: the same with all defaults
    written out, or None."""
    before_is, after_is = _as_mapping(before), _as_mapping(after)
    if before_is is not None and after_is is not None and (before_is or after_is):
        found = []
        for name in sorted({*before_is, *after_is}):
            old, old_full = _member(before_is, name, full_before)
            new, new_full = _member(after_is, name, full_after)
            if not _same(old, new):
                found += _changed(old, new, f"{at}.{name}" if at else name, old_full, new_full)
        return found
    if isinstance(before, list) and isinstance(after, list):
        return _lists(before, after, at, full_before, full_after)
    old, new = _pair(before, after)
    return [f"{at}: {old} -> {new}"]


def _as_mapping(value: Any) -> dict | None:
    """A block whose keys are all at their default is not in an identity, and has keys all the same."""
    if isinstance(value, _Missing):
        return {} if value.known and isinstance(value.default, dict) else None
    return value if isinstance(value, dict) else None


def _member(value: dict, name: str, full: Any) -> tuple[Any, Any]:
    """A key's value, and its value with all defaults written out."""
    known = isinstance(full, dict) and name in full
    inner = full[name] if known else None
    if name in value:
        return value[name], inner
    if known:
        return _Missing(inner, known=True), inner
    return _Missing("not given", known=False) if isinstance(full, dict) else _Missing(), None


def _lists(before: list, after: list, at: str, full_before: list | None, full_after: list | None) -> list[str]:
    texts = [_text(before), _text(after)]
    if max(map(len, texts)) <= LONGEST:
        return [f"{at}: {texts[0]} -> {texts[1]}"]
    if len(before) == len(after) and all(isinstance(item, dict) for item in [*before, *after]):
        found = []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if not _same(old, new):
                found += _changed(old, new, f"{at}[{i}]", full_before and full_before[i], full_after and full_after[i])
        return found
    old, new = Counter(map(canonical, before)), Counter(map(canonical, after))
    found = [
        f"{many(len(items), 'entry/entries')} {verb} ({some([_cut(item) for item in items])})"
        for verb, items in (("added", list((new - old).elements())), ("removed", list((old - new).elements())))
        if items
    ]
    return [f"{at}: {', '.join(found) or f'its {len(after)} entries in another order'}"]


def _pair(before: Any, after: Any) -> tuple[str, str]:
    """Two values that are not the same, as texts that are not the same."""
    old, new = _text(before), _text(after)
    if old == new and not isinstance(before, _Missing) and not isinstance(after, _Missing):
        old, new = canonical(before), canonical(after)
    same = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
    start = max(0, same - LONGEST // 2) if max(len(old), len(new)) > LONGEST else 0
    return _shown(old, start, before), _shown(new, start, after)


def _shown(text: str, start: int, value: Any) -> str:
    default = isinstance(value, _Missing) and value.known
    return _cut(text, start) + (" (default)" if default else "")


def _text(value: Any) -> str:
    if isinstance(value, _Missing):
        return _text(value.default) if value.known else value.default or "default"
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12] + "…"
    return text


def _cut(text: str, start: int = 0) -> str:
    """At most LONGEST characters from `start` on."""
    begin = "…" if start else ""
    rest = text[start:]
    return begin + (rest if len(rest) <= LONGEST else rest[: LONGEST - 3] + "…")


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, _Missing) or isinstance(after, _Missing):
        return isinstance(before, _Missing) and isinstance(after, _Missing)
    return canonical(before) == canonical(after)
