"""Where a run has its checkpoints, and which of them are complete and undamaged.

    checkpoints/step-000100/            complete.json, written last, has size and sha256 of all other files and the
                                        state of the training loop
    checkpoints/.step-000100.tmp/       being written; .step-000100.old.tmp: being removed
    checkpoints/damaged-step-000100/    found to be damaged, never resumed from

A run is the folder of an output, published or not. pipeline/train/checkpoints.py writes checkpoints.
"""

import json
import re
from pathlib import Path

from pipeline.core.files import damage_of, write_json

FOLDER = "checkpoints"
MARKER = "complete.json"


def folder_of(run: Path) -> Path:
    return run / FOLDER


def path_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:06d}"


def hidden_path(checkpoint: Path) -> Path:
    """Name of a checkpoint while it is being written, so that it is not taken for a complete one."""
    return checkpoint.with_name(f".{checkpoint.name}.tmp")


def removal_path(checkpoint: Path) -> Path:
    """Name of a checkpoint while it is being removed."""
    return checkpoint.with_name(f".{checkpoint.name}.old.tmp")


def damaged_path(checkpoint: Path) -> Path:
    """Name under which a damaged checkpoint is kept."""
    return checkpoint.with_name(f"damaged-{checkpoint.name}")


def leftovers(run: Path) -> list[Path]:
    """Checkpoints that a killed run was writing or removing."""
    return list(folder_of(run).glob(".step-*.tmp"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    complete = []
    for path in folder_of(run).glob("step-*"):
        if re.fullmatch(r"step-\d+", path.name) and (path / MARKER).exists():
            complete.append(path)
    return sorted(complete, key=step_of)


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    complete = complete_checkpoints(run)
    return step_of(complete[-1]) if complete else 0


def loop_state(checkpoint: Path) -> dict:
    """State of the training loop, saved with a checkpoint."""
    return json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["state"]


def replace_loop_state(checkpoint: Path, state: dict) -> None:
    """Give a complete checkpoint another state of the training loop. A kill leaves it with one of the two."""
    marker = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
    write_json(checkpoint / MARKER, marker | {"state": state})


def damage(checkpoint: Path, first: int = 0, every: int = 1) -> str | None:
    """What is wrong with a complete checkpoint, or None. Of its files, each `every`-th one from `first` on is hashed,
    so that processes can share the work. Raises OSError."""
    try:
        files = json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))["files"]
        for name in sorted(files)[first::every]:
            problem = damage_of(checkpoint / name, files[name])
            if problem:
                return problem
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        return f"{checkpoint / MARKER} cannot be read: {error}"
    return None
