"""How long a run is, said in four ways; warmup in tokens; and schedules that follow."""

import json

import pytest
import tiny
from harness import files_of, stage, succeed

from pipeline.core.errors import UserError
from pipeline.pretrain import Config
from pipeline.train import train_length
from pipeline.train.config import Optimizer, Schedule
from pipeline.train.schedule import learning_rate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("horizon")
    tiny.write_inputs(folder)
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    return folder


def published(folder, runs):
    return folder / runs / "tiny" / "pretrain" / "current"


def lines(folder, runs) -> list[dict]:
    return [
        line
        for line in map(json.loads, (published(folder, runs) / "metrics.jsonl").read_text().splitlines())
        if "lr" in line
    ]


@pytest.mark.parametrize(
    "words, steps, warmup",
    [
        (["pretrain.tokens=1025"], 5, 2),  # a step is 256 tokens, and no fewer are read than asked for
        (["pretrain.tokens=1.024e3", "pretrain.schedule.warmup_steps=0", "pretrain.schedule.warmup_tokens=700"], 4, 3),
        (["pretrain.tokens_per_parameter=0.05"], 8, 2),  # of 39,680 parameters: 1,984 tokens
    ],
)
def test_tokens_become_steps(world, words, steps, warmup):
    runs = "-".join(words).replace("/", "")[:60]
    said = succeed("pretrain", "recipe.yaml", f"output={runs}", "pretrain.steps=~", *words, cwd=world)
    found = lines(world, runs)
    assert [line["step"] for line in found] == list(range(1, steps + 1)) and f"= {steps} steps x 8 rows x 32" in said
    expected = [learning_rate(Schedule(kind="cosine", warmup_steps=warmup), 3e-3, step, steps) for step in range(steps)]
    assert [line["lr"] for line in found] == pytest.approx(expected)


def test_time_becomes_steps_once_and_is_kept_over_kills(world):
    """Killed before and after it is settled; an hour is then cut to 30 steps in the file that decides. A second run
    that has the file from its start ends in the same bytes."""
    words = (
        "pretrain.steps=~",
        "pretrain.time=1h",
        "pretrain.save.every_steps=7",
        "pretrain.save.asynchronous=false",
        "pretrain.heldout_rows=2",
        "pretrain.optimizer.lr=1e-3",
    )
    code, _ = stage("pretrain", "recipe.yaml", "output=timed", *words, cwd=world, fault="work:9")
    assert code == -9
    code, said = stage("pretrain", "recipe.yaml", "output=timed", *words, cwd=world, fault="work:15")
    assert code == -9 and "resuming from step-000007" in said
    (partial,) = (world / "timed/tiny/pretrain").glob("*.partial")
    kept = json.loads((partial / "horizon.json").read_text())
    assert (
        kept["hold"] == 20
        and kept["steps"] == pytest.approx(20 + kept["seconds_left"] / kept["seconds_per_step"], abs=1)
        and 3000 < kept["seconds_left"] < 3600
    )
    assert f"1h is {kept['steps']:,} steps" in said
    kept["steps"] = 30
    (partial / "horizon.json").write_text(json.dumps(kept))
    said = succeed("pretrain", "recipe.yaml", "output=timed", *words, cwd=world)
    assert "resuming from step-000021" in said
    found = lines(world, "timed")
    assert found[-1]["step"] == kept["steps"]
    assert [line["lr"] for line in found[:20]] == pytest.approx([5e-4] + [1e-3] * 19), (
        "warmup, then the peak as long as the end is not known"
    )
    assert found[-1]["lr"] < found[20]["lr"] <= 1e-3

    code, _ = stage("pretrain", "recipe.yaml", "output=again", *words, cwd=world, fault="work:1")
    (partial,) = (world / "again/tiny/pretrain").glob("*.partial")
    (partial / "horizon.json").write_text(json.dumps(kept))
    succeed("pretrain", "recipe.yaml", "output=again", *words, cwd=world)
    assert files_of(published(world, "again")) == files_of(published(world, "timed"))


def test_a_warmup_in_tokens_longer_than_the_run_is_said(capsys):
    keys = {"kind": "pretrain", "batch_size": 8, "sequence_length": 32, "seed": 0, "inputs": {}}
    schedule = {"warmup_tokens": 2561}
    known = Config(**keys, tokens=2560, schedule=schedule)
    assert "a warmup of 11 steps is longer than the run of 10" in known.warnings()[0]
    by_size = Config(**keys, tokens_per_parameter=2, schedule=schedule)
    assert by_size.warnings() == []
    train_length.say_warnings(by_size, train_length.in_steps(by_size, 1280))
    assert "pretrain: WARNING: schedule: a warmup of 11 steps" in capsys.readouterr().out


