"""A stage's output: one folder, complete or absent.

    runs/<recipe>/<stage>/<fingerprint12>/            published; manifest.json was written last
    runs/<recipe>/<stage>/<fingerprint12>.partial/    being made, or interrupted
    runs/<recipe>/<stage>/current                     link to the published output in use, swapped last
    runs/<recipe>/<stage>/lock.json                   who writes here now

The content digest covers the files that later stages read. Logs and training checkpoints stay in the folder and are not
content: they differ between two runs whose results are equal. Reading is here; pipeline/core/output.py writes.
"""

import contextlib
import hashlib
import itertools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import Absent, Damaged, UserError
from pipeline.core.files import hash_files, read_record, sha256_file

SCHEMA_VERSION = 1
MOST_FILES = 100_000  # of a folder made elsewhere, which is hashed at each start; `/` by mistake has millions
MANIFEST = {
    "schema_version": int,
    "stage": str,
    "kind": str,
    "fingerprint": str,
    "identity": dict,
    "parents": dict,
    "config": dict,
    "files": dict,
    "digest": str,
    "metrics": dict,
    "seconds": (int, float),
}
NOT_CONTENT = {
    "README.md",
    "manifest.json",
    "run.json",
    "recipe.yaml",
    "metrics.jsonl",
    "horizon.json",
    "requeue.json",
    "logs",
    "checkpoints",
    "work",
    "wandb",
}


def digest_of(files: dict[str, dict]) -> str:
    """Content digest of a set of hashed files; order does not matter, names do."""
    lines = [f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        top = path.relative_to(folder).parts[0]
        if path.is_file() and top not in NOT_CONTENT and not path.name.endswith(".tmp"):
            found.append(path)
    return found


@dataclass(frozen=True)
class Artifact:
    """A published output. `path` holds its files; everything else comes from the manifest."""

    path: Path
    manifest: dict = field(repr=False)

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    @property
    def metrics(self) -> dict:
        return self.manifest["metrics"]

    def damage(self, full: bool = False) -> str | None:
        """What is wrong with the files, in words, or None. Size and mtime decide; a file whose mtime moved, or any
        file if `full`, is hashed again."""
        for name, entry in self.manifest["files"].items():
            path = self.path / name
            if not path.is_file():
                return f"{path} is missing"
            status = path.stat()
            if status.st_size != entry["size"]:
                return f"{path} has {status.st_size} bytes, the manifest says {entry['size']}"
            if full or status.st_mtime_ns != entry["mtime"]:
                found = sha256_file(path)
                if found != entry["sha256"]:
                    return f"{path} has sha256 {found[:12]}…, the manifest says {entry['sha256'][:12]}…"
        if digest_of(self.manifest["files"]) != self.manifest["digest"]:
            return f"{self.path / 'manifest.json'} has been edited: its digest does not fit its list of files"
        return None


def read(path: Path) -> Artifact | None:
    """The artifact in a folder, or None if there is none. A manifest that cannot be read is Damaged, not an
    absence."""
    manifest = path / "manifest.json"
    try:
        value = read_record(manifest, MANIFEST)
        for name, entry in value["files"].items():
            if not isinstance(entry, dict) or set(entry) != {"sha256", "size", "mtime"}:
                raise ValueError(f"damaged, {name} has no sha256, size and mtime in its list of files")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise Damaged(f"{manifest}: {error}; run the stage again with --restart") from None
    except OSError as error:  # a folder, no permission, a disk that gives an error
        raise Damaged(f"{manifest}: cannot be read ({error.strerror}); run the stage again with --restart") from None
    if value["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{manifest}: written by a newer alma (schema {value['schema_version']}, this one reads {SCHEMA_VERSION});"
            " update alma"
        )
    return Artifact(path.resolve(), value)


def current(folder: Path) -> Artifact | None:
    """The published output of a stage folder that is in use."""
    link = folder / "current"
    if link.is_symlink() or link.is_dir():  # some ways of copying follow links, and make a folder of it
        return read(Path(os.path.realpath(link)))
    return None


def published(folder: Path) -> list[Artifact]:
    """All published outputs of a stage folder, the one in use first. One that cannot be read is left out, unless it is
    in use."""
    first = current(folder)
    found = [first] if first else []
    for path in sorted(folder.glob("*/manifest.json")):
        if not re.fullmatch("[0-9a-f]{12}", path.parent.name) or first and path.parent.resolve() == first.path:
            continue
        with contextlib.suppress(UserError):
            found.append(read(path.parent))
    return found


def external(name: str, path: Path, kinds: tuple[str, ...] = ()) -> Artifact:
    """A folder made elsewhere, as an artifact: hashed at each start. If a stage published it, it must be whole and
    of one of `kinds`."""
    if not os.path.isdir(path):
        raise Absent(f"inputs.{name}: {path} is not a folder; give the name of a stage or an existing folder")
    try:
        published = read(path)
    except Damaged as error:
        raise UserError(f"inputs.{name}: {error}") from None
    if published:
        if kinds and published.kind not in kinds:
            raise UserError(
                f"inputs.{name}: {path} was published by a stage of kind {published.kind}, expected"
                f" {' or '.join(kinds)}"
            )
        damage = published.damage(full=True)
        if damage:
            raise UserError(f"inputs.{name}: {path} is damaged: {damage}; copy it again, or run the stage that made it")
        return published
    try:
        if sum(1 for _ in itertools.islice(path.rglob("*"), MOST_FILES + 1)) > MOST_FILES:
            raise UserError(f"inputs.{name}: {path} has more than {MOST_FILES:,} files; name the folder that is meant")
        files = hash_files(path, content_files(path))
    except OSError as error:
        raise UserError(f"inputs.{name}: {error.filename or path} cannot be read: {error.strerror}") from None
    if not files:
        raise UserError(f"inputs.{name}: {path} has no files")
    digest = digest_of(files)
    manifest = {
        "stage": path.name,
        "kind": "external",
        "fingerprint": digest,
        "digest": digest,
        "files": files,
        "metrics": {},
    }
    return Artifact(path.resolve(), manifest)
