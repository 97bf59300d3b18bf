"""Models that are only read: the reference and the reward model of online RL.

    reference = only_read(policy_model, config, shared=True)
    with complete(reference) as model: ...        # collective

With `precision: bf16` the matrices that only matrix products read are kept in bf16. Autocast would round them at each
use anyway, so no bit of a log-probability or score changes (train/fsdp_sharding.py gathers such matrices in bf16 for
the same reason). Layouts that split the model that is trained, `shard` and `zero: 3`, split these models too: each
process keeps a part of every parameter, and gathers the complete model while it reads it.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

from pipeline.train import distributed
from pipeline.train.fsdp import filled, without_weights
from pipeline.train.fsdp_sharding import multiplied_names


class SplitModel:
    """A model of which each process keeps a part of every parameter, of equal length on all of them."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device):
        self.world = distributed.world()
        self.skeleton = without_weights(model).requires_grad_(False).eval()
        self.buffers = {name: value.to(device) for name, value in model.named_buffers()}
        self.shapes: dict[str, torch.Size] = {}
        self.parts: dict[str, torch.Tensor] = {}
        rounded = multiplied_names(model) if precision == "bf16" else set()
        for name, parameter in model.named_parameters():
            dtype = torch.bfloat16 if name in rounded else parameter.dtype
            self.shapes[name] = parameter.shape
            self.parts[name] = self._part(parameter.detach().reshape(-1), dtype, device)

    def _part(self, values: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """This process's part of a flat parameter; zeros after its end."""
        length = -(-values.numel() // self.world)
        own = values[distributed.rank() * length : (distributed.rank() + 1) * length]
        part = torch.zeros(length, dtype=dtype, device=device)
        part[: own.numel()] = own
        return part

    @contextlib.contextmanager
    def complete(self) -> Iterator[nn.Module]:
        """Inside, the model with all of its weights, on the device. Collective."""
        weights = {name: self._gathered(name) for name in self.parts}
        with filled(self.skeleton, weights, self.buffers):
            yield self.skeleton

    def _gathered(self, name: str) -> torch.Tensor:
        part, shape = self.parts[name], self.shapes[name]
        if self.world == 1:
            return part.view(shape)
        flat = part.new_empty(self.world * part.numel())
        dist.all_gather_into_tensor(flat, part)
        return flat[: shape.numel()].view(shape)


def only_read(model: nn.Module, config, *, shared: bool) -> nn.Module | SplitModel:
    """A model as a stage with this config keeps it for reading, on the device. shared: the model is used for something
    else too, and stays as it is."""
    device = distributed.device()
    if config.parallel.splits_weights:
        return SplitModel(model, config.precision, device)
    if shared:
        model = copy.deepcopy(model)
    if config.precision == "bf16":
        for name in multiplied_names(model):
            parameter = model.get_parameter(name)
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def complete(model: nn.Module | SplitModel) -> Iterator[nn.Module]:
    """Inside, a model that can be called. Collective."""
    if isinstance(model, SplitModel):
        with model.complete() as whole:
            yield whole
    else:
        yield model
