"""Accelerators as their vendors describe them: arithmetic rate, memory, and links inside and between nodes.

    cluster = parse("64xH100-80G")
    cluster.device.peak, cluster.nodes

Rates of matrix products are those of pipeline/train/peak_flops.py where the device is in that table. Links are bytes
per second in one direction and per device; a group that spans nodes can use the network cards of all its devices in a
node. Sources are in `source`; a device that was reported by others and has no public data sheet says so.
"""

import difflib
import re
from dataclasses import dataclass, replace

from pipeline.core.errors import UserError

MIB = 2**20
RESERVED = 2 * 2**30
"""Bytes that a run cannot have: the CUDA context and NCCL's buffers."""
USABLE = 0.95
"""Share of the remaining memory that may be planned: the allocator's fragmentation and what an estimate misses."""


@dataclass(frozen=True)
class Device:
    name: str
    driver_name: str
    """As the driver reports it, for the table of peak rates."""
    architecture: str
    """The achievable share of the peak is calibrated per architecture (step_time.py)."""
    peak: float
    """Dense bf16 (on Ascend fp16), FLOP/s."""
    memory: float
    """Bytes that the driver reports."""
    bandwidth: float
    """Of the memory, bytes/s."""
    link: float
    """To devices of the same node, bytes/s."""
    network: float
    """To other nodes, bytes/s."""
    per_node: int
    source: str

    @property
    def kind(self) -> str:
        """As torch calls it."""
        return "cpu" if self.architecture == "cpu" else "cuda"

    @property
    def usable(self) -> float:
        """Bytes that a layout may take."""
        return USABLE * (self.memory - RESERVED)


def _device(name, driver, architecture, peak, mib, bandwidth, link, network, per_node, source) -> Device:
    return Device(
        name, driver, architecture, peak * 1e12, mib * MIB, bandwidth * 1e9, link * 1e9, network * 1e9, per_node, source
    )


# name, driver's name, architecture, TFLOP/s, MiB by nvidia-smi, memory GB/s, GB/s in the node, GB/s between nodes
DEVICES = [
    _device(
        "A100-40G", "NVIDIA A100-SXM4-40GB", "ampere", 312, 40_960, 1555, 300, 25, 8,
        "NVIDIA A100 data sheet (SXM, NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s",
    ),
    _device(
        "A100-80G", "NVIDIA A100-SXM4-80GB", "ampere", 312, 81_920, 2039, 300, 25, 8,
        "NVIDIA A100 data sheet (SXM, NVLink 600 GB/s both ways); DGX A100: 8 x 200 Gb/s",
    ),
    _device(
        "H100-80G", "NVIDIA H100 80GB HBM3", "hopper", 989, 81_559, 3350, 450, 50, 8,
        "NVIDIA H100 data sheet (SXM, NVLink 900 GB/s both ways); DGX H100: 8 x 400 Gb/s",
    ),
    _device(
        "H200-141G", "NVIDIA H200", "hopper", 989, 143_771, 4800, 450, 50, 8,
        "NVIDIA H200 data sheet (SXM, NVLink 900 GB/s both ways); DGX H200: 8 x 400 Gb/s",
    ),
    _device(
        "B200-180G", "NVIDIA B200", "blackwell", 2250, 183_359, 8000, 900, 50, 8,
        "NVIDIA HGX B200 data sheet (NVLink 1.8 TB/s both ways); DGX B200: 8 x 400 Gb/s",
    ),
    _device(
        "MI300X-192G", "AMD Instinct MI300X", "cdna3", 1307, 196_592, 5300, 448, 50, 8,
        "AMD MI300X data sheet (7 Infinity Fabric links of 64 GB/s each way); 8 x 400 Gb/s assumed",
    ),
    _device(
        "RTX4090-24G", "NVIDIA GeForce RTX 4090", "ada", 165.2, 24_564, 1008, 16, 1.6, 8,
        "NVIDIA Ada whitepaper; PCIe 4.0 x16 through the host's memory, one 100 Gb/s card per node assumed",
    ),
    _device(
        "ASCEND910B-64G", "Ascend 910B", "davinci", 320, 65_536, 1600, 196, 25, 8,
        "reported by the press, no public data sheet: 320 TFLOP/s fp16, 64 GB, HCCS 392 GB/s both ways, 200 Gb/s",
    ),
    _device(
        "CPU", "cpu", "cpu", 0.8, 16_384, 20, 5, 1.25, 16,
        "two cores of a Xeon with AMX, measured here in bf16 (docs/performance.md); memory and links assumed",
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Equal devices in equal nodes."""

    count: int
    device: Device

    @property
    def nodes(self) -> int:
        return -(-self.count // self.device.per_node)

    @property
    def local(self) -> int:
        """Devices of a node that are used."""
        return min(self.count, self.device.per_node)

    def __str__(self) -> str:
        return f"{self.count}x{self.device.name}"


def like(driver_name: str, memory: float, processes: int, per_node: int) -> Cluster:
    """The devices of a run: those of the table with this driver's name, else like an H100, with this memory."""
    known = next((device for device in DEVICES if device.driver_name == driver_name), find("H100-80G"))
    return Cluster(processes, replace(known, memory=memory, per_node=per_node))


def find(name: str) -> Device:
    """A device by its name, with or without its memory. Raises UserError."""
    wanted = re.sub(r"[\s_-]", "", name).upper()
    if re.search(r"\dGB$", wanted):
        wanted = wanted.removesuffix("B")
    complete = {device.name.replace("-", ""): device for device in DEVICES}
    named = [device for device in DEVICES if device.name.partition("-")[0] == wanted]
    if wanted in complete or len(named) == 1:
        return complete.get(wanted) or named[0]
    known = [device.name for device in DEVICES]
    near = difflib.get_close_matches(name.upper(), known, 1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
    if named:
        hint = f"it comes as {' and '.join(device.name for device in named)}"
    raise UserError(f"--on: no device is called {name!r}; {hint}")


def parse(text: str, per_node: int | None = None, network: float | None = None) -> Cluster:
    """`64xH100-80G` as a cluster. per_node, network: instead of the table's devices in a node and GB/s per device
    between nodes. Raises UserError."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\S+)\s*", text)
    if not match:
        raise UserError(f"--on: {text!r} does not name devices; write NUMBERxDEVICE, such as 64xH100-80G")
    count, device = int(match[1]), find(match[2])
    if not 1 <= count <= 1_000_000:
        raise UserError(f"--on: {count} devices; expected 1 to 1,000,000")
    if per_node:
        device = replace(device, per_node=per_node)
    if network:
        device = replace(device, network=network * 1e9)
    if count > device.per_node and count % device.per_node:
        below = count // device.per_node * device.per_node
        raise UserError(
            f"--on: {count} devices do not fill nodes of {device.per_node}; use {below} or {below + device.per_node},"
            " or say how many a node has (--per-node)"
        )
    return Cluster(count, device)
