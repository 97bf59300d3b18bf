"""The average of the last checkpoints: that it is what it says, that it is published only if it is better, and that a
killed run ends as one that was not."""

import json
import random
import shutil

import pytest
import torch
import tuned
from harness import files_of, launch, stage, succeed
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.core import checkpoint_folder
from pipeline.core.errors import UserError
from pipeline.sft import Config
from pipeline.train.average import Average

KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 2, "sequence_length": 64, "kind": "sft"}


def test_steps_and_weights():
    average = Average(every_steps=10, last=3)
    assert average.steps(45) == [25, 35, 45] and average.weights() == pytest.approx([1 / 3] * 3)
    assert Average(every_steps=10, last=3, decay=0.5).weights() == pytest.approx([1 / 7, 2 / 7, 4 / 7])


def test_keys_that_contradict_each_other():
    with pytest.raises(UserError, match="average: 3 checkpoints with 10 steps between them need more than 20 steps"):
        Config(**KEYS, steps=20, average={"every_steps": 10, "last": 3}).check(1)
    Config(**KEYS, steps=21, average={"every_steps": 10, "last": 3}).check(1)
    for keys, name in (({"best": {"every_steps": 2}}, "best"), ({"save": {"keep_best": True}}, "save.keep_best")):
        with pytest.raises(UserError, match=f"average and {name} both say what is published"):
            Config(**KEYS, **keys, steps=21, average={"every_steps": 2}).check(1)


