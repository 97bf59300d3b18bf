"""compile: true with recomputed activations, under DDP, ZeRO and a pipeline: what one process computes without it."""

import harness
import pytest
import torch
from parallel_worker import COMPILED, STEPS, kind_of, train
from paths import HELPERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One launch of two processes for all of them."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "checkpoints").mkdir()
    harness.launch(2, HELPERS / "parallel_worker.py", folder / "results.pt", "compiled", cwd=folder, seconds=900)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def alone():
    return {kind: train(name, None) for kind, name in (("plain", "one"), ("tied", "one tied"))}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_trains_as_one_process_without(results, alone, name):
    """Losses and gradient norms of 6 clipped steps, and an evaluation after them, to 1e-5 relative; weights to 1e-4
    after updates of 3e-3. Something was compiled."""
    expected, found = alone[kind_of(name)], results[name]
    assert found["graphs"] >= 2, "a layer in training and in evaluation"
    assert len(found["steps"]) == STEPS and found["after"] == pytest.approx(expected["after"], rel=1e-5)
    for one, other in zip(expected["steps"], found["steps"], strict=True):
        assert other["applied"] and one["grad_norm"] > 0.5
        assert [other["loss"], other["grad_norm"]] == pytest.approx([one["loss"], one["grad_norm"]], rel=1e-5)
    for key, value in found["weights"].items():
        assert key not in expected["weights"] or torch.allclose(expected["weights"][key], value, atol=1e-4), key


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_resumes_to_the_bit_and_keeps_harm_out(results, name):
    found = results[name]
    assert found["resumed steps"] == found["steps"][3:]
    assert all(torch.equal(value, found["weights"][key]) for key, value in found["resumed weights"].items())
    assert [found[harm] for harm in ("nan loss", "infinite loss, finite gradient", "nan gradient")] == [False] * 3
    assert all(torch.equal(value, found["weights"][key]) for key, value in found["harmed weights"].items())
    assert found["step after harm"]["applied"]
