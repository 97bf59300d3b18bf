"""What decides a stage's result: its identity, and the hash of it that names the result.

    {"kind": ..., "version": ..., "config": keys that decide, "parents": {input: digest}, "sources": external files}

A source or an input that is not on this machine counts as the identity of an earlier run has it (`recorded`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core.config import ExternalFiles, ExternalSource, SourceBlock, StageConfig
from pipeline.core.config import identity as identity_of_keys
from pipeline.core.errors import Absent
from pipeline.core.files import hashes
from pipeline.core.value_differences import canonical


def fingerprint_of(identity: dict) -> str:
    """sha256 of an identity as canonical JSON. Names of files in it need not be UTF-8."""
    return hashlib.sha256(canonical(identity).encode(errors="surrogatepass")).hexdigest()


def identity_of(
    config: StageConfig, version: int, parents: dict[str, str], external: dict[str, Any], dropped: list[str]
) -> dict:
    """The identity of a stage.

    version: of its kind. parents: input -> content digest. external, dropped: what ExternalContent.of returned.
    """
    keys = identity_of_keys(config)
    keys.pop("inputs", None)  # parents count by their content, not by their names
    for key in dropped:
        keys = without_key(keys, key)
    identity = {"kind": config.kind, "version": version, "config": keys, "parents": parents}
    if external:
        identity["sources"] = external
    return identity


def without_key(config: dict, key: str) -> dict:
    """A copy of a config without a dotted key, and without blocks that have no other."""
    first, _, rest = key.partition(".")
    if first not in config:
        return config
    kept = {name: value for name, value in config.items() if name != first}
    if rest and isinstance(config[first], dict):
        inner = without_key(config[first], rest)
        if inner:
            kept[first] = inner
    return kept


class ExternalContent:
    """Reads what stages have outside the run folder, as identities have it.

    cache: a file that keeps hashes by path, size and mtime. recorded: `sources` of an earlier identity, which is used
    for files that are not on this machine; their keys are then in `absent`. Without it they are an error.
    """

    def __init__(self, cache: Path, recorded: dict | None = None):
        self.cache, self.recorded = cache, recorded
        self.absent: list[str] = []

    def of(self, config: StageConfig) -> tuple[dict[str, Any], list[str]]:
        """(entries of the identity, keys of the config that they replace). Raises Absent with all missing files."""
        entries: dict[str, Any] = {}
        dropped: list[str] = []
        missing: list[str] = []
        for part in config.external():
            try:
                if isinstance(part, ExternalFiles):
                    content = self._files(part, config)
                else:
                    content = self._block(part, config)
            except Absent as error:
                missing += error.lines
                continue
            entries.update(content)
            if content and part.drop_key:
                dropped.append(part.key)
        if missing:
            raise Absent(*missing)
        return entries, dropped

    def _block(self, block: SourceBlock, config: StageConfig) -> dict[str, Any]:
        sources = block.sources(config)
        if not sources:
            return {}
        if block.group:
            recorded = None if self.recorded is None else self.recorded.get(block.group, {})
            return {block.group: self.sources(sources, block.key, recorded)}
        recorded = None
        if self.recorded is not None:
            recorded = {name: self.recorded.get(f"{block.prefix}{name}", {}) for name in sources}
        entries = self.sources(sources, block.key, recorded)
        return {f"{block.prefix}{name}": entry for name, entry in entries.items()}

    def sources(
        self, sources: dict[str, ExternalSource], key: str = "sources", recorded: dict[str, dict] | None = None
    ) -> dict[str, dict]:
        """Name -> options of a source and its `files`, for the sources of one block. Raises Absent."""
        entries = {}
        missing: list[str] = []
        with hashes(self.cache) as sha256:
            for name, source in sorted(sources.items()):
                entries[name] = identity_of_keys(source)
                try:
                    files = source.content(f"{key}.{name}", sha256)
                except Absent as error:
                    if recorded is None or "files" not in recorded.get(name, {}):
                        missing += error.lines
                        continue
                    files = recorded[name]["files"]
                    self.absent.append(f"{key}.{name}")
                if files is not None:
                    entries[name]["files"] = files
        if missing:
            raise Absent(*missing)
        return entries

    def _files(self, part: ExternalFiles, config: StageConfig) -> dict[str, list[list[str]]]:
        entry = part.name_of_entry
        try:
            with hashes(self.cache) as sha256:
                files = [[path.name, _hash_of(path, part.key, sha256)] for path in part.files(config)]
        except Absent:
            if self.recorded is None or entry not in self.recorded:
                raise
            files = self.recorded[entry]
            self.absent.append(part.key)
        return {entry: files} if files else {}


def _hash_of(path: Path, key: str, sha256: Callable[[Path], str]) -> str:
    path = path.expanduser()
    if not path.is_file():
        raise Absent(f"{key}: {path} does not exist (in {Path.cwd()}); give a file that does")
    return sha256(path)
