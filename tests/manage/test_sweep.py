"""`alma sweep`: which members there are, what they share, and a sweep that runs, fails in part, and is continued."""

import json

import pytest
import tiny
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.core.errors import UserError
from pipeline.core.graph import nodes
from pipeline.manage.sweep import Metric, Result, ranked
from pipeline.manage.sweep_plan import own_recipe, sweep_plan


@pytest.fixture
def world(tmp_path, monkeypatch):
    tiny.write_chain(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*words, stages=(), count=None, seed=0):
    return sweep_plan("r.yaml", list(words), list(stages), count, seed)


def test_a_grid_is_all_combinations_and_what_they_share(world):
    found = plan("pretrain.optimizer.lr=1e-3,3e-3", "pretrain.steps=10,20", "pretrain.batch_size=8")
    assert [member.name.rpartition(".")[0] for member in found.members] == [
        "t.lr1e-3-steps10",
        "t.lr1e-3-steps20",
        "t.lr3e-3-steps10",
        "t.lr3e-3-steps20",
    ], "the names end with a mark of the keys that all have"
    assert (found.shared, found.varied) == (["clean", "tokenizer", "pack"], ["pretrain"])
    configs = [member.recipe.stages["pretrain"] for member in found.members]
    assert [(config.optimizer.lr, config.steps, config.batch_size) for config in configs] == [
        (1e-3, 10, 8),
        (1e-3, 20, 8),
        (3e-3, 10, 8),
        (3e-3, 20, 8),
    ]
    other = plan("tokenizer.vocab_size=300,320", "pretrain.optimizer.lr=1e-3,3e-3")
    assert (other.shared, other.varied) == (["clean"], ["tokenizer", "pack", "pretrain"])
    assert other.members[0].name == "t.vocab_size300-lr1e-3"
    upto = plan("tokenizer.vocab_size=300,320", stages=["tokenizer"])
    assert (upto.shared, upto.varied) == (["clean"], ["tokenizer"])


def test_more_values_keep_the_members_that_there_are(world):
    few = {member.name for member in plan("pretrain.optimizer.lr=1e-3,3e-3").members}
    more = {member.name for member in plan("pretrain.optimizer.lr=1e-3,2e-3,3e-3").members}
    assert few < more
    drawn = [
        [member.values for member in plan("pretrain.optimizer.lr=log:1e-4..1e-2", count=count, seed=3).members]
        for count in (3, 5)
    ]
    assert drawn[1][:3] == drawn[0] and len({values["pretrain.optimizer.lr"] for values in drawn[1]}) == 5
    assert all(1e-4 <= float(values["pretrain.optimizer.lr"]) <= 1e-2 for values in drawn[1])
    whole = plan("pretrain.steps=linear:10..40", "pretrain.batch_size=4,8", count=6, seed=1).members
    assert all(10 <= int(member.values["pretrain.steps"]) <= 40 for member in whole)
    assert {member.values["pretrain.batch_size"] for member in whole} <= {"4", "8"}


def test_values_may_be_lists_and_texts_with_commas(world):
    found = plan("pretrain.optimizer.betas=[0.9, 0.95],[0.9, 0.999]")
    betas = [member.recipe.stages["pretrain"].optimizer.betas for member in found.members]
    assert [list(pair) for pair in betas] == [[0.9, 0.95], [0.9, 0.999]]
    assert len({member.name for member in found.members}) == 2


def test_a_member_reads_what_the_shared_stages_have_published(world):
    found = plan("pretrain.optimizer.lr=1e-3,3e-3")
    outputs = {name: world / "runs/t" / name / "0123" for name in found.shared}
    recipe = own_recipe(found, found.members[0], outputs)
    assert list(recipe.stages) == ["pretrain"] and recipe.name == "t.lr1e-3"
    parents = nodes(recipe)["pretrain"].parents
    assert parents == {"tokens": "./runs/t/pack/0123", "tokenizer": "./runs/t/tokenizer/0123"}


