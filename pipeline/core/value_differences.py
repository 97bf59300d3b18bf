"""What differs between two JSON values or two lists of files, as short phrases for messages."""

import json
from collections import Counter
from typing import Any

from pipeline.core.terminal import plural

MAX_NAMED = 3  # files, entries of a list, or reasons that a message names; the rest are counted
MAX_LENGTH = 80  # characters of a value that are shown


class Missing:
    """Stands for a key that a block does not have. `default` is the value that counts then, if it is `known`."""

    def __init__(self, default: Any = None, known: bool = False):
        self.default, self.known = default, known


def same(before: Any, after: Any) -> bool:
    if isinstance(before, Missing) or isinstance(after, Missing):
        return isinstance(before, Missing) and isinstance(after, Missing)
    return canonical(before) == canonical(after)


def canonical(value: Any) -> str:
    """JSON that is equal for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def some(texts: list[str], separator: str = ", ") -> str:
    """The first few texts, and how many more there are."""
    more = len(texts) - MAX_NAMED
    first = separator.join(texts[:MAX_NAMED])
    return f"{first} and {more} more" if more > 0 else first


# ---- files -----------------------------------------------------------------------------------------------------------


def file_differences(before: list[list[str]], after: list[list[str]]) -> list[str]:
    """What changed between two lists of files, each a name and one or more hashes: `1 file added (b.jsonl)`."""
    old, new = _numbered(before), _numbered(after)
    removed = [key for key in old if key not in new]
    added = [key for key in new if key not in old]
    changed = [name for name, number in old if (name, number) in new and old[name, number] != new[name, number]]
    renamed = []
    for key in list(added):
        source = next((other for other in removed if old[other] == new[key]), None)
        if source:
            renamed.append(f"{source[0]} -> {key[0]}")
            removed.remove(source)
            added.remove(key)
    added_names, removed_names = [name for name, _ in added], [name for name, _ in removed]
    phrases = []
    for verb, names in (("added", added_names), ("removed", removed_names), ("changed", changed), ("renamed", renamed)):
        if names:
            phrases.append(f"{plural(len(names), 'file')} {verb} ({some(names)})")
    if not phrases and before != after:
        return [f"{plural(len(after), 'file')} in another order"]
    return phrases


def _numbered(files: list[list[str]]) -> dict[tuple[str, int], list[str]]:
    """(name, number of earlier files of this name, in other folders) -> hashes."""
    seen: Counter[str] = Counter()
    numbered = {}
    for name, *hashes in files:
        numbered[name, seen[name]] = hashes
        seen[name] += 1
    return numbered


# ---- values ----------------------------------------------------------------------------------------------------------


def value_differences(before: Any, after: Any, key: str, full_before: Any = None, full_after: Any = None) -> list[str]:
    """Differences of two values that are not the same, such as `optimizer.lr: 0.001 (default) -> 0.0003`.

    key: the dotted key of both. full_before, full_after: the values with all defaults written out, or None.
    """
    old_block, new_block = _as_block(before), _as_block(after)
    if old_block is not None and new_block is not None and (old_block or new_block):
        phrases = []
        for name in sorted({*old_block, *new_block}):
            old, old_full = _member(old_block, name, full_before)
            new, new_full = _member(new_block, name, full_after)
            if not same(old, new):
                phrases += value_differences(old, new, f"{key}.{name}" if key else name, old_full, new_full)
        return phrases
    if isinstance(before, list) and isinstance(after, list):
        return _list_differences(before, after, key, full_before, full_after)
    old_text, new_text = _texts(before, after)
    return [f"{key}: {old_text} -> {new_text}"]


def _as_block(value: Any) -> dict | None:
    """The keys of a value, or None if it is not a block. A block whose keys are all at their default is missing in an
    identity."""
    if isinstance(value, Missing):
        return {} if value.known and isinstance(value.default, dict) else None
    return value if isinstance(value, dict) else None


def _member(block: dict, name: str, full: Any) -> tuple[Any, Any]:
    """The value of a key, and its value with all defaults written out."""
    known = isinstance(full, dict) and name in full
    default = full[name] if known else None
    if name in block:
        return block[name], default
    if known:
        return Missing(default, known=True), default
    return Missing("not given" if isinstance(full, dict) else None), None


def _list_differences(
    before: list, after: list, key: str, full_before: list | None, full_after: list | None
) -> list[str]:
    old_text, new_text = _text(before), _text(after)
    if max(len(old_text), len(new_text)) <= MAX_LENGTH:
        return [f"{key}: {old_text} -> {new_text}"]
    if len(before) == len(after) and all(isinstance(item, dict) for item in [*before, *after]):
        phrases = []
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if not same(old, new):
                old_full, new_full = full_before and full_before[i], full_after and full_after[i]
                phrases += value_differences(old, new, f"{key}[{i}]", old_full, new_full)
        return phrases
    old_items, new_items = Counter(map(canonical, before)), Counter(map(canonical, after))
    phrases = []
    for verb, items in (("added", new_items - old_items), ("removed", old_items - new_items)):
        if items:
            names = some([_cut(item) for item in items.elements()])
            phrases.append(f"{plural(items.total(), 'entry/entries')} {verb} ({names})")
    return [f"{key}: {', '.join(phrases) or f'its {len(after)} entries in another order'}"]


def _texts(before: Any, after: Any) -> tuple[str, str]:
    """Two values that are not the same, as texts that are not the same."""
    old, new = _text(before), _text(after)
    if old == new and not isinstance(before, Missing) and not isinstance(after, Missing):
        old, new = canonical(before), canonical(after)  # 1 and "1"
    start = 0
    if max(len(old), len(new)) > MAX_LENGTH:
        first_difference = min(len(old), len(new))
        for i, (x, y) in enumerate(zip(old, new, strict=False)):
            if x != y:
                first_difference = i
                break
        start = max(0, first_difference - MAX_LENGTH // 2)
    return _marked(before, _cut(old, start)), _marked(after, _cut(new, start))


def _marked(value: Any, text: str) -> str:
    return f"{text} (default)" if isinstance(value, Missing) and value.known else text


def _text(value: Any) -> str:
    if isinstance(value, Missing):
        return _text(value.default) if value.known else value.default or "default"
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12] + "…"
    return text


def _cut(text: str, start: int = 0) -> str:
    """At most MAX_LENGTH characters from `start` on."""
    beginning = "…" if start else ""
    rest = text[start:]
    if len(rest) > MAX_LENGTH:
        rest = rest[: MAX_LENGTH - 3] + "…"
    return beginning + rest
