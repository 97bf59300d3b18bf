"""`alma run RECIPE --on slurm` on a real Slurm of four nodes on this machine (tests/helpers/real_slurm.py): a chain, and
what becomes of a run when something fails. `make test-cluster` runs this file and fails where no Slurm can be started;
elsewhere it is skipped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from harness import files_of
from real_slurm import RealSlurm, reason_to_skip, wait_for

REASON = reason_to_skip()
if REASON and os.environ.get("ALMA_TEST_CLUSTER"):
    raise RuntimeError(f"make test-cluster: {REASON}")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=f"no Slurm: {REASON}")]

BIN = Path(sys.executable).parent
SECONDS = 900  # for a job with all its starts; a start costs a busy machine of two cores up to a minute
STEPS = 300
TRAINING = (
    tiny.RECIPE.replace("steps: 6", f"steps: {STEPS}")
    .replace("every_steps: 2, keep: 2", "every_steps: 10, keep: 2")
    .replace("log: {every_steps: 1}", "log: {every_steps: 20}")
    + """
    run: {device: cpu, nodes: NODES, processes: 1, threads: 1}
    resources: {cpus: 1, preflight: false, environment: {PYTHONPATH: FOLDER}}
    watch: {hang: 120, lost: 20}
"""
)
# In every process of a job: an error of a GPU in rank 1, at its seventh step, in the first start.
ERROR_OF_A_GPU = """
import os
if os.environ.get("SLURM_PROCID") == "1" and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    os.environ["ALMA_FAULT"] = "work:7:device"
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with RealSlurm(tmp_path_factory.mktemp("slurm"), nodes=4) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def whole(slurm):
    """Every test begins with an empty queue, and with all nodes."""
    slurm.cancel_all()
    slurm.resume_nodes()
    yield


def alma(slurm: RealSlurm, folder: Path, *words: str, code: int = 0) -> str:
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [BIN / "alma", *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert answer.returncode == code, answer.stdout + answer.stderr
    return answer.stdout + answer.stderr


def logs_of(folder: Path) -> str:
    return "\n".join(f"==> {path.name}\n{path.read_text()}" for path in sorted(folder.glob("runs/*/jobs/*.log")))


def numbers(folder: Path, run: str) -> dict[str, str]:
    record = json.loads((folder / "runs" / run / "jobs/jobs.json").read_text())
    return {stage: entry["job"] for stage, entry in record.items()}


class Training:
    """A job that pretrains on `nodes` nodes, one process on each."""

    def __init__(self, slurm: RealSlurm, inputs: Path, folder: Path, nodes: int = 2):
        self.slurm, self.folder, self.stage = slurm, folder, folder / "runs/tiny/pretrain"
        for name in ("tokens", "tokenizer"):
            (folder / name).symlink_to((inputs / name).resolve())
        (folder / "r.yaml").write_text(TRAINING.replace("NODES", str(nodes)).replace("FOLDER", str(folder)))

    def submit(self) -> None:
        alma(self.slurm, self.folder, "run", "r.yaml", "--on", "slurm")
        self.job = numbers(self.folder, "tiny")["pretrain"]

    def beats(self) -> dict[int, dict]:
        """Rank -> its newest heartbeat."""
        found = {}
        for path in self.stage.glob("*.partial/logs/heartbeat/rank-*.json"):
            beat = json.loads(path.read_text())
            found[beat["rank"]] = beat
        return found

    def saved(self) -> int:
        steps = [int(path.name.removeprefix("step-")) for path in self.stage.glob("*.partial/checkpoints/step-*")]
        return max(steps, default=0)

    def wait_for_progress(self, start: int = 0) -> None:
        """Wait until this start of the job (counted from 0) has saved something."""
        before = self.saved()

        def is_going_on() -> bool:
            state = self.slurm.job(self.job)
            assert state["JobState"] not in ("COMPLETED", "FAILED", "CANCELLED"), logs_of(self.folder)
            beats = self.beats().values()
            launches = {beat["launch"] for beat in beats if beat["patience"] == "hang" and beat["ending"] is None}
            return f"{self.job}.{start}.0" in launches and self.saved() > before

        wait_for(is_going_on, SECONDS, f"progress in start {start}")

    def finish(self, restarts: int) -> dict[str, bytes]:
        """Files of the model, after the job has ended in its start number `restarts` (from 0)."""
        state = self.slurm.wait_for_job(self.job, SECONDS)
        assert state == "COMPLETED", logs_of(self.folder)
        assert self.slurm.job(self.job)["Restarts"] == str(restarts), logs_of(self.folder)
        return files_of(self.stage / "current")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def quiet(inputs, tmp_path_factory):
    """Nodes -> files of the model that as many processes train on this machine, when nothing happens to them."""
    models = {}

    def model(nodes: int) -> dict[str, bytes]:
        if nodes not in models:
            folder = tmp_path_factory.mktemp("quiet")
            for name in ("tokens", "tokenizer"):
                (folder / name).symlink_to((inputs / name).resolve())
            (folder / "r.yaml").write_text(TRAINING.replace("NODES", "1").replace("FOLDER", str(folder)))
            words = [BIN / "alma", "run", "r.yaml", f"pretrain.run.processes={nodes}"]
            answer = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
            assert answer.returncode == 0, answer.stdout + answer.stderr
            models[nodes] = files_of(folder / "runs/tiny/pretrain/current")
        return models[nodes]

    return model


@pytest.fixture
def training(slurm, inputs, tmp_path):
    return Training(slurm, inputs, tmp_path)


# ---- a chain ---------------------------------------------------------------------------------------------------------

CHAIN = """
name: chain
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
resources: {cpus: 1}
stages:
  clean: {sources: {a: {path: a.txt, sample_by: line}}, holdout: 0.2, resources: {cpus: 2, memory: 1G}}
  tokenizer: {vocab_size: 320, algorithm: byte-bpe}
  pack: {resources: {exclusive: true}}
  pretrain:
    steps: 4
    batch_size: 8
    sequence_length: 32
    run: {nodes: 2, processes: 1, device: cpu}
    resources: {time: 20m, partition: cpu}
  export: {}
"""


def sentences(draw: random.Random, count: int) -> list[str]:
    """Texts that the filters keep."""
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 7))) for _ in range(60 * count)]
    return [" ".join(words[start : start + 60]) for start in range(0, len(words), 60)]


