#!/usr/bin/env python3
"""Whether a stage that ended shall be started again: `again.py RECIPE_FOLDER/STAGE TRIES`. Exit code 0: yes, 1: no.
Says why in one line.

A run that may go on leaves requeue.json in its stage's folder (pipeline/train/stop.py). Without progress, which is the
saved step, it gets TRIES tries; tries.json beside it counts them. A mistake in the recipe, an exception and a spike
leave no requeue.json: starting again would not help.
"""

import json
import sys
from pathlib import Path


def main(folder: Path, most: int) -> int:
    try:
        word = json.loads((folder / "requeue.json").read_text())
    except FileNotFoundError:
        print(f"{folder.name}: left no word that it wants to go on; see its message above")
        return 1
    counted = folder / "tries.json"
    before = json.loads(counted.read_text()) if counted.exists() else {}
    tries = before.get("tries", 0) + 1 if before.get("saved") == word["saved"] else 1
    counted.write_text(json.dumps({"saved": word["saved"], "tries": tries, "reason": word["reason"]}) + "\n")
    reason = word.get("message") or f"{word['reason']} {word.get('signal', '')}".strip()
    if tries >= most:
        print(
            f"{folder.name}: {tries} tries ended at step {word['saved']} without progress, the last with: {reason}. Not"
            " queued again; submit the same line when the reason is gone"
        )
        counted.unlink()
        return 1
    print(f"{folder.name}: queued again from step {word['saved']} (try {tries} of {most} without progress): {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
