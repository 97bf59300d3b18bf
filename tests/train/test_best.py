"""Which checkpoint is published and when a run stops early; and that a killed run decides like one that was not."""

import json
import math
import shutil

import pytest
import tuned
from harness import files_of, stage, succeed

from pipeline.core.errors import UserError
from pipeline.sft import Config
from pipeline.train.best import Best, Selection


def decisions(values: list[float], metric: str = "loss", **options) -> tuple[int | None, int | None]:
    """(step of the best checkpoint, step at which the run stops) when the metric has these values at steps 1, 2, ..."""
    selection, state = Selection(Best(metric=metric, every_steps=1, **options), "sft"), {}
    for step, value in enumerate(values, 1):
        stops = selection.note(state, step, {metric: value}, None)
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
        if stops:
            return state["best"]["step"], step
    return state["best"]["step"] if "best" in state else None, None


@pytest.mark.parametrize(
    "values, options, expected",
    [
        ([3, 2, 1, 2, 3, 4], {}, (3, None)),
        ([3, 2, 1, 2, 3, 4], {"patience": 2}, (3, 5)),
        ([3, 2, 2, 2], {"patience": 2}, (2, 4)),  # equal is not better
        ([3, 2.95, 2.9, 2.85, 2.8], {"patience": 3, "min_delta": 0.12}, (5, None)),  # slow, but it adds up
        ([3, 2.95, 2.9, 2.89, 2.885], {"patience": 3, "min_delta": 0.12}, (4, 4)),
        ([0.1, 0.5, 0.4, 0.6, 0.2], {"metric": "accuracy"}, (4, None)),
        ([0.5, 0.4, 0.3], {"metric": "rule", "patience": 1}, (1, 2)),
        ([2, 1, 3], {"metric": "loss/books"}, (2, None)),
        ([math.nan, 2, math.inf, 1], {}, (4, None)),
        ([math.nan, math.nan], {"patience": 1}, (None, None)),
    ],
)
def test_what_is_best_and_when_it_stops(values, options, expected):
    assert decisions(values, **options) == expected


def test_a_metric_that_is_not_measured_is_refused():
    with pytest.raises(UserError, match="'acuracy' is not measured; expected one of accuracy, loss"):
        Selection(Best(metric="acuracy", every_steps=1), "dpo").check({"loss": 1.0, "accuracy": 0.5, "weight": 3.0})


def test_keys_that_contradict_each_other():
    keys = {"sources": {"s": {"path": "x"}}, "batch_size": 2, "sequence_length": 64, "steps": 9, "kind": "sft"}
    with pytest.raises(UserError, match="save.keep_best and best both say which checkpoint is the best one"):
        Config(**keys, best={"every_steps": 2}, save={"keep_best": True}).check(1)
    with pytest.raises(UserError, match="best.every_steps: 10 is more than the 9 steps of the run"):
        Config(**keys, best={"every_steps": 10}).check(1)


# No evaluation is better by 100 than the first, so the run stops after the third, at step 6. Which of the three is the
# best depends on the processor's rounding at this rate.
WORDS = (
    "sft.lora={rank: 4}",
    "sft.neftune=5",
    "sft.optimizer.lr=1",
    "sft.steps=16",
    "sft.best={metric: loss, every_steps: 2, patience: 2, min_delta: 100}",
    "sft.max_prompts=0",
    "sft.save={every_steps: 100, keep: 1}",
)


def test_the_best_checkpoint_is_published_also_by_a_run_that_was_killed(tmp_path):
    """With adapters and NEFTune; killed twice, once after the evaluation that stops the run. What is published is the
    model of a run that ends at the best step."""
    folder = tuned.world(tmp_path)
    text = succeed("sft", "tiny.yaml", *WORDS, cwd=folder)
    current = folder / "runs/tiny/sft/current"
    metrics = json.loads((current / "manifest.json").read_text())["metrics"]
    best, steps = metrics["best_step"], metrics["steps"]
    assert steps == 6 and "stopped at step 6: loss has not improved" in text
    evaluations = [line for line in tuned.lines(folder, "sft") if "heldout_loss" in line]
    losses = {line["step"]: line["heldout_loss"] for line in evaluations if line["step"]}
    assert min(losses, key=losses.get) == best and losses[best] == metrics["heldout_loss_after"]
    expected = files_of(current)

    shutil.rmtree(folder / "runs")
    for fault in ("work:5", "publish:1"):
        code, text = stage("sft", "tiny.yaml", *WORDS, cwd=folder, fault=fault)
        assert code == -9, text
    succeed("sft", "tiny.yaml", *WORDS, cwd=folder)
    assert files_of(current) == expected

    succeed("sft", "tiny.yaml", *WORDS, "sft.best=~", f"sft.steps={best}", cwd=folder)
    assert files_of(current)["model/model.safetensors"] == expected["model/model.safetensors"]
