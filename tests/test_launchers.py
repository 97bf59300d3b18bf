"""The commands of docs/launchers.md, with two machines played by two agents on this one: each launcher trains the same
weights as `alma run`, byte for byte. Manifests are also checked against the schemas that their makers publish."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import tiny
from harness import files_of
from paths import ROOT
from ruamel.yaml import YAML

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


def documented(*start: str) -> str:
    """The command of docs/launchers.md that begins with these words."""
    text = (ROOT / "docs/launchers.md").read_text(encoding="utf-8")
    blocks = [block.partition("\n")[2] for block in text.split("```")[1::2]]
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line for line in commands if line.split()[: len(start)] == list(start)]
    assert len(found) == 1, f"docs/launchers.md has {len(found)} commands {' '.join(start)}"
    return found[0]


def with_one_process(words: list[str], output: str, port: str, rank: int) -> list[str]:
    """The words after the launcher's name, for a machine with one process, which runs the tests' recipe."""
    values = {"--nproc-per-node": "1", "--num_processes": "2", "--node-rank": str(rank), "--machine_rank": str(rank)}
    changed: list[str] = []
    for word in words:
        before = changed[-1] if changed else ""
        changed.append(values.get(before, {"HOST": "127.0.0.1", "29500": port}.get(word, word)))
    assert changed[-2:] == ["pipeline/pretrain.py", "recipes/llama-7b.yaml"]
    return [*changed[:-2], SCRIPT, *WORDS, output]


def torchrun(output: str, port: str) -> list[list]:
    words = documented("torchrun").split()[1:]
    agent = [sys.executable, "-m", "torch.distributed.run"]
    return [[*agent, *with_one_process(words, output, port, rank)] for rank in range(2)]


def accelerate(output: str, port: str) -> list[list]:
    words = documented("accelerate", "launch").split()[2:]
    agent = [sys.executable, "-m", "accelerate.commands.launch"]
    return [[*agent, *with_one_process(words, output, port, rank)] for rank in range(2)]


def deepspeed(output: str, port: str) -> list[list]:
    words = documented("deepspeed", "--num_gpus", "8").replace("--num_gpus 8", "--num_gpus 2").split()[1:]
    return [[BIN / "deepspeed", "--master_port", port, *with_one_process(words, output, port, 0)]]


# In the place of programs that reach other machines: they run the command on this one.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do shift 2; done   # options have a value
host=$1; shift
echo "$host" >> "$(dirname "$0")/hosts"
[ "$*" = "hostname -I" ] && { echo 127.0.0.1; exit; }
exec bash -c "$*"
"""
PDSH = """#!/usr/bin/env python3
import pathlib, subprocess, sys
words = sys.argv[1:]
at = words.index("-w")
hosts, command = words[at + 1].split(","), " ".join(words[at + 2 :])
(pathlib.Path(__file__).parent / "hosts").open("a").write("".join(f"{host}\\n" for host in hosts))
started = [subprocess.Popen(["bash", "-c", command.replace("%n", str(rank))]) for rank in range(len(hosts))]
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture
def other_machines(tmp_path, monkeypatch) -> Path:
    """A file with the hosts that ssh and pdsh were asked to reach."""
    for name, text in (("ssh", SSH), ("pdsh", PDSH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{BIN}:{os.environ['PATH']}")
    return tmp_path / "hosts"


def plain(output: str, port: str) -> list[list]:
    """What `ssh HOST` runs on each host, without any launcher."""
    shared = ["env", "WORLD_SIZE=2", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]
    shared.append(f"MASTER_PORT={port}")
    return [[*shared, f"RANK={rank}", sys.executable, SCRIPT, *WORDS, output] for rank in range(2)]


JOBSET = YAML(typ="safe").load(ROOT / "launch/kubernetes/jobset.yaml")
SKYPILOT = YAML(typ="safe").load(ROOT / "launch/skypilot/pretrain.yaml")


def on_this_machine(words: list[str]) -> list[str]:
    """The command of a manifest, with one process instead of eight, on the CPU."""
    assert words[0] == "torchrun" and words[-1] == "recipe.yaml"
    words = ["--nproc-per-node=1" if word.startswith("--nproc-per-node=") else word for word in words]
    return [sys.executable, "-m", "torch.distributed.run", *words[1:-1], *WORDS]


def kubernetes(output: str, port: str) -> list[list]:
    """Both pods of the JobSet. The kubelet puts the container's variables in the place of $(NAME); the name of the
    first pod is that of JobSet's documentation, and is looked up here as 127.0.0.1."""
    pod = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    commands = []
    for index in range(2):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in pod["containers"][0]["command"]]
        words = [word.replace("$(JOBSET_NAME)", "alma-x7k2p") for word in words]
        assert "--master-addr=alma-x7k2p-node-0-0.alma" in words
        words = [word.replace("alma-x7k2p-node-0-0.alma", "127.0.0.1").replace("29500", port) for word in words]
        commands.append([*on_this_machine(words), output])
    return commands


