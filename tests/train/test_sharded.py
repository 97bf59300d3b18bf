"""What DeepSpeed is told. That its engines compute what the others compute is in test_parallel.py."""

import pytest
import torch
from tiny_engine import config

from pipeline.core import distributed
from pipeline.train.sharded import settings


@pytest.mark.parametrize("parallel", [{"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 1, "pipeline": 2}])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deepspeed_overlaps_on_gpus_and_waits_for_no_timer(parallel, device, monkeypatch):
    """DeepSpeed's own reading of its configuration; a pipeline of its engine cannot overlap."""
    timers = pytest.importorskip("deepspeed.utils.config")
    zero = pytest.importorskip("deepspeed.runtime.zero.config")
    monkeypatch.setattr(distributed, "device", lambda: torch.device(device))
    options = settings(config(parallel=parallel), 1, 1, 8)
    assert not timers.get_timers_config(options).enabled
    expected = device == "cuda" and "pipeline" not in parallel
    assert zero.get_zero_config(options).overlap_comm is expected