def test_a_rollback_at_the_step_that_would_settle_puts_it_off(tmp_path):
    """Times are measured anew after a rollback (loop.py): a step that has none yet decides nothing, and no learning
    rate of the steps so far depends on the end."""
    settings = Config(kind="pretrain", time="1h", batch_size=8, sequence_length=32, seed=0, inputs={})
    output = type("Output", (), {"path": tmp_path, "is_main": True, "spent": lambda self: 100.0})()
    found = train_length.TrainingLength(settings, output, 0)
    assert found.settle(20, None, 0.0) is None and found.steps is None
    assert "3,523 steps" in found.settle(23, 1.0, 0.0)
    again = train_length.TrainingLength(settings, output, 10)
    assert (
        again.steps == found.steps == 3523
        and [again.learning_rate(step) for step in (21, 23)] == [3e-4, 3e-4]
        and again.learning_rate(24) < 3e-4
    )


@pytest.mark.parametrize("text, seconds", [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5d", 129600), ("45s", 45)])
def test_lengths_of_time(text, seconds):
    assert train_length.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "words, said",
    [
        (["pretrain.tokens=100"], "2 training lengths (steps, tokens)"),
        (["pretrain.steps=~"], "give one of steps, tokens, tokens_per_parameter, time"),
        (["pretrain.steps=~", "pretrain.time=soon"], "'soon' is not a duration"),
        (["pretrain.schedule.warmup_tokens=100"], "warmup_steps 2 and warmup_tokens 100"),
        (["pretrain.schedule.decay_ratio=0.5"], "decay_ratio: 0.5 applies only to kind: wsd"),
        (["pretrain.schedule={kind: wsd, decay_ratio: 0.5, decay_steps: 2}"], "decay_steps both"),
        (["pretrain.schedule={kind: constant, min_ratio: 0.5}"], "min_ratio: 0.5 has no effect with kind: constant"),
        (["pretrain.optimizer.momentum=0.5"], "momentum: 0.5 applies only to kind: muon"),
    ],
)
def test_mistakes_are_one_sentence(world, words, said):
    code, text = stage("pretrain", "recipe.yaml", "output=wrong", *words, cwd=world)
    assert code == 2 and said in text and "Traceback" not in text and text.count("error:") == 1, text


def test_a_horizon_behind_the_checkpoint_is_refused(world):
    code, _ = stage(
        "pretrain",
        "recipe.yaml",
        "output=behind",
        "pretrain.steps=~",
        "pretrain.tokens=1536",
        "pretrain.save.asynchronous=false",
        cwd=world,
        fault="work:5",
    )
    assert code == -9
    code, said = stage(
        "pretrain", "recipe.yaml", "output=behind", "pretrain.steps=~", "pretrain.tokens=512", "--fork", cwd=world
    )
    assert code == 2 and "is at step-000004 already and the recipe asks for 2 steps" in said, said
    # what only the stage itself can tell: the run that it was forked from is as it was (correctness 48)
    before = sorted(path.name for path in (world / "behind/tiny/pretrain").iterdir())
    words = ("pretrain.steps=~", "pretrain.tokens_per_parameter=0.001")
    code, said = stage("pretrain", "recipe.yaml", "output=behind", *words, "--fork", cwd=world)
    assert code == 2 and "is at step 4" in said and "asks for 1 step;" in said, said
    assert sorted(path.name for path in (world / "behind/tiny/pretrain").iterdir()) == before


def test_keys_at_their_default_may_stand():
    """The chain hands stages a recipe in which everything is written out."""
    Schedule(kind="cosine", decay_ratio=0.2), Schedule(kind="constant", min_ratio=0.1), Optimizer(momentum=0.95)
    assert Config.model_fields["steps"].default is None


def test_a_decay_of_so_many_steps():
    at = [learning_rate(Schedule(kind="wsd", decay_steps=4, min_ratio=0.0), 1.0, step, 10) for step in range(10)]
    assert at == [1.0] * 7 + [0.75, 0.5, 0.25]
    assert (
        learning_rate(Schedule(kind="cosine"), 1.0, 50, 100, hold=60)
        == 1.0
        > learning_rate(Schedule(kind="cosine"), 1.0, 61, 100, hold=60)
    )


def test_lengths_that_are_none_are_refused():
    with pytest.raises(ValueError, match="is not a duration"):
        train_length.seconds_of("2 weeks")
    with pytest.raises(UserError, match="beyond|behind|at step"):
        train_length.TrainingLength(type("C", (), {"steps": 3, "time": None, "kind": "pretrain"}), None, 4)
