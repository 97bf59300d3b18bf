"""A worker of `executor: slurm`: takes tasks from a folder until the stage is done (see slurm_executor.py).

python -m pipeline.data.cleaning.slurm_worker FOLDER
"""

import os
import pickle
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from pipeline.core.files import write_atomic
from pipeline.core.lock import born
from pipeline.data.cleaning.process_setup import run_task

HEARTBEAT = 5.0  # seconds between signs of life of the stage and of workers
SILENCE = 120.0  # seconds without a sign of life after which the stage, or a worker, counts as dead


def work(folder: Path) -> None:
    """Run tasks until the stage says stop, or gives no sign of life for SILENCE seconds."""
    worker = f"task-{os.environ.get('SLURM_ARRAY_TASK_ID', '0')}-{uuid.uuid4().hex[:8]}"
    sign = folder / "workers" / worker
    write_atomic(sign, f"{socket.gethostname()} {os.getpid()} {born(os.getpid())}")
    threading.Thread(target=_keep_alive, args=(folder, sign), daemon=True).start()
    while not (folder / "stop").exists() and folder.exists():
        task = _take_task(folder, worker)
        if task is None:
            time.sleep(0.1)
            continue
        name = task.name.partition("@")[0]
        try:
            result = (True, run_task(*pickle.loads(task.read_bytes())))
        except Exception as error:  # for the stage to handle: a damaged file, a full disk, a mistake in the recipe
            result = (False, error)
        if not folder.exists():
            return  # the stage has ended
        write_atomic(folder / "done" / name, pickle.dumps(result))
        task.unlink(missing_ok=True)


def _take_task(folder: Path, worker: str) -> Path | None:
    for path in sorted((folder / "todo").glob("[0-9]*")):
        task = folder / "taken" / f"{path.name}@{worker}"
        try:
            return path.rename(task)
        except FileNotFoundError:
            continue  # another worker was faster
    return None


def _keep_alive(folder: Path, sign: Path) -> None:
    """Give signs of life, and end this process when the stage gives none, even in the middle of a task."""
    last_beat, seen = None, time.time()
    while True:
        time.sleep(HEARTBEAT)
        try:
            os.utime(sign)
            beat = (folder / "alive").stat().st_mtime_ns
        except OSError:
            beat = last_beat
            if not folder.exists():
                os._exit(0)
        if beat != last_beat:
            last_beat, seen = beat, time.time()  # by this machine's own clock
        elif time.time() - seen > SILENCE:
            os._exit(1)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
