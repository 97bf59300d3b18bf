"""`alma run --dry-run`: what would run, why, and the time that earlier runs took."""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
from harness import succeed
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core import artifact, chain
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.core.launch import StageFailed
from pipeline.core.lock import Lock
from pipeline.core.recipe import load
from pipeline.manage.durations import earlier_runs, estimate


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """clean has run and took 60 s, by its manifest."""
    folder = tmp_path_factory.mktemp("dry")
    tiny.write_chain(folder)
    succeed("clean", "r.yaml", cwd=folder)
    took(folder / "runs/t/clean", 60.0)
    return folder


@pytest.fixture
def world(made, monkeypatch):
    monkeypatch.chdir(made)
    return made


def took(folder, seconds: float) -> None:
    path = artifact.current(folder).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))


def dry_run(*words) -> dict[str, str]:
    """Stage -> its row. Nothing may have changed on disk."""
    before = snapshot()
    result = CliRunner().invoke(app, ["run", "r.yaml", "--dry-run", *words])
    assert result.exit_code == 0, (result.output, result.exception)
    assert snapshot() == before
    rows: dict[str, str] = {}
    for line in result.output.splitlines():
        if line.startswith("     ") and rows:  # the rest of a cell
            rows[list(rows)[-1]] += " " + " ".join(line.split())
        elif line.strip():
            rows[line.split()[0]] = line.rstrip()
    return rows | {"": result.output.strip().splitlines()[-1]}


def snapshot() -> list[tuple]:
    found = []
    for folder, _, names in os.walk("."):
        for name in names:
            status = os.stat(os.path.join(folder, name))
            found.append((folder, name, status.st_mtime_ns, status.st_size))
    return sorted(found)


def test_what_would_run_and_why(world):
    rows = dry_run()
    assert "up to date" in rows["clean"]
    assert "run " in rows["tokenizer"] and "no tokenizer has run in these folders" in rows["tokenizer"]
    assert "tokenizer is missing" in rows["pack"] and "pack waits too" in rows["pretrain"]
    assert rows[""] == "3 stages would run; nothing was run"
    assert "pack" not in dry_run("tokenizer") and "1 stage would run" in dry_run("tokenizer")[""]
    assert "nothing would run" in dry_run("clean")[""]


def test_a_change_is_explained_and_timed_by_the_run_before(world):
    rows = dry_run("clean.filters.max_repeated_shingles=0.9", "clean")
    assert "filters.max_repeated_shingles: 1.0 -> 0.9" in rows["clean"] and " 60 s" in rows["clean"]
    path = os.path.relpath(artifact.current(world / "runs/t/clean").path)
    assert f"as {path}, with another filters.max_repeated_shingles" in rows["clean"]
    assert "about 60 s" in rows[""]
    assert "--restart" in dry_run("clean", "--restart")["clean"]


def published_pretraining(world, steps: int, seconds: float):
    """An output of stage pretrain in another run, with the keys of this recipe."""
    import ledger

    from pipeline.core.config import dump, identity
    from pipeline.pretrain import VERSION

    config = load("r.yaml", [f"pretrain.steps={steps}"]).stages["pretrain"]
    folder = world / f"runs/other{steps}/pretrain"
    made = ledger.output(folder, identity(config), kind="pretrain", version=VERSION, seconds=seconds)
    record = json.loads((made.path / "manifest.json").read_text()) | {"config": dump(config)}
    (made.path / "manifest.json").write_text(json.dumps(record))


def test_time_in_proportion_to_steps(world):
    published_pretraining(world, 50, 500.0)
    rows = dry_run()
    assert "1000 s" in rows["pretrain"].replace(",", "") and "per step (it made 50)" in rows["pretrain"]
    rows = dry_run("pretrain.run.processes=2", "pretrain.optimizer.lr=1e-4")
    assert "with another optimizer.lr, number of processes" in rows["pretrain"]
    assert rows[""] == "3 stages would run, about 1000 s without the 2 stages of unknown time; nothing was run"


