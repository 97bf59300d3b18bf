"""DPO: the loss by hand and with noisy labels, the frozen reference, what it learns, and that a killed run ends as
if it had not been."""

import math
import random
import shutil

import numpy as np
import pytest
import torch
import tuned
from harness import files_of, stage

from pipeline.core.config import identity
from pipeline.dpo import Config
from pipeline.train.loss_preference import Options, Pairs, pair_losses


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_against_cross_entropy_with_soft_labels(smoothing):
    """cDPO is the cross entropy of sigmoid(beta * h) with the label 1 - smoothing (Mitchell, 2023); its gradient
    too."""
    logps, reference = (
        torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.randn(8, generator=torch.Generator().manual_seed(1)),
    )
    pairs = Pairs(logps, reference, torch.ones(8))
    loss, metrics = pair_losses({"sigmoid": 1.0}, pairs, Options(0.5, smoothing))
    h = 0.5 * ((logps[:4] - reference[:4]) - (logps[4:] - reference[4:]))
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(h, torch.full((4,), 1 - smoothing), reduction="sum")
    torch.testing.assert_close(loss.sum(), oracle)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logps)[0], torch.autograd.grad(oracle, logps)[0])
    torch.testing.assert_close(metrics["margin"], h.detach())
    torch.testing.assert_close(metrics["reward_chosen"] - metrics["reward_rejected"], metrics["margin"])


def test_robust_is_dpo_on_average_over_flipped_labels():
    """The property that its paper proves, with half of the pairs flipped at a rate of 0.3."""
    logps, reference = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    flipped = [tensor.view(2, 4).flip(0).flatten() for tensor in (logps, reference)]
    right = pair_losses({"robust": 1.0}, Pairs(logps, reference, torch.ones(8)), Options(0.5, 0.3))[0]
    wrong = pair_losses({"robust": 1.0}, Pairs(*flipped, torch.ones(8)), Options(0.5, 0.3))[0]
    dpo = pair_losses({"sigmoid": 1.0}, Pairs(logps, reference, torch.ones(8)), Options(0.5))[0]
    torch.testing.assert_close(0.7 * right + 0.3 * wrong, dpo)


def test_an_odds_ratio_of_certain_answers_is_finite():
    """fp32 rounds a probability near 1 to 1, whose odds are infinite."""
    logps = torch.tensor([0.0, -1e-9, -3.0, -80.0]).requires_grad_()
    loss, _ = pair_losses({"orpo": 1.0}, Pairs(logps, None, torch.ones(4)), Options(0.1))
    assert torch.isfinite(loss).all() and torch.isfinite(torch.autograd.grad(loss.sum(), logps)[0]).all()


KEYS = {"sources": {"s": {"path": "x"}}, "batch_size": 8, "sequence_length": 64, "steps": 1}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"loss": "sft"}, "needs a loss that compares both answers"),
        ({"loss": {"sft": 1.0}}, "needs a loss that compares both answers"),
        ({"loss": {}}, "needs a loss that compares both answers"),
        ({"loss": {"sigmoid": 0}}, "greater than 0"),
        ({"loss": "robust"}, "robust needs label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "applies only to loss: sigmoid, sigmoid_norm, robust"),
        ({"gamma": 0.3}, "gamma: 0.3 applies only to loss: simpo"),
    ],
)
def test_losses_that_make_no_sense_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        Config(**KEYS, **keys)


def test_one_loss_in_two_spellings_has_one_identity():
    """And the default none, so that old recipes keep their fingerprints."""
    assert identity(Config(**KEYS, loss={"ipo": 1.0})) == identity(Config(**KEYS, loss="ipo"))
    assert not {"loss", "gamma", "beta", "label_smoothing"} & identity(Config(**KEYS)).keys()


def test_it_starts_at_the_reference_and_learns():
    found = tuned.metrics(tuned.plain(), "dpo")
    assert abs(found["heldout_margin_before"]) < 1e-5 and abs(found["heldout_loss_before"] - math.log(2)) < 1e-5
    assert (
        found["heldout_margin_after"] > 0.05
        and found["heldout_accuracy_after"] > 0.7
        and found["heldout_loss_after"] < found["heldout_loss_before"]
    )
    before, after = (
        found[f"heldout_logp_chosen_{when}"] - found[f"heldout_logp_rejected_{when}"] for when in ("before", "after")
    )
    for name in ("loss", "margin"):
        low, high = found[f"heldout_{name}_change_interval"]
        assert low < found[f"heldout_{name}_after"] - found[f"heldout_{name}_before"] < high and low * high > 0
    # margins are beta times what the log-probabilities moved
    assert after - before == pytest.approx(found["heldout_margin_after"] / 0.1, abs=1e-3)


