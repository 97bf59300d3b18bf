"""Devices other than the CPU that torch may have, and how they differ:

    cuda    NVIDIA's GPUs, and AMD's with torch for ROCm
    npu     Ascend's NPUs, with the package torch_npu
    mps     the GPU of a Mac

The last two are untested (docs/install.md): their functions are played by others in tests/core/test_accelerators.py.
"""

import functools
import importlib
import importlib.util

KINDS = ("cuda", "npu", "mps")
"""In the order in which `run.device: auto` takes them."""
NAMES = {"cuda": "GPU", "npu": "Ascend NPU", "mps": "Apple GPU (MPS)"}
UNTESTED = ("npu", "mps")


def count(kind: str) -> int:
    """How many devices of a kind torch finds here."""
    import torch

    if kind == "mps":
        return int(torch.backends.mps.is_available())
    if kind == "npu" and npu_problem() is not None:
        return 0
    library = _library(kind)
    return library.device_count() if library.is_available() else 0


def _library(kind: str):
    """torch's functions for a kind of device. torch.npu is there when torch_npu has been imported."""
    import torch

    return torch.cuda if kind == "cuda" else torch.npu


def first() -> str | None:
    """The kind that `run.device: auto` means here; None: the CPU."""
    return next((kind for kind in KINDS if count(kind)), None)


@functools.cache
def npu_problem() -> str | None:
    """Why there can be no Ascend NPU; None if torch_npu can be used."""
    if importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:  # without Ascend's driver and CANN its libraries are not found
        return f"torch_npu cannot be loaded ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def backend(kind: str) -> str:
    """The collectives of processes on devices of a kind. Flags and sums of a few numbers are sent over gloo even if
    tensors are not: no kernel is launched, and nothing waits for the device."""
    return {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}.get(kind, "gloo")


def use(device) -> None:
    """Make a device the one that this process computes on."""
    if device.type in ("cuda", "npu"):
        _library(device.type).set_device(device)


def synchronize(device) -> None:
    """Wait until a device has done what it was given."""
    import torch

    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != "cpu":
        _library(device.type).synchronize(device)


def peak_memory(device) -> float | None:
    """Bytes: the most that torch has allocated on a device, on a Mac what it has allocated now. None for the CPU."""
    import torch

    if device.type == "cpu":
        return None
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory())
    return float(_library(device.type).max_memory_allocated(device))


def reset_peak(device) -> None:
    """Forget the most that torch has allocated on a device; a Mac knows only what it has now."""
    if device.type in ("cuda", "npu"):
        _library(device.type).reset_peak_memory_stats(device)


def name(device) -> str:
    """As people call it."""
    if device.type in ("cuda", "npu"):
        return _library(device.type).get_device_name(device)
    return NAMES[device.type]


def has_bf16(kind: str) -> bool:
    """Whether devices of a kind compute in bf16: on a Mac since macOS 14, of NPUs those since the 910B."""
    import torch

    if kind == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.npu.is_bf16_supported() if kind == "npu" else True


def double(tensor):
    """A tensor in fp64, on the CPU if its device has no such numbers."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
