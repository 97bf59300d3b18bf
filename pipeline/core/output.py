"""The folder that a stage writes: unfinished under one name, published under another, complete or not there.

pipeline/core/artifact.py says where the folders are, and reads them.
"""

import contextlib
import os
import shutil
import time
from pathlib import Path

from pipeline.core import faults
from pipeline.core.artifact import SCHEMA_VERSION, Artifact, content_files, digest_of, read, software
from pipeline.core.changes import explain
from pipeline.core.checkpoint_folder import complete_checkpoints, hidden_path, path_of, step_of
from pipeline.core.errors import Damaged, UserError
from pipeline.core.files import hash_files, now, sync_folder, sync_tree, write_json
from pipeline.core.fingerprint import fingerprint_of
from pipeline.core.fork import can_fork, fork_source
from pipeline.core.lock import Lock
from pipeline.core.partial_runs import (
    has_work,
    partials,
    restarting,
    run_info,
    set_aside,
    sweep_folder,
    sweep_temporary,
    worth_keeping,
)
from pipeline.core.terminal import show


class Output:
    """The folder that a stage writes: `path` has a temporary name until `publish`. Only the main process writes outside
    checkpoints."""

    def __init__(self, folder: Path, stage: str, kind: str, identity: dict, is_main: bool = True):
        self.folder, self.stage, self.kind, self.identity, self.is_main = folder, stage, kind, identity, is_main
        self.fingerprint = fingerprint_of(identity)
        self.final = folder / self.fingerprint[:12]
        self.path = folder / f"{self.fingerprint[:12]}.partial"
        self.lock = Lock(folder)
        self.info: dict = {}
        self.published: Artifact | None = None
        self._forked: dict[Path, Path] = {}  # runs that this fork replaced -> where they are now

    # ---- opening

    def open(
        self, *, config: dict, parents: dict, restart: bool = False, fork: bool = False, last_step: int | None = None
    ) -> "Output":
        """Take the lock, and resume in the unfinished folder of the same fingerprint or make a new one. Raises
        UserError for an unfinished run of another recipe.

        last_step: the step that the stage ends with, as far as the recipe says (--fork continues from one before it).
        """
        self.config, self.parents = config, parents
        if not self.is_main:
            if not restart and not restarting(self.path):
                self._look_for_published()
            return self
        self.lock.acquire()
        try:
            self._open(restart, fork, last_step)
        except BaseException:
            self.lock.release()
            raise
        return self

    def _look_for_published(self) -> None:
        # The main process may be renaming it at this moment, so its last place is looked at twice.
        for path in (self.final, self.path, self.final):
            with contextlib.suppress(Damaged):
                artifact = read(path)
                if artifact and not artifact.damage():
                    self.published = artifact

    def _open(self, restart: bool, fork: bool, last_step: int | None) -> None:
        (self.folder / "requeue.json").unlink(missing_ok=True)  # the previous run's marker for its job script
        sweep_folder(self.folder)
        if restart:
            self._set_damaged_aside()
        # A --restart that was killed is resumed by the same command and by the one without --restart.
        resumes_restart = restarting(self.path)
        if not restart and not resumes_restart:
            self.published = self._finish_publishing()
            if self.published:
                return
        self._drop_worthless_runs()
        others = [path for path in partials(self.folder) if path != self.path]
        if restart:
            for path in others if resumes_restart else partials(self.folder):
                set_aside(path)
        elif others and not fork:
            self._refuse_other_run(others[-1], last_step)
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
                source = fork_source(self.folder, self._as_run(), self.stage, last_step)
                self.info["forked_from"] = source.relative_to(self.folder.resolve()).as_posix()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_info()
        # run.json names the source of the fork before the copy, and the old run is set aside after it, so that a run
        # that is killed in between can resume.
        if self.info.get("forked_from") and not complete_checkpoints(self.path):
            self._copy_checkpoint(self.folder / self.info["forked_from"])
        faults.point("fork")
        if fork:
            self._forked = {path: set_aside(path) for path in others}
        self._clock = time.time()

    def _as_run(self) -> dict:
        """This run as changes.explain takes it."""
        return {"identity": self.identity, "config": self.config, "parents": self.parents}

    def _set_damaged_aside(self) -> None:
        """Set unfinished runs aside whose run.json cannot be read."""
        for path in partials(self.folder):
            try:
                run_info(path)
            except Damaged:
                set_aside(path, "damaged")

    def _drop_worthless_runs(self) -> None:
        """Remove or set aside unfinished runs of other recipes that nothing can be resumed from."""
        for path in partials(self.folder):
            if path == self.path:
                continue
            if not has_work(path):  # ended by a mistake in the recipe, or killed at its start
                shutil.rmtree(path)
            elif not worth_keeping(path):
                kept = set_aside(path, "failed")
                show(
                    f"{self.stage}: an unfinished run of another recipe, from which nothing can be resumed, is now"
                    f" {kept}; delete it when you no longer need it"
                )

    def _refuse_other_run(self, other: Path, last_step: int | None) -> None:
        after = self._as_run()
        changes = "; ".join(explain(self.folder, run_info(other), after))
        advice = "Put the recipe back to finish it, or give --restart to start again"
        if can_fork(self.folder, after, self.stage, last_step):
            advice += ", or --fork to continue from its last checkpoint under the new recipe"
        raise UserError(
            f"{other}: an unfinished run of stage {self.stage} was made by another recipe. Changed since:"
            f" {changes}. {advice}"
        )

    def _finish_publishing(self) -> Artifact | None:
        """The output of this fingerprint if it is complete, also if an earlier run was killed between its manifest and
        its link."""
        for path in (self.path, self.final):
            try:
                artifact = read(path)
            except Damaged:
                set_aside(path, "damaged")
                continue
            if artifact is None:
                continue
            if artifact.damage():
                set_aside(path, "damaged")
                continue
            if path == self.path:
                self._rename()
            link(self.folder, self.final)
            self._remove_work()
            return read(self.final)
        if self.final.exists():
            set_aside(self.final, "damaged")
        return None

    def _copy_checkpoint(self, source: Path) -> None:
        target = path_of(self.path, step_of(source))
        temporary = hidden_path(target)
        if temporary.exists():
            shutil.rmtree(temporary)
        shutil.copytree(source, temporary)
        sync_tree(temporary)
        os.rename(temporary, target)

    # ---- publishing

    def publish(self, metrics: dict) -> Artifact:
        """Sync, hash, manifest, rename, link; in that order, so that a reader sees everything or nothing."""
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
        self._rename()
        faults.point("publish")
        link(self.folder, self.final)
        self._remove_work()
        self.path = self.final
        return read(self.final)

    def _rename(self) -> None:
        if self.final.exists():  # made again with --restart: until here, readers have the old one
            set_aside(self.final, "replaced")
        os.rename(self.path, self.final)
        sync_folder(self.folder)

    def _remove_work(self) -> None:
        """Remove intermediate files. This comes last, because a killed run resumes from them until the link is
        swapped."""
        if (self.final / "work").exists():
            shutil.rmtree(self.final / "work")

    # ---- ending without a result

    def end_with_error(self, message: str) -> None:
        """After a UserError: remove a run without work, so that it does not keep a corrected recipe from starting;
        otherwise note what it ended with."""
        if not self.is_main or not self.path.exists():
            return
        if self._is_unused_fork():
            for before, after in self._forked.items():
                os.rename(after, before)
            shutil.rmtree(self.path)
        elif not has_work(self.path):
            shutil.rmtree(self.path)
        else:
            self.info["ended"] = message
            self._write_info()

    def _is_unused_fork(self) -> bool:
        """Whether this run has only the checkpoint that it was forked from, which still exists."""
        source = self.info.get("forked_from")
        if not source or (self.path / "logs" / "spikes").exists():  # the error message refers to rows in there
            return False
        origin = self.folder / source
        still_exists = origin.exists() or any(origin.is_relative_to(path) for path in self._forked)
        checkpoints = {path.name for path in complete_checkpoints(self.path)}
        return still_exists and checkpoints <= {origin.name}

    def note_time(self) -> None:
        """Record the seconds spent so far, so that the time of a killed run is counted. Called after saving."""
        if self.is_main:
            self.info["seconds"] = self.spent()
            self._clock = time.time()
            self._write_info()

    def _write_info(self) -> None:
        own = {"config": self.config, "parents": self.parents, "stage": self.stage, "kind": self.kind}
        write_json(self.path / "run.json", self.info | own)

    def spent(self) -> float:
        """Seconds spent on this output, including those of killed runs. Main process only."""
        return self.info.get("seconds", 0.0) + time.time() - self._clock

    def close(self) -> None:
        if self.is_main:
            self.lock.release()


def link(folder: Path, target: Path) -> None:
    """Swap `current`, atomically."""
    current = folder / "current"
    temporary = folder / f".current.{os.getpid()}.tmp"
    if temporary.is_symlink():
        temporary.unlink()
    if current.is_dir() and not current.is_symlink():  # copied by a tool that follows links
        if os.path.realpath(target) == os.path.realpath(current):
            target = _rename_copy(folder, current)
        else:
            set_aside(current, "copied")
    os.symlink(target.name, temporary)
    os.replace(temporary, current)
    sync_folder(folder)


def _rename_copy(folder: Path, copy: Path) -> Path:
    """Give an output whose folder is called `current` the name of its fingerprint. Returns its new path."""
    target = folder / read(copy).fingerprint[:12]
    if target.exists():
        set_aside(target, "damaged")
    os.rename(copy, target)
    return target
