"""What sft, reward, dpo and ppo share: the length of a run in epochs."""

import json

import pytest
import tuned
from harness import files_of, stage, succeed

from pipeline.core.config import identity
from pipeline.core.errors import UserError
from pipeline.dpo import Config
from pipeline.train.finetune_config import FinetuneSchedule

KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 10, "sequence_length": 64}


@pytest.mark.parametrize(
    "epochs, rows, steps", [(1, 100, 10), (2, 95, 19), (1.1, 100, 11), (0.3, 100, 3), (0.001, 100, 1), (3, 7, 3)]
)
def test_epochs_in_steps(epochs, rows, steps):
    """Rounded up, so that every row is taken `epochs` times; a float's error is not a step."""
    resolved = Config(**KEYS, epochs=epochs).in_steps(rows)
    assert resolved.steps == steps and resolved.epochs is None


@pytest.mark.parametrize("ratio, steps, warmup", [(0.1, 40, 4), (0.03, 100, 3), (0.01, 5, 1), (1, 7, 7)])
def test_warmup_as_a_share_of_the_steps(ratio, steps, warmup):
    """Rounded up, as transformers' TrainingArguments does."""
    resolved = Config(**KEYS, steps=steps, schedule={"warmup_ratio": ratio}).in_steps(100)
    assert resolved.schedule.warmup_steps == warmup and resolved.schedule.warmup_ratio is None


def test_one_length_and_one_warmup():
    with pytest.raises(ValueError, match="the length of the run is missing; give steps or epochs"):
        Config(**KEYS)
    with pytest.raises(ValueError, match="steps: 3 and epochs: 2 both say how long the run is; remove one"):
        Config(**KEYS, steps=3, epochs=2)
    with pytest.raises(ValueError, match="warmup_steps: 5 and warmup_ratio both say how long the warmup is"):
        FinetuneSchedule(warmup_ratio=0.1, warmup_steps=5)


def test_keys_at_their_default_change_no_fingerprint():
    keys = identity(Config(**KEYS, steps=3))
    assert keys["steps"] == 3 and "epochs" not in keys and "schedule" not in keys


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_run_of_epochs_is_the_run_of_as_many_steps(kind, tmp_path):
    """Also when it is killed in its second epoch."""
    tuned.copy_until(kind, tmp_path)
    small = (f"{kind}.sources.nouns.limit=60", f"{kind}.schedule={{kind: cosine, warmup_ratio: 0.1}}")
    if kind == "sft":
        small = (*small, "sft.packing=false", "sft.max_prompts=0")
    code, text = stage(kind, "tiny.yaml", *small, f"{kind}.steps=~", f"{kind}.epochs=2", cwd=tmp_path, fault="save:3")
    assert code == -9, text
    succeed(kind, "tiny.yaml", *small, f"{kind}.steps=~", f"{kind}.epochs=2", cwd=tmp_path)
    current = tmp_path / "runs/tiny" / kind / "current"
    in_epochs = files_of(current)
    metrics = json.loads((current / "manifest.json").read_text())["metrics"]
    rows = metrics["train_conversations" if kind == "sft" else "train_pairs"]
    steps = -(-2 * rows // 8)
    assert metrics["epochs"] == steps * 8 / rows >= 2
    succeed(kind, "tiny.yaml", *small, f"{kind}.steps={steps}", cwd=tmp_path)
    assert files_of(current) == in_epochs


def test_a_length_that_other_keys_do_not_fit_is_refused(tmp_path):
    """Known only once the rows are."""
    tuned.copy_until("dpo", tmp_path)
    words = ("dpo.steps=~", "dpo.epochs=0.02", "dpo.save.keep_best=true", "dpo.evaluate_every=4")
    code, text = stage("dpo", "tiny.yaml", *words, cwd=tmp_path)
    assert code == 2 and "save.keep_best: no step is both saved" in text and "Traceback" not in text, text


def test_user_errors_name_the_stage():
    with pytest.raises(UserError, match="stage dpo: batch_size 10 is not divisible by 3 data-parallel ranks"):
        Config(**KEYS, kind="dpo", epochs=1).check(3)
