"""Outputs of stages as the store writes them, without running the stages: what commands on runs read."""

import json
from pathlib import Path
from unittest.mock import patch

from pipeline.core.artifact import Artifact, read
from pipeline.core.changes import record
from pipeline.core.files import write_atomic
from pipeline.core.output import Output


def output(
    folder: Path,
    config: dict,
    parents: dict[str, Artifact] | None = None,
    *,
    kind: str = "",
    version: int = 1,
    checkpoints: tuple[int, ...] = (),
    content: str | None = None,
    publish: bool = True,
    seconds: float | None = None,
    **metrics,
) -> Artifact | Path:
    """Write one output into the folder of a stage. Returns what was published, or the folder of the unfinished run."""
    parents = parents or {}
    kind = kind or folder.name
    digests = {key: parent.digest for key, parent in parents.items()}
    identity = {"kind": kind, "version": version, "config": config, "parents": digests}
    records = {key: record(parent, folder, False) for key, parent in parents.items()}
    opened = Output(folder, folder.name, kind, identity)
    # Nothing here has to outlive a power failure, and asking git for each output takes most of the time.
    with patch("os.fsync"), patch("pipeline.core.output.software", dict):
        opened.open(config=config | {"kind": kind}, parents=records)
        try:
            for step in checkpoints:
                path = opened.path / f"checkpoints/step-{step:06d}"
                write_atomic(path / "state", b"s" * 1000)
                write_atomic(path / "complete.json", json.dumps({"files": {}, "state": {}}))
            if not publish:
                return opened.path
            write_atomic(opened.path / "data.txt", content or json.dumps([config, digests]))
            published = opened.publish(metrics)
        finally:
            opened.close()
    if seconds is not None:
        manifest = published.manifest | {"seconds": seconds}
        write_atomic(published.path / "manifest.json", json.dumps(manifest))
        published = read(published.path)
    return published
