"""The name of a result: a hash of all that decides it, and in words what differs between two."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


def fingerprint_of(identity: dict) -> str:
    """sha256 of what decides a stage's result, as canonical JSON. Names of files in it need not be UTF-8."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


@dataclass
class Recorded:
    """What a published run's identity says of sources that are not on this machine any more."""

    entries: dict[str, dict]
    """Name of a source -> its options and `files`, as in the identity."""
    absent: list[str]
    """Keys of what was taken from here, for a message; grows."""

    def has(self, name: str) -> bool:
        return "files" in self.entries.get(name, {})

    def take(self, name: str, key: str) -> list:
        """The files of a source as they were; `key` is where the recipe has it."""
        self.absent.append(key)
        return self.entries[name]["files"]


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """What changed between two identities, a phrase each: `optimizer.lr: 0.001 -> 0.0003`."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for name in sorted({*before, *after}):
            shown = name if name in ("parents", "config") and not key else f"{key}.{name}" if key else name
            shown = shown.removeprefix("config.")
            if name not in before:
                found.append(f"{shown}: default -> {_short(after[name])}")
            elif name not in after:
                found.append(f"{shown}: {_short(before[name])} -> default")
            else:
                found += differences(before[name], after[name], shown)
        return found
    return [] if before == after else [f"{key}: {_short(before)} -> {_short(after)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12] + "…"
    return text if len(text) <= 80 else text[:77] + "…"
