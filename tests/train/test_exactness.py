"""One step of SFT has the same gradients however it is divided: micro-batches, processes, packing, chunks of the loss;
with all weights and with adapters. Against one padded batch by transformers alone, padded on either side.

Packed rows equal rows that are alone: no conversation sees another one."""

import functools

import pytest
import sft_gradients
import torch
import tuned
from harness import launch
from paths import ROOT
from sft_gradients import NAMES, VARIANTS

TOLERANCE = 1e-5  # absolute, fp32; the largest gradient is about 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tuned.base(tmp_path_factory.mktemp("exact")) / "model"


@functools.cache
def expected(folder, rows: str, side: str, adapters: bool):
    return sft_gradients.transformers_gradients(folder, rows, side, adapters)


def compare(found: tuple[float, dict], folder, rows: str, adapters: bool) -> None:
    for side in ("left", "right"):
        value, gradients = expected(folder, rows, side, adapters)
        assert found[0] == pytest.approx(value, abs=TOLERANCE)
        assert found[1].keys() == gradients.keys()
        assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0.05
        for name, gradient in gradients.items():
            difference = float((found[1][name] - gradient).abs().max())
            assert difference < TOLERANCE, (side, name)


@pytest.mark.parametrize("variant", VARIANTS, ids=NAMES)
def test_one_process(model, variant):
    rows, _, _, adapters = variant
    compare(sft_gradients.engine_gradients(model, *variant), model, rows, adapters)


@pytest.mark.slow
def test_two_processes(model, tmp_path):
    script = ROOT / "tests/helpers/sft_gradients.py"
    launch(2, str(script), str(model), str(tmp_path), cwd=ROOT)
    for (rows, _, _, adapters), name in zip(VARIANTS, NAMES, strict=True):
        compare(torch.load(tmp_path / f"{name}.pt"), model, rows, adapters)
