"""The stage grpo, as a user runs it. Its losses are in tests/rl/test_group_losses.py."""

import json
import math

import numpy as np
import pytest
import torch
from harness import files_of, stage, succeed
from ppo_world import write_world
from test_ppo import close, logged, ranks, weights

ALGORITHMS = {
    "grpo": ["grpo.update.kl_coef=0.05", "grpo.resample=2"],
    "dr_grpo": ["grpo.algorithm=dr_grpo", "grpo.overlong={buffer: 3}"],
    "rloo": ["grpo.algorithm=rloo", "grpo.update.kl_coef=0.05"],
    "reinforce_pp": ["grpo.algorithm=reinforce_pp", "grpo.samples=1", "grpo.batch_size=16", "grpo.update.kl_coef=0.01"],
    "gspo": ["grpo.update={ratio: sequence, clip: 3e-4, clip_high: 4e-4, minibatches: 4}"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("grpo"))


def run(folder, *words, output, **options):
    text = succeed("grpo", "group.yaml", f"output={output}", *words, cwd=folder, **options)
    found = (folder / output / "t" / "grpo" / "current").resolve()
    return found, json.loads((found / "manifest.json").read_text())["metrics"], text


def iterations(found):
    return [line for line in logged(found) if "policy_loss" in line]


def test_the_stage(world):
    """GRPO without a KL has no reference and no value model, says so, and logs its groups."""
    found, metrics, text = run(world, output="plain")
    lines = iterations(found)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "reward model" in text and "reference" not in text and "value model" not in text
    for line in lines:
        assert line["first_approx_kl"] < 1e-10 and line["rollout_difference_max"] < 1e-5
        assert line["policy_updates"] == 4 and (line["reward_spread"] > 0) == (line["equal_groups"] < 1)
        assert not {"kl", "value_loss", "value_lr"} & set(line)
    assert metrics["summary"]["output"] == "3 x 16 responses" and "kl_after" not in metrics
    start, end = weights(world / "policy"), weights(found)
    assert any(not torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize(
    "name", ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ALGORITHMS if name != "grpo")]
)
def test_killed_anywhere_it_ends_with_the_same_bytes(world, name):
    """After a step, inside a save and while publishing; weights, samples and curve of the uninterrupted run."""
    words = ALGORITHMS[name]
    whole, metrics, _ = run(world, *words, output=f"whole-{name}")
    for fault in ("work:1", "save:2", "publish:1"):
        code, text = stage("grpo", "group.yaml", f"output=killed-{name}", *words, cwd=world, fault=fault)
        assert code == -9, text
    found, again, _ = run(world, *words, output=f"killed-{name}")
    assert files_of(found) == files_of(whole) and again == metrics
    for line, wanted in zip(iterations(found), iterations(whole), strict=True):
        same = {key for key in line if not key.startswith(("seconds", "time", "tok_", "peak", "data_wait"))}
        assert {key: line[key] for key in same} == {key: wanted[key] for key in same}
        assert ("kl" in line) == any("kl_coef" in word for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["null", 2, 3])
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_two_processes_make_the_run_of_one(world, name, zero):
    words = [*ALGORITHMS[name], "grpo.steps=2"]
    alone, _, _ = run(world, *words, output=f"alone-{name}")
    found, _ = ranks(
        world, *words, f"grpo.parallel.zero={zero}", output=f"two-{name}-{zero}", kind="grpo", recipe="group.yaml"
    )
    close(found, alone)
    for key in ("reward", "kl", "grad_norm", "approx_kl", "reward_spread", "policy_loss"):
        mine, wanted = ([line[key] for line in iterations(run)] for run in (found, alone))
        np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-5, err_msg=key)
    assert (found / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


@pytest.mark.slow
def test_micro_batches_do_not_change_the_result(world):
    """Each response on its own, of uneven lengths: the average is that of the whole update."""
    words = ["grpo.steps=2"]
    whole, _, _ = run(world, *words, output="one-batch")
    found, _, _ = run(world, *words, "grpo.micro_batch=1", "grpo.rollout.batch=3", output="micro")
    close(found, whole)


def test_adapters_without_a_copy_of_the_policy(world):
    """The reference is the policy without its adapter."""
    words = ("grpo.lora={rank: 4}", "grpo.update.kl_coef=0.05", "grpo.optimizer.lr=3e-2")
    found, metrics, text = run(world, *words, output="adapted")
    assert "adapter merged" in text and "reference" not in text
    assert abs(metrics["kl_before"]) < 1e-5 < abs(metrics["kl_after"])
    start, end = weights(world / "policy"), weights(found)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all("_proj" in name for name in changed)


@pytest.mark.parametrize(
    "words, message",
    [
        (["grpo.samples=1"], "samples: 1 leaves nothing to compare a response with"),
        (
            ["grpo.samples=3", "grpo.update.minibatches=8"],
            "batch_size 4 x 3 samples is not divisible by 8 minibatches x 1 processes; use 8",
        ),
        (["grpo.algorithm=rloo", "grpo.update.kl_in=loss", "grpo.update.kl_coef=1"], "kl_in: loss is not for rloo"),
        (["grpo.algorithm=rloo", "grpo.update.average=token"], "average: token is not for rloo"),
        (["grpo.update.kl_in=reward"], "kl_in: 'reward' says where the KL counts, and its weight kl_coef is 0"),
        (["grpo.update={ratio: sequence, average: token}"], "goes with average: response, not token"),
        (["grpo.overlong.buffer=7"], "overlong.buffer: 7 is more than rollout.max_new_tokens: 6"),
        (["grpo.algorithm=gae"], "algorithm is 'gae', expected 'grpo', 'dr_grpo', 'rloo' or 'reinforce_pp'"),
    ],
)
def test_what_cannot_be_done_is_refused(world, words, message):
    code, text = stage("grpo", "group.yaml", *words, "output=refused", cwd=world)
    assert code == 2 and message in text, text


# ---- learning --------------------------------------------------------------------------------------------------------

LEARN = [
    *("grpo.steps=24", "grpo.batch_size=16", "grpo.samples=8", "grpo.rollout.temperature=1"),
    *("grpo.save.every_steps=100", "grpo.show=24", "grpo.evaluate_prompts=24"),
]


def share_of_z(found, when):
    rows = [json.loads(line) for line in (found / "samples.jsonl").read_text().splitlines()]
    text = "".join(row["sampled"] for row in rows if row["when"] == when)
    return text.count("z") / len(text)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
def test_it_learns_what_is_rewarded(world, algorithm):
    """The share of one letter of 29 in held-out answers rises from about 1/29 to above 0.8, with the KL below that of
    always the letter (6 log 35)."""
    words = [*LEARN, f"grpo.algorithm={algorithm}", "grpo.update.kl_coef=0.01"]
    found, metrics, _ = run(world, *words, output=f"learns-{algorithm}")
    assert share_of_z(found, "before") < 0.15 and share_of_z(found, "after") > 0.8, metrics
    assert 0 < metrics["kl_after"] < 1.1 * 6 * math.log(35)  # the start is not quite uniform


@pytest.mark.slow
def test_a_large_kl_coefficient_holds_it_back(world):
    found, metrics, _ = run(world, *LEARN, "grpo.steps=12", "grpo.update.kl_coef=10", output="held")
    assert share_of_z(found, "after") < 0.2 and metrics["kl_after"] < 0.5
