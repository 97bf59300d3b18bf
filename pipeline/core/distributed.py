"""Processes of a launch: setting up devices and the process group, exchanging small values, and ending cleanly.

`accelerate launch`, torchrun, srun and `alma run` only start processes and set RANK, WORLD_SIZE and LOCAL_RANK; the
recipe decides what the processes do together (`parallel`).
"""

import functools
import gc
import os
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from pipeline.core import accelerators
from pipeline.core.config import StageConfig
from pipeline.core.errors import UserError
from pipeline.core.processes import cores
from pipeline.core.terminal import plural, say

if TYPE_CHECKING:
    from pipeline.train.config import TrainConfig


CHOSEN = "ALMA_DEVICE"
"""Variable with the kind of device that a recipe names, where it names one: there may be another one, too."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def device():
    """torch.device of this process: its GPU or NPU, or the CPU."""
    import torch

    kind = None if _is_only_cpu() else os.environ.get(CHOSEN) or accelerators.first()
    if kind in ("cuda", "npu"):
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(kind or "cpu")


def _is_only_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"


def setup(config: "TrainConfig | None" = None) -> None:
    """Threads, GPU and process group of this process; without a config only threads and GPU as the environment says.
    May be called again. Raises UserError if the launcher asks for something else than the recipe."""
    import torch
    import torch.distributed as dist

    if config is not None:
        _agree_with_launcher(config)
        choose_device(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(_num_threads(config))
    _initialise_vector_math()
    here = device()
    accelerators.use(here)
    _mention_device(here.type)
    if here.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would look for one and warn that it found none
    # DeepSpeed and FSDP need a rank and a group even for one process
    group_of_one = world() == 1 and config is not None and config.parallel.needs_group
    if group_of_one:
        os.environ.setdefault("LOCAL_RANK", "0")
    if dist.is_initialized():
        return
    backend = accelerators.backend(here.type)
    if world() > 1:
        # The watchdog (train/heartbeat.py) can name the rank that the others wait for, so its limits must end first.
        seconds = 2 * max(config.watch.start, config.watch.hang) if config else 0
        timeout = timedelta(seconds=max(1800, seconds))
        dist.init_process_group(backend, store=_store(timeout), rank=rank(), world_size=world(), timeout=timeout)
    elif group_of_one:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _num_threads(config: "TrainConfig | None") -> int:
    """CPU threads of this process."""
    if config is not None and config.run.threads:
        return config.run.threads
    from_environment = int(os.environ.get("OMP_NUM_THREADS", 0))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return from_environment or max(1, cores() // local)


def _store(timeout: timedelta):
    """The store of a launch by pipeline/core/processes.py, whose port is already open. None: torch creates one from
    MASTER_ADDR and MASTER_PORT, or uses torchrun's."""
    import torch.distributed as dist

    socket = os.environ.get("ALMA_STORE")
    if socket is None:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not is_main():
        return dist.TCPStore(address, port, world(), False, timeout)
    return dist.TCPStore(address, port, world(), True, timeout, master_listen_fd=int(socket))


def _initialise_vector_math() -> None:
    """Call each of oneMKL's vector functions once on one number, before two threads can do it at the same time.

    oneMKL before 2025.0 (torch 2.13 has 2024.2) chooses the kernel of a function at its first call. If several threads
    make that call at once, one of them may run a kernel of low accuracy, in this call only: relative errors of 1.5e-4
    in exp in 13 of 900 fresh processes with two threads, in none of 900 after this (docs/log.md 14; pytorch/pytorch
    issue 188792). So the first step of a run was not always reproduced."""
    import torch

    # what torch computes with them on a CPU (aten/src/ATen/cpu/vml.h)
    functions = (
        torch.acos,
        torch.asin,
        torch.atan,
        torch.cos,
        torch.erf,
        torch.erfc,
        torch.exp,
        torch.expm1,
        torch.log,
    )
    functions += (torch.log10, torch.log1p, torch.log2, torch.sin, torch.sqrt, torch.tan, torch.tanh)
    for dtype in (torch.float32, torch.float64):
        for function in functions:
            function(torch.full((1,), 0.5, dtype=dtype))


