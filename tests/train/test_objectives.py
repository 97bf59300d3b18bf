"""The gradient of every finetuning objective does not depend on how a batch is divided: 1e-5 of the largest element,
eight records of 6 to 41 tokens in one micro-batch against one record at a time, full and with adapters, on one process
and on two."""

import functools

import objectives
import pytest
import torch
from harness import launch
from paths import HELPERS


@functools.cache
def whole(name: str, adapted: bool):
    return objectives.gradients(name, adapted, None)


def compare(name: str, adapted: bool, stats: dict, found: dict) -> None:
    expected_stats, expected = whole(name, adapted)
    assert found.keys() == expected.keys() and len(found) > 5
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    assert largest > 1e-4
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-5 * max(1.0, largest), rtol=0, msg=f"{name}: {key}")
    for key in ("loss", "grad_norm", "weight"):
        assert stats[key] == pytest.approx(expected_stats[key], rel=1e-5), key


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_one_record_at_a_time(name, adapted):
    compare(name, adapted, *objectives.gradients(name, adapted, 1))


@pytest.mark.slow
def test_two_processes(tmp_path):
    launch(2, str(HELPERS / "objectives.py"), str(tmp_path / "results.pt"), cwd=tmp_path)
    results = torch.load(tmp_path / "results.pt", weights_only=False)
    assert len(results) == 2 * len(objectives.OBJECTIVES)
    for (name, adapted), (stats, found) in results.items():
        compare(name, adapted, stats, found)
