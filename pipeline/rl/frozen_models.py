"""Models that are only read: the reference and the reward model of online RL.

    reference = only_read(policy_model, config, shared=True)
    with complete(reference) as model: ...        # collective

With `precision: bf16` the matrices that only matrix products read are kept in bf16. Autocast would round them at each
use anyway, so no bit of a log-probability or score changes (train/fsdp_sharding.py gathers such matrices in bf16 for
the same reason). Layouts that split the model that is trained, `shard` and `zero: 3`, split these models too: each
process keeps a part of every parameter, and gathers the complete model while it reads it.

With `on_demand` they are in memory only while they are used, and read from their files for each use.

A model may be on the meta device: then each part (a decoder layer, a table) is created, filled and split before the
next one, and of the files only the rows are read that this process keeps an element of.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from pipeline.core import distributed
from pipeline.models.folder_weights import Fill, keep_rows
from pipeline.models.model_parts import Parts
from pipeline.train.fsdp import filled, without_weights
from pipeline.train.fsdp_sharding import multiplied_names

Load = Callable[[], tuple[nn.Module, Fill | None]]


class SplitModel:
    """A model of which each process keeps a part of every parameter, of equal length on all of them. fill: gives a part
    of a model on the meta device its values."""

    def __init__(self, model: nn.Module, precision: str, device: torch.device, fill: Fill | None = None):
        self.world, self.device = distributed.world(), device
        self.rounded = multiplied_names(model) if precision == "bf16" else set()
        self.skeleton = without_weights(model).requires_grad_(False).eval()
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.buffers: dict[str, torch.Tensor] = {}
        self.parts: dict[str, torch.Tensor] = {}
        if fill is None:
            self._take(model)
            return
        _round(model, self.rounded)  # so that a part is created in the type in which it is kept
        parts = Parts(model)
        for name in parts.names:
            part = parts.materialise(name, fill, self._keep_rows)
            self._take(part, f"{name}.")
            part.to_empty(device="meta")
        missing = self.shapes.keys() - self.parts.keys()
        assert not missing, f"{min(missing)} is beside the parts of {type(model).__name__}"

    def _keep_rows(self, part: nn.Module) -> None:
        """Note on each parameter of which rows this process keeps an element, so that a folder's others are not
        read."""
        for parameter in part.parameters():
            if parameter.dim():
                start, stop = self._range(parameter.numel())
                width = parameter.numel() // len(parameter)
                keep_rows(parameter, 0, start // width, -(-stop // width))

    def _range(self, count: int) -> tuple[int, int]:
        """The elements that this process keeps of a flat parameter of `count`: (first, end)."""
        length = -(-count // self.world)
        start = min(distributed.rank() * length, count)
        return start, min(start + length, count)

    def _take(self, module: nn.Module, prefix: str = "") -> None:
        """Keep this process's part of each parameter of a module, and its buffers. prefix: of their names."""
        for inner, value in module.named_buffers():
            self.buffers[f"{prefix}{inner}"] = value.to(self.device)
        for inner, parameter in module.named_parameters():
            name = f"{prefix}{inner}"
            if name in self.shapes and name not in self.parts:  # a shared parameter counts under its first name
                self.parts[name] = self._part(name, parameter.detach().reshape(-1))

    def _part(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """This process's part of a flat parameter; zeros after its end."""
        start, stop = self._range(values.numel())
        dtype = torch.bfloat16 if name in self.rounded else values.dtype
        part = torch.zeros(-(-values.numel() // self.world), dtype=dtype, device=self.device)
        part[: stop - start] = values[start:stop]
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


class OnDemand:
    """A model that is read from its files each time, and is not in memory in between. load: gives the model, and what
    fills it (finetune.load_model)."""

    def __init__(self, load: Load, config):
        self.load, self.config = load, config

    @contextlib.contextmanager
    def complete(self) -> Iterator[nn.Module]:
        """Inside, the model, on the device. Collective."""
        model, fill = self.load()
        with complete(only_read(model, self.config, fill=fill)) as whole:
            yield whole


Frozen = nn.Module | SplitModel | OnDemand
"""A model as online RL keeps it for reading."""


def only_read(model: nn.Module, config, *, shared: bool = False, fill: Fill | None = None) -> nn.Module | SplitModel:
    """A model as a stage with this config keeps it for reading, on the device. shared: the model is used for something
    else too, and stays as it is. fill: what gives a part of a model on the meta device its values."""
    device = distributed.device()
    if config.parallel.splits_weights:
        return SplitModel(model, config.precision, device, fill)
    if shared:
        model = copy.deepcopy(model)
    if config.precision == "bf16":
        _round(model, multiplied_names(model))
    if fill is not None:
        Parts(model).materialise_all(fill, device)
    return model.requires_grad_(False).eval().to(device)


def read_only(model: nn.Module, fill: Fill | None, config, load: Load) -> Frozen:
    """A model that nothing else uses, as a stage with this config keeps it. load: gives it, and what fills it, once
    more."""
    if config.on_demand:
        return OnDemand(load, config)
    return only_read(model, config, fill=fill)


def copy_to_read(model: nn.Module, fill: Fill | None, config, load: Load) -> Frozen:
    """What `only_read` makes of a model that will also be trained. load: gives the model, and what fills it, once more:
    one on the meta device has nothing to copy, and is read from its folder again."""
    if config.on_demand:
        return OnDemand(load, config)
    if fill is None:
        return only_read(model, config, shared=True)
    again, weights = load()
    return only_read(again, config, fill=weights)


def _round(model: nn.Module, names: set[str]) -> None:
    """Keep some of a model's parameters in bf16."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(torch.bfloat16)


@contextlib.contextmanager
def complete(model: Frozen) -> Iterator[nn.Module]:
    """Inside, a model that can be called. Collective."""
    if isinstance(model, (SplitModel, OnDemand)):
        with model.complete() as whole:
            yield whole
    else:
        yield model
