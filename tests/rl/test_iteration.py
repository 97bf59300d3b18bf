"""One iteration of PPO inside this process: what changes and what does not."""

import math

import ppo_world
import pytest
import torch


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Models, prompts and state as the stage has them before its first iteration."""
    ppo_world.write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return ppo_world.inside(tmp_path, tmp_path)


def test_the_reference_and_the_reward_model_stay(inside):
    """38, 41: bitwise, over five updates; neither has gradients or an optimizer."""
    from pipeline.rl.iteration import iterate

    models, pool, _, state = inside
    frozen = {
        name: {key: value.clone() for key, value in model.state_dict().items()}
        for name, model in (("reference", models.reference), ("reward", models.reward))
    }
    start = {key: value.clone() for key, value in models.policy.model.state_dict().items()}
    for state["step"] in range(2):
        iterate(models, pool, state)
    for name, model in (("reference", models.reference), ("reward", models.reward)):
        assert all(torch.equal(value, frozen[name][key]) for key, value in model.state_dict().items())
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not all(torch.equal(value, start[key]) for key, value in models.policy.model.state_dict().items())


def test_each_sample_once_an_epoch_in_a_fresh_order(inside, monkeypatch):
    """29, 4: and the ids that are trained on are the ids that were sampled, though their text would be read back as
    others."""
    from pipeline.rl import experience, iteration

    models, pool, _, state = inside
    seen, sampled = [], []
    monkeypatch.setattr(
        models.value,
        "step",
        lambda batches, lr: (
            seen.append(batches)
            or {"loss": 0.0, "grad_norm": 0.0, "value_clip_fraction": 0.0, "value_mean": 0.0, "applied": True}
        ),
    )
    collect = experience.collect
    monkeypatch.setattr(iteration, "collect", lambda *a, **k: sampled.extend(collect(*a, **k)) or sampled)
    iteration.iterate(models, pool, state)
    wanted = sorted((sample.prompt_ids, sample.response_ids) for sample in sampled)
    orders = []
    for epoch in range(2):
        rows = []
        for batches in seen[2 * epoch : 2 * epoch + 2]:
            for batch in batches:
                length = batch["mask"].shape[1]
                for ids, attended, mask in zip(
                    batch["inputs"]["input_ids"],
                    batch["inputs"]["attention_mask"].bool(),
                    batch["mask"].bool(),
                    strict=True,
                ):
                    prompt, response = slice(None, -length), slice(-length, None)
                    rows.append((ids[prompt][attended[prompt]].tolist(), ids[response][mask].tolist()))
        assert sorted(rows) == wanted
        orders.append(rows)
    assert orders[0] != orders[1]


def test_an_update_that_is_no_number_is_skipped_and_counted(inside, monkeypatch):
    """35: weights of the policy untouched, the value model goes on."""
    from pipeline.rl import advantages as module
    from pipeline.rl.iteration import iterate

    models, pool, _, state = inside
    start = {key: value.clone() for key, value in models.policy.model.state_dict().items()}
    monkeypatch.setattr(module, "whiten", lambda values, mask, shift_mean=True: values * math.nan)
    stats = iterate(models, pool, state)
    assert state["skipped_updates"] == stats["skipped_updates"] == stats["policy_updates"] == 4
    assert all(torch.equal(value, start[key]) for key, value in models.policy.model.state_dict().items())
