"""How fast a model writes, and how much memory that takes.

Tokens are written as in the rest of alma (pipeline/rl/rollout.py): by transformers' model with its cache, all rows of a
batch in step. vLLM and llama.cpp are faster; what is compared here are models, on one machine.
"""

import contextlib
import statistics
import time
from pathlib import Path

from pipeline.assessment.continuations import greedy_continuations
from pipeline.core import accelerators

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_speed(model, vocabulary: int, config, seed: int) -> dict:
    """For each batch: tokens per second after the first token, seconds to the first, and the peak of memory in bytes.
    config: a Speed block."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    device = next(model.parameters()).device
    figures: dict = {"device": _device_name(device), "weight_bytes": weights, "batches": {}}
    for batch in config.batches:
        prompts = torch.randint(vocabulary, (batch, config.prompt_tokens), generator=generator).tolist()
        _seconds(model, prompts, config.new_tokens)  # kernels are chosen and memory is reserved once
        _reset_peak(device)
        firsts = [_seconds(model, prompts, 1) for _ in range(config.repeats)]
        totals = [_seconds(model, prompts, config.new_tokens) for _ in range(config.repeats)]
        first, total = statistics.median(firsts), statistics.median(totals)
        figures["batches"][str(batch)] = {
            "tokens_per_second": batch * (config.new_tokens - 1) / max(total - first, 1e-9),
            "first_token_seconds": first,
            "peak_bytes": _peak(device),
        }
    return figures


def _seconds(model, prompts: list[list[int]], new_tokens: int) -> float:
    """Of one generation, which no stop token ends."""
    begin = time.perf_counter()
    greedy_continuations(model, prompts, new_tokens, batch=len(prompts))
    accelerators.synchronize(next(model.parameters()).device)
    return time.perf_counter() - begin


def _device_name(device) -> str:
    import torch

    if device.type != "cpu":
        return accelerators.name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _reset_peak(device) -> None:
    if device.type != "cpu":
        accelerators.reset_peak(device)
        return
    with contextlib.suppress(OSError):  # where it is forbidden, the peak is that of the process so far
        RESET.write_text("5")


def _peak(device) -> int | None:
    """Bytes: on a GPU of torch's tensors, on a CPU of the whole process; None where that is not known."""
    if device.type != "cpu":
        return int(accelerators.peak_memory(device))
    if not STATUS.is_file():
        return None
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
