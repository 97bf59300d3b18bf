"""One iteration of PPO inside this process: what changes and what does not."""

import math

import ppo_world
import pytest
import torch

LR = 3e-3  # of the policy in ppo_world.py


@pytest.fixture
def world(tmp_path, monkeypatch):
    ppo_world.write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def inside(world):
    """Models, prompts and state as the stage has them before its first iteration."""
    return ppo_world.inside(world, world)


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
        iterate(models, pool, state, LR)
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
    iteration.iterate(models, pool, state, LR)
    wanted = sorted((sample.prompt_ids, sample.response_ids) for sample in sampled)
    orders = []
    for epoch in range(2):
        rows = []
        for batches in seen[2 * epoch : 2 * epoch + 2]:
            for batch in batches:
                for ids, mask in zip(batch["inputs"]["input_ids"], batch["mask"].bool(), strict=True):
                    start, end = (mask.nonzero()[[0, -1], 0] + 1).tolist()
                    rows.append((ids[:start].tolist(), ids[start : end + 1].tolist()))
        assert sorted(rows) == wanted
        orders.append(rows)
    assert orders[0] != orders[1]


def test_one_learning_rate_from_the_loop_is_that_of_both_models(world, monkeypatch):
    """The policy's is the one that the loop gives; the value model's follows by the ratio of the two peaks."""
    from pipeline.rl.iteration import Iterations

    models, pool, _, state = ppo_world.inside(world, world, ["ppo.steps=4", "ppo.value_optimizer={lr: 1e-2}"])
    used = {}
    for name, engine in (("policy", models.policy), ("value", models.value)):
        step = engine.step
        monkeypatch.setattr(
            engine,
            "step",
            lambda batches, lr, *rest, name=name, step=step: used.update({name: lr}) or step(batches, lr, *rest),
        )
    iterations = Iterations(models, pool)
    iterations.begin(state | {"skipped": 0}, "run")
    stats = iterations.step(0, 1e-4, None)
    assert (stats["lr"], stats["value_lr"]) == (used["policy"], used["value"]) == pytest.approx((1e-4, 1e-4 * 10 / 3))


def test_an_update_that_is_no_number_is_skipped_and_counted(inside, monkeypatch):
    """35: weights of the policy untouched, the value model goes on."""
    from pipeline.rl import advantages as module
    from pipeline.rl.iteration import iterate

    models, pool, _, state = inside
    start = {key: value.clone() for key, value in models.policy.model.state_dict().items()}
    monkeypatch.setattr(module, "whiten", lambda values, mask, shift_mean=True: values * math.nan)
    stats = iterate(models, pool, state, LR)
    assert state["skipped_updates"] == stats["skipped_updates"] == stats["policy_updates"] == 4
    assert all(torch.equal(value, start[key]) for key, value in models.policy.model.state_dict().items())


def test_without_their_adapters_the_trained_models_are_reference_and_reward_model(world):
    """41: bitwise those of the parents' folders, after two iterations, and no copy of a model is kept."""
    from pipeline.models import build, lora
    from pipeline.rl.iteration import iterate
    from pipeline.train.scores import reward_scores

    models, pool, _, state = ppo_world.inside(world, world, ["ppo.steps=4", "ppo.lora={rank: 4}"])
    assert models.reference is None and sum(p.numel() for p in models.reward.parameters()) == 32
    ids = torch.randint(6, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    for state["step"] in range(2):
        stats = iterate(models, pool, state, LR)
    assert abs(stats["kl"]) > 1e-3  # estimated from samples, so of either sign
    policy, reward = build.load(world / "policy/model").eval(), build.load(world / "reward/model", head="judge").eval()
    with torch.no_grad():
        with models.as_reference() as reference:
            assert torch.equal(reference.eval()(ids).logits, policy(ids).logits)
        assert not torch.equal(models.policy.model.eval()(ids).logits, policy(ids).logits)
    with models.as_reward() as shared:
        assert torch.equal(reward_scores(shared, ids.tolist()), reward_scores(reward, ids.tolist()))
    value = models.value.model.classifier
    assert not torch.equal(value.score.weight, reward.score.weight)
    for trained, parent in ((models.policy.model, policy), (value, reward)):
        frozen = {name for name, p in trained.named_parameters() if not p.requires_grad}
        assert all(torch.equal(trained.get_parameter(name), parent.get_parameter(name)) for name in frozen)
        assert len(lora.adapted_layers(trained)) == 7 * trained.config.num_hidden_layers


def test_a_fork_takes_what_alarms_changed_from_its_recipe(world):
    """kl_coef, lr_scale and the alarms' memory; a resumed run keeps them. With other rewards also the calibration and
    the first evaluation."""
    from pipeline.rl.iteration import Iterations

    models, pool, _, _ = ppo_world.inside(world, world, ["ppo.ppo.kl_coef=0.3", "ppo.steps=4"])
    iterations = Iterations(models, pool)
    new = {"skipped": 0, "before": None}
    iterations.begin(new, "one")
    new["run"] = "one"  # the loop notes it
    measured = new["calibration"]
    assert new["kl_coef"] == 0.3 and measured != (0.0, 1.0)
    changed = {"kl_coef": 9.0, "lr_scale": 0.5, "alarms": {"raised": {"kl": 2}}, "calibration": [5.0, 2.0]}
    saved = new | changed | {"before": {"reward": 1.0}}
    resumed, forked = dict(saved), dict(saved)
    iterations.begin(resumed, "one")
    assert resumed == saved
    iterations.begin(forked, "two")
    assert forked["kl_coef"] == 0.3 and not {"lr_scale", "alarms"} & set(forked)
    assert forked["calibration"] == [5.0, 2.0] and forked["before"] == {"reward": 1.0}
    other = saved | {"scored_by": saved["scored_by"] | {"rewards": {"length": {}}}}
    iterations.begin(other, "two")
    assert other["calibration"] == pytest.approx(measured) and other["before"] is None


def test_the_header_says_how_many_rows_a_micro_batch_has(world, monkeypatch, capsys):
    """Without micro_batch as many as have the tokens of a micro-batch, at the longest: of 2 updates of 4 rows each, 2
    of 48 tokens. A plan asks the same method."""
    from pipeline.rl import online_config

    assert online_config.MICRO_BATCH_TOKENS == 8192
    monkeypatch.setattr(online_config, "MICRO_BATCH_TOKENS", 100)
    models, _, _, _ = ppo_world.inside(world, world)
    said = capsys.readouterr()
    assert "2 micro-batches of 2 rows" in said.out + said.err
    config = models.config
    assert [config.micro_rows(processes) for processes in (1, 2, 4)] == [2, 2, 1]
    assert config.model_copy(update={"sequence_length": 4096}).micro_rows(1) == 1
    assert config.model_copy(update={"micro_batch": 4}).micro_rows(1) == 4
