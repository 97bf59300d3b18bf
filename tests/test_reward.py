"""The reward model: it ranks, its scores do not depend on padding, they are calibrated, and a killed run ends as if
it had not been."""

import math
import random

import numpy as np
import pytest
import torch
import tuned

from pipeline.core.intervals import wilson
from pipeline.models import build
from pipeline.train.loss_preference import bradley_terry
from pipeline.train.scores import reward_scores


@pytest.fixture(scope="module")
def model():
    return build.load(tuned.plain() / "runs/tiny/reward/current/model", head="reward")


@pytest.fixture(scope="module")
def answers():
    """Token rows of the training pairs, (chosen, rejected), made again as the stage made them."""
    from transformers import AutoTokenizer

    from pipeline.data.chat.chat_sources import PreferenceSource
    from pipeline.data.chat.conversations import load_pairs
    from pipeline.data.chat.template import Chat
    from pipeline.train.preference_data import encode_pairs

    source = PreferenceSource(
        path=str(tuned.plain() / "rows.jsonl"), prompt="What is a {words} {noun}?", chosen="{kind}", rejected="{wrong}"
    )
    train, _, ledger = load_pairs({"nouns": source}, 0.1)
    arrays = encode_pairs(train, "train", Chat(AutoTokenizer.from_pretrained(tuned.plain() / "base/model")), 64, ledger)
    return arrays["train.chosen"], arrays["train.rejected"]


def test_bradley_terry_by_hand():
    scores = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, -1.0])  # chosen 1, 0, 2; rejected 0.5, 0, -1
    loss, metrics = bradley_terry(scores)
    assert abs(float(loss) - sum(math.log(1 + math.exp(-d)) for d in (0.5, 0.0, 3.0))) < 1e-6
    assert float(metrics["accuracy"]) == 2.5 and float(metrics["margin"]) == 3.5
    with_margin, _ = bradley_terry(scores, torch.tensor([0.5, 0.0, 1.0]), centering=0.1)
    assert (
        abs(float(with_margin) - sum(math.log(1 + math.exp(-d)) for d in (0.0, 0.0, 2.0)) - 0.1 * (1.5**2 + 0 + 1))
        < 1e-6
    )


def test_it_learns_to_rank():
    found = tuned.metrics(tuned.plain(), "reward")
    assert (
        found["heldout_accuracy_before"] < 0.65
        and found["heldout_accuracy_after"] > 0.65
        and found["heldout_loss_after"] < found["heldout_loss_before"]
    )
    low, high = found["heldout_accuracy_interval"]
    assert low < found["heldout_accuracy_after"] <= high


def test_wilson():
    """Against the published example values of the interval: 0 of 10, 5 of 10, 81 of 263 (Newcombe, 1998, table I)."""
    for share, count, expected in (
        (0.0, 10, (0.0, 0.2775)),
        (0.5, 10, (0.2366, 0.7634)),
        (81 / 263, 263, (0.2553, 0.3662)),
    ):
        np.testing.assert_allclose(wilson(share, count), expected, atol=5e-5)


def test_scores_are_calibrated_and_survive_loading(model, answers):
    rows = [answers[kind][i].tolist() for kind in (0, 1) for i in range(len(answers[0]))]
    scores = reward_scores(model, rows)
    assert abs(float(scores.mean())) < 1e-3 and abs(float(scores.std(correction=0)) - 1) < 1e-3
    chosen, rejected = scores.chunk(2)
    assert float((chosen > rejected).float().mean()) > 0.65


def test_scores_do_not_depend_on_padding(model, answers):
    rows = [answers[0][i].tolist() for i in range(12)] + [answers[0][0].tolist() + answers[0][1].tolist()]
    scores = reward_scores(model, rows)
    np.testing.assert_allclose(reward_scores(model, rows, batch=1), scores, atol=1e-5)
    np.testing.assert_allclose(reward_scores(model, rows[::-1], batch=5), scores.flip(0), atol=1e-5)
    # padding on the left, by transformers: the last token is still the last
    from pipeline.rl.rollout import left_pad

    input_ids, mask, positions = left_pad(rows, model.config.pad_token_id)
    with torch.no_grad():
        raw = model(input_ids=input_ids, attention_mask=mask, position_ids=positions).logits.squeeze(-1)
    np.testing.assert_allclose(raw * model.config.alma_reward_gain + model.config.alma_reward_bias, scores, atol=1e-5)
    changed = [row[:-1] + [5] for row in rows]
    # read at the end of the turn, not before it
    assert not np.allclose(reward_scores(model, changed), scores, atol=1e-3)


def test_scores_need_no_padding_token(model):
    """correctness 40: the last token is found by length."""
    import copy

    rows = [[5, 6, 7], [8, 9], [7]]
    other = copy.deepcopy(model)
    expected = reward_scores(other, rows)
    for pad in (None, 9, 7):
        other.config.pad_token_id = pad
        np.testing.assert_allclose(reward_scores(other, rows), expected, atol=1e-6)


def test_killed_and_resumed(tmp_path):
    tuned.killed_like_plain(
        "reward", tmp_path, ["save:1", "work:6", "save:1", "publish:1"], kill_after=random.uniform(0.2, 2.5)
    )