def checkpoint_weights(run, step: int) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint of any layout, flat, by their names in the published model."""
    fragments: dict[str, dict[int, torch.Tensor]] = {}
    for path in checkpoint_folder.path_of(run, step).glob("model-*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, _, rest = key.partition("/")
                name, _, start = rest.partition("@")
                if kind == "weight":
                    fragments.setdefault(name, {})[int(start)] = file.get_tensor(key)
    return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in fragments.items()}


def compare(run, average: dict, count: int = 4) -> None:
    """The published weights, and the sum in fp64 of those in the checkpoints."""
    published = load_file(run / "model/model.safetensors")
    saved = [checkpoint_weights(run, step) for step in average["steps"]]
    weights = [1 / count] * count if average["published"] else [0] * (count - 1) + [1]
    assert len(saved) == count and len(published) > 10
    for name, value in published.items():
        expected = sum(weight * own[name].double() for weight, own in zip(weights, saved, strict=True))
        torch.testing.assert_close(value.double().flatten(), expected, atol=1e-7, rtol=1e-6)


# Answers are drawn at random, so no weights have a loss of 0, and with a rate far too high the last steps wander around
# the best ones: their average is better by 0.02 to 0.05 for each of four draws. At the start the loss falls at each step.
WANDERING = ("sft.optimizer.lr=0.03", "sft.steps=40", "sft.max_prompts=0", "sft.average={every_steps: 3, last: 4}")
FALLING = ("sft.optimizer.lr=2e-3", "sft.steps=20", "sft.max_prompts=0", "sft.average={every_steps: 6, last: 4}")


def random_answers(folder):
    tuned.world(folder)
    draw = random.Random(1)
    rows = [row | {"kind": draw.choice(sorted(tuned.KINDS))} for row in tuned.rows()]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wandering(tmp_path_factory):
    folder = random_answers(tmp_path_factory.mktemp("average"))
    return folder, succeed("sft", "tiny.yaml", *WANDERING, cwd=folder)


def test_a_better_average_is_published(wandering):
    folder, text = wandering
    found = tuned.metrics(folder, "sft")
    average = found["average"]
    assert average["steps"] == [31, 34, 37, 40] and average["published"], average
    assert average["loss"] < average["last_loss"] and "the average is published" in text
    assert found["heldout_loss_after"] == average["loss"]
    compare((folder / "runs/tiny/sft/current").resolve(), average)


@pytest.mark.slow
def test_checkpoints_have_the_weights_of_shorter_runs(wandering, tmp_path):
    """The oldest of those that are averaged, against the model of a run of so many steps: the rate is constant."""
    random_answers(tmp_path)
    shorter = [word for word in WANDERING if "average" not in word and "steps=" not in word]
    succeed("sft", "tiny.yaml", *shorter, "sft.steps=31", cwd=tmp_path)
    expected = load_file(tmp_path / "runs/tiny/sft/current/model/model.safetensors")
    saved = checkpoint_weights((wandering[0] / "runs/tiny/sft/current").resolve(), 31)
    assert len(expected) > 10
    for name, value in expected.items():
        assert torch.equal(saved[name], value.flatten()), name


@pytest.mark.slow
def test_a_worse_average_is_not(wandering, tmp_path):
    shutil.copytree(wandering[0], tmp_path, symlinks=True, dirs_exist_ok=True)
    text = succeed("sft", "tiny.yaml", *FALLING, cwd=tmp_path)
    found = tuned.metrics(tmp_path, "sft")
    average = found["average"]
    assert average["steps"] == [2, 8, 14, 20] and not average["published"] and "the last one is published" in text
    assert found["heldout_loss_after"] == average["last_loss"] <= average["loss"]
    compare((tmp_path / "runs/tiny/sft/current").resolve(), average)


@pytest.mark.slow
def test_killed_and_resumed(wandering, tmp_path):
    """Also after the last step, when it averages."""
    random_answers(tmp_path)
    for fault in ("work:36", "publish:1"):
        code, text = stage("sft", "tiny.yaml", *WANDERING, cwd=tmp_path, fault=fault)
        assert code == -9, text
    succeed("sft", "tiny.yaml", *WANDERING, cwd=tmp_path)
    expected, found = (files_of(where / "runs/tiny/sft/current/model") for where in (wandering[0], tmp_path))
    assert expected == found
    assert tuned.metrics(tmp_path, "sft")["average"] == tuned.metrics(wandering[0], "sft")["average"]


TWO_RANKS = """
import json
import sys
from pipeline.core.recipe import load
from pipeline.core.stage import run_stage
from pipeline.core import distributed
words = [f"sft.parallel.{sys.argv[1]}", "sft.micro_batch=2", "sft.run.processes=2", *json.loads(sys.argv[2])]
run_stage(load("tiny.yaml", words), "sft")
distributed.barrier()
distributed.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zero=null", "zero=1", "zero=2", "zero=3", "shard=full"])
def test_on_two_ranks_like_one_process(layout, tmp_path):
    """At a rate at which rounding does not grow: the two held-out losses within 1e-5, the weights in each checkpoint
    that is averaged and the published ones 1e-4. The published ones are the average of the run's own checkpoints."""
    words = ["sft.steps=12", "sft.optimizer.lr=1e-3", "sft.max_prompts=0", "sft.average={every_steps: 2, last: 3}"]
    one, two = (tuned.world(tmp_path / name) for name in ("one", "two"))
    succeed("sft", "tiny.yaml", *words, cwd=one)
    (two / "two.py").write_text(TWO_RANKS)
    launch(2, "two.py", layout, json.dumps(words), cwd=two)
    averages = [tuned.metrics(folder, "sft")["average"] for folder in (one, two)]
    for key in ("loss", "last_loss"):
        assert averages[0][key] == pytest.approx(averages[1][key], abs=1e-5)
    assert averages[0]["published"] == averages[1]["published"]
    runs = [(folder / "runs/tiny/sft/current").resolve() for folder in (one, two)]
    assert averages[0]["steps"] == averages[1]["steps"] == [8, 10, 12]
    for step in (8, 10, 12):
        saved = [checkpoint_weights(run, step) for run in runs]
        assert saved[0].keys() == saved[1].keys()
        for name, value in saved[0].items():
            torch.testing.assert_close(value, saved[1][name], atol=1e-4, rtol=0, msg=f"{name}, step {step}")
    for run, average in zip(runs, averages, strict=True):
        compare(run, average, count=3)
    models = [load_file(run / "model/model.safetensors") for run in runs]
    assert models[0].keys() == models[1].keys()
    for name, value in models[0].items():
        torch.testing.assert_close(value, models[1][name], atol=1e-4, rtol=0)