def choose_device(config: StageConfig, local: int) -> None:
    """Apply `run.device` for `local` processes on this machine. Raises UserError if that is impossible."""
    wanted = config.run.device
    os.environ.pop(CHOSEN, None)
    if wanted == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `device` and DeepSpeed's launchers read this
        return
    only_cpu = _is_only_cpu()
    kind = accelerators.first() if wanted == "auto" else wanted
    num_devices = accelerators.count(kind) if kind else 0
    if wanted != "auto" and (only_cpu or not num_devices):
        asks = "asks for a GPU, and" if wanted == "cuda" else f"asks for an {accelerators.NAMES[wanted]}, and"
        reason = "ACCELERATE_USE_CPU=true forbids it" if only_cpu else _why_none(wanted)
        raise UserError(
            f"stage {config.kind}: run.device: {wanted} {asks} {reason}; start it where there is one, or give"
            f" {config.kind}.run.device=cpu"
        )
    if only_cpu or kind is None:
        return
    obstacle = "several processes" if kind == "mps" and max(local, world()) > 1 else config.obstacle_on(kind)
    if obstacle and kind == "mps" and wanted == "auto":  # a recipe for other machines, tried on a Mac
        os.environ["ACCELERATE_USE_CPU"] = "true"
        say(f"WARNING: an Apple GPU (MPS) is here and cannot do {obstacle}: computing on the CPU", rank())
        return
    if obstacle:
        raise UserError(
            f"stage {config.kind}: {obstacle} on an {accelerators.NAMES[kind]} is not supported; remove it, or give"
            f" {config.kind}.run.device=cpu"
        )
    if num_devices < local:
        name = accelerators.NAMES[kind]
        raise UserError(
            f"stage {config.kind}: {plural(local, 'process/processes')} on this machine and"
            f" {plural(num_devices, name)}; launch {num_devices}, or give {config.kind}.run.device=cpu"
        )
    if wanted != "auto":
        os.environ[CHOSEN] = wanted


def _why_none(kind: str) -> str:
    """Why there is no device of a kind here."""
    import torch

    if kind == "npu" and accelerators.npu_problem():
        return accelerators.npu_problem()
    visible = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}.get(kind)
    set_to = f" ({visible}={os.environ.get(visible, 'not set')})" if visible else ""
    return f"torch {torch.__version__} finds none here{set_to}"


@functools.cache
def _mention_device(kind: str) -> None:
    """Say once if the device that is computed on is untested, or if the CPU computes beside a device that stages cannot
    use, and was not asked for."""
    import torch

    if kind in accelerators.UNTESTED:
        name = accelerators.NAMES[kind]
        say(f"WARNING: computing on an {name}, on which alma is untested; run.device: cpu avoids it", rank())
    if kind != "cpu" or _is_only_cpu():
        return
    unused = ["an Intel GPU (XPU)"] if torch.xpu.is_available() else []
    problem = accelerators.npu_problem()
    if problem and "cannot be loaded" in problem:
        unused.append(problem)
    if unused:
        say(f"WARNING: {' and '.join(unused)} is here and is not supported: computing on the CPU", rank())


def _agree_with_launcher(config: "TrainConfig") -> None:
    """Raise UserError if an `accelerate config` file names another ZeRO stage than the recipe. Both were chosen by the
    user, so neither wins."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    launched = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    if launched is None:
        return
    # a pipeline always has DeepSpeed's ZeRO-1 optimizer
    zero = 1 if config.parallel.pipeline > 1 else config.parallel.zero
    if str(zero) != launched:
        shown = "none (plain data parallelism)" if zero is None else zero
        raise UserError(
            f"stage {config.kind}: the recipe says parallel.zero: {shown}, the accelerate launch config says"
            f" zero_stage: {launched}; make them equal, or launch with --multi_gpu and let the recipe decide"
        )


def local_world() -> int:
    """Processes of this launch on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def barrier() -> None:
    if world() > 1:
        all_reduce_sum([0.0])


def all_reduce_sum(values: list[float]) -> list[float]:
    """Sums over all processes in double precision; every process gets them. Collective."""
    return _reduce(values, largest=False)


def all_reduce_max(values: list[float]) -> list[float]:
    """Maxima over all processes. Collective."""
    return _reduce(values, largest=True)


def all_rows(values: list[float]) -> list[list[float]]:
    """The numbers of each process, in the order of ranks, on every process. Collective."""
    flat = [0.0] * (world() * len(values))
    flat[rank() * len(values) : (rank() + 1) * len(values)] = values
    flat = all_reduce_sum(flat)
    return [flat[start : start + len(values)] for start in range(0, len(flat), len(values))]


def _reduce(values: list[float], largest: bool) -> list[float]:
    if world() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return tensor.tolist()


def from_main(value):
    """The main process's value of a small picklable object, on every process. Collective."""
    if world() == 1:
        return value
    import torch
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def all_gather_lists(items: list) -> list:
    """The lists of all processes, of picklable items, joined in the order of ranks, on every process. Collective."""
    return [item for part in all_gather_object(items) for item in part]


def all_gather_object(value) -> list:
    """A small picklable object of each process, on every process. Collective."""
    if world() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world()
    dist.all_gather_object(values, value, group=_cpu_group())
    return values


_gloo_group = None


def _cpu_group():
    """A gloo group if there are GPUs or NPUs: torch's all_gather_object has no `device`, and over nccl and hccl it
    needs their tensors."""
    global _gloo_group
    import torch.distributed as dist

    if _gloo_group is None and accelerators.backend(device().type) != "gloo":
        _gloo_group = dist.new_group(backend="gloo")
    return _gloo_group


def shutdown() -> None:
    """End the process group. Without the pause a gloo thread may take the interpreter lock while Python shuts down, and
    a run whose result is published dies with SIGABRT (`terminate called without an active exception`); with it: in 0 of
    18 launches."""
    if "torch.distributed" not in sys.modules:
        return
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return
    dist.destroy_process_group()
    gc.collect()
    if world() > 1:
        time.sleep(0.5)
