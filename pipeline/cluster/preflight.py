"""Looks at the nodes of a job before a stage starts on them, one process per node:
`python -m pipeline.cluster.preflight NOTES RUN_FOLDER GPUS`, started by pipeline/cluster/job.py.

Each process checks its node (the run folder can be written, temporary files too, the GPUs are there, free and compute
right), then all of them meet: a sum over all nodes must be right, and their clocks must agree. NOTES/RANK.json has what
a node has found so far, so that one that hangs is known by what it did not write.
"""

import os
import shutil
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from pipeline.core.files import read_record, write_json

MEETING = 60  # seconds in which all nodes must have met; the first ones wait for the last
LEAST_FREE = 256 * 2**20  # bytes for temporary files, and in the run folder
LEAST_FREE_GPU = 0.9  # share of a GPU's memory; the rest is another process's
MOST_SKEW = 10.0  # seconds; locks and heartbeats are judged by their age
BYTES = 2**20  # of the file that is written, and of the sum
RECORD = {"node": str, "problem": (str, type(None)), "at": str}


class Problem(Exception):
    """What is wrong with this node, or between this node and others."""


def main(words: list[str]) -> int:
    notes, run_folder, num_gpus = Path(words[0]), Path(words[1]), int(words[2])
    rank, world = int(os.environ.get("SLURM_PROCID", 0)), int(os.environ.get("SLURM_NTASKS", 1))
    record = {"node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(), "problem": None, "at": ""}

    def note(place: str, problem: str | None = None) -> None:
        record["at"], record["problem"] = place, problem
        write_json(notes / f"{rank}.json", record)

    checks = {
        "the run folder": lambda: check_folder(run_folder),
        "temporary files": lambda: check_folder(Path(tempfile.gettempdir())),
        "its GPUs": lambda: check_gpus(num_gpus),
        "the meeting of all nodes": lambda: check_together(rank, world, num_gpus),
    }
    for place, check in checks.items():
        try:
            note(place)
            check()
        except (Problem, OSError, RuntimeError) as error:
            text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            note(place, text)
            print(f"{record['node']}: {place}: {text}", flush=True)
            return 1
    note("done")
    return 0


# ---- the node --------------------------------------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Write a file, have it reach the disk, read it. Raises Problem or OSError."""
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE:
        raise Problem(f"{folder} has {free / 2**20:.0f} MB free")
    path = folder / f".preflight.{socket.gethostname()}.{os.getpid()}.tmp"
    data = os.urandom(BYTES)
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.read_bytes() != data:
            raise Problem(f"{folder} gives back other bytes than were written")
    finally:
        path.unlink(missing_ok=True)


def check_gpus(expected: int) -> None:
    """Every GPU is visible, has its memory, and multiplies right. Raises Problem or RuntimeError."""
    if not expected:
        return
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < expected:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise Problem(f"torch sees {found} of {expected} GPUs (CUDA_VISIBLE_DEVICES={visible})")
    total = [torch.cuda.mem_get_info(number)[1] for number in range(expected)]
    for number in range(expected):
        free = torch.cuda.mem_get_info(number)[0]
        if free < LEAST_FREE_GPU * total[number]:
            raise Problem(
                f"GPU {number} has {free / 2**30:.0f} of {total[number] / 2**30:.0f} GiB free: another process uses it"
            )
        if total[number] < LEAST_FREE_GPU * max(total):
            raise Problem(f"GPU {number} has {total[number] / 2**30:.0f} GiB, another one {max(total) / 2**30:.0f}")
        ones = torch.ones(1024, 1024, device=f"cuda:{number}")
        if not bool((ones @ ones == 1024).all()):
            raise Problem(f"GPU {number} multiplies wrong")


# ---- all nodes -------------------------------------------------------------------------------------------------------


def check_together(rank: int, world: int, num_gpus: int) -> None:
    """A sum over all nodes, by the way that training will send, and their clocks. Raises Problem or RuntimeError."""
    if world == 1:
        return
    import torch
    import torch.distributed as dist

    backend, device = ("cpu:gloo,cuda:nccl", "cuda:0") if num_gpus else ("gloo", "cpu")
    if num_gpus:
        torch.cuda.set_device(0)
    dist.init_process_group(backend, rank=rank, world_size=world, timeout=timedelta(seconds=MEETING))
    values = torch.full((BYTES // 4,), float(rank + 1), device=device)
    dist.all_reduce(values)
    if not bool((values == world * (world + 1) / 2).all()):
        raise Problem("the sum over all nodes is wrong")
    clocks: list = [None] * world
    dist.barrier()
    dist.all_gather_object(clocks, time.time(), group=dist.new_group(backend="gloo"))
    middle = sorted(clocks)[world // 2]
    if abs(clocks[rank] - middle) > MOST_SKEW:
        raise Problem(f"its clock differs from that of the others by {clocks[rank] - middle:+.0f} s")
    dist.destroy_process_group()


# ---- in the job ------------------------------------------------------------------------------------------------------


def problems(notes: Path, nodes: list[str]) -> dict[str, str]:
    """Node -> what is wrong with it, from the notes of all processes. `nodes` are those of the job, in the order of
    ranks. Nodes that only could not meet the others are named if no other node has a problem of its own."""
    own, meeting = {}, {}
    for rank, node in enumerate(nodes):
        try:
            record = read_record(notes / f"{rank}.json", RECORD)
        except (OSError, ValueError):
            own[node] = "its process did not start, or the folder of the job cannot be written from it"
            continue
        is_meeting = record["at"].startswith("the meeting")
        if record["problem"]:
            at_fault = meeting if is_meeting and "clock" not in record["problem"] else own
            at_fault[node] = f"{record['at']}: {record['problem']}"
        elif record["at"] != "done":
            at_fault = meeting if is_meeting else own
            at_fault[node] = f"{record['at']}: no answer"
    return own or meeting


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
