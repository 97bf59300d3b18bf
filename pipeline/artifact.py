"""A stage's output: one folder, complete or absent.

    runs/<recipe>/<stage>/<fingerprint12>/            published; manifest.json was written last
    runs/<recipe>/<stage>/<fingerprint12>.partial/    being made, or interrupted
    runs/<recipe>/<stage>/current                     link to the published output in use, swapped last
    runs/<recipe>/<stage>/lock.json                   who writes here now

The content digest covers the files that later stages read. Logs and training checkpoints stay in the folder and are not
content: they differ between two runs whose results are equal.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline import faults
from pipeline.errors import UserError
from pipeline.files import damage_of, hash_files, now, sha256_file, sync_folder, sync_tree, write_json
from pipeline.lock import Lock

SCHEMA_VERSION = 1
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


def digest_of(files: dict[str, dict]) -> str:
    """Content digest of a set of hashed files; order does not matter, names do."""
    lines = [f"{name}\0{entry['sha256']}\n" for name, entry in sorted(files.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint_of(identity: dict) -> str:
    """sha256 of what decides a stage's result, as canonical JSON."""
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    ).hexdigest()


def content_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*")):
        top = path.relative_to(folder).parts[0]
        if path.is_file() and top not in NOT_CONTENT and not path.name.endswith(".tmp"):
            found.append(path)
    return found


# ---- reading ---------------------------------------------------------------------------------------------------------


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
    """The artifact in a folder, or None if there is none. A manifest that cannot be read is a UserError, not an
    absence."""
    manifest = path / "manifest.json"
    try:
        value = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{manifest}: damaged, not JSON ({error}); run the stage again with --restart") from None
    missing = {"stage", "kind", "fingerprint", "digest", "files", "metrics"} - set(
        value if isinstance(value, dict) else {}
    )
    if missing:
        raise UserError(f"{manifest}: damaged, lacks {', '.join(sorted(missing))}; run the stage again with --restart")
    if value.get("schema_version", 0) > SCHEMA_VERSION:
        raise UserError(
            f"{manifest}: written by a newer alma (schema {value['schema_version']}, this one reads {SCHEMA_VERSION});"
            " update alma"
        )
    return Artifact(path.resolve(), value)


def current(folder: Path) -> Artifact | None:
    """The published output of a stage folder that is in use."""
    link = folder / "current"
    return read(link.resolve()) if link.is_symlink() else None


def external(name: str, path: Path, kinds: tuple[str, ...] = ()) -> Artifact:
    """A folder made elsewhere, as an artifact: hashed at each start. If a stage published it, it must be whole and
    of one of `kinds`."""
    if not path.is_dir():
        raise UserError(f"inputs.{name}: {path} is not a folder; give the name of a stage or an existing folder")
    published = read(path)
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
    files = hash_files(path, content_files(path))
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


# ---- writing ---------------------------------------------------------------------------------------------------------


