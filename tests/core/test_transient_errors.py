"""Which errors may not come again: texts as torch 2.13, NCCL 2.27 and gloo write them."""

import errno

import pytest
import torch

from pipeline.core.errors import UserError
from pipeline.core.transient_errors import cause_of, first_line


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might"), "device"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "device"),
        (RuntimeError("HIP error: unspecified launch failure"), "device"),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled system error, NCCL version 2.27.5\n"
                "ncclSystemError: System call (e.g. socket, malloc) or external library call failed"
            ),
            "network",
        ),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:544] Connection closed by peer [10.0.0.2]:4242"), "network"),
        (torch.distributed.DistStoreError("Timed out after 1801 seconds waiting for clients. 1/2"), "network"),
        (OSError(errno.ESTALE, "Stale file handle"), "storage"),
        (OSError(errno.EIO, "Input/output error"), "storage"),
        # these come again
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), None),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), None),
        (
            torch.distributed.DistBackendError(
                "NCCL error in: NCCLUtils.cpp:77, invalid usage\nncclInvalidUsage: This usually reflects invalid usage"
                " of NCCL library.\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
            ),
            None,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (UserError("CUDA error: is what the user wrote"), None),
        (KeyError("CUDA error"), None),
    ],
)
def test_errors_of_machines_are_told_from_those_of_programs(error, expected):
    assert cause_of(error) == expected


def test_an_error_on_one_line():
    assert first_line(RuntimeError("CUDA error: x\nFor debugging consider")) == "RuntimeError: CUDA error: x"
    assert first_line(KeyError()) == "KeyError"
