"""Whether a folder can be seen by all nodes of a cluster, as far as this machine can tell."""

import ipaddress
import re
import socket
from pathlib import Path

from pipeline.cluster import slurm
from pipeline.core.errors import UserError

# Types of file systems that only this machine has: memory, and the layers of a container. Disks (ext4, xfs) may be
# exported by this machine to all others, so nothing is known of them.
OWN = {"tmpfs", "ramfs", "devtmpfs", "overlay"}


def check(folder: Path) -> None:
    """Raise UserError if only this machine has the file system of a folder, and the cluster has other machines. A
    folder on a file system that other machines may see is accepted: each job looks for its recipe first."""
    kind = file_system(folder)
    if kind in OWN and not _is_the_only_machine():
        raise UserError(
            f"output: {folder} is on a file system of type {kind}, which the nodes of the cluster do not see; give an"
            " `output` on one that all of them see"
        )


def file_system(folder: Path) -> str | None:
    """Type of the file system that a folder, or its nearest parent that exists, is on; None if it is not known."""
    path = str(folder.absolute().resolve())
    best, kind = "", None
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return None
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), before.split()[4])
        is_above = path == point or path.startswith(point.rstrip("/") + "/")
        if is_above and len(point) >= len(best):  # of two on the same point the later one counts
            best, kind = point, after.split()[0]
    return kind


def _is_the_only_machine() -> bool:
    """Whether all nodes of the cluster are this machine."""
    answer = slurm.call("scontrol", "--oneliner", "show", "nodes")
    addresses = set(re.findall(r"\bNodeAddr=(\S+)", answer.stdout))
    return bool(addresses) and all(_is_here(address) for address in addresses)


def _is_here(address: str) -> bool:
    if address in ("localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
