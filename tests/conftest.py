import importlib
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# `make test` tries the same examples each time, so that what is red was made red by a change; `make test-all` draws new
# ones.
settings.register_profile("steady", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("steady")

sys.path.insert(0, str(Path(__file__).parent / "helpers"))


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument, not by what they hold: the header of a gzip file holds the time, and the two
    workers of pytest-xdist refuse to run tests that they name differently."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="module")
def _as_it_was():
    """Engines leave traces in the process that built them: LOCAL_RANK, and DeepSpeed's ZeRO-3 its own
    torch.nn.functional.linear. The next file finds none."""
    import torch

    environment, linear = dict(os.environ), torch.nn.functional.linear
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.nn.functional.linear = linear
    _forget_groups()


def _forget_groups() -> None:
    """DeepSpeed keeps groups that a later file's process group does not know."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm
        from deepspeed.utils import groups

        comm.cdb = None
        importlib.reload(groups)
