"""The look at the nodes of a job: what each node notes, and which node is named."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster import preflight

# One node; the clock of the second one may be wrong.
NODE = """
import sys, time
real, skew = time.time, float(sys.argv.pop())
time.time = lambda: real() + skew
from pipeline.cluster.preflight import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def notes(tmp_path) -> Path:
    (tmp_path / "notes").mkdir()
    (tmp_path / "run").mkdir()
    return tmp_path / "notes"


def look(notes: Path, skews: list[float], run_folders: list[Path], gpus: int = 0) -> list[int]:
    """Exit codes of one process per node."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for rank, skew in enumerate(skews):
        words = [sys.executable, "-c", NODE, notes, run_folders[rank], str(gpus), str(skew)]
        environment = {"SLURM_PROCID": rank, "SLURM_NTASKS": len(skews), "SLURMD_NODENAME": f"n{rank + 1}"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        own = {**os.environ, **{name: str(value) for name, value in environment.items()}}
        processes.append(subprocess.Popen(words, env=own))
    return [process.wait(120) for process in processes]


def test_one_node_that_is_fit(notes, tmp_path):
    assert look(notes, [0], [tmp_path / "run"]) == [0]
    assert preflight.problems(notes, ["n1"]) == {}
    assert list((tmp_path / "run").iterdir()) == []


def test_a_node_without_its_gpus_is_named(notes, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert look(notes, [0], [tmp_path / "run"], gpus=2) == [1]
    (problem,) = preflight.problems(notes, ["n1"]).values()
    assert problem == "its GPUs: torch sees 0 of 2 GPUs (CUDA_VISIBLE_DEVICES=)"


@pytest.mark.slow
def test_nodes_whose_clocks_agree_are_fit_and_the_one_with_another_clock_is_named(notes, tmp_path):
    folders = [tmp_path / "run"] * 3
    assert look(notes, [0, 0, 1], folders) == [0, 0, 0]
    assert preflight.problems(notes, ["n1", "n2", "n3"]) == {}
    assert look(notes, [0, -90, 0], folders) == [0, 1, 0]
    problems = preflight.problems(notes, ["n1", "n2", "n3"])
    assert problems == {"n2": "the meeting of all nodes: its clock differs from that of the others by -90 s"}


def write(notes: Path, rank: int, at: str, problem: str | None = None) -> None:
    (notes / f"{rank}.json").write_text(json.dumps({"node": f"n{rank + 1}", "at": at, "problem": problem}))


def test_a_node_that_cannot_write_the_run_folder_is_the_one_that_is_named(notes):
    """The others wait for it in vain, which is not their fault."""
    write(notes, 0, "the meeting of all nodes", "Timed out after 61 seconds waiting for clients. 2/3 clients joined.")
    write(notes, 1, "the run folder", "[Errno 30] Read-only file system")
    write(notes, 2, "the meeting of all nodes")
    assert list(preflight.problems(notes, ["n1", "n2", "n3"])) == ["n2"]


def test_a_node_that_hangs_is_known_by_what_it_did_not_write(notes):
    write(notes, 0, "the meeting of all nodes")
    write(notes, 1, "its GPUs")
    named = preflight.problems(notes, ["n1", "n2", "n3"])
    assert named["n2"] == "its GPUs: no answer" and "did not start" in named["n3"] and "n1" not in named


def test_nodes_that_only_could_not_meet_are_all_named(notes):
    write(notes, 0, "the meeting of all nodes")
    write(notes, 1, "the meeting of all nodes", "Connection refused")
    assert list(preflight.problems(notes, ["n1", "n2"])) == ["n1", "n2"]


def test_a_run_folder_that_does_not_keep_what_is_written_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_bytes", lambda path: b"other")
    with pytest.raises(preflight.Problem, match="gives back other bytes"):
        preflight.check_folder(tmp_path)
