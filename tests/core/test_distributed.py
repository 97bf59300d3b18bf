"""The first step of a fresh process is computed like any other (docs/log.md 14)."""

import os
import subprocess
import sys

import pytest
import torch
from paths import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.core import distributed


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if args and isinstance(args[0], torch.Tensor):
            self.seen.add((function.overloadpacket.__name__, args[0].dtype, args[0].numel()))
        return function(*args, **(kwargs or {}))


def test_vector_functions_are_called_once_before_threads_do_it():
    with Calls() as calls:
        distributed.setup()
    for name in ("exp", "log", "sqrt", "tanh", "erf", "cos", "sin"):  # what models and losses use
        for dtype in (torch.float32, torch.float64):
            assert (name, dtype, 1) in calls.seen


ON_A_MAC = """
import torch
torch.backends.mps.is_available = lambda: True
from pipeline.core import distributed
distributed.setup()
distributed.setup()
print(distributed.device())
"""


@pytest.mark.slow
def test_a_device_that_is_untested_is_mentioned_once():
    done = subprocess.run([sys.executable, "-c", ON_A_MAC], capture_output=True, text=True, timeout=600)
    warning = "WARNING: computing on an Apple GPU (MPS), on which alma is untested; run.device: cpu avoids it"
    assert done.stdout.splitlines() == [warning, "mps"], done.stdout + done.stderr


STORM = """
import os, sys
import numpy, torch
from pipeline.core import distributed
x = torch.from_numpy(numpy.random.default_rng(0).random((128, 4096), dtype=numpy.float32))
os.environ["OMP_NUM_THREADS"] = "2"
other = 0
for _ in range(int(sys.argv[1])):
    child = os.fork()  # torch is there and has computed nothing yet
    if not child:
        distributed.setup()
        os._exit(0 if torch.equal(x.exp(), x.exp()) else 1)
    other += os.waitpid(child, 0)[1] != 0
print(other)
"""


FORKED = """
import sys
sys.path[:0] = [{helpers!r}, {root!r}]
from harness import launch
print(launch(1, {script!r}, cwd="."))
"""


@pytest.mark.slow
def test_forked_stages_of_the_tests_have_one_thread(tmp_path):
    """Also where pytest is started without OMP_NUM_THREADS (tests/helpers/preload.py)."""
    (tmp_path / "threads.py").write_text("import torch\nprint('threads', torch.get_num_threads())\n")
    command = FORKED.format(helpers=str(ROOT / "tests/helpers"), root=str(ROOT), script=str(tmp_path / "threads.py"))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "threads 1" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_first_exponentials_of_300_processes_are_exact():
    """Without the calls 1 to 2 of 100 deviate by up to 1.5e-4, so all 300 are equal by chance in 1 to 5 of 100 runs."""
    done = subprocess.run([sys.executable, "-c", STORM, "300"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.split() == ["0"], done.stdout + done.stderr
