"""The arithmetic rate that a device could reach, which model FLOPs utilisation (MFU) is measured against: from a table,
or measured here.

No rate is guessed: a device that the table does not have gives none, and then no MFU is shown, unless the recipe says
`log.peak`.
"""

import re
import time

# Device name, as the driver gives it -> dense peak in TFLOP/s: bf16, tf32 (tensor cores) and fp32 (without them).
# Vendors' data sheets; where these state rates "with sparsity", half of it. Consumer cards: bf16 with fp32
# accumulation. A name has to fit as a whole: laptop, D and MIG variants have fewer units.
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
    # MI250X data sheet, of one of its two dies: each is a device
    r"AMD Instinct MI250X?( / MI250)?": (191.5, None, 47.9),
}
COLUMNS = ("bf16", "tf32", "fp32")


def known(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of a device by its name; precision bf16, tf32 or fp32. None if the table does not say."""
    for pattern, rates in TABLE.items():
        if re.fullmatch(pattern, name):
            rate = rates[COLUMNS.index(precision)]
            return rate * 1e12 if rate else None
    return None


def measured(precision: str, device, seconds: float = 1.0) -> float:
    """FLOP/s of a product of 4096x1024 by 1024x4096 on this device with this process's threads: the best of the
    repetitions that fit into `seconds`, at least three."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)  # its own: nothing of the run's random state is used
    left = torch.randn(4096, 1024, generator=generator).to(device, dtype)
    right = torch.randn(1024, 4096, generator=generator).to(device, dtype)
    best, begun, turns = 0.0, time.perf_counter(), 0
    repeats = 1 if device.type == "cpu" else 50  # a GPU takes microseconds for one and milliseconds to be asked
    while turns < 4 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        for _ in range(repeats):
            left @ right
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        elapsed = time.perf_counter() - start
        if turns:  # the first one loads kernels
            best = max(best, repeats * 2 * 4096 * 1024 * 4096 / elapsed)
        turns += 1
    return best


def peak(setting, precision: str, device) -> float | None:
    """FLOP/s of this process's device. setting: the recipe's `log.peak`, which is None (the table), "measured", or
    TFLOP/s."""
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
