"""`alma status`, `alma cancel` and `alma logs` with jobs that are queued, running, and gone from the queue."""

import json
import threading
import time

import pytest
from fake_slurm import FakeSlurm

from pipeline import cli
from pipeline.cluster import queue_commands
from pipeline.core.errors import UserError

RECIPE = """
name: small
model: {family: llama, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64}
stages:
  clean: {sources: {a: {path: a.txt, sample_by: line}}, holdout: 0.1}
  tokenizer: {vocab_size: 320, algorithm: byte-bpe}
  pack: {}
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a row of text\n")
    (tmp_path / "r.yaml").write_text(RECIPE)
    jobs = tmp_path / "runs/small/jobs"
    jobs.mkdir(parents=True)
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    queued = {"clean": ("11", []), "tokenizer": ("12", ["clean"]), "pack": ("13", ["clean", "tokenizer"])}
    record = {name: {"job": job, "needs": needs, "submitted": "now"} for name, (job, needs) in queued.items()}
    (jobs / "jobs.json").write_text(json.dumps(record))
    return fake


def ended(folder, stage: str, job: str, state: str, reason: str, restarts: int = 0) -> None:
    """As pipeline/cluster/job.py notes it."""
    record = {"job": job, "restarts": restarts, "state": state, "reason": reason, "code": None}
    (folder / f"runs/small/jobs/{stage}.json").write_text(json.dumps(record))


def alma(*words: str) -> None:
    cli.app([*words], standalone_mode=False)


def shown(capsys, *words: str) -> dict[str, str]:
    """Stage -> what `alma status` says of its job."""
    capsys.readouterr()
    alma("status", "r.yaml", *words)
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.rpartition("[")[2].rstrip("]") for line in lines}


def test_status_shows_what_slurm_says_beside_the_stage(fake, tmp_path, capsys):
    fake.write("squeue.txt", "11|RUNNING|None\n12|PENDING|Dependency\n13|PENDING|Dependency\n")
    ended(tmp_path, "clean", "11", "running", "", restarts=2)
    assert shown(capsys) == {
        "clean": "job 11 RUNNING: start 3",
        "tokenizer": "job 12 PENDING: Dependency",
        "pack": "job 13 PENDING: Dependency",
    }
    alma("status", "r.yaml", "clean", "--json")
    job = json.loads(capsys.readouterr().out)["clean"]["job"]
    assert job == {"job": "11", "state": "RUNNING", "reason": "start 3", "is_live": True}


def test_status_tells_why_jobs_ended_while_slurm_still_has_them(fake, tmp_path, capsys):
    fake.write("squeue.txt", "11|FAILED|NonZeroExitCode\n12|CANCELLED|DependencyNeverSatisfied\n13|CANCELLED|\n")
    ended(tmp_path, "clean", "11", "failed", "a.txt: no such file")
    assert shown(capsys) == {
        "clean": "job 11 FAILED: a.txt: no such file",
        "tokenizer": "job 12 CANCELLED: clean did not succeed (job 11)",
        "pack": "job 13 CANCELLED: clean did not succeed (job 11)",
    }


@pytest.mark.parametrize("accounts", [False, True])
def test_status_knows_jobs_that_have_left_the_queue(fake, tmp_path, capsys, accounts):
    if accounts:
        fake.write("sacct.txt", "11|COMPLETED|None\n12|CANCELLED by 0|None\n13|CANCELLED by 0|Dependency\n")
    ended(tmp_path, "clean", "11", "done", "")
    ended(tmp_path, "tokenizer", "12", "cancelled", "ended by Slurm")
    assert shown(capsys) == {
        "clean": "job 11 COMPLETED",
        "tokenizer": "job 12 CANCELLED: ended by Slurm",
        "pack": f"job 13 {'CANCELLED' if accounts else 'ENDED'}: tokenizer did not succeed (job 12)",
    }


def test_a_record_of_an_earlier_job_counts_for_nothing(fake, tmp_path, capsys):
    ended(tmp_path, "clean", "5", "failed", "of another job")
    fake.write("squeue.txt", "11|PENDING|Priority\n")
    assert shown(capsys, "clean") == {"clean": "job 11 PENDING: Priority"}


def test_status_without_slurm_says_so(fake, tmp_path, capsys, monkeypatch):
    ended(tmp_path, "clean", "11", "running", "")
    monkeypatch.setenv("PATH", "/nowhere")
    assert shown(capsys, "clean") == {"clean": "job 11 UNKNOWN: squeue does not answer; its last start: running"}


def test_cancel_ends_what_lives(fake, tmp_path, capsys):
    fake.write("squeue.txt", "11|COMPLETED|None\n12|RUNNING|None\n13|PENDING|Dependency\n")
    alma("cancel", "r.yaml")
    assert fake.calls("scancel") == ["scancel 12 13"]
    alma("cancel", "r.yaml", "pack")
    assert fake.calls("scancel")[-1] == "scancel 13"
    alma("cancel", "r.yaml", "clean")
    assert "no job is queued or running" in capsys.readouterr().out and len(fake.calls("scancel")) == 2
    fake.write("scancel.fails", "Access/permission denied")
    with pytest.raises(UserError, match="scancel failed: scancel: error: Access/permission denied"):
        alma("cancel", "r.yaml")


def test_logs_of_the_job_and_of_one_process(fake, tmp_path, capsys):
    jobs = tmp_path / "runs/small/jobs"
    (jobs / "clean-11.log").write_text("stage clean, start 1\n")
    (jobs / "clean-11-rank-0.log").write_text("reading\nhalf a li")
    (jobs / "clean-11-rank-1.log").write_text("second\n")
    alma("logs", "r.yaml", "clean")
    assert capsys.readouterr().out.splitlines()[1::2] == ["stage clean, start 1", "reading"]
    alma("logs", "r.yaml", "clean", "--rank", "1")
    assert "second" in capsys.readouterr().out
    fake.write("squeue.txt", "12|PENDING|Dependency\n")
    alma("logs", "r.yaml", "tokenizer")
    assert capsys.readouterr().out == "tokenizer: job 12 PENDING: Dependency; it has printed nothing yet\n"
    for words, said in (
        (["clean", "--rank", "7"], "clean-11-rank-7.log: does not exist; job 11 has logs of 2 ranks"),
        ([], "name one stage; the recipe has clean, tokenizer, pack"),
        (["sft"], "no stage is called 'sft'"),
    ):
        with pytest.raises(UserError) as caught:
            alma("logs", "r.yaml", *words)
        assert said in str(caught.value)


def test_logs_follow_until_the_job_has_ended(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(queue_commands, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(queue_commands, "ASK_EVERY", 0.1)
    log = tmp_path / "runs/small/jobs/clean-11-rank-0.log"
    log.write_text("step 1\nste")
    fake.write("squeue.txt", "11|RUNNING|None\n")

    def go_on() -> None:
        time.sleep(0.3)
        with open(log, "a") as file:
            file.write("p 2\n")
        fake.write("squeue.txt", "11|COMPLETED|None\n")

    thread = threading.Thread(target=go_on)
    thread.start()
    alma("logs", "r.yaml", "clean", "--follow")
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["step 1", "step 2", "clean: job 11 COMPLETED"]


def test_a_run_without_jobs_is_a_sentence(fake, tmp_path):
    (tmp_path / "runs/small/jobs/jobs.json").unlink()
    for command in (["cancel", "r.yaml"], ["logs", "r.yaml", "clean"]):
        with pytest.raises(UserError, match="no job of this run was queued"):
            alma(*command)
    (tmp_path / "runs/small/jobs/jobs.json").write_text("{")
    with pytest.raises(UserError, match="damaged, not JSON"):
        alma("cancel", "r.yaml")
