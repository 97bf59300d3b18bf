#!/usr/bin/env python3
"""Whether a stage that ended shall be started again: `again.py RECIPE_FOLDER/STAGE TRIES [--asked]`. Exit code 0: yes,
1: no. Says why in one line.

A run that may continue leaves requeue.json in its stage's folder (pipeline/train/stop.py). Without progress (the saved
step, or the finished files of a stage without steps) it gets TRIES tries; tries.json beside it counts them. A mistake
in the recipe and a spike leave no requeue.json, and an exception leaves one with the reason `failed`: starting again
would not help. With --asked the job was asked to stop: a stage that left no word was still starting, which is a try
without progress.
"""

import argparse
import json
import os
import sys
from pathlib import Path


def known(path: Path, key: str) -> dict:
    """A JSON file with `key`; empty if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and key in found else {}


def main(folder: Path, most: int, asked: bool) -> int:
    counted = folder / "tries.json"
    before, word = known(counted, "tries"), known(folder / "requeue.json", "reason")
    if not word and asked:
        starting = "asked to stop before the stage had begun its work"
        word = {"reason": "signal", "message": starting, "saved": before.get("saved"), "from": before.get("from")}
        word["progress"] = before.get("progress")
    elif not word:
        print(f"{folder.name}: left no word that it wants to go on; see its message above")
        return 1
    reason = word.get("message") or f"{word['reason']} {word.get('signal', '')}".strip()
    if word["reason"] == "failed":
        print(f"{folder.name}: {reason}. Not queued again, for it would fail again; see its message above")
        return 1
    progress, place = word.get("progress", word["saved"]), word.get("from") or f"step {word['saved'] or 0}"
    same = bool(before) and before.get("progress", before.get("saved")) == progress
    tries = before["tries"] + 1 if same else 1
    count = {"saved": word["saved"], "progress": progress, "from": place, "tries": tries, "reason": word["reason"]}
    temporary = counted.with_name(f".{counted.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(count) + "\n")
    temporary.replace(counted)
    if tries >= most:
        print(
            f"{folder.name}: {tries} tries ended at {place} without progress, the last with: {reason}. Not"
            " queued again; submit the same line when the reason is gone"
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
