"""The peak arithmetic rate of a device, against which model FLOPs utilisation (MFU) is measured: from a table, or
measured here.

No rate is guessed: for a device that is not in the table no MFU is shown, unless the recipe has `log.peak`.
"""

import re
import time

from pipeline.core import accelerators

# Device name, as the driver reports it -> dense peak in TFLOP/s: bf16, tf32 (tensor cores) and fp32 (without them).
# From the vendors' data sheets; half of the rate where these state it "with sparsity". Consumer cards: bf16 with fp32
# accumulation. The complete name must match: laptop, D and MIG variants have fewer units.
TABLE = {
    r"NVIDIA B200": (2250, 1125, 75),  # HGX B200 data sheet, a GPU of eight
    r"NVIDIA GB200": (2500, 1250, 80),  # GB200 NVL72 data sheet, a GPU
    r"NVIDIA GH200( \d+GB.*)?": (989, 494, 67),  # GH200 data sheet
    r"NVIDIA H200": (989, 494, 67),  # H200 data sheet, SXM
    r"NVIDIA H200 NVL": (835, 417, 60),  # H200 data sheet, NVL
    r"NVIDIA H100( 80GB HBM3| 64GB HBM2| SXM5.*)?": (989, 494, 67),  # H100 data sheet, SXM
    r"NVIDIA H100 PCIe": (756, 378, 51),  # H100 data sheet, PCIe
    r"NVIDIA H100 NVL": (835, 417, 60),  # H100 data sheet, NVL
    r"NVIDIA H800": (989, 494, 67),  # as H100 SXM, with slower links
    r"NVIDIA H20": (148, 74, 44),  # H20 data sheet
    r"(NVIDIA )?A[18]00-SXM4-\d+GB|(NVIDIA )?A[18]00(-PCIE-\d+GB| \d+GB PCIe)": (312, 156, 19.5),  # A100 data sheet
    r"(NVIDIA )?A40": (149.7, 74.8, 37.4),  # A40 data sheet
    r"(NVIDIA )?A30": (165, 82, 10.3),  # A30 data sheet
    r"(NVIDIA )?A10": (125, 62.5, 31.2),  # A10 data sheet
    r"(NVIDIA )?A10G": (70, 35, 31.5),  # A10G data sheet
    r"NVIDIA L40S": (362, 183, 91.6),  # L40S data sheet
    r"NVIDIA L40": (181, 90.5, 90.5),  # L40 data sheet
    r"NVIDIA L4": (121, 60, 30.3),  # L4 data sheet
    r"NVIDIA GeForce RTX 5090": (209.5, 104.8, 104.8),  # RTX Blackwell whitepaper
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6, 82.6),  # Ada whitepaper, appendix A
    r"NVIDIA GeForce RTX 3090": (71, 35.6, 35.6),  # GA102 whitepaper, appendix A
    r"NVIDIA RTX A6000": (154.8, 77.4, 38.7),  # RTX A6000 data sheet
    r"(Tesla V100-SXM2-\d+GB(-LS)?)": (None, None, 15.7),  # V100 data sheet; no bf16, no tf32
    r"AMD Instinct MI300X( OAM)?": (1307, 654, 163.4),  # MI300X data sheet
    r"AMD Instinct MI325X( OAM)?": (1307, 654, 163.4),  # MI325X data sheet
    # MI250X data sheet, for one of its two dies: each is a device
    r"AMD Instinct MI250X?( / MI250)?": (191.5, None, 47.9),
}
COLUMNS = ("bf16", "tf32", "fp32")


def known(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name; precision bf16, tf32 or fp32. None if it is not in the table."""
    for pattern, rates in TABLE.items():
        if re.fullmatch(pattern, name):
            rate = rates[COLUMNS.index(precision)]
            return rate * 1e12 if rate else None
    return None


def measured(precision: str, device, seconds: float = 1.0) -> float:
    """FLOP/s of a product of 4096x1024 by 1024x4096 on this device with the threads of this process: the best of as
    many repetitions as fit into `seconds`, at least three."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rows, inner = 4096, 1024
    generator = torch.Generator().manual_seed(0)  # its own, so that the run's random state is not used
    left = torch.randn(rows, inner, generator=generator).to(device, dtype)
    right = torch.randn(inner, rows, generator=generator).to(device, dtype)
    repeats = 1 if device.type == "cpu" else 50  # a GPU takes microseconds for one and milliseconds to synchronise
    best, rounds, started = 0.0, 0, time.perf_counter()
    while rounds < 4 or time.perf_counter() - started < seconds:
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        accelerators.synchronize(device)
        elapsed = time.perf_counter() - start
        if rounds:  # the first one loads kernels
            best = max(best, repeats * 2 * rows * inner * rows / elapsed)
        rounds += 1
    return best


def peak(setting, precision: str, device) -> float | None:
    """FLOP/s of the device of this process. setting: the recipe's `log.peak`: None (the table), "measured", or a number
    of TFLOP/s."""
    import torch

    if isinstance(setting, (int, float)):
        return setting * 1e12
    if setting == "measured":
        return measured(precision, device)
    if device.type != "cuda":
        return None
    if precision == "fp32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    return known(torch.cuda.get_device_name(device), precision)
