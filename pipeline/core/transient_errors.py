"""Errors of a machine rather than of a recipe or a program: of a GPU, of the network between processes, or of a file
server. Starting again may help, which an out-of-memory error or an index out of range would not."""

import errno
import re

from pipeline.core.errors import UserError

# Errors of CUDA and HIP come again at the same place if they are among these: too little memory, an index out of range,
# or a build of torch that does not fit the GPU or its driver.
OF_THE_PROGRAM = re.compile(
    r"out of memory|ALLOC_FAILED|device-side assert|no kernel image|invalid (device|argument|configuration|resource)"
    r"|NOT_SUPPORTED|INVALID_VALUE|driver version is insufficient|invalid usage|ncclInvalid|Duplicate GPU",
    re.IGNORECASE,
)
DEVICE = re.compile(r"(CUDA|HIP) error\b|\bECC error|\bXid\b|\bCU\w+_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)|NVLink")
NETWORK = re.compile(
    r"\bNCCL (error|Error|WARN)|\bnccl\w*Error|\bRCCL\b.*error|Connection (closed|reset) by peer|Connection timed out"
    r"|No route to host|Socket Timeout|Broken pipe"
)
NETWORK_CLASSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # of torch.distributed
STORAGE = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EHOSTDOWN, errno.ENOTCONN}


def cause_of(error: BaseException) -> str | None:
    """`device`, `network` or `storage` if an error is one that may not come again; None for all others."""
    if isinstance(error, UserError):
        return None
    if isinstance(error, OSError) and error.errno in STORAGE:
        return "storage"
    text = str(error)
    if not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError" or OF_THE_PROGRAM.search(text):
        return None
    if DEVICE.search(text):
        return "device"
    if NETWORK.search(text) or type(error).__name__ in NETWORK_CLASSES:
        return "network"
    return None


def first_line(error: BaseException) -> str:
    """An error on one line. Those of CUDA have advice for programmers below it."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
