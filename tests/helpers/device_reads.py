"""Counts reads of a device's values, for which a program waits."""

from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """How often the value of a tensor is asked for: .item(), float(), bool(). What .tolist() reads is not counted."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*arguments, **(keywords or {}))
