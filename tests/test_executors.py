"""Engines for many machines: the same bytes as one process makes, and a sentence for what goes wrong. Slurm's
commands are played by small programs; Ray is real where it is installed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from harness import files_of, stage, succeed
from test_clean import published
from test_dedup import words, write

# sbatch starts the script for each task of the array and says a number; squeue lists the job while one of them lives.
SBATCH = """#!/usr/bin/env python3
import pathlib, subprocess, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
options = [word for word in words if word.startswith("--")]
script = words[len(options):]
tasks = int(next(word for word in options if word.startswith("--array=0-")).removeprefix("--array=0-")) + 1
output = next(word for word in options if word.startswith("--output=")).removeprefix("--output=")
(here / "calls").open("a").write(" ".join(words) + "\\n")
for task in range(tasks):
    with open(output.replace("%a", str(task)), "w") as log:
        process = subprocess.Popen(["bash", *script], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    (here / "pids").open("a").write(f"{process.pid}\\n")
print("4711;cluster")
"""
SQUEUE = """#!/usr/bin/env python3
import pathlib
for pid in (pathlib.Path(__file__).parent / "pids").read_text().split():
    path = pathlib.Path("/proc") / pid / "stat"
    if path.exists() and path.read_text().rpartition(")")[2].split()[0] != "Z":
        print("4711 running")
"""
SCANCEL = """#!/usr/bin/env python3
import os, pathlib, signal
for pid in (pathlib.Path(__file__).parent / "pids").read_text().split():
    try:
        os.kill(int(pid), signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    yield {"PATH": f"{folder}:{os.environ['PATH']}"}
    if (folder / "pids").exists():
        subprocess.run([sys.executable, folder / "scancel"], check=True)


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict]]:
    rng = random.Random(2)
    shared = words(rng, 60)
    return {
        name: [{"text": " ".join(words(rng, 150) + (shared if i % 3 == 0 else []))} for i in range(60)] for name in "ab"
    }


BLOCK = {"dedup": {"runs": 50}, "unit_bytes": 9_000}


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("one")
    succeed("clean", write(folder, corpus, **BLOCK), cwd=folder)
    return files_of(published(folder))


def test_an_array_job_makes_the_same_bytes(corpus, one, slurm, tmp_path):
    path = write(tmp_path / "run", corpus, **BLOCK, executor="slurm", workers=2)
    succeed("clean", path, cwd=path.parent, env=slurm)
    assert files_of(published(path.parent)) == one
    call = (tmp_path / "bin/calls").read_text()
    assert "--array=0-1" in call and "launch/slurm/units.sbatch" in call and call.count("\n") == 1


def test_a_killed_stage_with_an_array_job_goes_on(corpus, one, slurm, tmp_path):
    path = write(tmp_path / "run", corpus, **BLOCK, executor="slurm", workers=1)
    assert stage("clean", path, cwd=path.parent, env=slurm, fault="work:3")[0] == -9
    assert len(list(path.parent.glob("runs/t/clean/*/work/units-*/*/*.parquet"))) >= 3
    # a worker ends by itself after two silent minutes
    subprocess.run([sys.executable, tmp_path / "bin/scancel"], check=True)
    succeed("clean", path, "clean.workers=2", cwd=path.parent, env=slurm)
    assert files_of(published(path.parent)) == one


def test_mistakes_and_an_array_job_that_dies_are_sentences(corpus, slurm, tmp_path):
    path = write(tmp_path / "run", corpus, **BLOCK, executor="slurm", workers=2)
    code, text = stage("clean", path, cwd=path.parent, env={"PATH": "/nowhere"})
    assert code == 2 and "executor: slurm needs sbatch" in text
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text("#!/bin/bash\necho 'Invalid account' >&2\nexit 1\n")
    code, text = stage("clean", path, cwd=path.parent, env=slurm)
    assert code == 2 and "sbatch refused the array job: Invalid account" in text
    sbatch.write_text(SBATCH.replace('["bash", *script]', '["false"]'))
    code, text = stage("clean", path, cwd=path.parent, env=slurm)
    assert code == 2 and "the array job 4711 has ended before its work was done" in text


def test_what_a_worker_of_an_array_job_meets_is_the_stages(slurm, tmp_path, corpus):
    """A source with too many bad records ends the stage as it does with local processes; nothing of it hangs."""
    path = write(tmp_path / "run", corpus, **BLOCK, executor="slurm", workers=1)
    with open(path.parent / "a.jsonl", "a") as handle:
        handle.write("{broken\n" * 30)
    code, text = stage("clean", path, cwd=path.parent, env=slurm)
    assert code == 2 and "more than max_bad" in text


def test_ray_makes_the_same_bytes(corpus, one, tmp_path):
    pytest.importorskip("ray")
    path = write(tmp_path, corpus, **BLOCK, executor="ray", workers=2)
    # a process of its own: Ray changes much in the one that it is in
    script = Path(__file__).parents[1] / "pipeline/clean.py"
    answer = subprocess.run([sys.executable, script, path], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert files_of(published(tmp_path)) == one


def test_ray_that_is_not_installed_is_a_sentence(corpus, tmp_path):
    if json.loads(
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import importlib.util, json; print(json.dumps(importlib.util.find_spec('ray') is not None))",
            ],
            capture_output=True,
            text=True,
        ).stdout
    ):
        pytest.skip("Ray is installed")
    code, text = stage("clean", write(tmp_path, corpus, executor="ray"), cwd=tmp_path)
    assert code == 2 and "pip install 'alma[ray]'" in text
