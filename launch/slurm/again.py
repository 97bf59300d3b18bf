#!/usr/bin/env python3
"""Decides whether a stage that ended is started again: `again.py RECIPE_FOLDER/STAGE TRIES [--asked]`. Exit code 0:
yes, 1: no. Prints the reason in one line.

A run that may continue leaves requeue.json in its stage's folder (pipeline/core/stop.py). Without progress (the saved
step, or the finished files of a stage without steps) it gets TRIES tries; tries.json in the same folder counts them. A
user error and a spike leave no requeue.json, and an exception leaves one with the reason `failed`: starting again would
not help. With --asked the job was asked to stop: a stage without requeue.json was still starting, which counts as a try
without progress.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def read_record(path: Path, key: str) -> dict:
    """The record in a JSON file, if it has `key`; empty if the file is missing or damaged."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and key in record else {}


def main(folder: Path, most: int, asked: bool) -> int:
    counted = folder / "tries.json"
    before = read_record(counted, "tries")
    marker = read_record(folder / "requeue.json", "reason")
    if not marker and asked:
        starting = "asked to stop before the stage had begun its work"
        marker = {"reason": "signal", "message": starting, "saved": before.get("saved"), "from": before.get("from")}
        marker["progress"] = before.get("progress")
    elif not marker:
        print(f"{folder.name}: left no requeue.json, so it is not queued again; see its message above")
        return 1
    reason = marker.get("message") or f"{marker['reason']} {marker.get('signal', '')}".strip()
    if marker["reason"] == "failed":
        print(f"{folder.name}: {reason}. Not queued again, because it would fail again; see its message above")
        return 1
    progress = marker.get("progress", marker["saved"])
    place = marker.get("from") or f"step {marker['saved'] or 0}"
    same = bool(before) and before.get("progress", before.get("saved")) == progress
    tries = before["tries"] + 1 if same else 1
    count = {"saved": marker["saved"], "progress": progress, "from": place, "tries": tries, "reason": marker["reason"]}
    temporary = counted.with_name(f".{counted.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(count) + "\n")
    temporary.replace(counted)
    if tries >= most:
        print(
            f"{folder.name}: {tries} tries ended at {place} without progress, the last with: {reason}. Not"
            " queued again; submit the same command when the cause is fixed"
        )
        counted.unlink()
        return 1
    print(f"{folder.name}: queued again from {place} (try {tries} of {most} without progress): {reason}")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tries", type=int)
    parser.add_argument("--asked", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.tries, arguments.asked))
