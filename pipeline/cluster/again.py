#!/usr/bin/env python3
"""Decides whether a stage that ended is started again: `again.py RECIPE_FOLDER/STAGE TRIES [--asked]`. Exit code 0:
yes, 1: no. Prints the reason in one line. pipeline/cluster/job.py and launch/slurm/alma.sbatch ask it.

A run that may continue leaves requeue.json in its stage's folder (pipeline/core/stop.py). Without progress (the saved
step, or the finished files of a stage without steps) it gets TRIES tries; tries.json in the same folder counts them. A
user error and a spike leave no requeue.json, and an exception leaves one with the reason `failed`, unless it is an
error of a machine (pipeline/core/transient_errors.py): starting again would not help. With --asked the job was asked to
stop: a stage without requeue.json was still starting, which counts as a try without progress. So does a process that
was killed before it could leave one ($ALMA_ENDED, see rank.py).
"""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

# A rank that was still starting when it was asked to stop ends by that signal.
STOPPED = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)}
USER_ERROR = 2  # EXIT_USER of pipeline/core/errors.py


def read_record(path: Path, key: str) -> dict:
    """The record in a JSON file, if it has `key`; empty if the file is missing or damaged."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and key in record else {}


def ended_ranks(folder: Path | None) -> list[dict]:
    """The ranks that failed, as rank.py noted them: rank, host, process, code. One that was killed comes first, because
    it explains why others failed, and one that was only stopped is left out."""
    failed = []
    for path in folder.glob("rank-*") if folder else ():
        try:
            host, process, code = path.read_text(encoding="utf-8").split()
            entry = {"rank": int(path.name.removeprefix("rank-")), "host": host, "process": int(process)}
            entry["code"] = int(code)
        except (OSError, ValueError):
            continue
        if entry["code"] not in STOPPED:
            failed.append(entry)
    return sorted(failed, key=lambda entry: (entry["code"] <= 128, entry["rank"]))


def decide(
    folder: Path, most: int, asked: bool = False, ended: Path | None = None, measured: dict | None = None
) -> tuple[bool, str]:
    """Whether a stage that ended is started again, and the reason as a sentence. Counts the try.

    folder: of the stage; most: tries without progress; asked: the job was asked to stop; ended: folder with the notes
    of rank.py; measured: `saved`, `progress` and `from` of a stage that left no marker, if they are known.
    """
    measured = measured or {}
    failed = ended_ranks(ended)
    if any(entry["code"] == USER_ERROR for entry in failed):
        return False, f"{folder.name}: ended with an error for the user to fix; see its message"
    marker = read_record(folder / "requeue.json", "reason")
    if not marker and failed and failed[0]["code"] > 128:
        first = failed[0]
        what = f"rank {first['rank']} ({first['host']}) was killed by {signal.Signals(first['code'] - 128).name}"
        return count(folder, most, {"reason": "lost", "message": f"lost: {what}"} | measured)
    if not marker and asked:
        starting = "asked to stop before the stage had begun its work"
        return count(folder, most, {"reason": "signal", "message": starting} | measured)
    if not marker:
        return False, f"{folder.name}: left no requeue.json, so it is not queued again; see its message above"
    if marker["reason"] == "failed":
        message = marker.get("message") or "failed"
        text = f"{folder.name}: {message}. Not queued again, because it would fail again; see its message above"
        return False, text
    return count(folder, most, marker)


def count(folder: Path, most: int, marker: dict, start: int | None = None) -> tuple[bool, str]:
    """Count a try of a stage, whose marker has `saved` and `progress` unless it ended before it made any. Returns what
    `decide` does.

    start: how often Slurm had started the job again before this try; by default, this start's.
    """
    counted = folder / "tries.json"
    before = read_record(counted, "tries")
    if "saved" not in marker:  # it ended before it could say how far it was: no further than the start before
        marker = marker | {key: before.get(key) for key in ("saved", "progress", "from")}
    reason = marker.get("message") or f"{marker['reason']} {marker.get('signal', '')}".strip()
    progress = marker.get("progress", marker["saved"])
    place = marker.get("from") or f"step {marker['saved'] or 0}"
    same = bool(before) and before.get("progress", before.get("saved")) == progress
    tries = before["tries"] + 1 if same else 1
    record = {"saved": marker["saved"], "progress": progress, "from": place, "tries": tries, "reason": marker["reason"]}
    record["start"] = int(os.environ.get("SLURM_RESTART_COUNT", 0)) if start is None else start
    temporary = counted.with_name(f".{counted.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record) + "\n")
    temporary.replace(counted)
    if tries >= most:
        counted.unlink()
        return False, (
            f"{folder.name}: {tries} tries ended at {place} without progress, the last with: {reason}. Not"
            " queued again; submit the same command when the cause is fixed"
        )
    return True, f"{folder.name}: queued again from {place} (try {tries} of {most} without progress): {reason}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("tries", type=int)
    parser.add_argument("--asked", action="store_true")
    arguments = parser.parse_args()
    notes = os.environ.get("ALMA_ENDED")
    again, text = decide(arguments.folder, arguments.tries, arguments.asked, Path(notes) if notes else None)
    print(text)
    sys.exit(0 if again else 1)
