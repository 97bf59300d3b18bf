"""`alma gc`: what goes, and that nothing goes that a stage, a resume or a lineage needs."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ledger
import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core import artifact
from pipeline.core.checkpoint_folder import complete_checkpoints, step_of
from pipeline.core.errors import UserError
from pipeline.core.lock import Lock
from pipeline.core.partial_runs import partials, run_info, set_aside
from pipeline.manage import garbage


def gc(*words, code=0, answer=None) -> str:
    result = CliRunner().invoke(app, ["gc", *map(str, words)], input=answer)
    assert result.exit_code == code and (code or not result.exception), (result.output, result.exception)
    return result.output


def removable(folder: Path) -> dict[str, str]:
    """Path below the folder -> why."""
    items = json.loads(gc(folder, "--dry-run", "--json"))["items"]
    return {str(Path(item["path"]).relative_to(folder)): item["why"] for item in items}


def steps(output: Path) -> list[int]:
    return [step_of(path) for path in complete_checkpoints(output)]


@pytest.fixture
def runs(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "runs", symlinks=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two runs. In `a`, pack was made three times: pretrain was made from the second and is now stale, nothing refers
    to the first. `b` continues from a's pretraining, and has an unfinished run."""
    runs = tmp_path_factory.mktemp("ledger") / "runs"
    packs = [ledger.output(runs / "a/pack", {"x": x}) for x in (1, 2, 3)]
    save = {"save": {"keep": 2, "keep_every": 20}}
    pretrain = ledger.output(runs / "a/pretrain", save, {"tokens": packs[1]}, checkpoints=(10, 20, 25, 30, 40))
    ledger.output(runs / "b/decay", {"from_step": 10}, {"model": pretrain}, kind="pretrain", checkpoints=(12,))
    old = ledger.output(runs / "b/sft", {"lr": 1}, {"model": pretrain}, checkpoints=(1, 2))
    ledger.output(runs / "b/sft", {"lr": 2}, {"model": pretrain}, checkpoints=(3, 4))
    ledger.output(runs / "b/dpo", {"beta": 1}, {"model": old}, checkpoints=(5, 6), publish=False)
    return runs


def names(runs: Path, stage: str) -> list[str]:
    return sorted(path.name for path in (runs / stage).iterdir() if path.name != "current")


def test_what_goes_and_what_stays(runs):
    first = artifact.published(runs / "a/pack")
    unneeded = next(output for output in first if output.manifest["config"]["x"] == 1)
    found = removable(runs)
    sft = artifact.current(runs / "b/sft")
    old_sft = next(output for output in artifact.published(runs / "b/sft") if output.path != sft.path)
    assert set(found) == {
        f"a/pack/{unneeded.path.name}",
        f"a/pretrain/{artifact.current(runs / 'a/pretrain').path.name}/checkpoints/step-000025",
        f"a/pretrain/{artifact.current(runs / 'a/pretrain').path.name}/checkpoints/step-000030",
        f"b/sft/{sft.path.name}/checkpoints/step-000003",
        f"b/sft/{old_sft.path.name}/checkpoints/step-000001",
    }
    assert "nothing refers to" in found[f"a/pack/{unneeded.path.name}"]
    before = sum(file.stat().st_size for file in runs.rglob("*") if file.is_file() and not file.is_symlink())
    planned = json.loads(gc(runs, "--dry-run", "--json"))["bytes"]
    said = gc(runs, "--yes")
    after = sum(file.stat().st_size for file in runs.rglob("*") if file.is_file() and not file.is_symlink())
    assert before - after == planned > 4000 and "5 folders removed" in said
    assert steps(runs / "a/pretrain/current") == [10, 20, 40], "a branch, the grid, the newest"
    assert steps(partials(runs / "b/dpo")[0]) == [5, 6], "an unfinished run keeps all of its own"
    assert len(names(runs, "a/pack")) == 2 and "nothing can be removed" in gc(runs, "--yes")
    assert not list(runs.rglob("lock.json")) and not list(runs.rglob(".gc-*"))


