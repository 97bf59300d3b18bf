"""Starting the processes of a proof on this machine, on its GPUs or on its CPU."""

import os
import tempfile

from pipeline.core.processes import Ranks, cores

# set by a launcher, or for one launch only
NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ALMA_FAULT")


def gpus() -> int:
    """How many GPUs a proof may use; 0 for the CPU. With a single GPU it is 0 as well, because two processes need
    two."""
    import torch

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return 0
    count = torch.cuda.device_count()
    return count if count > 1 else 0


def run(
    program: list[str], processes: int, *, on_gpu: bool, environment: dict[str, str] | None = None
) -> tuple[int, str]:
    """Exit code (negative: killed by that signal) and printed text of a launch with its own environment. `program` is a
    script with its arguments, or `-m` with a module and its arguments."""
    settings = {key: value for key, value in os.environ.items() if key not in NOT_INHERITED}
    threads = int(settings.get("OMP_NUM_THREADS", cores())) // processes
    settings["OMP_NUM_THREADS"] = str(max(1, threads))
    settings["OMP_WAIT_POLICY"] = "PASSIVE"
    settings["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if not on_gpu:
        settings["CUDA_VISIBLE_DEVICES"] = ""
        settings["ACCELERATE_USE_CPU"] = "true"
    settings.update(environment or {})
    with tempfile.TemporaryFile() as output:
        codes = Ranks(program, processes, settings, stdout=output).wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
    failed = [code for code in codes if code]
    return failed[0] if failed else 0, text
