"""Engines for many machines: the same bytes as one process makes, and a sentence for what goes wrong. Slurm's
commands are played by small programs; Ray is real where it is installed."""

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from cleaned import published
from fake_array import SBATCH, write_programs
from harness import files_of, stage, succeed
from paths import ROOT
from word_corpus import words, write

from pipeline.core.errors import UserError
from pipeline.data.cleaning import slurm_executor


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    folder = tmp_path / "bin"
    write_programs(folder)
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
    assert "--array=0-1" in call and call.endswith("/worker.sbatch\n") and call.count("\n") == 1


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


@pytest.mark.slow
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
    script = ROOT / "pipeline/clean.py"
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


# ---- workers that are lost, and a Slurm that does not answer (correctness 36, 42) -----------------------------------


@pytest.fixture
def two(slurm, tmp_path, monkeypatch):
    """An array job of two workers."""
    monkeypatch.setenv("PATH", slurm["PATH"])
    monkeypatch.setattr(slurm_executor, "HEARTBEAT", 0.5)
    executor = slurm_executor.SlurmExecutor(2, tmp_path / "tasks")
    yield executor
    executor.shutdown()


def holders(executor) -> dict[int, str]:
    """Process -> the task that it has taken."""
    found = {}
    for path in (executor.folder / "taken").glob("*@*"):
        name, _, worker = path.name.partition("@")
        found[int((executor.folder / "workers" / worker).read_text().split()[1])] = name
    return found


def until(condition, seconds: float = 60) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_unit_whose_worker_was_killed_is_done_by_another(two, capfd):
    """correctness 36: the other worker idled and the stage waited for ever."""
    futures = [two.submit(time.sleep, 3) for _ in range(2)]
    until(lambda: len(holders(two)) == 2)
    os.kill(next(iter(holders(two))), signal.SIGKILL)
    concurrent.futures.wait(futures, timeout=60)
    assert [future.exception(0) for future in futures] == [None, None]
    assert "is lost: its process is gone" in capfd.readouterr().out
    assert two.submit(max, 1, 2).result(60) == 2


def test_a_unit_that_kills_its_workers_ends_the_stage(slurm, tmp_path, monkeypatch):
    """correctness 36: three workers and no more, or it would go round for ever."""
    monkeypatch.setenv("PATH", slurm["PATH"])
    monkeypatch.setattr(slurm_executor, "HEARTBEAT", 0.5)
    executor = slurm_executor.SlurmExecutor(4, tmp_path / "tasks")
    try:
        with pytest.raises(UserError, match="3 workers of the array job were lost with the same unit of work"):
            executor.submit(os.abort).result(90)
    finally:
        executor.shutdown()


def test_tasks_that_slurm_runs_no_more_are_taken_back(two, slurm, tmp_path):
    """correctness 36: on other machines, where a process cannot be seen; here the worker's file says another host."""
    future = two.submit(time.sleep, 2)
    until(lambda: holders(two))
    taken = next((two.folder / "taken").glob("*@*")).name.partition("@")[2]
    sign = two.folder / "workers" / taken
    process = int(sign.read_text().split()[1])
    sign.write_text(f"elsewhere {process} 1")
    number = taken.split("-")[1]
    (tmp_path / "bin/squeue").write_text(f"#!/bin/bash\necho 'task {1 - int(number)} RUNNING'\n")
    os.kill(process, signal.SIGKILL)
    assert future.result(60) is None and two.losses


def test_a_squeue_that_fails_is_no_end_and_one_that_says_so_is(two, tmp_path):
    """correctness 42: the controller was busy for a moment and the clean ended."""
    squeue = tmp_path / "bin/squeue"
    squeue.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n")
    first = two.submit(time.sleep, 3)
    assert first.result(60) is None
    until(lambda: not holders(two))
    squeue.write_text("#!/bin/bash\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    with pytest.raises(UserError, match="the array job 4711 has ended before its work was done"):
        two.submit(time.sleep, 30).result(60)


def test_the_array_job_ends_with_its_stage_however_that_ends(slurm, tmp_path, monkeypatch):
    """correctness 36: also one with tasks that are still in the queue, and one of a stage that was killed."""
    monkeypatch.setenv("PATH", slurm["PATH"])
    calls = tmp_path / "bin/cancelled"
    scancel = (tmp_path / "bin/scancel").read_text()
    scancel += (
        "import sys\n(pathlib.Path(__file__).parent / 'cancelled').open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
    )
    (tmp_path / "bin/scancel").write_text(scancel)
    executor = slurm_executor.SlurmExecutor(1, tmp_path / "tasks")
    assert executor.submit(max, 1, 2).result(60) == 2
    executor.shutdown()
    assert calls.read_text() == "4711\n"
    # a stage that is killed: its array job is cancelled at once, and its folder is removed by the next one
    program = "import sys; from pathlib import Path; from pipeline.data.cleaning.slurm_executor import SlurmExecutor; import time\n"
    program += "SlurmExecutor(1, Path(sys.argv[1])); print('up', flush=True); time.sleep(60)"
    killed = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "tasks"], stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT
    )
    assert killed.stdout.readline() == b"up\n"
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    until(lambda: calls.read_text().count("4711") >= 3)  # the second: it ended what was left of the first
    left = next((tmp_path / "tasks").iterdir())
    after = slurm_executor.SlurmExecutor(1, tmp_path / "tasks")
    assert calls.read_text().count("4711") == 4 and not left.exists()
    after.shutdown()
