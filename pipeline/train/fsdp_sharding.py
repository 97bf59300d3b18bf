"""How the FSDP engine (train/fsdp.py) splits a model: which parameters are gathered together, in which type, and which
every process holds."""

import torch
from torch import nn

from pipeline.models import lora
from pipeline.models.experts import MATRICES
from pipeline.models.folder_weights import Fill, keep_rows
from pipeline.models.model_parts import Parts, own_parameters, parameter_at, split_dim
from pipeline.train.chunked_loss import Head
from pipeline.train.engine import lr_scale
from pipeline.train.shards import Piece
from pipeline.train.tensor_parallel import TensorGroup, part_of


class Sharder:
    """Splits the parameters of a model over the processes of a mesh, in place. tensor: the group over which matrices
    are split before that."""

    def __init__(self, model, mesh, device: torch.device, precision: str, tensor: TensorGroup | None = None):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        self.model, self.mesh, self.device, self.tensor = model, mesh, device, tensor
        self.size = mesh["shard"].size()
        options = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
        self.exact = MixedPrecisionPolicy(**options)
        self.rounded = MixedPrecisionPolicy(param_dtype=gathered_dtype(model, precision), **options)
        self.parts = Parts(model)
        self.kept: set[nn.Parameter] = set()  # on every process
        self.scales: dict[str, float] = {}
        self.rounded_names: set[str] = set()

    def shard(self, fill: Fill | None) -> None:
        """Split part after part. fill: gives a part on the meta device its values, on the CPU."""
        for name in self.parts.names:
            part = self.parts.materialise(name, fill, self._keep_rows)
            if self.tensor is not None:
                self.tensor.split(name, part)
            # no name here refers to a parameter, or it would stay complete while the next part is created
            self.scales |= {f"{name}.{inner}": lr_scale(parameter) for inner, parameter in part.named_parameters()}
            if self._shard_part(part) is self.rounded:
                self.rounded_names |= {f"{name}.{inner}" for inner, _ in part.named_parameters()}
        self._fully_shard(self.model, self.exact)
        self.parts.check_complete()
        self._prefetch()

    def _keep_rows(self, part: nn.Module) -> None:
        """Note on each parameter which of its rows this process keeps, so that a folder's others are not read."""
        for module, attribute, parameter in own_parameters(part):
            if not self._is_whole(part, module, attribute, parameter) and not lora.reads_whole_weight(module):
                dim = self._placement(parameter).dim
                first, end = (0, parameter.shape[dim]) if self.tensor is None else self.tensor.rows(module, parameter)
                start, stop = self._rows(end - first)
                keep_rows(parameter, dim, first + start, first + stop)

    def _is_whole(self, part: nn.Module, module: nn.Module, attribute: str, parameter: nn.Parameter) -> bool:
        """Whether every process keeps a parameter."""
        if self.tensor is not None and self.tensor.dim_of(module, parameter) is not None:
            return False
        is_layer = id(part) in self.parts.layers
        return parameter.dim() < 2 or (is_layer and not _only_multiplied(module, attribute, parameter))

    def _rows(self, length: int) -> tuple[int, int]:
        """The indices of a dimension that this process keeps: (first, end)."""
        return part_of(length, self.mesh["shard"].get_local_rank(), self.size)

    def _shard_part(self, part: nn.Module):
        """Returns the types in which the part is gathered; None if the root gathers it."""
        is_layer = id(part) in self.parts.layers
        for module, attribute, parameter in own_parameters(part):
            if self._is_whole(part, module, attribute, parameter):
                self._keep(parameter)
        shared = {id(parameter) for places in self.parts.tied for parameter in map(parameter_at, places)}
        if any(id(parameter) in shared for parameter in part.parameters()):
            return None  # a table that two modules read belongs to the root, which holds it while both are used
        if is_layer:
            policy = self.rounded
        elif isinstance(part, (nn.Embedding, Head)):
            policy = self.exact
        elif isinstance(part, nn.Linear):
            policy = self.rounded
        else:
            return None
        self._fully_shard(part, policy)
        if policy is self.exact and not (isinstance(part, Head) and part.per_token):
            part.set_unshard_in_backward(False)  # its gradients do not need the table
        return policy

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
        from torch.distributed.tensor import Shard

        return Shard(split_dim(parameter.shape, self.size))

    def _prefetch(self) -> None:
        """Gather the next layer while one computes. In the backward pass torch does so by itself."""
        found = [module for module in self.model.modules() if id(module) in self.parts.layers]
        for layer, following in zip(found, found[1:], strict=False):
            layer.set_modules_to_forward_prefetch([following])

    def result(self) -> tuple[dict[str, nn.Parameter], dict[str, Piece], dict[str, nn.Parameter]]:
        """(sharded parameters, this process's pieces of them, whole parameters), by name."""
        sharded, pieces, whole = {}, {}, {}
        for name, parameter in self.model.named_parameters():
            if parameter in self.kept:
                parameter.lr_scale = self.scales[name]
                whole[name] = parameter
                continue
            sharded[name] = parameter
            local = parameter.to_local().detach()  # empty if there are fewer rows than processes
            values = nn.Parameter(local, requires_grad=parameter.requires_grad)
            values.lr_scale = self.scales[name]
            dim = parameter.placements[-1].dim
            pieces[name] = self._piece(name, values, parameter.shape, dim)
        return sharded, pieces, whole

    def _piece(self, name: str, values: nn.Parameter, shape: torch.Size, dim: int) -> Piece:
        """shape: without what tensor parallelism has cut off."""
        start = self._rows(shape[dim])[0]
        cut = None if self.tensor is None else self.tensor.slices.get(name)
        if cut is None:
            return Piece(values, shape, dim, start)
        complete = torch.Size(cut.length if index == cut.dim else size for index, size in enumerate(shape))
        if cut.dim == 0:
            return Piece(values, complete, dim, cut.start + start)
        return Piece(values, complete, dim, start, cut.start)

    def gathered_in(self, name: str) -> torch.dtype | None:
        """The type in which a sharded parameter is gathered; None: its own."""
        return self.rounded.param_dtype if name in self.rounded_names else None


def multiplied_names(model: nn.Module) -> set[str]:
    """Parameters of a complete model that only matrix products read, so that autocast rounds them at each use: what
    the sharder gathers in bf16."""
    parts, names = Parts(model), set()
    shared = {id(parameter) for places in parts.tied for parameter in map(parameter_at, places)}
    for part_name in parts.names:
        part = model.get_submodule(part_name)
        if id(part) not in parts.layers and (isinstance(part, Head) or not isinstance(part, nn.Linear)):
            continue
        for prefix, module in part.named_modules(prefix=part_name):
            for attribute, parameter in module.named_parameters(recurse=False):
                is_matrix = parameter.dim() >= 2 and id(parameter) not in shared
                if is_matrix and _only_multiplied(module, attribute, parameter):
                    names.add(f"{prefix}.{attribute}")
    return names


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
