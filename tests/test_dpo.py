"""DPO: the loss by hand and with noisy labels, the frozen reference, what it learns, and that a killed run ends as
if it had not been."""

import math
import random

import numpy as np
import pytest
import torch
import tuned
from harness import stage

from pipeline.train.loss_preference import dpo


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_against_cross_entropy_with_soft_labels(smoothing):
    """cDPO is the cross entropy of sigmoid(beta * h) with the label 1 - smoothing (Mitchell, 2023); its gradient
    too."""
    logps, reference = (
        torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.randn(8, generator=torch.Generator().manual_seed(1)),
    )
    loss, metrics = dpo(logps, reference, beta=0.5, label_smoothing=smoothing)
    h = 0.5 * ((logps[:4] - reference[:4]) - (logps[4:] - reference[4:]))
    oracle = torch.nn.functional.binary_cross_entropy_with_logits(h, torch.full((4,), 1 - smoothing), reduction="sum")
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], torch.autograd.grad(oracle, logps)[0])
    assert math.isclose(float(metrics["margin"]), h.sum().item(), rel_tol=1e-5)
    assert float(metrics["reward_chosen"] - metrics["reward_rejected"]) == pytest.approx(
        float(metrics["margin"]), abs=1e-5
    )


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
    """work:5 falls into the reference (12 units of training pairs, 2 held out), so its units are taken up too;
    work:9 of the next run into the steps."""
    tuned.killed_like_plain(
        "dpo", tmp_path, ["save:1", "work:5", "work:16", "save:1"], kill_after=random.uniform(0.2, 2.5)
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
