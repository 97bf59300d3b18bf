"""The FSDP engine: weights, gradients and moments are split over processes by torch's fully_shard (FSDP2; Zhao et al.,
2023), layer by layer.

A process holds its part of every matrix in fp32, gathers a layer before it computes with it, and drops it afterwards.
With `precision: bf16` the matrices of layers are gathered in bf16, which halves what is sent and changes no bit: a
linear layer under autocast casts its weight to bf16 anyway, and casting and gathering can be exchanged (docs/log.md).
What is not only read by matrix products is not rounded: embeddings are gathered in fp32, and so is an output layer that
computes its losses in chunks, whose gradient is a sum in fp32. Norms, biases and other small parameters are on every
process. Gradients are summed in fp32.

`shard: full` splits over all processes. `shard: hybrid` splits over the processes of a group, such as a node, and every
group holds a copy: weights are gathered inside a group, and gradients are summed over the groups once a step.

`tensor: N` splits the matrices of each layer over N processes first (train/tensor_parallel.py); what a process has of
them is then split as above, over the processes that have the same.

A model may be on the meta device: then each part (a decoder layer, a table) is created, filled and split before the
next one, so that a process never holds the complete model.
"""

import contextlib
import copy
import math

import torch
import torch.distributed as dist
from torch import nn

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.models import publish
from pipeline.train import muon, muon_sharded, phases, shards
from pipeline.train.context_parallel import ContextGroup
from pipeline.train.engine import Engine, Sums, adamw, finite, gradient_norm, set_learning_rate
from pipeline.train.fsdp_sharding import Fill, Sharder
from pipeline.train.state import Fragment, share
from pipeline.train.tensor_parallel import TensorGroup

SQUARE = "gradient_square"  # key of the squared gradient norm among a step's sums


def mesh_of(parallel, device: torch.device):
    """The processes as a mesh: [copies, processes of a copy] with `shard: hybrid`, [world / N, N] with `tensor: N`,
    otherwise [world]. Raises UserError if they cannot be divided into groups."""
    from torch.distributed.device_mesh import init_device_mesh

    world, size = distributed.world(), parallel.group_size(distributed.world(), distributed.local_world())
    if parallel.tensor > 1:  # neighbours, which are in one node
        return init_device_mesh(device.type, (size, parallel.tensor), mesh_dim_names=("shard", "tensor"))
    if parallel.shard != "hybrid":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    if world % size:
        raise UserError(
            f"parallel.shard: hybrid: {world} processes cannot be divided into groups of {size}; start the same number"
            " on every node, or give parallel.shard_ranks"
        )
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("copies", "shard"))


