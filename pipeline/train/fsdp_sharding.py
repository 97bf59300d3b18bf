"""How the FSDP engine (train/fsdp.py) splits a model: which parameters are gathered together, in which type, and which
every process holds."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from pipeline.models import lora
from pipeline.models.experts import MATRICES
from pipeline.train import layers
from pipeline.train.chunked_loss import Head
from pipeline.train.engine import lr_scale
from pipeline.train.shards import Piece

Fill = Callable[[nn.Module, Callable[[str], str]], None]
"""fill(part, global_name): gives the parameters of a part of a model their values. global_name: name inside the part ->
name in the whole model."""


class Sharder:
    """Splits the parameters of a model over the processes of a mesh, in place."""

    def __init__(self, model, mesh, device: torch.device, precision: str):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.model, self.mesh, self.device = model, mesh, device
        self.size = mesh["shard"].size()
        options = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        self.exact = MixedPrecisionPolicy(**options)
        self.rounded = MixedPrecisionPolicy(param_dtype=gathered_dtype(model, precision), **options)
        self.layers = {id(layer) for layer in layers.decoder_layers(model)}
        self.tied = _tied(model)
        self.kept: set[nn.Parameter] = set()  # on every process
        self.scales: dict[str, float] = {}

    def shard(self, fill: Fill | None) -> None:
        """Split part after part. fill: gives a part on the meta device its values, on the CPU."""
        for name in list(_parts(self.model, self.layers)):
            part = self.model.get_submodule(name)
            if any(tensor.is_meta for tensor in itertools.chain(part.parameters(), part.buffers())):
                self._materialise(part, name, fill)
            # no name here refers to a parameter, or it would stay complete while the next part is created
            self.scales |= {f"{name}.{inner}": lr_scale(parameter) for inner, parameter in part.named_parameters()}
            self._shard_part(part)
        self._fully_shard(self.model, self.exact)
        for name, parameter in self.model.named_parameters():
            assert not parameter.is_meta, f"{name} is beside the parts of {type(self.model).__name__}"
        self._prefetch()

    def _materialise(self, part: nn.Module, name: str, fill: Fill | None) -> None:
        assert fill is not None, "a model on the meta device needs values"
        part.to_empty(device="cpu")
        for places in self.tied:  # `to_empty` has made new parameters
            parameter = next((value for value in map(_parameter_at, places) if not value.is_meta), None)
            for module, attribute in places if parameter is not None else ():
                setattr(module, attribute, parameter)
        fill(part, lambda inner: f"{name}.{inner}" if inner else name)

    def _shard_part(self, part: nn.Module) -> None:
        is_layer = id(part) in self.layers
        for module in part.modules():
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or (is_layer and not _only_multiplied(module, attribute, parameter)):
                    self._keep(parameter)
        shared = {id(parameter) for places in self.tied for parameter in map(_parameter_at, places)}
        if any(id(parameter) in shared for parameter in part.parameters()):
            return  # a table that two modules read belongs to the root, which holds it while both are used
        if is_layer:
            self._fully_shard(part, self.rounded)
        elif isinstance(part, nn.Embedding) or isinstance(part, Head):
            self._fully_shard(part, self.exact)
            if not (isinstance(part, Head) and part.per_token):
                part.set_unshard_in_backward(False)  # its gradients do not need the table
        elif isinstance(part, nn.Linear):
            self._fully_shard(part, self.rounded)

    def _keep(self, parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(self.device)
        self.kept.add(parameter)

    def _fully_shard(self, module: nn.Module, policy) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(
            module, mesh=self.mesh, mp_policy=policy, shard_placement_fn=self._placement, ignored_params=self.kept
        )
        if self.device.type == "cpu":  # gloo has no mean
            module.set_force_sum_reduction_for_comms(True)

    def _placement(self, parameter: nn.Parameter):
        """Experts are one parameter [experts, out, in] and are split by `out` where there are more processes than
        experts; everything else by its first dimension."""
        from torch.distributed.tensor import Shard

        is_cut_evenly = parameter.shape[0] % self.size == 0
        if parameter.dim() == 3 and not is_cut_evenly and parameter.shape[1] % self.size == 0:
            return Shard(1)
        return Shard(0)

    def _prefetch(self) -> None:
        """Gather the next layer while one computes. In the backward pass torch does so by itself."""
        found = [module for module in self.model.modules() if id(module) in self.layers]
        for layer, following in zip(found, found[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])

    def result(self) -> tuple[dict[str, nn.Parameter], dict[str, Piece], dict[str, nn.Parameter]]:
        """(sharded parameters, this process's pieces of them, whole parameters), by name."""
        rank = self.mesh["shard"].get_local_rank()
        sharded, pieces, whole = {}, {}, {}
        for name, parameter in self.model.named_parameters():
            if parameter in self.kept:
                parameter.lr_scale = self.scales[name]
                whole[name] = parameter
                continue
            sharded[name] = parameter
            local = parameter.to_local().detach()
            if not local.numel():
                continue
            values = nn.Parameter(local, requires_grad=parameter.requires_grad)
            values.lr_scale = self.scales[name]
            dim = parameter.placements[-1].dim
            rows = -(-parameter.shape[dim] // self.size)
            pieces[name] = Piece(values, parameter.shape, dim, rows * rank)
        return sharded, pieces, whole


def gathered_dtype(model, precision: str) -> torch.dtype | None:
    """The type in which the matrices of layers are gathered; None: their own. DoRA divides by the lengths of a weight's
    rows, which it computes in fp32."""
    has_dora = any(layer.adapter.options.dora for layer in lora.adapted_layers(model).values())
    return torch.bfloat16 if precision == "bf16" and not has_dora else None


def _only_multiplied(module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter of a decoder layer is read by matrix products alone, which round it to bf16 anyway: linear
    layers with their adapters, experts, and routers of experts."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    if parameter.dim() == 3:
        return attribute in MATRICES
    return type(module).__name__.lower().endswith("topkrouter")


def _parts(model: nn.Module, layer_ids: set[int], name: str = "") -> Iterator[str]:
    """Names of the modules that are split one after another: decoder layers, and the modules beside them."""
    for child_name, child in model.named_children():
        full_name = f"{name}.{child_name}" if name else child_name
        if id(child) in layer_ids or not any(id(module) in layer_ids for module in child.modules()):
            yield full_name
        else:
            yield from _parts(child, layer_ids, full_name)


def _tied(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places, (module, attribute), of each parameter that several modules share."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((module, attribute))
    return [found for found in places.values() if len(found) > 1]


def _parameter_at(place: tuple[nn.Module, str]) -> nn.Parameter:
    return getattr(*place)
