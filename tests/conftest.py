import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _as_it_was():
    """Engines leave traces in the process that built them: LOCAL_RANK, and DeepSpeed's ZeRO-3 its own torch.nn.functional.linear. The next file finds none."""
    import torch

    environment, linear = dict(os.environ), torch.nn.functional.linear
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.nn.functional.linear = linear
