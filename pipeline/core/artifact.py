"""A stage's output: one folder, complete or not there.

    runs/<recipe>/<stage>/<fingerprint12>/            published; manifest.json was written last
    runs/<recipe>/<stage>/<fingerprint12>.partial/    being made, or interrupted
    runs/<recipe>/<stage>/current                     link to the published output in use, swapped last
    runs/<recipe>/<stage>/lock.json                   which process writes here now

The content digest covers the files that later stages read. Logs and training checkpoints stay in the folder but are not
content: they differ between two runs with equal results. This module reads; pipeline/core/output.py writes.
"""

import contextlib
import hashlib
import itertools
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from pipeline.core.errors import Absent, Damaged, UserError
from pipeline.core.files import damage_of, hash_files, read_record

SCHEMA_VERSION = 1
# Of a folder made elsewhere, which is hashed at each start; `/`, given by mistake, has millions.
MAX_FILES = 100_000
# Keys of manifest.json that are always there, and the types of their values.
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
    "trackers",
}


def digest_of(files: dict[str, dict]) -> str:
    """Content digest of a set of hashed files. Their order does not matter, their names do."""
    lines = [f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def content_files(folder: Path) -> list[Path]:
    """Files of an output that later stages read."""
    paths = []
    for path in sorted(folder.rglob("*")):
        top = path.relative_to(folder).parts[0]
        if path.is_file() and top not in NOT_CONTENT and not path.name.endswith(".tmp"):
            paths.append(path)
    return paths


@dataclass(frozen=True)
class Artifact:
    """A published output. `path` has its files; everything else comes from the manifest."""

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
        """What is wrong with the files, or None. Files whose size and mtime are as in the manifest are not hashed,
        unless `full`."""
        for name, entry in self.manifest["files"].items():
            problem = damage_of(self.path / name, entry, trust_mtime=not full)
            if problem:
                return problem
        if digest_of(self.manifest["files"]) != self.manifest["digest"]:
            return f"{self.path / 'manifest.json'} was edited: its digest is not that of its list of files"
        return None


def read(path: Path) -> Artifact | None:
    """The artifact in a folder, or None if there is none. Raises Damaged for a manifest that cannot be read."""
    manifest = path / "manifest.json"
    try:
        value = read_record(manifest, MANIFEST)
        for name, entry in value["files"].items():
            if not isinstance(entry, dict) or set(entry) != {"sha256", "size", "mtime"}:
                raise ValueError(f"damaged, {name} has no sha256, size and mtime in its list of files")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise Damaged(f"{manifest}: {error}") from None
    except OSError as error:  # a folder, no permission, a disk error
        raise Damaged(f"{manifest}: cannot be read ({error.strerror})") from None
    if value["schema_version"] > SCHEMA_VERSION:
        raise UserError(
            f"{manifest}: written by a newer alma (schema {value['schema_version']}, this one reads {SCHEMA_VERSION});"
            " update alma"
        )
    return Artifact(path.resolve(), value)


def current(folder: Path) -> Artifact | None:
    """The published output of a stage folder that is in use."""
    link = folder / "current"
    if link.is_symlink():
        return read(Path(os.path.realpath(link)))
    if not link.is_dir():
        return None
    copy = read(link.resolve())  # some ways of copying follow links and make a folder of it
    if copy:
        with contextlib.suppress(Damaged):
            original = read(folder / copy.fingerprint[:12])
            if original and original.fingerprint == copy.fingerprint:
                return original
    return copy


def published(folder: Path) -> list[Artifact]:
    """All published outputs of a stage folder, the one in use first. One that cannot be read is skipped, unless it is
    in use."""
    in_use = current(folder)
    outputs = [in_use] if in_use else []
    for path in sorted(folder.glob("*/manifest.json")):
        if not re.fullmatch("[0-9a-f]{12}", path.parent.name):
            continue
        if in_use and path.parent.resolve() == in_use.path:
            continue
        with contextlib.suppress(UserError):
            outputs.append(read(path.parent))
    return outputs


def external(name: str, path: Path, kinds: tuple[str, ...] = ()) -> Artifact:
    """A folder made elsewhere, as an artifact for the input `name`. It is hashed at each start. If a stage published
    it, it must be undamaged and of one of `kinds`. Raises Absent, or UserError for one that cannot be used."""
    if not os.path.isdir(path):
        raise Absent(f"inputs.{name}: {path} is not a folder; give the name of a stage or an existing folder")
    try:
        published = read(path)
    except Damaged as error:
        raise UserError(f"inputs.{name}: {error.problem}; copy it again, or run the stage that made it") from None
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
        if sum(1 for _ in itertools.islice(path.rglob("*"), MAX_FILES + 1)) > MAX_FILES:
            raise UserError(f"inputs.{name}: {path} has more than {MAX_FILES:,} files; name the folder that is meant")
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


# Packages whose versions are recorded.
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "trl",
    "datasets",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pyarrow",
)


def software() -> dict:
    """Versions and commit that made an output. No paths and no environment, because manifests are published."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if shutil.which("git"):
        folder = str(Path(__file__).parent)
        # An installed package may be in a folder of somebody else's repository.
        tracked = subprocess.run(["git", "-C", folder, "ls-files", "--error-unmatch", __file__], capture_output=True)
        command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if tracked.returncode == 0 and answer.returncode == 0:
            versions["git"] = answer.stdout.strip()
    return versions
