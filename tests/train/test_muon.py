"""Muon in fp32, for processors without bf16 instructions, against torch.optim.Muon."""

import pytest
import torch

from pipeline.train import muon

OPTIONS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}


class Own(muon.MatrixMuon):
    """Computes with our step also in bf16, in which torch computes."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self._update(parameter, group)


def matrices() -> list[torch.nn.Parameter]:
    source = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=source)) for shape in ((24, 40), (40, 24), (32, 32))]


def trained(optimizer, parameters) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(1)
    for _ in range(4):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=source)
        with torch.no_grad():
            optimizer.step()
    return [parameter.detach() for parameter in parameters]


def of_torch() -> list[torch.Tensor]:
    parameters = matrices()
    return trained(torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **OPTIONS), parameters)


def test_the_step_is_torch_s():
    """Bit for bit where both multiply in bf16."""
    parameters = matrices()
    found = trained(Own(parameters, torch.bfloat16, **OPTIONS), parameters)
    assert all(torch.equal(one, other) for one, other in zip(found, of_torch(), strict=True))


def test_in_fp32_it_differs_by_the_rounding_of_bf16():
    """The sum of 4 updates, whose entries are about 0.2 * lr * 4, to 3% of the largest."""
    parameters = matrices()
    found = trained(muon.MatrixMuon(parameters, torch.float32, **OPTIONS), parameters)
    for one, other, start in zip(found, of_torch(), matrices(), strict=True):
        change = (other - start).abs().max()
        assert 0 < (one - other).abs().max() < 0.03 * change


def test_singular_values_come_near_one():
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(2))
    found = muon.orthogonalised(matrix, torch.float32, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(found)
    assert found.shape == matrix.shape and found.dtype == torch.float32
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("capability, dtype", [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_the_processor_decides(monkeypatch, capability, dtype):
    capabilities = {"avx2": True, "avx512_bf16": capability == "avx512_bf16", "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert muon.product_dtype(torch.device("cpu")) == dtype
    assert muon.product_dtype(torch.device("cuda")) == torch.bfloat16