def skypilot(output: str, port: str) -> list[list]:
    """What SkyPilot runs on each node, with the variables that it sets."""
    script = SKYPILOT["run"].replace("cd /work\n", "").replace("29500", port)
    script = script.replace("torchrun", f"{sys.executable} -m torch.distributed.run")
    script = script.replace("recipe.yaml", " ".join([*WORDS, output]))
    shared = ["env", "SKYPILOT_NUM_NODES=2", "SKYPILOT_NUM_GPUS_PER_NODE=1", "SKYPILOT_NODE_IPS=127.0.0.1\n127.0.0.1"]
    return [[*shared, f"SKYPILOT_NODE_RANK={rank}", "bash", "-euc", script] for rank in range(2)]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """(folder with the inputs, files of the model that `alma run` trains in two processes)."""
    folder = tmp_path_factory.mktemp("launchers")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    run_together([[BIN / "alma", "run", *WORDS, "pretrain.run.processes=2"]], folder)
    return folder, files_of(folder / "runs/tiny/pretrain/current")


@pytest.mark.parametrize("launcher", [torchrun, accelerate, deepspeed, plain, kubernetes, skypilot])
def test_every_launcher_trains_the_same_weights(expected, launcher):
    folder, files = expected
    run_together(launcher(f"output={launcher.__name__}", free_port()), folder)
    assert files_of(folder / launcher.__name__ / "tiny/pretrain/current") == files


def test_deepspeed_starts_processes_on_the_hosts_of_a_file(expected, other_machines):
    folder, files = expected
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    port = free_port()
    words = documented("deepspeed", "--hostfile").split()[1:]
    run_together(
        [[BIN / "deepspeed", "--master_port", port, *with_one_process(words, "output=hosts-runs", port, 0)]], folder
    )
    assert files_of(folder / "hosts-runs/tiny/pretrain/current") == files
    assert {"node1", "node2"} == set(other_machines.read_text().split())


def test_a_loop_over_ssh_starts_a_launcher_on_each_host(expected, other_machines):
    folder, files = expected
    text = (ROOT / "docs/launchers.md").read_text(encoding="utf-8")
    (loop,) = [block for block in text.split("```")[1::2] if "ssh " in block]
    for before, after in (
        (".venv/bin/torchrun", f"{sys.executable} -m torch.distributed.run"),
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ("--master-addr node1", "--master-addr 127.0.0.1"),
        ("29500", free_port()),
        ("pipeline/pretrain.py recipes/llama-7b.yaml", " ".join([SCRIPT, *WORDS, "output=ssh"])),
    ):
        assert before in loop, f"docs/launchers.md: the loop has no {before}"
        loop = loop.replace(before, after)
    run_together([["bash", "-uc", loop]], folder)
    assert files_of(folder / "ssh/tiny/pretrain/current") == files
    assert sorted(other_machines.read_text().split()) == ["node1", "node2"]


def test_the_jobset_is_one_as_kubernetes_and_jobset_publish_it():
    """Their models drop what they do not know, and refuse values of another type."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    assert JobsetV1alpha2JobSet.from_dict(JOBSET).to_dict() == JOBSET
    wrong = copy.deepcopy(JOBSET)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["completionsMode"] = "Indexed"
    assert JobsetV1alpha2JobSet.from_dict(wrong).to_dict() != wrong
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 2 and "--nnodes=2" in str(job)
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_the_task_of_skypilot_is_one_as_it_publishes_it():
    schema = json.loads((ROOT / "tests/schemas/skypilot-task.json").read_text())
    jsonschema.validate(SKYPILOT, schema)
    with pytest.raises(jsonschema.ValidationError, match="num_machines"):
        jsonschema.validate(SKYPILOT | {"num_machines": 2}, schema)
    with pytest.raises(jsonschema.ValidationError, match="accelerator"):
        jsonschema.validate(SKYPILOT | {"resources": {"accelerator": "H100:8"}}, schema)