def write_chain(folder: Path) -> None:
    (folder / "a.txt").write_text("".join(f"{row}\n" for row in sentences(random.Random(3), 150)))
    (folder / "r.yaml").write_text(CHAIN)


def test_a_chain_of_jobs_with_different_resources(slurm, tmp_path):
    """In a folder whose name has a space, Chinese, and what sbatch replaces in the names of logs."""
    tmp_path = tmp_path / "my 运行 50%j"
    tmp_path.mkdir()
    write_chain(tmp_path)
    alma(slurm, tmp_path, "run", "r.yaml", "--on", "slurm")
    jobs = numbers(tmp_path, "chain")
    second = alma(slurm, tmp_path, "run", "r.yaml", "--on", "slurm", code=2)
    # clean may have ended on a busy machine before the second command had looked
    assert "jobs of this run are queued or running: " in second and f"export (job {jobs['export']}" in second
    assert numbers(tmp_path, "chain") == jobs
    assert slurm.wait_for_job(jobs["export"], SECONDS) == "COMPLETED", logs_of(tmp_path)
    assert (tmp_path / "runs/chain/export/current/model.safetensors").is_file()
    shown = {stage: slurm.job(job) for stage, job in jobs.items()}
    assert {stage: job["NumNodes"] for stage, job in shown.items()} == {
        "clean": "1", "tokenizer": "1", "pack": "1", "pretrain": "2", "export": "1"
    }  # fmt: skip
    assert {stage: job["NumCPUs"] for stage, job in shown.items()} == {
        "clean": "2", "tokenizer": "1", "pack": "4", "pretrain": "2", "export": "1"
    }  # fmt: skip
    assert shown["pretrain"]["Partition"] == "cpu" and shown["pretrain"]["TimeLimit"] == "00:20:00"
    assert "logits differ by" in (tmp_path / f"runs/chain/jobs/export-{jobs['export']}-rank-0.log").read_text()
    states = json.loads(alma(slurm, tmp_path, "status", "r.yaml", "--json"))
    assert {(state["state"], state["job"]["state"]) for state in states.values()} == {("up to date", "COMPLETED")}
    assert "everything is up to date; nothing was submitted" in alma(slurm, tmp_path, "run", "r.yaml", "--on", "slurm")


def test_a_stage_that_fails_cancels_those_that_need_it(slurm, tmp_path):
    write_chain(tmp_path)
    (tmp_path / "a.txt").write_text("too short\n" * 100)
    alma(slurm, tmp_path, "run", "r.yaml", "--on", "slurm")
    jobs = numbers(tmp_path, "chain")
    assert slurm.wait_for_job(jobs["clean"], SECONDS) == "FAILED", logs_of(tmp_path)
    assert slurm.wait_for_job(jobs["export"], SECONDS) == "CANCELLED"
    assert slurm.job(jobs["clean"])["Restarts"] == "0"  # a mistake of the user
    states = json.loads(alma(slurm, tmp_path, "status", "r.yaml", "--json"))
    reasons = {stage: state["job"]["reason"] for stage, state in states.items()}
    assert "nothing is left of its 100 records" in reasons.pop("clean")
    assert reasons["tokenizer"] == f"clean did not succeed (job {jobs['clean']})"
    assert reasons["export"] == f"pretrain did not succeed (job {jobs['pretrain']})"


def test_what_the_cluster_does_not_have_is_refused_before_anything_is_queued(slurm, tmp_path):
    write_chain(tmp_path)
    for word, text in (
        ("pretrain.resources.partition=none", "this cluster has no partition none; it has main, cpu"),
        ("pretrain.run.nodes=8", "run.nodes: 8 are more than partition cpu has for this stage, 4"),
        ("pretrain.run={nodes: 1, processes: 4, device: cuda}", "4 GPUs per node are needed, and a node of partition"),
    ):
        assert text in alma(slurm, tmp_path, "run", "r.yaml", word, "--on", "slurm", code=2)
    assert slurm.run("squeue", "--noheader", "--name=chain.clean") == ""