class Output:
    """The folder that a stage writes: `path` is under a temporary name until `publish`. Only the main process writes
    outside checkpoints."""

    def __init__(self, folder: Path, stage: str, kind: str, identity: dict, is_main: bool = True):
        self.folder, self.stage, self.kind, self.identity, self.is_main = folder, stage, kind, identity, is_main
        self.fingerprint = fingerprint_of(identity)
        self.final = folder / self.fingerprint[:12]
        self.path = folder / f"{self.fingerprint[:12]}.partial"
        self.lock = Lock(folder)
        self.info: dict = {}
        self.published: Artifact | None = None

    def open(self, *, config: dict, parents: dict, restart: bool = False, fork: bool = False) -> "Output":
        """Take the lock; go on in the unfinished folder of the same fingerprint, or make a new one. Refuses another
        unfinished run."""
        # the main process may be renaming it at this moment, hence the second look at its last place
        if not self.is_main:
            for path in () if restart or restarting(self.path) else (self.final, self.path, self.final):
                found = read(path)
                if found and not found.damage():
                    self.published = found
            return self
        self.lock.acquire()
        try:
            self._open(config, parents, restart, fork)
        except BaseException:
            self.lock.release()
            raise
        return self

    def _open(self, config: dict, parents: dict, restart: bool, fork: bool) -> None:
        (self.folder / "requeue.json").unlink(missing_ok=True)  # the word that an earlier run left for its job script
        begun = restarting(self.path)  # a killed --restart is gone on with, by the same command and by the plain one
        self.published = None if restart or begun else self._finish_publishing()
        if self.published:
            return
        for path in partials(self.folder):
            if path != self.path and not _has_work(path):  # ended by a mistake in the recipe, or killed at its start
                shutil.rmtree(path)
        others = [path for path in partials(self.folder) if path != self.path]
        if restart:
            for path in others if begun else partials(self.folder):
                _set_aside(path)
        elif others and not fork:
            before = json.loads((others[-1] / "run.json").read_text())["identity"]
            raise UserError(
                f"{others[-1]}: an unfinished run of stage {self.stage} was made by another recipe. Changed since:"
                f" {'; '.join(differences(before, self.identity))}. Put the recipe back to finish it, or give --restart"
                " to begin anew, or --fork to go on from its last checkpoint under the new recipe"
            )
        known = self.path / "run.json"
        if known.exists():
            self.info = json.loads(known.read_text())
            self.info["resumed"] = self.info.get("resumed", 0) + 1
        else:
            self.info = {
                "fingerprint": self.fingerprint,
                "identity": self.identity,
                "started": now(),
                "resumed": 0,
                "seconds": 0.0,
                "restart": restart,
            }
            if fork:
                self.info["forked_from"] = (
                    fork_source(self.folder, self.identity, config, self.stage)
                    .relative_to(self.folder.resolve())
                    .as_posix()
                )
        self.config, self.parents = config, parents
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(known, {**self.info, "config": config, "parents": parents, "stage": self.stage, "kind": self.kind})
        # The word of the fork stands before the copy and the old run is set aside after it, so that a kill in between
        # is gone on from.
        if self.info.get("forked_from") and not list(self.path.glob("checkpoints/step-*/complete.json")):
            self._copy_checkpoint(self.folder / self.info["forked_from"])
        faults.point("fork")
        if fork:
            for path in others:
                _set_aside(path)
        self._clock = time.time()

    def _finish_publishing(self) -> Artifact | None:
        """The output of this fingerprint if it is complete, also when an earlier run died between its manifest and
        its link."""
        for path in (self.path, self.final):
            artifact = read(path)
            if artifact is None:
                continue
            if artifact.damage():
                _set_aside(path, "damaged")
                continue
            if path == self.path:
                self._rename()
            link(self.folder, self.final)
            self._sweep()
            return read(self.final)
        if self.final.exists():
            _set_aside(self.final, "damaged")
        return None

    def _rename(self) -> None:
        if self.final.exists():  # made again with --restart: readers have the old one until here
            _set_aside(self.final, "replaced")
        os.rename(self.path, self.final)
        sync_folder(self.folder)

    def _sweep(self) -> None:
        """Intermediates go last: until the link is swapped they are what a killed run goes on from."""
        if (self.final / "work").exists():
            shutil.rmtree(self.final / "work")

    def _copy_checkpoint(self, source: Path) -> None:
        target = self.path / "checkpoints" / source.name
        temporary = target.with_name(f".{target.name}.tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        shutil.copytree(source, temporary)
        sync_tree(temporary)
        os.rename(temporary, target)

    def publish(self, metrics: dict) -> Artifact:
        """Hash, sync, manifest, rename, link; in that order, so that a reader sees all or nothing."""
        sync_tree(self.path)
        files = hash_files(self.path, content_files(self.path))
        if not files:
            raise AssertionError(f"stage {self.stage} wrote no content")
        faults.point("publish")
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "parents": self.parents,
            "config": self.config,
            "files": files,
            "digest": digest_of(files),
            "metrics": metrics,
            "software": software(),
            "started": self.info["started"],
            "finished": now(),
            "seconds": round(self.spent(), 3),
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
            "resumed": self.info.get("resumed", 0),
            "forked_from": self.info.get("forked_from"),
        }
        write_json(self.path / "manifest.json", manifest)
        if self.final.exists():  # made again, with --restart
            _set_aside(self.final, "replaced")
        os.rename(self.path, self.final)
        sync_folder(self.folder)
        faults.point("publish")
        link(self.folder, self.final)
        self._sweep()
        self.path = self.final
        return read(self.final)

    def drop_if_empty(self) -> None:
        """Leave no folder behind for a mistake that was found before any work was done."""
        if self.is_main and self.path.exists() and not _has_work(self.path):
            shutil.rmtree(self.path)

    def note_time(self) -> None:
        """Keep the seconds spent so far, so that a killed run's time is counted; called when something was saved."""
        if self.is_main:
            self.info["seconds"] = self.spent()
            self._clock = time.time()
            write_json(
                self.path / "run.json",
                {**self.info, "config": self.config, "parents": self.parents, "stage": self.stage, "kind": self.kind},
            )

    def spent(self) -> float:
        """Seconds that this output has been worked on, by killed runs too. Main process only."""
        return self.info.get("seconds", 0.0) + time.time() - self._clock

    def close(self) -> None:
        if self.is_main:
            self.lock.release()


