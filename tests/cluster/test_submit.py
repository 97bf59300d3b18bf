"""`alma run RECIPE --on slurm`: what is queued, with which words, and what is refused before. Slurm's commands are
played by programs that check their words (tests/helpers/fake_slurm.py)."""

import json
import random
import subprocess
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from paths import ROOT

from pipeline import cli
from pipeline.cluster import shared_storage, slurm
from pipeline.core.errors import UserError
from pipeline.core.recipe import load, resolved

RECIPE = """
name: small
resources: {partition: main, account: lab}
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {a: {path: a.txt, sample_by: line}}, holdout: 0.1, resources: {cpus: 4, memory: 2G}}
  tokenizer: {vocab_size: 320, algorithm: byte-bpe, resources: {cpus: 1}}
  pack: {}
  pretrain:
    steps: 2
    batch_size: 48
    sequence_length: 64
    run: {nodes: 2, processes: 2, device: cpu}
    resources: {cpus: 2, time: 90m, qos: long, constraint: "ib&fast", exclude: n9, sbatch: [--reservation=course],
                modules: [gcc/13], environment: {GLOO_SOCKET_IFNAME: "lo 0"}}
  export: {resources: {exclusive: true, cpus: 1, memory: 1G}}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    (tmp_path / "a.txt").write_text(
        "".join(f"row {i} of some text that is long enough to be kept\n" for i in range(99))
    )
    (tmp_path / "r.yaml").write_text(RECIPE)
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def alma(*words: str) -> None:
    cli.app(["run", "r.yaml", *words, "--on", "slurm"], standalone_mode=False)


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        alma(*words)
    return str(caught.value)


def options(path: Path) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in path.read_text().splitlines() if line.startswith("#SBATCH")]


def test_each_stage_is_a_job_with_what_it_needs_after_those_that_it_needs(fake, tmp_path, capsys):
    alma()
    jobs = tmp_path / "runs/small/jobs"
    submitted = [line for line in fake.calls("sbatch") if "--test-only" not in line]
    assert submitted == [
        f"sbatch --parsable {'runs/small/jobs/clean.sbatch'}",
        "sbatch --parsable --dependency=afterok:101 --kill-on-invalid-dep=yes runs/small/jobs/tokenizer.sbatch",
        "sbatch --parsable --dependency=afterok:101:102 --kill-on-invalid-dep=yes runs/small/jobs/pack.sbatch",
        "sbatch --parsable --dependency=afterok:103:102 --kill-on-invalid-dep=yes runs/small/jobs/pretrain.sbatch",
        "sbatch --parsable --dependency=afterok:104 --kill-on-invalid-dep=yes runs/small/jobs/export.sbatch",
    ]
    # every job was tried before the first one was queued
    assert ["--test-only" in line for line in fake.calls("sbatch")] == [True] * 5 + [False] * 5
    assert options(jobs / "pretrain.sbatch")[:10] == [
        "--nodes=2",
        "--ntasks-per-node=2",
        "--cpus-per-task=2",
        "--time=90",
        "--partition=main",
        "--account=lab",
        "--qos=long",
        "--constraint=ib&fast",
        "--exclude=n9",
        "--reservation=course",
    ]
    text = (jobs / "pretrain.sbatch").read_text()
    assert "module load gcc/13\n" in text and "export GLOO_SOCKET_IFNAME='lo 0'\n" in text
    assert options(jobs / "clean.sbatch")[:4] == ["--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=4", "--mem=2G"]
    assert options(jobs / "pack.sbatch")[2:4] == ["--exclusive", "--mem=0"]  # no cores were given: all of the node's
    assert options(jobs / "export.sbatch")[2:5] == ["--cpus-per-task=1", "--exclusive", "--mem=1G"]
    for path in (*jobs.glob("*.sbatch"), jobs / "submit.sh"):
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        assert {"--requeue", "--signal=B:USR1@120"} <= set(options(path)) or path.suffix == ".sh"
    assert load(jobs / "recipe.yaml").stages == load("r.yaml").stages
    assert {stage: entry["job"] for stage, entry in json.loads((jobs / "jobs.json").read_text()).items()} == {
        "clean": "101", "tokenizer": "102", "pack": "103", "pretrain": "104", "export": "105"
    }  # fmt: skip
    assert "pretrain     job 104 after pack, tokenizer" in capsys.readouterr().out
    # the script for submitting by hand queues the same
    answer = subprocess.run(["bash", jobs / "submit.sh"], capture_output=True, text=True, env={"PATH": fake.path})
    assert answer.returncode == 0, answer.stderr
    assert fake.calls("sbatch")[-2:] == [
        "sbatch --parsable --dependency=afterok:108:107 --kill-on-invalid-dep=yes pretrain.sbatch",
        "sbatch --parsable --dependency=afterok:109 --kill-on-invalid-dep=yes export.sbatch",
    ]


def test_a_dry_run_prints_the_files_and_needs_neither_slurm_nor_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    cli.app(["run", str(ROOT / "recipes/llama-7b.yaml"), "--on", "slurm", "--dry-run"], standalone_mode=False)
    shown = capsys.readouterr()
    assert "#SBATCH --nodes=4\n#SBATCH --ntasks-per-node=8\n#SBATCH --gpus-per-node=8\n" in shown.out
    assert shown.out.count("#SBATCH --job-name=") == 10 and "10 jobs; nothing was written" in shown.err
    assert "clean: missing (sources.books_zh: no file matches" in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_where_slurm_does_not_answer_says_so_and_prints_the_files(fake, capsys):
    """The commands are installed and no controller is there: a login node in maintenance. A submission is refused."""
    fake.write("sinfo.fails", "Unable to contact slurm controller (connect failure)")
    alma("--dry-run")
    shown = capsys.readouterr()
    assert "# resources were not compared with the cluster: " in shown.err and "Unable to contact" in shown.err
    assert shown.out.count("#SBATCH --job-name=") == 5
    assert "Unable to contact slurm controller" in refusal()
    assert not fake.calls("sbatch")


def test_a_second_submission_is_refused_while_jobs_live(fake, tmp_path):
    alma("tokenizer")
    assert len([line for line in fake.calls("sbatch") if "--test-only" not in line]) == 2
    fake.write("squeue.txt", "101|RUNNING|None\n102|PENDING|Dependency\n")
    text = refusal()
    assert "jobs of this run are queued or running: clean (job 101, RUNNING), tokenizer (job 102, PENDING (Dep" in text
    fake.write("squeue.fails", "Unable to contact slurm controller")
    assert "squeue does not answer" in refusal()
    (fake.folder / "squeue.fails").unlink()
    fake.write("squeue.txt", "101|FAILED|NonZeroExitCode\n102|CANCELLED|DependencyNeverSatisfied\n")
    alma("tokenizer")


def test_two_submissions_at_once_do_not_mix(fake, tmp_path):
    from pipeline.core.lock import Lock

    lock = Lock(tmp_path / "runs/small/jobs")
    lock.acquire()
    try:
        assert "another run is writing here" in refusal()
        assert not [line for line in fake.calls("sbatch") if "--test-only" not in line]
    finally:
        lock.release()


@pytest.mark.parametrize(
    "words, said",
    [
        (["pretrain.resources.partition=gpus"], "this cluster has no partition gpus; it has main, cpu, down"),
        (["pretrain.run.nodes=3"], "run.nodes: 3 are more than partition main has for this stage, 2"),
        (["pretrain.resources.cpus=3"], "resources.cpus: 3 for each of 2 processes are 6 per node, and a node of"),
        (["clean.resources.memory=9G"], "resources.memory: 9G is more than a node of partition main has, 8192M"),
        (["pretrain.run.time=3h", "pretrain.resources.time=3h"], "run.time: 3h is more than the limit of partition"),
        (["pretrain.run.device=auto", "pretrain.run.processes=8"], "8 GPUs per node are needed, and a node of"),
        (
            ["pretrain.run.device=auto", "pretrain.resources.gpu_type=h100"],
            "2 GPUs per node are needed, and a node of partition main has at most 0 of type h100",
        ),
        (
            ["pretrain.run.device=auto", "pretrain.resources.partition=cpu"],
            "resources.gpus: 2 per node are needed, but partition cpu has no GPUs; give another partition",
        ),
        (["pack.resources.partition=down"], "resources.partition: partition down is down"),
        (["resources.partition=~"], "this cluster has no default partition; give one of main, cpu, down"),
        (["resources.nodes=2"], "resources: nodes differs between stages"),
        (["pretrain.resources.nodes=3"], "resources.nodes is 3 and run.nodes is 2: give one of the two"),
        (["pretrain.resources.gpus=2"], "resources.gpus: 2 would be idle with run.device: cpu"),
        (["pretrain.run.device=cuda", "pretrain.resources.gpus=0"], "resources.gpus: 0 leaves no GPU for run.device"),
        (["pretrain.resources.gpu_type=h100"], "resources.gpu_type: h100 has no effect without GPUs"),
        (["pretrain.resources.mounts=[/data]"], "resources.mounts: are folders that a container sees"),
        (
            ["pretrain.resources={container: a.sif, mounts: ['/data:/data']}"],
            "stages.pretrain.resources.container: /data:/data has a comma or a colon, where Apptainer and pyxis take",
        ),
        (["clean.sources.a.path=b.txt"], "sources.a: b.txt does not exist"),
        (["sft"], "no stage is called 'sft'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_queued(fake, words, said):
    fake.write(
        "sinfo.txt",
        "main|up|2:00:00|4|8192|gpu:fake:4(S:0-1)|2\ncpu|up|infinite|4+|8192|(null)|4\ndown|inact|infinite|4|8192|(null)|4\n",
    )
    assert said in refusal(*words)
    assert not fake.calls("sbatch")


def test_without_slurm_and_with_wrong_words_it_is_one_sentence(fake, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="give one of the two"):
        alma("--restart", "--fork")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "no Slurm here: sinfo is not on the PATH" in refusal()


def last_line(folder: Path, stage: str) -> str:
    return (folder / f"runs/small/jobs/{stage}.sbatch").read_text().splitlines()[-1]


def test_restart_and_fork_are_given_to_the_stages_that_would_get_them_without_a_cluster(fake, tmp_path):
    alma("--restart", "tokenizer")
    assert last_line(tmp_path, "clean").endswith(' "$recipe" clean')
    assert last_line(tmp_path, "tokenizer").endswith(' "$recipe" tokenizer --restart')
    fake.write("squeue.txt", "")
    alma("--restart")
    assert last_line(tmp_path, "clean").endswith(' "$recipe" clean --restart')
    alma("--fork")
    assert last_line(tmp_path, "pretrain").endswith(' "$recipe" pretrain --fork')
    assert last_line(tmp_path, "clean").endswith(' "$recipe" clean')


def run_here(stage: str) -> None:
    """Make a stage and what it needs, of texts that the filters keep."""
    draw = random.Random(3)
    rows = [" ".join("".join(draw.choices("etaoinsh", k=draw.randint(2, 7))) for _ in range(40)) for _ in range(60)]
    Path("a.txt").write_text("".join(f"{row}\n" for row in rows))
    cli.app(["run", "r.yaml", stage], standalone_mode=False)


@pytest.mark.slow
def test_a_named_stage_is_run_again_with_what_needs_it(fake, tmp_path, capsys):
    """Stages below it may be out of date after it; those that are up to date and not below it are not queued."""
    run_here("tokenizer")
    alma("tokenizer")
    assert "everything is up to date; nothing was submitted" in capsys.readouterr().out
    alma("--restart", "clean", "tokenizer", "--dry-run")
    assert "#SBATCH --job-name=small.clean" in (shown := capsys.readouterr().out) and "tokenizer --restart" in shown
    alma("--restart", "tokenizer")
    assert json.loads((tmp_path / "runs/small/jobs/jobs.json").read_text()).keys() == {"tokenizer"}


@pytest.mark.slow
def test_a_fork_without_a_checkpoint_is_refused_before_anything_is_queued(fake):
    run_here("pack")
    assert "--fork found no complete checkpoint of stage pretrain" in refusal("--fork", "pretrain")
    assert not fake.calls("sbatch")


def test_a_folder_that_only_this_machine_has_is_refused_if_there_are_other_machines(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_storage, "file_system", lambda folder: "tmpfs")
    fake.write("nodes.txt", "NodeName=n1 NodeAddr=127.0.0.1\nNodeName=n2 NodeAddr=10.0.0.2\n")
    text = refusal()
    assert "output: runs/small is on a file system of type tmpfs, which the nodes of the cluster do not see" in text
    assert not fake.calls("sbatch")
    fake.write("nodes.txt", "NodeName=n1 NodeAddr=127.0.0.1\nNodeName=n2 NodeAddr=127.0.0.1\n")
    alma("clean")


def test_the_file_system_of_a_folder_that_does_not_exist_yet_is_its_parents():
    assert shared_storage.file_system(Path("/proc/self/task/nothing")) == "proc"


def test_a_job_that_slurm_refuses_takes_those_before_it_along(fake, tmp_path):
    fake.write("refused", "pack.sbatch")
    text = refusal()
    assert "sbatch refused runs/small/jobs/pack.sbatch: Batch job submission failed: Job violates" in text
    assert fake.calls("scancel") == ["scancel 101 102"]
    (fake.folder / "refused").unlink()
    fake.write("sbatch.fails", "Batch job submission failed: Invalid account")
    text = refusal()
    assert "sbatch would refuse runs/small/jobs/clean.sbatch: Batch job submission failed: Invalid account" in text
    assert "nothing was submitted" in text


def test_resources_do_not_change_what_a_stage_is(fake):
    """They are execution keys: identities with and without them are equal."""
    from pipeline.core.config import identity

    plain = load("r.yaml", ["resources={}", "pretrain.resources={}", "clean.resources={}", "export.resources={}"])
    for name, config in load("r.yaml").stages.items():
        assert identity(config) == identity(plain.stages[name])
    assert "partition: main" in resolved(load("r.yaml"))


@pytest.mark.parametrize(
    "gres, expected",
    [
        ("gpu:4", {"": 4}),
        ("gpu:a100:8(S:0-1),nvme:1", {"a100": 8}),
        ("gpu:3g.20gb:2,gpu:a100:4", {"3g.20gb": 2, "a100": 4}),
        ("(null)", {}),
        ("mps:100", {}),
    ],
)
def test_gpus_in_slurms_words(gres, expected):
    assert slurm.gpus_of(gres) == expected