def test_one_run_knows_what_others_refer_to(runs):
    """b's dpo was made from b's old sft, and b's branch from a's step 10: a folder of one run sees both."""
    assert {path.split("/")[0] for path in removable(runs / "a")} == {"pack", "pretrain"}
    assert not any(path.endswith("step-000010") for path in removable(runs / "a"))


def test_a_branch_that_has_not_run_yet(runs):
    """recipe.yaml of a published stage names a stage that will continue from step 30."""
    block = "{kind: pretrain, inputs: {model: pretrain}, from_step: 30}"
    recipe = f"name: a\nstages:\n  pretrain: {{}}\n  later: {block}\n"
    (artifact.current(runs / "a/pack").path / "recipe.yaml").write_text(recipe)
    assert not any(path.endswith("step-000030") for path in removable(runs))
    assert any(path.endswith("step-000025") for path in removable(runs))


def plan_of_b(runs: Path, model: str, rest: str = "") -> None:
    """The recipe of b's decay names a stage that has not run yet and continues from step 30 of a folder."""
    block = f"{{kind: pretrain, inputs: {{model: {model}}}, from_step: 30}}"
    recipe = f"name: b\noutput: runs\nstages:\n  later: {block}\n{rest}"
    (artifact.current(runs / "b/decay").path / "recipe.yaml").write_text(recipe)


@pytest.mark.parametrize("model", ["./runs/a/pretrain/current", "ABSOLUTE", "./gone/pretrain/current"])
@pytest.mark.parametrize("started_in", [".", "elsewhere"])
def test_a_branch_of_another_run_that_has_not_run_yet(runs, monkeypatch, model, started_in):
    """Its input is a folder, relative to where the run was started. If that leads nowhere, any output may be meant."""
    folder = runs.parent / started_in
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    plan_of_b(runs, model.replace("ABSOLUTE", str(runs / "a/pretrain/current")))
    found = removable(runs)
    assert not any(path.endswith("step-000030") for path in found)
    assert any(path.endswith("step-000025") for path in found)


def test_a_branch_of_what_is_in_no_run(runs, tmp_path):
    """A folder elsewhere, or a model of a hub: no checkpoint of these runs is meant."""
    (tmp_path / "other").mkdir()
    for model in (str(tmp_path / "other"), "org/name@0123abc"):
        plan_of_b(runs, model)
        assert any(path.endswith("step-000030") for path in removable(runs))


def test_an_old_output_that_a_later_stage_names(runs):
    first = next(output for output in artifact.published(runs / "a/pack") if output.manifest["config"]["x"] == 1)
    assert f"a/pack/{first.path.name}" in removable(runs)
    plan_of_b(runs, "org/name@0123abc", f"  more: {{kind: pretrain, inputs: {{tokens: {first.path}}}}}\n")
    assert f"a/pack/{first.path.name}" not in removable(runs)


def test_blocks_without_keys(runs):
    plan_of_b(runs, "./runs/a/pretrain/current", "  pack:\n  tokenizer: {inputs: }\n")
    assert not any(path.endswith("step-000030") for path in removable(runs))
    (artifact.current(runs / "b/decay").path / "recipe.yaml").write_text("# from_step: 3\nname: b\nstages:\n")
    assert removable(runs)


def test_it_says_what_it_does_not_know(runs):
    assert "recipes that have never run" in gc(runs, "--dry-run")


def test_the_best_checkpoint_stays(runs):
    output = artifact.current(runs / "b/sft").path
    (output / "checkpoints/losses.json").write_text('{"3": 1.0, "4": 2.0}')
    assert f"b/sft/{output.name}/checkpoints/step-000003" not in removable(runs)


