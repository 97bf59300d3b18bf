"""Sampling one step ahead: whose weights sampled what, what is kept, and what is dropped for its age."""

import copy
import json

import ppo_world
import pytest
import torch
from harness import files_of, stage
from ppo_world import samples_of, write_world
from test_grpo import iterations, run

from pipeline import grpo, ppo
from pipeline.rl import group_objective, ppo_objective

AHEAD = ["grpo.rollout.ahead=true", "grpo.update.importance_cap=2"]
NO_CHANGE = "grpo.optimizer.lr=1e-30"  # less than the smallest difference of two weights
TIMES = ("seconds", "time", "tok_", "peak", "data_wait")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("ahead"))


def untimed(line: dict) -> dict:
    return {key: value for key, value in line.items() if not key.startswith((*TIMES, "stale"))}


def test_responses_are_those_of_the_weights_before_the_last_updates(tmp_path, monkeypatch):
    """Against the sampler itself, with copies of the weights at the beginning of each iteration."""
    from pipeline.rl import experience, iteration
    from pipeline.rl.rollout import generate

    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["ppo.steps=4", "ppo.rollout.ahead=true", "ppo.ppo.importance_cap=2"]
    models, pool, _, state = ppo_world.inside(tmp_path, tmp_path, words)
    learned = []
    collect = experience.collect
    monkeypatch.setattr(iteration, "collect", lambda *a, **k: learned.append(collect(*a, **k)) or learned[-1])
    weights, stats = [], []
    for state["step"] in range(4):
        weights.append(copy.deepcopy(models.policy.model))
        stats.append(iteration.iterate(models, pool, state, 3e-3))
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
    assert "ahead" not in state  # nothing follows the last iteration
    for number, samples in enumerate(learned):
        seeds = [iteration.derive(0, "rollout", sample.index) for sample in samples]
        prompts = [sample.prompt_ids for sample in samples]
        options = {"max_new_tokens": 6, "temperature": 0.7, "stop_ids": models.stop_ids, "pad_id": models.pad_id}
        expected = generate(weights[max(0, number - 1)], prompts, seeds=seeds, **options)
        assert [sample.response_ids for sample in samples] == [each.ids for each in expected]
        assert [sample.sampled_logprobs for sample in samples] == [each.logprobs for each in expected]
    assert [line["staleness"] for line in stats] == [line["staleness_max"] for line in stats] == [0, 4, 4, 4]
    assert stats[0]["rollout_difference"] < 1e-6 < 1e-3 < stats[1]["rollout_difference"]


def test_without_changes_of_the_weights_it_is_the_run_that_samples_in_time(world):
    """Zero staleness: every number and byte of a run whose sampler waits for the updates."""
    found, _, _ = run(world, *AHEAD, NO_CHANGE, output="ahead-same")
    expected, _, _ = run(world, *AHEAD[1:], NO_CHANGE, output="in-time-same")
    assert files_of(found) == files_of(expected)
    assert [untimed(line) for line in iterations(found)] == [untimed(line) for line in iterations(expected)]
    assert [line["staleness"] for line in iterations(found)] == [0, 4, 4]
    assert not any("staleness" in line for line in iterations(expected))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["work:1", "work:2", "save:2", "publish:1"])
def test_killed_it_learns_from_what_was_sampled_before(world, fault):
    whole, metrics, _ = run(world, *AHEAD, "grpo.resample=1", output="whole")
    name = fault.replace(":", "-")
    code, text = stage("grpo", "group.yaml", f"output={name}", *AHEAD, "grpo.resample=1", cwd=world, fault=fault)
    assert code == -9, text
    found, again, _ = run(world, *AHEAD, "grpo.resample=1", output=name)
    assert files_of(found) == files_of(whole) and again == metrics
    assert [untimed(line) for line in iterations(found)] == [untimed(line) for line in iterations(whole)]


