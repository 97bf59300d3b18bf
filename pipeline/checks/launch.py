"""Starting the processes of a proof on this machine, on its GPUs or on its CPU."""

import os
import tempfile

from pipeline.core.processes import Ranks, cores

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ALMA_FAULT")


def gpus() -> int:
    """How many GPUs a proof may use; 0 for the CPU, also with a single one, because two processes need two."""
    import torch

    found = torch.cuda.device_count() if os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true" else 0
    return found if found > 1 else 0


def run(
    program: list[str], processes: int, *, on_gpu: bool, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code (negative: killed by that signal) and what was printed, of a launch with an environment of its own.
    `program` is a script with its words, or `-m` with a module and its words."""
    settings = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    settings |= {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(max(1, int(settings.get("OMP_NUM_THREADS", cores())) // processes)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if not on_gpu:
        settings |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    with tempfile.TemporaryFile() as said:
        codes = Ranks(program, processes, settings | (environment or {}), stdout=said).wait()
        said.seek(0)
        text = said.read().decode(errors="replace")
    return next((code for code in codes if code), 0), text
