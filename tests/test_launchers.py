"""The commands of docs/launchers.md, with two machines played by two agents on this one: each launcher trains the same
weights as `alma run`, byte for byte."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from harness import files_of
from paths import ROOT

pytestmark = pytest.mark.slow
SCRIPT = str(ROOT / "pipeline/pretrain.py")
BIN = Path(sys.executable).parent
WORDS = ["recipe.yaml", "pretrain.steps=3", "pretrain.run.device=cpu"]


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def run_together(commands: list[list], folder: Path) -> None:
    """Start all commands at once and wait for them, as the machines of a launch do."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    processes = []
    for number, command in enumerate(commands):
        with open(folder / f"log-{number}", "w") as log:
            processes.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment))
    codes = [process.wait(300) for process in processes]
    logs = [(folder / f"log-{number}").read_text()[-3000:] for number in range(len(commands))]
    assert not any(codes), "\n".join(logs)


def torchrun(output: str, port: str) -> list[list]:
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    agent += ["--master-addr", "127.0.0.1", "--master-port", port]
    return [[*agent, "--node-rank", str(rank), SCRIPT, *WORDS, output] for rank in range(2)]


def accelerate(output: str, port: str) -> list[list]:
    agent = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"]
    agent += ["--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return [[*agent, "--machine_rank", str(rank), SCRIPT, *WORDS, output] for rank in range(2)]


def deepspeed(output: str, port: str) -> list[list]:
    return [[BIN / "deepspeed", "--num_gpus", "2", "--master_port", port, SCRIPT, *WORDS, output]]


def plain(output: str, port: str) -> list[list]:
    """What `ssh HOST` runs on each host, without any launcher."""
    shared = ["env", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]
    shared.append(f"MASTER_PORT={port}")
    return [[*shared, f"RANK={rank}", sys.executable, SCRIPT, *WORDS, output] for rank in range(2)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """(folder with the inputs, files of the model that `alma run` trains in two processes)."""
    folder = tmp_path_factory.mktemp("launchers")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    run_together([[BIN / "alma", "run", *WORDS, "pretrain.run.processes=2"]], folder)
    return folder, files_of(folder / "runs/tiny/pretrain/current")


@pytest.mark.parametrize("launcher", [torchrun, accelerate, deepspeed, plain])
def test_every_launcher_trains_the_same_weights(expected, launcher):
    folder, files = expected
    run_together(launcher(f"output={launcher.__name__}", free_port()), folder)
    assert files_of(folder / launcher.__name__ / "tiny/pretrain/current") == files
