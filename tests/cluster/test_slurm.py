"""Slurm's commands do not always answer as in the manual: other lines beside a job's number, units and signs behind
numbers, jobs with several parts, a controller or a database that does not answer."""

import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import FakeSlurm

from pipeline.cluster import job_files, slurm
from pipeline.core.errors import UserError
from pipeline.core.run_config import Resources


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def test_partitions_in_slurms_words(fake):
    fake.write(
        "sinfo.txt",
        "CLUSTER: mini\nmain*|up|1-12:00:00|64+|515000+|gpu:a100:8(S:0-1)|1K\nmain*|up|1-12:00:00|128|1M|(null)|2\n"
        "night|drain|30:00|4|8192|(null)|4\nempty|up|UNLIMITED|0|0|(null)|0\nodd|up|n/a|N/A|N/A|(null)|0\n",
    )
    found = slurm.partitions()
    assert list(found) == ["main", "night", "empty", "odd"]
    assert [part.minutes for part in found.values()] == [36 * 60, 30, math.inf, math.inf]
    assert [part.is_default for part in found.values()] == [True, False, False, False]
    assert [part.is_up for part in found.values()] == [True, False, True, True]
    assert found["main"].kinds == [
        slurm.NodeKind(1024, 64, 515000, {"a100": 8}), slurm.NodeKind(2, 128, 2**20, {})
    ]  # fmt: skip
    assert found["odd"].kinds == [slurm.NodeKind(0, 0, 0, {})]


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("1-12:00:00\n", 36 * 3600),
        ("12:00:01\n", 43201),
        ("0:59\n", 59),
        ("CLUSTER: mini\n59:00\n", 59 * 60),
        ("UNLIMITED\n", math.inf),
        ("NOT_SET\n", math.inf),
        ("", math.inf),
    ],
)
def test_time_that_is_left(fake, text, seconds):
    fake.write("left.txt", text or "\n")
    assert slurm.seconds_left("7") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    [
        "41\n",
        "41;mini\n",
        "Welcome to mini\n3 nodes are down\n41;mini\n",
        "41\nYour project has 12 hours left\n",
        "\n 41 \n",
    ],
)
def test_a_jobs_number_among_other_lines(text):
    assert slurm.number_in(text) == "41"


@pytest.mark.parametrize("text", ["", "Submitted batch job 41\n", "mini\n"])
def test_no_number_is_said(text):
    with pytest.raises(UserError, match="printed no job number.*see squeue"):
        slurm.number_in(text)


def test_jobs_with_several_parts_live_as_long_as_one_of_them(fake):
    fake.write(
        "squeue.txt",
        "CLUSTER: mini\n11_0|COMPLETED|None\n11_1|RUNNING|None\n11_[2-9]|PENDING|Resources\n12+0|FAILED|NonZeroExitCode\n"
        "12+1|FAILED|x\n13||\n",
    )
    states = slurm.job_states(["11", "12", "13"])
    assert states["11"].is_live and states["12"].state == "FAILED" and states["13"].state == "UNKNOWN"


def test_accounts_are_not_needed(fake):
    """sacct has jobs that have left the queue; without it, or if its database does not answer, nothing is known."""
    fake.write("squeue.txt", "11|RUNNING|None\n")
    assert slurm.job_states(["11", "12"]).keys() == {"11"}  # accounting is disabled
    fake.write("sacct.txt", "12|CANCELLED by 1000|None\n12.batch|COMPLETED|\n12.extern|COMPLETED|\n")
    assert slurm.job_states(["11", "12"])["12"] == slurm.JobState("CANCELLED", "")
    answers = slurm.call

    def call(*words, **options):
        if words[0] == "sacct":
            raise UserError("sacct did not answer for 60 s")
        return answers(*words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "call", call)
        assert slurm.job_states(["11", "12"]) == {"11": slurm.JobState("RUNNING", "")}
    (fake.folder / "sacct").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(fake.folder))
        assert slurm.job_states(["11", "12"]).keys() == {"11"}


def test_bytes_that_are_no_text_are_no_error(fake):
    (fake.folder / "squeue").write_bytes(b"#!/bin/sh\nprintf '11|RUNNING|\\377\\376'\n")
    assert slurm.job_states(["11"])["11"].is_live


@pytest.mark.parametrize(
    "message, tries",
    [
        ("slurm_requeue error: Unable to contact slurm controller (connect failure)", 3),
        ("Requeue error: Socket timed out on send/recv operation", 3),
        ("slurm_requeue error: Requested operation is presently disabled for job 7", 1),
        ("slurm_requeue error: Access/permission denied", 1),
    ],
)
def test_a_job_waits_for_a_controller_that_is_away_and_takes_a_refusal_at_its_word(fake, monkeypatch, message, tries):
    fake.write("scontrol.fails", message)
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            (fake.folder / "scontrol.fails").unlink()  # it is back

    # Not time.sleep itself, which subprocess calls while it waits for a program.
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    answer = slurm.call_patiently("scontrol", "requeue", "7")
    assert len(fake.calls("scontrol")) == tries and answer.returncode == (0 if tries == 3 else 1)


