"""Tensor parallelism: each matrix of a layer is split over a group of processes, which compute the same rows together
(Shoeybi et al., 2019, section 3). What a process has of a matrix is split once more by FSDP (train/fsdp.py).

Attention and feed-forward layers begin with matrices of which each process has some outputs (whole heads), and end with
one of which it has the matching inputs. So a block needs two sums over the group: of its output in the forward pass,
and of its input's gradient in the backward pass. Which matrix is which is said by transformers' `base_model_tp_plan`.
Input and output table are split by words; the chunked loss (train/chunked_loss.py) of a part of the vocabulary needs
three numbers of each token from the others, and no logits.

    tensor = TensorGroup(model, mesh)
    tensor.split(name, part)             # in place: parameters stay ordinary ones, with fewer rows or columns
"""

import functools
import re
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pipeline.core.errors import UserError
from pipeline.models.families import family_of, supporting
from pipeline.train.chunked_loss import IGNORE, Head, chunk_of

COLUMNS, ROWS, SEES_OWN_HEADS = "colwise", "rowwise", "replicated_with_grad_allreduce"  # transformers' names
SIZES = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def check(model_config, size: int) -> None:
    """Raise UserError if a model of this configuration cannot be split over `size` processes."""
    reason = obstacle(model_config, size)
    if reason is not None:
        raise UserError(f"parallel.tensor: {reason}")


def obstacle(model_config, size: int) -> str | None:
    """Why a model of this configuration cannot be split over `size` processes, in words; None if it can."""
    if size == 1:
        return None
    if not family_of(model_config).tensor:
        return (
            f"the family {model_config.model_type} cannot be split over a tensor group here; these can:"
            f" {', '.join(supporting('tensor'))}. Use shard: full without tensor"
        )
    for key in SIZES:
        number = getattr(model_config, key)
        if number % size:
            return f"{key}: {number} of the model is not divisible by tensor: {size}; use a divisor of {number}"
    return None


