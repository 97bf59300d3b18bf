"""Devices that no machine of the tests has, played by other functions: which one a stage takes, what it refuses there,
and which of torch's functions it calls. That Apple's GPUs and Ascend's NPUs train is not shown by this."""

import importlib
import importlib.machinery
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from paths import ROOT

from pipeline.core import accelerators, distributed
from pipeline.core.errors import UserError
from pipeline.core.recipe import load
from pipeline.rl import rollout

SFT = """
  sft:
    inputs: {model: pretrain}
    sources: {a: {path: a.jsonl}}
    sequence_length: 64
    batch_size: 8
    epochs: 1
    lora: {rank: 4, base: nf4}
"""


@pytest.fixture
def machine(monkeypatch):
    """A machine without devices, and a function that gives it some."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # choose_device changes both
    monkeypatch.setenv(distributed.CHOSEN, "")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def give(mps: bool = False, macos: int = 15, npus: int | None = None, problem: Exception | None = None) -> None:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: macos >= major)
        if npus is not None:
            package = ModuleType("torch_npu")
            package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
            monkeypatch.setitem(sys.modules, "torch_npu", package)
            library = SimpleNamespace(is_available=lambda: npus > 0, device_count=lambda: npus)
            library.is_bf16_supported = lambda: macos >= 14
            monkeypatch.setattr(torch, "npu", library, raising=False)
        if problem is not None:
            real = importlib.import_module

            def import_module(name, package=None):
                if name == "torch_npu":
                    raise problem
                return real(name, package)

            monkeypatch.setattr(accelerators.importlib, "import_module", import_module)
        accelerators.npu_problem.cache_clear()

    give()
    yield give
    accelerators.npu_problem.cache_clear()


def choose(folder, *words: str, local: int = 1, stage: str = "pretrain") -> str:
    """Kind of the device that a stage computes on."""
    (folder / "r.yaml").write_text(tiny.RECIPE + SFT)
    distributed.choose_device(load(folder / "r.yaml", words).stages[stage], local)
    return "cpu" if os.environ["ACCELERATE_USE_CPU"] == "true" else accelerators.first()


def test_auto_takes_what_is_there(machine, tmp_path, monkeypatch):
    assert choose(tmp_path) is None
    machine(mps=True)
    assert choose(tmp_path) == "mps" and str(distributed.device()) == "mps"
    machine(mps=True, npus=8)
    assert choose(tmp_path, local=8) == "npu"
    machine(npus=0)
    assert choose(tmp_path) is None and str(distributed.device()) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose(tmp_path) == "cuda" and str(distributed.device()) == "cuda:0"
    assert choose(tmp_path, "pretrain.run.device=cpu") == "cpu" and str(distributed.device()) == "cpu"


def test_the_device_that_the_recipe_names_wins(machine, tmp_path, monkeypatch):
    machine(mps=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    choose(tmp_path, "pretrain.run.device=mps")
    assert str(distributed.device()) == "mps"
    choose(tmp_path)
    assert str(distributed.device()) == "cuda:0"


SPLIT = "pretrain.parallel={zero: 1}"


@pytest.mark.parametrize(
    "words, local, obstacle",
    [
        ([SPLIT], 1, "parallel.zero: 1"),
        (["pretrain.parallel={shard: full}"], 1, "parallel.shard: full"),
        (["pretrain.parallel={pipeline: 2}"], 1, "parallel.pipeline: 2"),
        (["pretrain.compile=true"], 1, "compile: true"),
        ([], 2, "several processes"),
    ],
)
def test_what_a_mac_cannot_do_is_done_by_its_cpu_and_refused_if_it_was_asked_for(
    machine, tmp_path, capsys, words, local, obstacle
):
    machine(mps=True)
    assert choose(tmp_path, *words, local=local) == "cpu"
    assert f"an Apple GPU (MPS) is here and cannot do {obstacle}: computing on the CPU" in capsys.readouterr().out
    os.environ["ACCELERATE_USE_CPU"] = "false"
    with pytest.raises(UserError) as caught:
        choose(tmp_path, "pretrain.run.device=mps", *words, local=local)
    assert str(caught.value) == (
        f"stage pretrain: {obstacle} on an Apple GPU (MPS) is not supported; remove it, or give pretrain.run.device=cpu"
    )


def test_bf16_where_the_device_has_none(machine, tmp_path):
    machine(mps=True, macos=13)
    bf16 = "pretrain.precision=bf16"
    assert choose(tmp_path, "pretrain.run.device=mps", "pretrain.precision=fp32") == "mps"
    with pytest.raises(UserError, match=r"precision: bf16 on an Apple GPU \(MPS\) is not supported"):
        choose(tmp_path, "pretrain.run.device=mps", bf16)
    machine(npus=1, macos=13)
    with pytest.raises(UserError, match="precision: bf16 on an Ascend NPU is not supported"):
        choose(tmp_path, bf16)
    machine(npus=1)
    assert choose(tmp_path, bf16) == "npu"


def test_npus_do_ddp_and_nothing_that_splits_a_model(machine, tmp_path):
    machine(npus=8)
    assert choose(tmp_path, "pretrain.run.device=npu", local=8) == "npu"
    for words, said in (
        ([SPLIT], "parallel.zero: 1 on an Ascend NPU is not supported; remove it"),
        (["pretrain.compile=true"], "compile: true on an Ascend NPU is not supported"),
    ):
        with pytest.raises(UserError, match=said):
            choose(tmp_path, *words)
    with pytest.raises(UserError, match="16 processes on this machine and 8 Ascend NPUs; launch 8"):
        choose(tmp_path, local=16)
    with pytest.raises(UserError, match="lora.base: nf4 on an Ascend NPU is not supported"):
        choose(tmp_path, stage="sft")


def test_a_device_that_is_not_there(machine, tmp_path):
    for name, said in (
        ("mps", "asks for an Apple GPU (MPS), and torch"),
        ("npu", "asks for an Ascend NPU, and the package torch_npu is not installed; start it where there is one, or"),
        ("cuda", "asks for a GPU, and torch"),
    ):
        with pytest.raises(UserError) as caught:
            choose(tmp_path, f"pretrain.run.device={name}")
        assert said in str(caught.value) and "give pretrain.run.device=cpu" in str(caught.value)
    machine(npus=8, problem=OSError("libascend_hal.so: cannot open shared object file\nmore"))
    assert choose(tmp_path) is None
    with pytest.raises(UserError, match=r"torch_npu cannot be loaded \(libascend_hal.so: cannot open shared object"):
        choose(tmp_path, "pretrain.run.device=npu")


def test_a_job_asks_slurm_for_gpus_only_where_they_are_gpus(tmp_path):
    (tmp_path / "r.yaml").write_text(tiny.RECIPE)
    for device, gpus in (("auto", 1), ("cuda", 1), ("npu", 0), ("mps", 0), ("cpu", 0)):
        config = load(tmp_path / "r.yaml", [f"pretrain.run.device={device}"]).stages["pretrain"]
        assert config.gpus_per_node == gpus


class OnAMac:
    """A tensor of a device that has no fp64."""

    device = torch.device("mps")

    def __init__(self, values):
        self.values = values

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    def cpu(self):
        return self.values


def test_fp64_is_computed_on_the_cpu_where_the_device_has_none():
    values = torch.tensor([1.0, 2.0])
    assert accelerators.double(OnAMac(values)).dtype == accelerators.double(values).dtype == torch.float64


def test_what_is_chosen_does_not_depend_on_where_it_is_summed(monkeypatch):
    """As on a Mac: sums in fp64 on another device than the logits."""
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    here = rollout.choose(logits, 1.0, draws)
    monkeypatch.setattr(rollout.accelerators, "double", lambda tensor: tensor.clone().cpu().double())
    there = rollout.choose(logits, 1.0, draws)
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_functions_of_the_device_are_called(monkeypatch):
    calls = []
    library = SimpleNamespace(
        set_device=lambda device: calls.append("set"),
        synchronize=lambda *device: calls.append("wait"),
        max_memory_allocated=lambda device: 7,
        reset_peak_memory_stats=lambda device: calls.append("reset"),
        driver_allocated_memory=lambda: 9,
        get_device_name=lambda device: "Ascend910B",
    )
    monkeypatch.setattr(torch, "npu", library, raising=False)
    monkeypatch.setattr(torch, "mps", library)
    npu, mps, cpu = SimpleNamespace(type="npu", index=0), torch.device("mps"), torch.device("cpu")
    for device in (npu, mps, cpu):
        accelerators.use(device)
        accelerators.synchronize(device)
        accelerators.reset_peak(device)
    assert calls == ["set", "wait", "reset", "wait"]
    assert [accelerators.peak_memory(device) for device in (npu, mps, cpu)] == [7, 9, None]
    assert [accelerators.name(device) for device in (npu, mps)] == ["Ascend910B", "Apple GPU (MPS)"]
    assert accelerators.backend("npu") == "cpu:gloo,npu:hccl" and accelerators.backend("mps") == "gloo"


TWO_NPUS = """
import sys
from types import ModuleType, SimpleNamespace
import importlib.machinery
import torch
torch.utils.rename_privateuse1_backend("npu")
package = ModuleType("torch_npu")
package.__spec__ = importlib.machinery.ModuleSpec("torch_npu", None)
sys.modules["torch_npu"] = package
torch.npu = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, is_bf16_supported=lambda: True)
torch.npu.set_device = lambda device: print("set", device)
torch.distributed.init_process_group = lambda backend, **options: print(backend, options["rank"], options["world_size"])
sys.path.insert(0, {root!r})
from pipeline.core import distributed
from pipeline.core.recipe import load
config = load({recipe!r}).stages["pretrain"]
distributed.setup(config)
print(distributed.device())
"""


@pytest.mark.slow
def test_processes_on_npus_meet_over_hccl(tmp_path):
    (tmp_path / "r.yaml").write_text(tiny.RECIPE)
    script = TWO_NPUS.format(root=str(ROOT), recipe=str(tmp_path / "r.yaml"))
    ranks = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, env=ranks)
    lines = [line for line in done.stdout.splitlines() if "WARNING" not in line]  # rank 0 says it
    assert lines == ["set npu:1", "cpu:gloo,npu:hccl 1 2", "npu:1"], done.stdout + done.stderr