def partials(folder: Path) -> list[Path]:
    """Unfinished outputs of a stage, oldest first."""
    found = [path for path in folder.glob("*.partial") if (path / "run.json").exists()]
    return sorted(found, key=lambda path: (path / "run.json").stat().st_mtime)


def restarting(partial: Path) -> bool:
    """Whether an unfinished output is a --restart that was killed: what is published beside it is then not the end
    of the story."""
    known = partial / "run.json"
    return (
        known.exists()
        and not (partial / "manifest.json").exists()
        and bool(json.loads(known.read_text()).get("restart"))
    )


def fork_source(folder: Path, identity: dict, config: dict, stage: str) -> Path:
    """The checkpoint that --fork goes on from: the newest of the newest run, before the wanted last step, of a run
    on the same inputs. Raises UserError."""
    published = current(folder)
    refused = "there is none"
    for run in [*reversed(partials(folder)), *([published.path] if published else [])]:
        before = json.loads((run / "run.json").read_text())["identity"]
        steps = sorted(
            (path.parent for path in run.glob("checkpoints/step-*/complete.json")),
            key=lambda path: int(path.name.removeprefix("step-")),
        )
        changed = differences(
            {key: before.get(key) for key in ("parents", "sources")},
            {key: identity.get(key) for key in ("parents", "sources")},
        )
        early = [step for step in steps if int(step.name.removeprefix("step-")) < (config.get("steps") or float("inf"))]
        if steps and changed:
            refused = f"{run.name} was made from other inputs ({'; '.join(changed)})"
        elif steps and not early:
            refused = f"{run.name} is at {steps[-1].name} already and the recipe asks for {config['steps']} steps"
        for path in reversed(early if not changed else []):
            damaged = _torn(path)
            if damaged is None:
                return folder.resolve() / run.name / "checkpoints" / path.name
            print(f"checkpoint {path} is damaged ({damaged}) and passed over", flush=True)
            refused = f"every one of {run.name} is damaged"
    raise UserError(
        f"{folder}: --fork found no complete checkpoint of stage {stage} to go on from: {refused}; use --restart to"
        " begin anew"
    )


def _torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, by its own marker."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
        return next((words for name, entry in files.items() if (words := damage_of(checkpoint / name, entry))), None)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"complete.json cannot be read: {error}"


def _has_work(path: Path) -> bool:
    """Whether an unfinished output holds anything that was worked for. Tables of rows (data/packing.py) are made
    again in seconds."""
    idle = {"run.json", "recipe.yaml", "metrics.jsonl", "logs", "wandb"}
    return any(
        file.is_file()
        and file.relative_to(path).parts[0] not in idle
        and file.relative_to(path).parts[:2] != ("work", "tables")
        for file in path.rglob("*")
    )


def link(folder: Path, target: Path) -> None:
    """Swap `current`, atomically."""
    temporary = folder / f".current.{os.getpid()}.tmp"
    if temporary.is_symlink():
        temporary.unlink()
    os.symlink(target.name, temporary)
    os.replace(temporary, folder / "current")
    sync_folder(folder)


def _set_aside(path: Path, why: str = "abandoned") -> None:
    """An abandoned or damaged run keeps its files under another name: nothing is deleted by a run."""
    os.rename(
        path,
        path.with_name(
            f"{path.name.removesuffix('.partial')}.{why}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
        ),
    )


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


def software() -> dict:
    """Versions and commit that made an output. No paths, no environment: manifests get published."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    answer = (
        subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
        )
        if shutil.which("git")
        else None
    )
    if answer and answer.returncode == 0:
        versions["git"] = answer.stdout.strip()
    return versions