def rows_mesh(parallel, device: torch.device):
    """The processes as a mesh [data ranks, processes that share their rows]."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (parallel.data_ranks(distributed.world()), parallel.context)
    return init_device_mesh(device.type, shape, mesh_dim_names=("rows", "context"))


class FullySharded(Engine):
    """`model` is the sharded model; a forward pass of it is collective. `pieces` are this process's parts of its
    parameters, `whole` the parameters that every process holds."""

    layout = "fsdp"
    samples_together = True

    def __init__(self, model, loss_fn, config, name, fill: Fill | None = None):
        super().__init__(model, loss_fn, config, name)
        self.mesh = mesh_of(config.parallel, self.device)
        self.size = self.mesh["shard"].size()
        parallel = config.parallel
        self.data_world = parallel.data_ranks(distributed.world())
        self.data_rank = distributed.rank() // (parallel.tensor * parallel.context)
        self.num_copies = self._num_losses() // self.size
        self.matrices = muon.matrix_names(model) if config.optimizer.kind == "muon" else set()
        self.skeleton = without_weights(model)
        self.tensor: TensorGroup | None = None
        mesh = self.mesh
        if parallel.tensor > 1:
            mesh, self.tensor = self.mesh["shard"], TensorGroup(model, self.mesh["tensor"])
        self.context: ContextGroup | None = None
        if parallel.context > 1:
            self.context = ContextGroup(model, rows_mesh(parallel, self.device)["context"])
        sharder = Sharder(model, mesh, self.device, config.wide_precision, self.tensor)
        sharder.shard(fill)
        self.sharded, self.pieces, self.whole = sharder.result()
        self.gathered_in = sharder.gathered_in
        self.parameters = [piece.values for piece in self.pieces.values() if piece.values.numel()]
        self.parameters += list(self.whole.values())
        if config.optimizer.kind == "muon":
            group = self.mesh["shard"].get_group()
            self.optimizer = muon_sharded.build(self.pieces, self.whole, self.matrices, group, config)
            self.optimizers = self.optimizer.parts
        else:
            self.optimizer = adamw(self.parameters, config, self.device)
            self.optimizers = [self.optimizer]

    # ---- updates -----------------------------------------------------------------------------------------------------

    def _update(self, micro_batches, weight, lr):
        self.model.train()
        sums = Sums()
        for index, batch in enumerate(micro_batches):
            if self.num_copies > 1:  # inside a group after each micro-batch, between groups after the last
                self.model.set_requires_all_reduce(index == len(micro_batches) - 1)
            phases.enter("forward")
            loss, metrics = self._forward(self.model, batch)
            sums.add(loss, metrics)
            phases.enter("backward")
            (loss * (self._num_losses() / weight)).backward()  # fully_shard averages over processes
        phases.enter("reduce")
        gradients = self._reduced_gradients()
        if self.tensor is not None:
            sums.scale(self._counts())
        sums.tensors[SQUARE] = self._square(gradients)
        total = sums.reduced()  # the only read of the device in a step
        loss, norm = total.pop("loss"), total.pop(SQUARE) ** 0.5
        applied = finite(loss, norm) and self._accepted(loss, norm)
        phases.enter("update")
        if applied:
            scale = self.config.optimizer.max_grad_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
            if scale < 1:
                torch._foreach_mul_(gradients, scale)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, total, norm, applied

    def _reduced_gradients(self) -> list[torch.Tensor]:
        """Give the optimizer's parameters their gradients: of its pieces this process has the sums already, those of
        whole parameters are summed here. Collective."""
        for name, piece in self.pieces.items():
            gradient = self.sharded[name].grad
            if gradient is not None:
                piece.values.grad = gradient.to_local()
                self.sharded[name].grad = None
        trained = [parameter for parameter in self.whole.values() if parameter.grad is not None]
        if trained and distributed.world() > 1:
            if self.tensor is not None:  # the others' gradients are equal in a group, and so is their mean
                for name in self.tensor.partial & self.whole.keys():
                    if self.whole[name].grad is not None:
                        self.whole[name].grad.mul_(self.tensor.size)
            flat = torch.cat([parameter.grad.view(-1) for parameter in trained])
            dist.all_reduce(flat)
            flat /= distributed.world()
            parts = flat.split([parameter.numel() for parameter in trained])
            for parameter, part in zip(trained, parts, strict=True):
                parameter.grad = part.view_as(parameter)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _square(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """This process's share of the squared gradient norm, fp64 []: the sum over all processes is the square.
        Gradients of pieces are on as many processes as there are copies, those of whole parameters on all."""
        whole = [parameter.grad for parameter in self.whole.values() if parameter.grad is not None]
        pieces = gradients[: len(gradients) - len(whole)]
        return gradient_norm(pieces) ** 2 / self.num_copies + gradient_norm(whole) ** 2 / distributed.world()

    def _own(self, batch):
        return batch if self.context is None else self.context.own(batch)

    def _num_losses(self):
        return self.data_world * self.config.parallel.context

    def _counts(self) -> float:
        """1 on one process of each tensor group, whose others have the same sums, and 0 on these. As a factor it leaves
        what is not finite as it is, on whichever process."""
        return float(self.tensor is None or self.tensor.rank == 0)

    def _data_sum(self, values):
        return super()._data_sum([value * self._counts() for value in values])

    def _forward_sums(self, micro_batches, counted):
        self.model.eval()
        sums = Sums()
        for batch, is_counted in zip(micro_batches, counted, strict=True):
            loss, metrics = self._forward(self.model, batch)
            if is_counted:
                sums.add(loss, metrics)
        self.model.train()
        self.model.reshard()  # the root keeps what it gathered until a backward pass, and there is none
        return sums.read()

    # ---- the complete model ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def gathered(self):
        sharded, complete = self.model, self.skeleton
        # in the types in which layers are gathered: half of the bytes under bf16, and the same results under autocast
        weights = {name: self._complete(name, self.gathered_in(name)) for name in self.shapes}
        with filled(complete, weights, dict(sharded.named_buffers())):
            complete.train(sharded.training)
            self.model = complete
            try:
                yield
            finally:
                self.model = sharded

    @contextlib.contextmanager
    def sampling(self):
        """All processes sample the same, each gathering a layer at a time: the complete model may not fit."""
        try:
            yield self.model
        finally:
            self.model.reshard()

    def _complete(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A complete parameter or buffer, on the device, in another type if one is given. Collective."""
        if name in self.whole:
            return self.whole[name].detach()
        if name not in self.sharded:
            return self.model.get_buffer(name)
        own = self.sharded[name].detach()
        if dtype is not None and own.is_floating_point():  # weights in 4 bits are bytes
            own = own.to(dtype)
        complete = own.full_tensor()
        return complete if self.tensor is None else self.tensor.gathered(name, complete)

    def consolidated(self):
        weights = self._on_main(self.shapes)
        if weights is None:
            return None
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        first_names = {id(parameter): name for name, parameter in reversed(parameters.items())}
        buffers = {fragment.name for fragment in shards.buffers(self.model)}
        result = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if name in buffers:
                result[name] = value.detach().cpu().clone()
            else:
                result[name] = weights[first_names[id(parameters[name])]]
        return result

    def publish(self, model_config, tokenizer_folder, folder, parent=None):
        if publish.can_publish_parts(model_config):
            publish.publish_parts(self._complete, model_config, tokenizer_folder, folder, parent)
        else:
            super().publish(model_config, tokenizer_folder, folder, parent)

    def trained_weights(self):
        return self._on_main(name for name in self.shapes if name not in self.frozen_names)

    def _on_main(self, names) -> dict[str, torch.Tensor] | None:
        """Complete parameters on the CPU of the main process, gathered one after another. Collective."""
        weights = {}
        for name in names:
            value = self._complete(name)
            if distributed.is_main():
                weights[name] = value.to("cpu", torch.float32, copy=True)
        return weights if distributed.is_main() else None

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def state_bytes(self):
        # of a matrix Muon has one moment, where AdamW has two
        return super().state_bytes() - 4 * sum(math.prod(self.shapes[name]) for name in self.matrices)

    def _layout(self):
        layout = super()._layout() | {"shard": self.config.parallel.shard}
        if self.num_copies > 1:
            layout["copies"] = self.num_copies
        if self.tensor is not None:
            layout["tensor"] = self.tensor.size
        if self.context is not None:
            layout["context"] = self.context.size
        return layout

    def _held(self):
        own = self._shared_pieces(self._copy())
        return own, shards.whole(self.whole, self.optimizers) + shards.buffers(self.model)

    def _share(self, common):
        return share(common, distributed.rank(), distributed.world())

    def _copies(self):
        fragments = []
        for other in range(self.num_copies):
            if other != self._copy():
                fragments += self._shared_pieces(other)
        return [fragment for fragment in fragments if fragment.name not in self.frozen_names]

    def _copy(self) -> int:
        """The number of the copy that this process holds a part of."""
        return self.mesh["copies"].get_local_rank() if self.num_copies > 1 else 0

    def _shared_pieces(self, number: int) -> list[Fragment]:
        """What a process of this number of a copy writes of the pieces that it shares with the other copies."""
        return share(shards.pieces(self.pieces, self.optimizers), number, self.num_copies)

    def _updates(self):
        return shards.updates_whole(self._optimized(), self.optimizers)

    def _begin_moments(self, saved):
        shards.begin_whole(self._optimized(), self.optimizers, saved)

    def _optimized(self) -> dict[str, nn.Parameter]:
        return {name: piece.values for name, piece in self.pieces.items()} | self.whole


# ---- the complete model ------------------------------------------------------------------------------------------


def without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters are on the meta device."""
    memo = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def filled(skeleton: nn.Module, weights: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]):
    """Inside, the skeleton has these weights and buffers."""
    before = dict(skeleton.named_parameters())
    values = {id(before[name]): nn.Parameter(value, requires_grad=False) for name, value in weights.items()}
    places = []
    for module in skeleton.modules():
        places += [(module, key, parameter) for key, parameter in module.named_parameters(recurse=False)]
    for module, attribute, parameter in places:
        setattr(module, attribute, values[id(parameter)])
    for name, value in buffers.items():
        module_name, _, attribute = name.rpartition(".")
        setattr(skeleton.get_submodule(module_name), attribute, value)
    try:
        yield
    finally:
        for module, attribute, parameter in places:
            setattr(module, attribute, parameter)