def test_a_controller_that_stays_away_is_given_up(fake, monkeypatch):
    fake.write("scontrol.fails", "Unable to contact slurm controller")
    monkeypatch.setattr(slurm, "RESTART", 0.0)
    assert "Unable to contact" in slurm.call_patiently("scontrol", "requeue", "7").stderr
    monkeypatch.setenv("PATH", "/nowhere")
    assert "scontrol is not on the PATH" in slurm.call_patiently("scontrol", "requeue", "7").stderr


def test_sbatch_gets_no_variables_of_another_job_nor_any_that_would_override_its_script(tmp_path, monkeypatch):
    script = tmp_path / "a.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --partition=main\n#SBATCH --mem=0\n")
    for name in ("SBATCH_PARTITION", "SBATCH_MEM_PER_CPU", "SBATCH_WAIT", "SBATCH_NO_REQUEUE", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "x")
    for name in ("SLURM_CONF", "SLURM_MEM_PER_CPU", "SRUN_CPUS_PER_TASK"):
        monkeypatch.setenv(name, "x")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def left() -> set[str]:
        return {name for name in slurm.environment_for(str(script)) if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))}

    outside = {"SBATCH_ACCOUNT", "SLURM_CONF", "SLURM_MEM_PER_CPU", "SRUN_CPUS_PER_TASK"}
    assert left() == outside
    monkeypatch.setenv("SLURM_JOB_ID", "3")  # of an interactive job
    assert left() == {"SBATCH_ACCOUNT", "SLURM_CONF"}


def test_a_partition_of_the_environment_counts(monkeypatch):
    """SBATCH_PARTITION is what sbatch takes where the recipe names none."""
    from pipeline.export import Config

    cluster = {
        name: slurm.Partition(name, name == "main", True, math.inf, [slurm.NodeKind(1, cpus, 8192, {})])
        for name, cpus in (("main", 4), ("big", 64))
    }
    config = Config(resources={"cpus": 16})
    with pytest.raises(UserError, match="16 per node, and a node of partition main has 4"):
        slurm.check_request("export", config, cluster)
    monkeypatch.setenv("SBATCH_PARTITION", "big")
    slurm.check_request("export", config, cluster)
    monkeypatch.setenv("SBATCH_PARTITION", "huge")
    with pytest.raises(UserError, match=r"no partition huge \(from SBATCH_PARTITION\); it has main, big"):
        slurm.check_request("export", config, cluster)


def test_memory_per_core_is_given_in_place_of_that_of_a_node():
    from pipeline.export import Config

    assert "--mem=0" in job_files.options_of(Config())
    options = job_files.options_of(Config(resources={"sbatch": ["--mem-per-cpu=4G"]}))
    assert "--mem-per-cpu=4G" in options and "--mem=0" not in options and "--exclusive" in options
    with pytest.raises(ValueError, match="beside the key memory; remove one of the two"):
        Resources(memory="4G", sbatch=["--mem-per-cpu=4G"])
    with pytest.raises(ValueError, match="set the variable SLURM_CLUSTERS"):
        Resources(sbatch=["--clusters=other"])


RECIPE = """
name: small
output: "运行 100%j #1's"
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {a: {path: a.txt, sample_by: line}}, holdout: 0.1}
  tokenizer: {vocab_size: 320, algorithm: byte-bpe}
"""


def test_a_folder_with_any_name_and_no_home(fake, tmp_path):
    """A run folder with spaces, Chinese and Slurm's own signs; a user without HOME or a language."""
    folder = tmp_path / "我的 work"
    folder.mkdir()
    (folder / "a.txt").write_text("a row of text\n")
    (folder / "r.yaml").write_text(RECIPE, encoding="utf-8")
    fake.write("sbatch.txt", "Welcome\n3 nodes are down\n")
    words = [sys.executable, "-m", "pipeline.cli", "run", "r.yaml", "--on", "slurm"]
    environment = {"PATH": fake.path, "PYTHONPATH": str(Path(slurm.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(words, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    jobs = folder / "运行 100%j #1's/small/jobs"
    text = (jobs / "clean.sbatch").read_text(encoding="utf-8")
    assert f'#SBATCH --chdir="{folder}"\n' in text
    assert f'#SBATCH --output="{tmp_path}/我的 work/运行 100%%j #1\'s/small/jobs/clean-%j.log"\n' in text
    assert subprocess.run(["bash", "-n", jobs / "clean.sbatch"]).returncode == 0
    submitted = [line for line in fake.calls("sbatch") if "--parsable" in line]
    assert len(submitted) == 2 and "--dependency=afterok:101 " in submitted[1]
    environment["PATH"] = f"{fake.folder}:/usr/bin:/bin"
    by_hand = subprocess.run(["bash", jobs / "submit.sh"], env=environment, capture_output=True, encoding="utf-8")
    assert "tokenizer: job 104" in by_hand.stdout, by_hand.stderr