def part_of(length: int, index: int, count: int) -> tuple[int, int]:
    """(first index, end) of one of `count` parts, of which the last ones may be shorter, or empty."""
    most = -(-length // count)
    return min(index * most, length), min((index + 1) * most, length)


class Slice(NamedTuple):
    """What a process has of a parameter: some indices of one dimension of `length`, from `start` on."""

    dim: int
    start: int
    length: int


class TensorGroup:
    """The group of this process, and what it has of a model's parameters.

    slices: by the name of the parameter. partial: names of parameters that every process holds, and whose gradient is
    the sum over the group, because each uses them for its own heads.
    """

    def __init__(self, model, mesh):
        check(model.config, mesh.size())
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.device = mesh.device_type
        self.slices: dict[str, Slice] = {}
        self.partial: set[str] = set()
        self.inputs, self.outputs = model.get_input_embeddings(), model.get_output_embeddings()
        self.is_tied = self.inputs.weight is self.outputs.weight
        self.styles: dict[nn.Module, str] = {self.inputs: COLUMNS, self.outputs: COLUMNS}
        plan = model.config.base_model_tp_plan
        for name, module in model.base_model.named_modules():
            style = plan.get(re.sub(r"\.\d+\.", ".*.", name))
            if style is not None:
                assert style in (COLUMNS, ROWS, SEES_OWN_HEADS), f"{name}: {style}"
                self.styles[module] = style

    def dim_of(self, module: nn.Module, parameter: torch.Tensor) -> int | None:
        """The dimension in which a module's parameter is split; None if every process has all of it."""
        style = self.styles.get(module)
        if style == COLUMNS:
            return 0
        return 1 if style == ROWS and parameter.dim() == 2 else None

    def rows(self, module: nn.Module, parameter: torch.Tensor) -> tuple[int, int]:
        """(first row, end) of a complete parameter of which this process has something."""
        is_split = self.dim_of(module, parameter) == 0
        return part_of(len(parameter), self.rank, self.size) if is_split else (0, len(parameter))

    def split(self, name: str, part: nn.Module) -> None:
        """Keep of a complete part of the model what is this process's, in place."""
        blocks = set()
        for inner, module in part.named_modules(prefix=name):
            style = self.styles.get(module)
            if style is None:
                continue
            if not (module is self.outputs and self.is_tied):  # its table was split as that of the inputs
                self._split_parameters(inner, module)
            if module is self.inputs:
                self._split_inputs(module, self.slices[f"{inner}.weight"].start)
            elif module is self.outputs:
                self._split_outputs(module)
            elif style == COLUMNS:
                module.out_features = len(module.weight)
                blocks.add(inner.rpartition(".")[0])
            elif style == ROWS:
                module.__class__ = InputsSplit
                module.in_features, module.group = module.weight.shape[1], self.group
            else:
                self.partial |= {f"{inner}.{attribute}" for attribute, _ in module.named_parameters(recurse=False)}
        for block in blocks:
            module = part.get_submodule(block[len(name) :].lstrip("."))
            module.register_forward_pre_hook(functools.partial(_enter, self.group), with_kwargs=True)

    def _split_parameters(self, name: str, module: nn.Module) -> None:
        for attribute, parameter in module.named_parameters(recurse=False):
            dim = self.dim_of(module, parameter)
            if dim is not None:
                length = parameter.shape[dim]
                start, stop = part_of(length, self.rank, self.size)
                self.slices[f"{name}.{attribute}"] = Slice(dim, start, length)
                parameter.data = parameter.data.narrow(dim, start, stop - start).clone()

    def _split_inputs(self, module: nn.Embedding, first: int) -> None:
        module.__class__ = Words
        module.num_embeddings, module.group, module.first = len(module.weight), self.group, first
        if module.padding_idx is not None:
            padding = module.padding_idx - first
            module.padding_idx = padding if 0 <= padding < module.num_embeddings else None

    def _split_outputs(self, module: nn.Linear) -> None:
        length = module.out_features
        first, stop = part_of(length, self.rank, self.size)
        module.out_features = stop - first
        module.register_forward_pre_hook(lambda _, words: (Entered.apply(words[0], self.group), *words[1:]))
        module.register_forward_hook(functools.partial(_complete_logits, self, length))
        if isinstance(module, Head):
            # the same on all processes of the group, which sum over each chunk
            module.chunk = module.chunk or chunk_of(-(-length // self.size), self.device)
            module.step = functools.partial(split_chunk, self.group, first)

    def gathered(self, name: str, own: torch.Tensor) -> torch.Tensor:
        """A complete parameter. Collective."""
        piece = self.slices.get(name)
        return own if piece is None else self.joined(own, piece.dim, piece.length)

    def joined(self, own: torch.Tensor, dim: int, length: int) -> torch.Tensor:
        """The tensor of which each process has some indices of a dimension, as `part_of` cuts it. Collective."""
        missing = -(-length // self.size) - own.shape[dim]
        if missing:
            shape = [missing if index == dim % own.dim() else size for index, size in enumerate(own.shape)]
            own = torch.cat([own, own.new_zeros(shape)], dim)
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts, dim).narrow(dim, 0, length)


# ---- blocks ----------------------------------------------------------------------------------------------------------


class Entered(torch.autograd.Function):
    """The input of matrices of which each process has some outputs: each gives a part of its gradient."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return _summed(gradient, ctx.group), None


class Summed(torch.autograd.Function):
    """The output of a matrix of which each process has some inputs."""

    @staticmethod
    def forward(ctx, part, group):
        return _summed(part, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Joined(torch.autograd.Function):
    """Logits of all words, of which each process has some. All compute the same from them."""

    @staticmethod
    def forward(ctx, logits, tensor: TensorGroup, length: int):
        ctx.places = part_of(length, tensor.rank, tensor.size)
        return tensor.joined(logits, -1, length)

    @staticmethod
    def backward(ctx, gradient):
        first, stop = ctx.places
        return gradient[..., first:stop], None, None


def _summed(value: torch.Tensor, group) -> torch.Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _enter(group, module, arguments, keywords):
    """Before the forward pass of a block, whose first argument is the hidden state."""
    if arguments:
        return (Entered.apply(arguments[0], group), *arguments[1:]), keywords
    return arguments, keywords | {"hidden_states": Entered.apply(keywords["hidden_states"], group)}


def _complete_logits(tensor: TensorGroup, length: int, module, arguments, outputs):
    """After the output layer, which returns losses in training, and logits otherwise."""
    return Joined.apply(outputs, tensor, length) if isinstance(outputs, torch.Tensor) else None


class InputsSplit(nn.Linear):
    """A matrix of which a process has some inputs, and the complete bias."""

    def forward(self, part):
        total = Summed.apply(F.linear(part, self.weight), self.group)
        return total if self.bias is None else total + self.bias.to(total.dtype)


class Words(nn.Embedding):
    """A table of which a process has some words, from number `first` on."""

    def forward(self, ids):
        own = ids - self.first
        elsewhere = (own < 0) | (own >= self.num_embeddings)
        vectors = F.embedding(own.masked_fill(elsewhere, 0), self.weight, self.padding_idx)
        return Summed.apply(vectors.masked_fill(elsewhere[..., None], 0), self.group)


# ---- loss ------------------------------------------------------------------------------------------------------------


def split_chunk(group, first: int, hidden_ND, weight_VD, bias_V, labels_N, z_loss: float, backward: bool):
    """chunked_loss's step with the weights of some words, from number `first` on: losses and logsumexps are those of
    all words, and so are equal on all processes; the gradient is that of this process's logits."""
    logits = F.linear(hidden_ND, weight_VD, bias_V).float()
    counted = labels_N != IGNORE
    own_N = labels_N - first
    is_own = counted & (own_N >= 0) & (own_N < logits.shape[1])
    index = own_N.clamp(0, logits.shape[1] - 1)[:, None]
    largest = logits.amax(-1)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    label_logits = torch.where(is_own, logits.gather(1, index)[:, 0], 0.0)
    p = logits.sub_(largest[:, None]).exp_()
    sums = torch.stack([p.sum(-1), label_logits])
    dist.all_reduce(sums, group=group)
    lse = sums[0].log() + largest
    nll = torch.where(counted, lse - sums[1], 0.0)
    if backward:
        # d nll / d logits = p - onehot; d lse^2 / d logits = 2 lse p
        p *= ((1 + 2 * z_loss * lse) / sums[0])[:, None]
        p.scatter_add_(1, index, -is_own.to(p.dtype)[:, None])
        p *= counted[:, None]
    return nll, torch.where(counted, lse, 0.0), p.to(hidden_ND.dtype) if backward else None
