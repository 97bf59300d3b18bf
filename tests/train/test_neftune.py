"""NEFTune against transformers' hook, and that noise depends on nothing but its seed."""

import math

import pytest
import torch
from torch import nn

from pipeline.train import neftune

WIDTH = 64


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, WIDTH)
        self.embedding.weight.requires_grad_(False).zero_()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return self.embedding(ids)


def noise_of(rows: list[list[tuple[int, int]]], length: int, alpha: float = 5.0) -> torch.Tensor:
    model = Model()
    noise = neftune.attach(model, alpha)
    noise.expect([rows])
    return model.train()(torch.zeros(len(rows), length, dtype=torch.long))


@pytest.mark.parametrize("length", [7, 400])
def test_distribution_is_transformers(length):
    """Uniform with transformers' bound alpha / sqrt(L * width): equal quantiles of 4 rows."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    torch.manual_seed(0)
    module = nn.Embedding(10, WIDTH)
    module.neftune_noise_alpha = 5.0
    theirs = neftune_post_forward_hook(module.train(), None, torch.zeros(4, length, WIDTH))
    ours = noise_of([[(seed, length)] for seed in range(4)], length)
    bound = 5.0 / math.sqrt(length * WIDTH)
    assert 0.99 * bound < float(ours.abs().max()) <= bound and float(theirs.abs().max()) <= bound
    quantiles = torch.linspace(0, 1, 11)
    torch.testing.assert_close(
        torch.quantile(ours.flatten(), quantiles) / bound,
        torch.quantile(theirs.flatten(), quantiles) / bound,
        atol=0.08 if length == 7 else 0.02,
        rtol=0,
    )


def test_noise_does_not_depend_on_what_is_beside_it():
    packed = noise_of([[(1, 5), (2, 9)], [(3, 4)]], length=16)
    for row, start, seed, length in ((0, 0, 1, 5), (0, 5, 2, 9), (1, 0, 3, 4)):
        alone = noise_of([[(seed, length)]], length=length)
        assert torch.equal(packed[row, start : start + length], alone[0])
    assert not packed[0, 14:].any() and not packed[1, 4:].any()  # padding
    assert not torch.equal(packed[0, :4], packed[1, :4])


def test_only_in_training():
    model = Model()
    noise = neftune.attach(model, 5.0)
    noise.expect([[[(1, 3)]]])
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert not model.eval()(ids).any()
    assert model.train()(ids).any()
    assert not model.train()(ids).any()  # nothing is expected any more