def test_what_was_set_aside_and_leftovers(runs):
    ledger.output(runs / "a/sft", {"lr": 3}, checkpoints=(1,), publish=False)
    aside = set_aside(partials(runs / "a/sft")[0])
    ledger.output(runs / "a/sft", {"lr": 4}, checkpoints=(1,))
    output = artifact.current(runs / "a/sft").path
    for name in ("damaged-step-000001", ".step-000002.tmp"):
        (output / "checkpoints" / name).mkdir()
    (runs / "a/cache").mkdir()
    (runs / "b/cache").mkdir()
    found = removable(runs)
    assert "set aside" in found[f"a/sft/{aside.name}"] and "a/cache" in found
    assert "b/cache" not in found, "b has an unfinished run"
    assert {f"a/sft/{output.name}/checkpoints/{name}" for name in ("damaged-step-000001", ".step-000002.tmp")} <= set(
        found
    )


def test_a_running_stage_is_left_alone(runs):
    lock = Lock(runs / "a/pack")
    lock.acquire()
    try:
        assert not any(path.startswith("a/pack") for path in removable(runs))
        said = gc(runs, "--yes")
        assert f"left alone: {runs / 'a/pack'}: in use by process {os.getpid()}" in said
        assert len(names(runs, "a/pack")) == 4, "three outputs and the lock"
    finally:
        lock.release()


def test_a_run_killed_while_it_published(runs):
    """The output is there, the link is the old one: the next start makes it the one in use."""
    newest = artifact.current(runs / "a/pack").path
    for output in artifact.published(runs / "a/pack"):
        if output.manifest["config"]["x"] == 1:
            link = runs / "a/pack/current"
            link.unlink()
            link.symlink_to(output.path.name)
            os.utime(link, (1, 1), follow_symlinks=False)
    assert f"a/pack/{newest.name}" not in removable(runs)


def test_a_record_that_cannot_be_read_stops_everything(runs):
    manifest = artifact.current(runs / "b/decay").path / "manifest.json"
    manifest.write_text("{")
    before = sorted(runs.rglob("*"))
    result = CliRunner().invoke(app, ["gc", str(runs), "--yes"])
    assert isinstance(result.exception, UserError)
    assert str(manifest) in str(result.exception) and "nothing is removed" in str(result.exception)
    assert sorted(runs.rglob("*")) == before


def test_it_asks(runs, monkeypatch):
    before = sorted(runs.rglob("*"))
    result = CliRunner().invoke(app, ["gc", str(runs)])
    assert isinstance(result.exception, UserError) and "give --yes" in str(result.exception)
    monkeypatch.setattr(
        "pipeline.manage.commands.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)), raising=True
    )
    assert "nothing was removed" in gc(runs, answer="n\n") and "nothing was removed" in gc(runs, answer="\n")
    assert sorted(runs.rglob("*")) == before
    assert "5 folders removed" in gc(runs, answer="y\n")


