"""Random rows of different lengths."""

import torch


def ragged(seed=0, batch=5, length=7):
    """Random [B, T] tensors and a mask whose rows have 1 to T tokens."""
    source = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, length, *torch.randint(1, length + 1, (batch - 2,), generator=source).tolist()])
    mask = (torch.arange(length) < lengths[:, None]).double()
    return [torch.randn(batch, length, generator=source, dtype=torch.float64) for _ in range(4)], mask, lengths