def test_old_responses_carry_no_loss(tmp_path, monkeypatch):
    """The policy stays as it is while all are too old, and the run goes on."""
    from pipeline.rl import iteration

    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = "ppo.ppo={epochs: 2, minibatches: 2, importance_cap: 2, target_kl: 1e-9}"
    words = ["ppo.steps=5", "ppo.rollout={ahead: true, max_staleness: 0, max_new_tokens: 6}", options]
    models, pool, _, state = ppo_world.inside(tmp_path, tmp_path, words)
    ages, changed = [], []
    for state["step"] in range(5):
        before = copy.deepcopy(models.policy.model.state_dict())
        stats = iteration.iterate(models, pool, state, 3e-3)
        ages.append((stats["staleness"], stats["stale_fraction"], stats["policy_updates"]))
        after = models.policy.model.state_dict()
        changed.append(any(not torch.equal(after[name], before[name]) for name in before))
    # target_kl ends the updates of an iteration after the one that has moved the policy
    first = ages[0][2]
    assert first in (1, 2) and ages[0][:2] == (0, 0)
    assert ages[1] == (first, 1, 0) and changed[:2] == [True, False]
    # sampled after the last update: the policy has stayed as it was
    assert ages[2][:2] == (0, 0) and changed[2] and ages[3][1:] == (1, 0)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "reinforce_pp"])
def test_the_average_is_over_the_young_ones(algorithm):
    """A response that is too old has weight 0, and the others have those of an update without it."""
    common = {"sources": {"words": {"path": "x.jsonl"}}, "steps": 1, "batch_size": 4, "sequence_length": 9}
    config = grpo.Config(**common, rollout={"max_new_tokens": 8}, samples=3, algorithm=algorithm)
    lengths, every = torch.tensor([3.0, 5.0, 8.0]), torch.tensor([True] * 3)
    fresh = torch.tensor([True, False, True])
    weights = group_objective.row_weights(config, lengths, every, fresh)
    alone = group_objective.row_weights(config, lengths[fresh], every[fresh], every[fresh])
    assert weights[1] == 0
    # the engine divides by all tokens of the update
    torch.testing.assert_close(weights[fresh] / lengths.sum(), alone / lengths[fresh].sum())


def test_ppo_counts_the_tokens_of_the_young_ones():
    lengths, every, fresh = torch.tensor([3.0, 5.0]), torch.tensor([True] * 2), torch.tensor([False, True])
    assert ppo_objective.row_weights(None, lengths, every, every) is None
    torch.testing.assert_close(ppo_objective.row_weights(None, lengths, every, fresh), torch.tensor([0.0, 8 / 5]))


@pytest.mark.parametrize(
    "words, message",
    [
        (["ahead: true"], "give importance_cap: 2"),
        (["max_staleness: 1"], "max_staleness: 1 is for ahead: true"),
        (["ahead: true, max_staleness: 4", 2], "no response is older than the 4 updates of an iteration"),
        (["ahead: true, max_staleness: 1", 2], "would drop every response but those of the first iteration"),
    ],
)
def test_what_has_no_use_is_refused(words, message):
    from pydantic import ValidationError
    from ruamel.yaml import YAML

    rollout = YAML(typ="safe").load(f"{{{words[0]}, max_new_tokens: 4}}")
    options = {"importance_cap": words[1]} if len(words) > 1 else {}
    common = {"sources": {"words": {"path": "x.jsonl"}}, "steps": 1, "batch_size": 4, "sequence_length": 9}
    with pytest.raises(ValidationError, match=message):
        ppo.Config(**common, rollout=rollout, ppo=options)


def test_other_prompts_than_the_kept_ones_are_answered_anew():
    """After a rollback."""
    from pipeline.rl import ahead

    state = {"ahead": {"first": 8, "num_updates": 3, "completions": [[[5, 2], [-1.0, -2.0], True]]}}
    assert ahead.take(dict(state), 16) is None and ahead.take({}, 8) is None
    sampled = ahead.take(state, 8)
    assert sampled.num_updates == 3 and sampled.completions[0].ids == [5, 2] and not state
    assert samples_of([(2, 1)])[0].num_updates == 0