@pytest.mark.parametrize(
    "words, message",
    [
        (["nowhere"], "is not there"),
        (["empty"], "has no runs"),
        (["runs", "--yes", "--dry-run"], "give one of the two"),
        (["runs", "--json"], "--json does not ask"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    ledger.output(tmp_path / "runs/a/pack", {})
    result = CliRunner().invoke(app, ["gc", *words])
    assert isinstance(result.exception, UserError) and message in str(result.exception)


def test_killed_while_it_removes(runs):
    """Every folder is complete or has a name that nothing reads, and the next gc ends the work."""
    code = "import sys, pathlib; from pipeline.manage.commands import gc; gc(pathlib.Path(sys.argv[1]), yes=True)"
    for number in (1, 2, 6):  # renamed two, and deleted some
        answer = subprocess.run(
            [sys.executable, "-c", code, str(runs)], env=os.environ | {"ALMA_FAULT": f"gc:{number}"}
        )
        assert answer.returncode == -signal.SIGKILL
        for output in runs.glob("*/*/[0-9a-f]*"):
            assert (output / "manifest.json").exists() or output.name.endswith(".partial")
    assert any("interrupted" in why or "being written" in why for why in removable(runs).values())
    gc(runs, "--yes")
    assert not removable(runs) and not list(runs.rglob(".gc-*")) and not list(runs.rglob(".step-*"))


@pytest.mark.parametrize("seed", range(4))
def test_random_histories(tmp_path, seed):
    """Stages made again and again from whatever was current, in two runs that read each other. Afterwards everything
    that is in use or unfinished still has its inputs, and theirs, undamaged; and nothing else is left."""
    draw = random.Random(seed)
    runs = tmp_path / "runs"
    folders = [runs / run / f"s{number}" for run in "ab" for number in range(4)]
    for moment in range(30):
        folder = draw.choice(folders)
        earlier = [other for other in folders if other.name < folder.name and (other / "current").exists()]
        chosen = draw.sample(earlier, min(len(earlier), 2))
        parents = {f"p{index}": artifact.current(other) for index, other in enumerate(chosen)}
        if not partials(folder):
            ledger.output(folder, {"moment": moment}, parents, kind="pack", publish=draw.random() > 0.15)
    gc(runs, "--yes")
    pending = [artifact.current(folder) for folder in folders if (folder / "current").exists()]
    seen: set[str] = set()
    records = [(output.path.parent, output.manifest) for output in pending]
    records += [(folder, run_info(path)) for folder in folders for path in partials(folder)]
    while records:
        folder, record = records.pop()
        for parent in record["parents"].values():
            made = artifact.read(folder / parent["path"])
            assert made is not None and made.digest == parent["digest"] and made.damage(full=True) is None
            if made.fingerprint not in seen:
                records.append((made.path.parent, made.manifest))
            seen.add(made.fingerprint)
    in_use = {output.fingerprint for output in pending}
    left = {json.loads(path.read_text())["fingerprint"] for path in runs.glob("*/*/*/manifest.json")}
    assert left == in_use | seen


def test_leftovers_of_an_interrupted_removal(tmp_path, monkeypatch):
    """Of a cache, a damaged and a superseded checkpoint and an old output: all are under hidden names, and the next gc
    removes them."""
    runs = tmp_path / "runs"
    ledger.output(runs / "a/sft", {"lr": 1}, checkpoints=(1,))
    output = ledger.output(runs / "a/sft", {"lr": 2}, checkpoints=(1, 2)).path
    (output / "checkpoints/damaged-step-000003").mkdir()
    (runs / "a/cache").mkdir()
    before = set(removable(runs))
    assert len(before) == 4

    def interrupted(path, *args, **kwargs):
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", interrupted)
        assert "0 folders removed" in gc(runs, "--yes")
    left = removable(runs)
    assert len(left) == 4 and not before & set(left)
    assert "4 folders removed" in gc(runs, "--yes")
    assert not removable(runs) and not [path for path in runs.rglob(".*") if path.name != ".hashes.json"]
    assert steps(output) == [2]


def test_links_are_not_removed(tmp_path):
    """A cache or a checkpoint on another disk."""
    runs = tmp_path / "runs"
    output = ledger.output(runs / "a/sft", {}, checkpoints=(1, 2, 3)).path
    for name in ("a/cache", f"a/sft/{output.name}/checkpoints/step-000001"):
        target = tmp_path / "disk" / Path(name).name
        if (runs / name).exists():
            shutil.copytree(runs / name, target)
            shutil.rmtree(runs / name)
        else:
            target.mkdir(parents=True)
        (runs / name).symlink_to(target)
    said = gc(runs, "--yes")
    assert "1 folder removed" in said and steps(output) == [1, 3]
    assert f"left alone: {runs / 'a/cache'}: a link" in said and (runs / "a/cache").is_symlink()
    assert f"left alone: {output / 'checkpoints/step-000001'}: a link" in said


def test_stages_are_locked_one_by_one_and_not_while_folders_are_deleted(runs, monkeypatch):
    """Deleting takes hours on a slow disk, and a stage must be able to start meanwhile."""
    held: list[int] = []
    acquire, rmtree = Lock.acquire, shutil.rmtree

    def counted(action):
        def wrapper(*args, **kwargs):
            held.append(len(list(runs.rglob("lock.json"))))
            return action(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(Lock, "acquire", counted(acquire))
    monkeypatch.setattr("shutil.rmtree", counted(rmtree))
    assert "5 folders removed" in gc(runs, "--yes")
    assert held == [0] * 8, "three stages, five folders"


def test_what_is_in_use_by_the_time_it_is_locked(runs):
    plan = garbage.removable([runs / "a", runs / "b"])
    first = next(output for output in artifact.published(runs / "a/pack") if output.manifest["config"]["x"] == 1)
    assert first.path in [item.path for item in plan.items]
    (runs / "a/pack/current").unlink()
    (runs / "a/pack/current").symlink_to(first.path.name)
    done = garbage.remove(plan, [runs / "a", runs / "b"])
    assert done.left_alone == [f"{first.path}: something refers to it by now"] and first.path.exists()
    assert len(done.items) == 4


@pytest.mark.parametrize("name", ["0-latest", "latest"])
def test_a_run_with_two_names(runs, name):
    """`latest -> a` is another name of the run, not another run."""
    before = removable(runs)
    (runs / name).symlink_to("a")
    assert removable(runs) == before
    assert len(removable(runs / name)) == 3
    assert "5 folders removed" in gc(runs, "--yes")


def test_runs_that_share_a_stage(runs):
    before = removable(runs)
    (runs / "c").mkdir()
    (runs / "c/pack").symlink_to(runs / "a/pack")
    assert removable(runs) == before and "5 folders removed" in gc(runs, "--yes")
    assert len(names(runs, "c/pack")) == 2


# ---- links -----------------------------------------------------------------------------------------------------------


def chain(runs: Path) -> None:
    """In `a`, pretrain was made from the first of two packs; `b` continues from its step 10."""
    packs = [ledger.output(runs / "a/pack", {"x": x}) for x in (1, 2)]
    pretrain = ledger.output(runs / "a/pretrain", {}, {"tokens": packs[0]}, checkpoints=(10, 20, 30))
    ledger.output(runs / "b/decay", {"from_step": 10}, {"model": pretrain}, kind="pretrain", checkpoints=(12,))


@pytest.mark.parametrize("linked", ["runs", "runs/a", "runs/b", "runs/a/pack", "runs/a/pretrain", "runs/b/decay"])
def test_what_links_lead_to_is_needed(tmp_path, linked):
    """The only thing that can go is the checkpoint of step 20, wherever the folders really are."""
    link = tmp_path / linked
    target = tmp_path / "mnt/deep/store" / linked.replace("/", "-")
    target.mkdir(parents=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    chain(tmp_path / "runs")
    for folder in ("runs", "runs/a"):
        found = removable(tmp_path / folder)
        assert [path.split("/")[-1] for path in found] == ["step-000020"], found


def test_an_input_that_is_nowhere_stops_everything(runs):
    """Of b's unfinished dpo: it is not known what b's old sft was made from."""
    old = next(output for output in artifact.published(runs / "b/sft") if output.manifest["config"]["lr"] == 1)
    shutil.rmtree(old.path)
    result = CliRunner().invoke(app, ["gc", str(runs), "--yes"])
    assert isinstance(result.exception, UserError)
    assert "inputs.model" in str(result.exception) and "nothing is removed" in str(result.exception)
    assert len(names(runs, "a/pack")) == 3


def test_an_input_that_cannot_be_read_stops_everything(runs):
    old = next(output for output in artifact.published(runs / "b/sft") if output.manifest["config"]["lr"] == 1)
    (old.path / "manifest.json").write_text("{")
    result = CliRunner().invoke(app, ["gc", str(runs), "--yes"])
    assert isinstance(result.exception, UserError) and "nothing is removed" in str(result.exception)
