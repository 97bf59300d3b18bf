"""A model on the meta device as parts that get memory and values one after another: decoder layers, and the modules
beside them."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from pipeline.models.folder_weights import Fill


def split_dim(shape: Sequence[int], size: int) -> int:
    """The dimension along which FSDP's `size` processes share a parameter. Experts are one parameter [experts, out, in]
    and are split by `out` where the processes cannot share the experts evenly; everything else by its first one."""
    is_cut_evenly = shape[0] % size == 0
    return 1 if len(shape) == 3 and not is_cut_evenly and shape[1] % size == 0 else 0


def padded_numel(shape: Sequence[int], size: int) -> int:
    """Elements that `size` processes gather of a parameter: what they cannot share evenly is filled up, so that each
    has as much. Of 256 experts over 2,048 processes it is as much as 2,048 experts."""
    length = shape[split_dim(shape, size)]
    return math.prod(shape) // length * (-(-length // size) * size)


def decoder_layers(model) -> list[torch.nn.Module]:
    """What transformers marks as decoder layers of a model, or of one stage of its pipeline, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Parts:
    """The parts of a model. Parameters that several modules share stay shared."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.layers = {id(layer) for layer in decoder_layers(model)}
        self.tied = _tied(model)
        self.names = list(_names(model, self.layers))

    def materialise(
        self, name: str, fill: Fill | None, prepare: Callable[[nn.Module], None] = lambda part: None
    ) -> nn.Module:
        """A part, whose parameters get memory on the CPU, and values from `fill`, if they are on the meta device.
        prepare(part) is called in between."""
        part = self.model.get_submodule(name)
        if any(tensor.is_meta for tensor in itertools.chain(part.parameters(), part.buffers())):
            assert fill is not None, "a model on the meta device needs values"
            part.to_empty(device="cpu")
            for places in self.tied:  # `to_empty` has made new parameters
                parameter = next((value for value in map(parameter_at, places) if not value.is_meta), None)
                for module, attribute in places if parameter is not None else ():
                    setattr(module, attribute, parameter)
            prepare(part)
            fill(part, lambda inner: f"{name}.{inner}" if inner else name)
        return part

    def materialise_all(self, fill: Fill, device: torch.device | None = None) -> None:
        """All parts, each moved to the device before the next one is created."""
        for name in self.names:
            self.materialise(name, fill).to(device or "cpu")
        self.check_complete()

    def cover(self) -> bool:
        """Whether each parameter of the model is in a part."""
        prefixes = tuple(f"{name}." for name in self.names)
        return all(name.startswith(prefixes) for name, _ in self.model.named_parameters())

    def check_complete(self) -> None:
        """No parameter may be on the meta device after all parts were materialised."""
        for name, parameter in self.model.named_parameters():
            assert not parameter.is_meta, f"{name} is beside the parts of {type(self.model).__name__}"


def own_parameters(part: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """(module, attribute, parameter) of each parameter of a part."""
    found = []
    for module in part.modules():
        found += [(module, name, parameter) for name, parameter in module.named_parameters(recurse=False)]
    return found


def parameter_at(place: tuple[nn.Module, str]) -> nn.Parameter:
    return getattr(*place)


def _names(model: nn.Module, layer_ids: set[int], name: str = "") -> Iterator[str]:
    """Names of the modules that are parts."""
    for child_name, child in model.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        if id(child) in layer_ids or not any(id(module) in layer_ids for module in child.modules()):
            yield full_name
        else:
            yield from _names(child, layer_ids, full_name)


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places, (module, attribute), of each parameter that several modules share."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, attribute, parameter in own_parameters(model):
        places.setdefault(id(parameter), []).append((module, attribute))
    return [found for found in places.values() if len(found) > 1]