# ---- failures: the weights are those of a run that nothing happened to -----------------------------------------------


def test_a_stop_before_the_time_limit(slurm, training, quiet):
    training.submit()
    training.wait_for_progress()
    slurm.run("scancel", "--batch", "--signal=USR1", training.job)
    assert training.finish(restarts=1) == quiet(2)
    assert "SIGUSR1" in logs_of(training.folder)


def test_a_node_that_is_set_down(slurm, training, quiet):
    training.submit()
    training.wait_for_progress()
    slurm.set_down(training.beats()[1]["host"])
    assert training.finish(restarts=1) == quiet(2)


def test_a_node_that_is_lost_with_the_lock(slurm, training, quiet):
    """Rank 0 has the lock. Nobody on its node can say anything any more, and the job starts again on other nodes."""
    training.submit()
    training.wait_for_progress()
    node = training.beats()[0]["host"]
    assert json.loads((training.stage / "lock.json").read_text())["host"] == node
    slurm.lose_node(node)
    assert training.finish(restarts=1) == quiet(2)
    assert node not in slurm.hosts(slurm.job(training.job)["NodeList"])


def test_each_process_is_killed_in_turn(slurm, inputs, quiet, tmp_path):
    training = Training(slurm, inputs, tmp_path, nodes=4)
    training.submit()
    for rank in range(4):
        training.wait_for_progress(start=rank)
        beat = training.beats()[rank]
        os.kill(beat["pid"], signal.SIGKILL)
        said = f"rank {rank} ({beat['host']}, process {beat['pid']}) was killed"
        wait_for(lambda said=said: said in logs_of(tmp_path), 60, said)
    assert training.finish(restarts=4) == quiet(4)


def test_a_process_that_is_suspended(training, quiet):
    recipe = training.folder / "r.yaml"
    recipe.write_text(recipe.read_text().replace("hang: 120", "hang: 15"))  # more than a step of a busy machine takes
    training.submit()
    training.wait_for_progress()
    os.kill(training.beats()[1]["pid"], signal.SIGSTOP)
    assert training.finish(restarts=1) == quiet(2)
    assert "rank 1" in logs_of(training.folder) and "has been in phase" in logs_of(training.folder)


def test_an_error_of_a_gpu(slurm, training, quiet):
    """With `exclude_failed` the next start is on other nodes."""
    (training.folder / "sitecustomize.py").write_text(ERROR_OF_A_GPU)
    recipe = training.folder / "r.yaml"
    recipe.write_text(recipe.read_text().replace("preflight: false", "preflight: false, exclude_failed: true"))
    training.submit()
    assert training.finish(restarts=1) == quiet(2)
    text = logs_of(training.folder)
    (bad,) = set(re.findall(r"rank 1 \((n\d)\) failed: .*uncorrectable ECC error", text))
    assert f"the next start avoids {bad}" in text
    job = slurm.job(training.job)
    assert job["ExcNodeList"] == bad and bad not in slurm.hosts(job["NodeList"])


# ---- cleaning on many machines ---------------------------------------------------------------------------------------


def test_an_array_of_workers_of_which_one_is_killed(slurm, tmp_path):
    """The stage runs here and its workers are tasks of an array job; one is killed while it has a unit of work."""
    rows = sentences(random.Random(4), 2000)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    recipe = "name: RUN\nstages:\n  clean: {sources: {a: {path: a.jsonl}}, holdout: 0.1, unit_bytes: 9000, MORE}\n"
    (tmp_path / "one.yaml").write_text(recipe.replace("RUN", "one").replace("MORE", "workers: 1"))
    (tmp_path / "many.yaml").write_text(recipe.replace("RUN", "many").replace("MORE", "workers: 2, executor: slurm"))
    alma(slurm, tmp_path, "run", "one.yaml")
    environment = {**os.environ, **slurm.environment, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        stage = subprocess.Popen(
            [BIN / "alma", "run", "many.yaml"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        _kill_a_worker(tmp_path / "runs/many/clean")
        assert stage.wait(SECONDS) == 0, (tmp_path / "log").read_text()
    finally:
        stage.kill()
        stage.wait()
    text = (tmp_path / "log").read_text()
    assert "of the array job is lost" in text, text
    assert files_of(tmp_path / "runs/many/clean/current") == files_of(tmp_path / "runs/one/clean/current")
    wait_for(lambda: not slurm.run("squeue", "--noheader"), 30, "the end of the array job")


def _kill_a_worker(folder: Path) -> None:
    """SIGKILL for a worker that has a unit."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        for taken in folder.glob("*.partial/work/tasks/*/taken/*@*"):
            worker = taken.parents[1] / "workers" / taken.name.partition("@")[2]
            os.kill(int(worker.read_text().split()[1]), signal.SIGKILL)
            return
        time.sleep(0.01)
    raise AssertionError("no worker took a unit")
