"""The models of an online stage: read in parts they are those that are read as a whole, and no process has more in
memory than its part. Whole runs: tests/test_ppo.py and tests/test_grpo.py."""

import harness
import online_worker
import pytest
import torch
from paths import HELPERS
from ppo_world import inside, write_world

from pipeline.rl.responses import SharedReward
from pipeline.train import finetune


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("online"))


def weights_of(models) -> dict[str, torch.Tensor]:
    """Of all models of a run, by model and name."""
    found = {"policy": models.policy.model, "value": models.value.model}
    found |= {"reference": models.reference, "reward": models.reward}
    weights = {}
    for key, model in found.items():
        for name, value in ({} if model is None else model.state_dict()).items():
            weights[f"{key}.{name}"] = value
    return weights


FUNCTIONS = "ppo.rewards={short: {function: length, arguments: {at_most: 3, unit: characters}}}"


@pytest.mark.parametrize(
    "words",
    [["ppo.precision=bf16"], ["ppo.lora={rank: 4}"], ["ppo.inputs={policy: ./policy}", FUNCTIONS]],
    ids=["four models", "adapters", "no reward model"],
)
def test_models_that_are_read_in_parts_are_those_that_are_read_as_a_whole(words, world, tmp_path, monkeypatch):
    """As on a GPU, where each part is moved to the device before the next one is read. Policy, value model, reference
    and reward model, with their adapters and score layers, in the same types."""
    monkeypatch.chdir(world)
    whole, *_ = inside(world, tmp_path, words)
    monkeypatch.setattr(finetune, "starts_in_parts", lambda config: True)
    parts, *_ = inside(world, tmp_path, words)
    expected, found = weights_of(whole), weights_of(parts)
    assert found.keys() == expected.keys() and len(found) > 40
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert type(parts.reward) is type(whole.reward)
    if "lora" in words[0]:
        assert isinstance(parts.reward, SharedReward) and parts.reward.score.weight.any()
    if FUNCTIONS in words:
        assert not parts.value.model.classifier.score.weight.any()


@pytest.mark.slow
def test_of_two_processes_each_reads_and_holds_its_part(tmp_path):
    """Policy, value model, reference and reward model of ppo, a teacher of sft. While they are built a process has its
    parts and two layers at most, or, read as a whole, more than two complete models. With `shard` it reads of each
    matrix the rows that it keeps; DeepSpeed sends what every process of ZeRO-3 has read of the models that are
    trained."""
    online_worker.write(tmp_path)
    harness.launch(2, HELPERS / "online_worker.py", tmp_path, cwd=tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    layer, model = 4 * online_worker.layer(), 4 * online_worker.total()
    kept, peak = results["shard"]["kept"], results["shard"]["peak"]
    assert 4 * model / 2 < kept < 1.02 * 4 * model / 2
    assert peak < kept + 2 * layer
    assert results["whole"]["peak"] > results["whole"]["kept"] + 0.9 * model
    assert 4 * model / 2 < results["shard"]["read"] < 1.02 * 4 * model / 2
    assert 2 * model + 2 * model / 2 < results["zero 3"]["read"] < 1.02 * 3 * model
    for name in ("teacher, shard", "teacher, zero 3"):
        found = results[name]
        assert model / 2 < found["read"] < 1.02 * model / 2
        assert model / 2 < found["kept"] < 1.02 * model / 2 and found["peak"] < found["kept"] + 2 * layer
        torch.testing.assert_close(found["logits"], results["logits"])
