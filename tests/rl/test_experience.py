"""Scores of responses and the order of prompts."""

import ppo_world
import pytest
import torch
from ppo_world import PAD, samples_of


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Models, prompts and state as the stage has them before its first iteration."""
    ppo_world.write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ppo_world.inside(tmp_path, tmp_path)


def test_scores_do_not_depend_on_padding(inside):
    """5, 12: against the reward model alone on each row; responses whose last token is the pad id are read at that
    token all the same."""
    from pipeline.rl.scoring import score

    models, *_ = inside
    made = samples_of([(5, 4), (1, 6), (9, 1), (3, 5)])
    made[3].response_ids[-1] = PAD
    models.config = models.config.model_copy(update={"rollout": models.config.rollout.model_copy(update={"batch": 3})})
    scores = score(models, made, [None] * 4)
    with torch.no_grad():
        for sample, found in zip(made, scores, strict=True):
            hidden = models.reward.model(torch.tensor([sample.prompt_ids + sample.response_ids])).last_hidden_state[
                0, -1
            ]
            assert found == pytest.approx(2 * models.reward.score(hidden).item() - 1, abs=1e-6)


def test_prompts_are_drawn_once_a_pass():
    """39: a pure function of (seed, index)."""
    from pipeline.rl.experience import draw

    passes = [[draw(0, index, 10) for index in range(10 * k, 10 * k + 10)] for k in range(2)]
    assert [sorted(drawn) for drawn in passes] == [list(range(10))] * 2 and passes[0] != passes[1]
    assert [draw(1, index, 10) for index in range(10)] != passes[0]