@pytest.mark.parametrize(
    "words, count, sentence",
    [
        (["pretrain.steps=10"], None, "nothing differs between members"),
        (["pretrain.steps=10,10"], None, "a value is given twice"),
        (["pretrain.steps=10,,20"], None, "one of its values is empty"),
        (["pretrain.steps=10,20", "pretrain.steps=30,40"], None, "is given twice; write all its values in one word"),
        (["pretrain.steps=10,x"], None, "'x'"),
        (["pretrain.steps=linear:1..5"], None, "ranges need --random N"),
        (["pretrain.steps=linear:5..1"], 2, "a range goes from a number to a larger one"),
        (["pretrain.optimizer.lr=log:0..1"], 2, "one by log begins above 0"),
        (["pretrain.steps=10,20"], 3, "only 2 combinations"),
        (["name=a,b"], None, "members of a sweep are named after their values"),
        (["run=1,2"], None, "neither a stage nor a top-level key"),
        (["pretrain.steps=" + ",".join(map(str, range(1, 1003)))], None, "1,002 members, more than 1,000"),
    ],
)
def test_mistakes(world, words, count, sentence):
    with pytest.raises(UserError) as caught:
        plan(*words, count=count)
    assert sentence in str(caught.value)


def test_the_best_is_first_and_what_measured_nothing_is_last():
    results = [
        Result(name, {}, "done", "", {"a.loss": value} if value else {}) for name, value in zip("xyz", (2, 0, 1))
    ]
    assert [result.name for result in ranked(results, Metric("a.loss", False))] == ["z", "x", "y"]
    assert [result.name for result in ranked(results, Metric("a.loss", True))] == ["x", "z", "y"]


@pytest.mark.slow
def test_a_sweep_runs_reports_a_member_that_fails_and_continues(world):
    """A vocabulary that the text cannot fill fails; the others are compared. The second time nothing runs again."""
    command = ["sweep", "r.yaml", "tokenizer", "tokenizer.vocab_size=300,310,60000", "--metric", "tokenizer.vocab_size"]
    runner = CliRunner()
    first = runner.invoke(app, command)
    assert first.exit_code == 1, first.output
    [folder] = world.glob("runs/t.sweep-*")
    content = json.loads((folder / "sweep.json").read_text())
    states = {member["values"]["tokenizer.vocab_size"]: member["state"] for member in content["members"]}
    assert states == {"300": "done", "310": "done", "60000": "failed"}
    table = (folder / "sweep.md").read_text()
    assert "| tokenizer.vocab_size |" in table and "failed" in table
    manifests = list(world.glob("runs/t.vocab_size*/tokenizer/current/manifest.json"))
    assert len(manifests) == 2 and len(list(world.glob("runs/*/clean/current"))) == 1
    times = {path: path.stat().st_mtime_ns for path in manifests}
    assert runner.invoke(app, command).exit_code == 1
    assert {path: path.stat().st_mtime_ns for path in manifests} == times
    lineage = json.loads(manifests[0].read_text())["parents"]["data"]
    assert (manifests[0].parents[1] / lineage["path"]).resolve() == (world / "runs/t/clean/current").resolve()
    assert runner.invoke(app, [*command, "--dry-run"]).exit_code == 0
    pytest.importorskip("plotly")
    page = (folder / "sweep.html").read_text()
    assert 'id="plot-sweep-0"' in page and "t.vocab_size300" in page


def test_on_a_cluster_it_says_what_to_do(world):
    result = CliRunner().invoke(app, ["sweep", "r.yaml", "pretrain.steps=10,20", "--on", "slurm"])
    assert isinstance(result.exception, UserError)
    assert "sbatch --wrap" in str(result.exception) and "alma run r.yaml name=NAME" in str(result.exception)
    assert not (world / "runs").exists()
