"""Training checkpoints: a folder that is complete or is not looked at.

    checkpoints/.step-000100.tmp/      being written
    checkpoints/step-000100/           complete.json, written last, holds sizes and sha256 of all other files and the loop's state
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline import faults
from pipeline.artifact import Output
from pipeline.files import hash_files, sha256_file, sync_folder, sync_tree, write_json
from pipeline.train import distributed

MARKER = "complete.json"


def save(output: Output, step: int, write: Callable[[Path], None], state: dict, keep: int) -> None:
    """Write a checkpoint of `step` steps. Collective: `write(folder)` is called on every process, each writing its own files.

    `state` must be JSON. The newest `keep` complete checkpoints stay; older ones go only once this one is complete.
    """
    folder = output.path / "checkpoints"
    final, temporary = folder / f"step-{step:06d}", folder / f".step-{step:06d}.tmp"
    if output.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*.tmp"):  # of a run that was killed while saving
            shutil.rmtree(left)
        temporary.mkdir()
    distributed.barrier()
    write(temporary)
    distributed.barrier()
    if output.is_main:
        sync_tree(temporary)
        files = hash_files(temporary, sorted(path for path in temporary.rglob("*") if path.is_file()))
        faults.point("save")
        write_json(temporary / MARKER, {"step": step, "state": state, "files": {name: {"sha256": e["sha256"], "size": e["size"]} for name, e in files.items()}})
        if final.exists():  # damaged: a valid one would have been resumed from
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
        for old in _complete(folder)[:-keep]:
            shutil.rmtree(old)
        output.note_time()
    distributed.barrier()


def newest(output: Output) -> tuple[Path, dict] | None:
    """The newest valid checkpoint and the state saved with it; a damaged one is named and passed over. Collective."""
    found = None
    if output.is_main:
        for path in reversed(_complete(output.path / "checkpoints")):
            damage = _damage(path)
            if damage is None:
                found = path, json.loads((path / MARKER).read_text(encoding="utf-8"))["state"]
                break
            print(f"checkpoint {path} is damaged ({damage}) and passed over", flush=True)
    return distributed.from_main(found)


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and (path / MARKER).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _damage(path: Path) -> str | None:
    try:
        marker = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = marker["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{MARKER} cannot be read: {error}"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
        if sha256_file(file) != entry["sha256"]:
            return f"{name} has another sha256 than when it was written"
    return None
