"""The name of a result: a hash of all that decides it, and in words what differs between two."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any


def fingerprint_of(identity: dict) -> str:
    """sha256 of what decides a stage's result, as canonical JSON. Names of files in it need not be UTF-8."""
    return hashlib.sha256(canonical(identity).encode(errors="surrogatepass")).hexdigest()


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


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
