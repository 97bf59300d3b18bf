"""The folder that a stage writes: unfinished under one name, published under another, all or nothing.

pipeline/core/artifact.py says where the folders are, and reads them.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import time
import uuid
from importlib import metadata
from pathlib import Path

from pipeline.core import faults
from pipeline.core.artifact import SCHEMA_VERSION, Artifact, content_files, digest_of, read
from pipeline.core.changes import explain
from pipeline.core.errors import Damaged, UserError
from pipeline.core.files import hash_files, now, sync_folder, sync_tree, write_json
from pipeline.core.fingerprint import fingerprint_of
from pipeline.core.lock import Lock
from pipeline.core.partial_runs import (
    can_fork,
    fork_source,
    has_work,
    partials,
    restarting,
    run_info,
    sweep_folder,
    sweep_temporary,
    worth_keeping,
)
from pipeline.core.terminal import show


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
        self._forked: dict[Path, Path] = {}  # unfinished runs that a fork took the place of, and where they are now

    def open(self, *, config: dict, parents: dict, restart: bool = False, fork: bool = False) -> "Output":
        """Take the lock; go on in the unfinished folder of the same fingerprint, or make a new one. Refuses another
        unfinished run."""
        # the main process may be renaming it at this moment, hence the second look at its last place
        if not self.is_main:
            for path in () if restart or restarting(self.path) else (self.final, self.path, self.final):
                with contextlib.suppress(Damaged):
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
        sweep_folder(self.folder)
        if restart:
            self._set_damaged_aside()
        begun = restarting(self.path)  # a killed --restart is gone on with, by the same command and by the plain one
        self.published = None if restart or begun else self._finish_publishing()
        if self.published:
            return
        for path in partials(self.folder):
            if path == self.path:
                continue
            if not has_work(path):  # ended by a mistake in the recipe, or killed at its start
                shutil.rmtree(path)
            elif not worth_keeping(path):
                kept = _set_aside(path, "failed")
                show(
                    f"{self.stage}: an unfinished run of another recipe, from which nothing can be resumed, is now"
                    f" {kept}; delete it when you no longer need it"
                )
        others = [path for path in partials(self.folder) if path != self.path]
        if restart:
            for path in others if begun else partials(self.folder):
                _set_aside(path)
        elif others and not fork:
            before = run_info(others[-1])
            wanted = {"identity": self.identity, "config": config, "parents": parents}
            fork_too = ", or --fork to continue from its last checkpoint under the new recipe"
            raise UserError(
                f"{others[-1]}: an unfinished run of stage {self.stage} was made by another recipe. Changed since:"
                f" {'; '.join(explain(self.folder, before, wanted))}. Put the recipe back to finish it, or give"
                f" --restart to start again{fork_too if can_fork(self.folder, wanted, self.stage) else ''}"
            )
        if (self.path / "run.json").exists():
            self.info = run_info(self.path)
            self.info["resumed"] += 1
            self.info.pop("ended", None)
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
                wanted = {"identity": self.identity, "config": config, "parents": parents}
                source = fork_source(self.folder, wanted, self.stage)
                self.info["forked_from"] = source.relative_to(self.folder.resolve()).as_posix()
        self.config, self.parents = config, parents
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_info()
        # The word of the fork stands before the copy and the old run is set aside after it, so that a kill in between
        # is gone on from.
        if self.info.get("forked_from") and not list(self.path.glob("checkpoints/step-*/complete.json")):
            self._copy_checkpoint(self.folder / self.info["forked_from"])
        faults.point("fork")
        if fork:
            self._forked = {path: _set_aside(path) for path in others}
        self._clock = time.time()

    def _set_damaged_aside(self) -> None:
        """Unfinished runs that say no more what they are."""
        for path in partials(self.folder):
            try:
                run_info(path)
            except Damaged:
                _set_aside(path, "damaged")

    def _finish_publishing(self) -> Artifact | None:
        """The output of this fingerprint if it is complete, also when an earlier run died between its manifest and
        its link."""
        for path in (self.path, self.final):
            try:
                artifact = read(path)
            except Damaged:
                _set_aside(path, "damaged")
                continue
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
        sweep_temporary(self.path)
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

    def end_with_error(self, message: str) -> None:
        """After a UserError: leave nothing behind that no work was done for, and note what the run ended with, so that
        it does not keep a corrected recipe from starting."""
        if not self.is_main or not self.path.exists():
            return
        if self._forked_in_vain():
            for before, now_at in self._forked.items():
                os.rename(now_at, before)
            shutil.rmtree(self.path)
        elif not has_work(self.path):
            shutil.rmtree(self.path)
        else:
            self.info["ended"] = message
            self._write_info()

    def _forked_in_vain(self) -> bool:
        """Whether this run has nothing but the checkpoint that it was forked from, which is still where it was."""
        source = self.info.get("forked_from")
        if not source or (self.path / "logs" / "spikes").exists():  # an error message names its rows
            return False
        at = self.folder / source
        there = at.exists() or any(at.is_relative_to(path) for path in self._forked)
        made = {path.parent.name for path in self.path.glob("checkpoints/step-*/complete.json")}
        return there and made <= {at.name}

    def note_time(self) -> None:
        """Keep the seconds spent so far, so that a killed run's time is counted; called when something was saved."""
        if self.is_main:
            self.info["seconds"] = self.spent()
            self._clock = time.time()
            self._write_info()

    def _write_info(self) -> None:
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


def link(folder: Path, target: Path) -> None:
    """Swap `current`, atomically."""
    temporary = folder / f".current.{os.getpid()}.tmp"
    if temporary.is_symlink():
        temporary.unlink()
    os.symlink(target.name, temporary)
    if (folder / "current").is_dir() and not (folder / "current").is_symlink():  # copied by a tool that follows links
        _set_aside(folder / "current", "copied")
    os.replace(temporary, folder / "current")
    sync_folder(folder)


def _set_aside(path: Path, why: str = "abandoned") -> Path:
    """Rename an abandoned or damaged run; returns where it is now. Nothing is deleted by a run."""
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    target = path.with_name(f"{path.name.removesuffix('.partial')}.{why}-{stamp}")
    os.rename(path, target)
    return target


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