def test_reference_is_the_input_model():
    """Log-probabilities of the first training step's metrics against transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.data.chat.chat_sources import PreferenceSource
    from pipeline.data.chat.conversations import load_pairs

    folder = tuned.plain() / "runs/tiny/sft/current/model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    source = PreferenceSource(
        path=str(tuned.plain() / "rows.jsonl"), prompt="What is a {words} {noun}?", chosen="{kind}", rejected="{wrong}"
    )
    _, heldout, _ = load_pairs({"nouns": source}, 0.1)
    total = {"chosen": 0.0, "rejected": 0.0}
    for pair in heldout:
        for key in total:
            turns = [*pair.prompt, getattr(pair, key)]
            made = tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, mask = torch.tensor([made["input_ids"]]), torch.tensor(made["assistant_masks"])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            total[key] += float(logps[mask[1:] == 1].sum())
    found = tuned.metrics(tuned.plain(), "dpo")
    for key, value in total.items():
        assert value / len(heldout) == pytest.approx(found[f"heldout_logp_{key}_before"], abs=1e-4)


def test_killed_and_resumed(tmp_path):
    """work:1 is after the reference of the training pairs, so that of the held-out ones is computed by the next run."""
    tuned.killed_like_plain(
        "dpo", tmp_path, ["save:1", "work:1", "work:6", "save:1"], kill_after=random.uniform(0.2, 2.5)
    )


def test_killed_in_publish(tmp_path):
    tuned.killed_like_plain("dpo", tmp_path, ["publish:1", "publish:2"])


def test_labels_may_be_noisy(tmp_path):
    tuned.copy_until("dpo", tmp_path)
    code, text = stage("dpo", "tiny.yaml", "dpo.label_smoothing=0.5", cwd=tmp_path)
    assert code == 2 and "label_smoothing" in text and "less than 0.5" in text
    code, text = stage("dpo", "tiny.yaml", "dpo.sources.nouns.rejected=", cwd=tmp_path)
    assert (
        code == 2
        and "rejected is missing: give templates for all of prompt, chosen and rejected" in text
        and "Traceback" not in text
    )
    tuned.succeed("dpo", "tiny.yaml", "dpo.label_smoothing=0.1", "dpo.steps=2", cwd=tmp_path)
    np.testing.assert_allclose(tuned.metrics(tmp_path, "dpo")["heldout_loss_before"], math.log(2), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("dpo.loss=sigmoid_norm", "dpo.beta=2"),
        ("dpo.loss=robust", "dpo.label_smoothing=0.2"),
        ("dpo.loss=ipo",),
        ("dpo.loss=hinge",),
        ("dpo.loss=apo_zero",),
        ("dpo.loss=apo_down",),
        ("dpo.loss=simpo", "dpo.beta=2"),
        ("dpo.loss=orpo",),
        ("dpo.loss={sigmoid: 1.0, sft: 0.2}", "dpo.micro_batch=2"),
    ],
    ids=str,
)
def test_every_loss_killed_twice_and_resumed(words, tmp_path):
    """Bit-equal to the run that was left alone, whose reference was computed by that run itself."""
    found = []
    for name, faults in (("alone", []), ("killed", ["work:5", "save:2"])):
        folder = tuned.copy_until("dpo", tmp_path / name)
        shutil.rmtree(folder / "runs/tiny/cache")
        for fault in faults:
            code, text = stage("dpo", "tiny.yaml", "dpo.steps=10", *words, cwd=folder, fault=fault)
            assert code == -9, text
        tuned.succeed("dpo", "tiny.yaml", "dpo.steps=10", *words, cwd=folder)
        metrics = tuned.metrics(folder, "dpo")
        numbers = {key: value for key, value in metrics.items() if "per_second" not in key}
        found.append((files_of(folder / "runs/tiny/dpo/current"), numbers))
    assert found[0] == found[1]