def test_steps_of_another_run_took_this_one_no_time(world):
    """60 steps, of which 50 are those of the run that it was forked from: 200 s are 20 s per step. A branch or a fork
    from step 30 makes 70 of 100."""
    published_pretraining(world, 60, 200.0)
    path = artifact.current(world / "runs/other60/pretrain").path / "manifest.json"
    newest = {"forked_from": "0123456789ab/checkpoints/step-000050", "finished": "2999-01-01T00:00:00Z"}
    path.write_text(json.dumps(json.loads(path.read_text()) | newest))
    try:
        row = dry_run()["pretrain"].replace(",", "")
        assert "2000 s" in row and "per step (it made 10)" in row
        earlier = earlier_runs(Path("runs"))["pretrain"]
        node = nodes(load("r.yaml"))["pretrain"]
        assert estimate(node, earlier, resumes=False, forked_at=30).seconds == 1400
        keys = ["pretrain.from_step=30", "pretrain.inputs.model=./runs/other60/pretrain/current"]
        branch = nodes(load("r.yaml", keys))["pretrain"]
        assert estimate(branch, earlier, resumes=False).seconds == 1400
    finally:
        shutil.rmtree(world / "runs/other60")


def test_it_names_the_stage_that_alma_run_starts(world, monkeypatch):
    """The first one that the chain launches is the first that the dry run has as `run`."""
    started = []

    def launch(node, recipe, **_):
        started.append(node.name)
        raise StageFailed(node.name, 1, "not here")

    monkeypatch.setattr(chain, "launch", launch)
    for words in ([], ["clean.filters.max_repeated_shingles=0.9"], ["tokenizer.vocab_size=310"]):
        first = next(name for name, row in dry_run(*words).items() if " run " in row)
        result = CliRunner().invoke(app, ["run", "r.yaml", *words])
        assert isinstance(result.exception, StageFailed) and started[-1] == first


def test_an_interrupted_stage_by_its_own_steps(tmp_path, monkeypatch):
    """sft on a model from elsewhere, killed after its checkpoint of step 10 of 40, 30 s in."""
    import tuned

    from pipeline.core.config import dump
    from pipeline.core.files import write_atomic
    from pipeline.core.output import Output
    from pipeline.core.status import examine, records

    monkeypatch.chdir(tmp_path)
    tuned.world(tmp_path)
    (tmp_path / "tiny.yaml").rename("r.yaml")
    graph = examine(load("r.yaml"))
    node = graph["sft"]
    output = Output(node.folder, "sft", "sft", node.identity)
    output.open(config=dump(node.config), parents=records(node, graph))
    write_atomic(output.path / "checkpoints/step-000010/complete.json", '{"files": {}, "state": {}}')
    output.close()
    record = json.loads((output.path / "run.json").read_text()) | {"seconds": 30.0}
    write_atomic(output.path / "run.json", json.dumps(record))
    rows = dry_run()
    assert "resume" in rows["sft"] and "at step 10 of 40" in rows["sft"] and " 90 s" in rows["sft"]
    assert "as its first 10 steps" in rows["sft"]
    other = output.path.with_name("0123456789ab.partial")
    other.mkdir()
    write_atomic(other / "run.json", json.dumps(record | {"seconds": 9000.0}))
    assert " 90 s" in dry_run()["sft"], "a run of another recipe is newer"
    shutil.rmtree(other)
    fork = {"forked_from": "0123456789ab.partial/checkpoints/step-000005"}
    write_atomic(output.path / "run.json", json.dumps(record | fork))
    rows = dry_run()
    assert " 180 s" in rows["sft"] and "as its first 5 steps" in rows["sft"]
    write_atomic(output.path / "run.json", json.dumps(record))
    with pytest.raises(AssertionError, match="unfinished run of stage sft was made by another recipe"):
        dry_run("sft.optimizer.lr=1e-4")
    assert "--fork, from step 10" in dry_run("sft.optimizer.lr=1e-4", "--fork")["sft"]
    assert "--restart" in dry_run("sft.optimizer.lr=1e-4", "--restart")["sft"]


def test_what_alma_run_refuses_is_refused(world):
    def refusal(*words) -> str:
        result = CliRunner().invoke(app, ["run", "r.yaml", "--dry-run", *words])
        assert isinstance(result.exception, UserError), result.output
        return str(result.exception)

    assert "no stage is called 'nothing'" in refusal("nothing")
    assert "give one of the two" in refusal("--restart", "--fork")
    changed = ("clean.sources.one.path=missing.txt", "clean.filters.max_repeated_shingles=0.9")
    assert "missing.txt" in refusal(*changed)
    lock = Lock(world / "runs/t/tokenizer")
    lock.acquire()
    try:
        assert "another run is writing here" in refusal()
    finally:
        lock.release()
