"""Context parallelism: a group of processes shares the tokens of each row (DeepSpeed-Ulysses: Jacobs et al., 2023).

Each process computes embedding, norms, matrices and loss of its own tokens, with all weights, as a data rank does with
rows of its own. Only attention needs the other tokens: queries, keys and values are exchanged there, so that a process
has some heads of all tokens, and its output is exchanged back. So rows may be as long as the activations of all
processes of the group together allow, and every kernel of attention can be used.

    context = ContextGroup(model, mesh)
    batch = context.own(batch)              # its tokens, positions and labels
"""

import functools

import torch
import torch.distributed as dist

from pipeline.core.errors import UserError
from pipeline.models import row_attention
from pipeline.models.families import family_of
from pipeline.models.model_parts import decoder_layers

HEADS = ("num_attention_heads", "num_key_value_heads")


def check(model_config, size: int) -> None:
    """Raise UserError if the rows of a model of this configuration cannot be shared by `size` processes."""
    reason = obstacle(model_config, size)
    if reason is not None:
        raise UserError(f"parallel.context: {reason}")


def obstacle(model_config, size: int) -> str | None:
    """Why the rows of a model of this configuration cannot be shared by `size` processes, in words; None if they
    can."""
    if size == 1:
        return None
    if not family_of(model_config).tensor or row_attention.is_special(model_config):
        return (
            f"the attention of this {model_config.model_type} model cannot be exchanged; llama, qwen2 and qwen3 can,"
            " without windows, caps and dropout. Use shard: full without context"
        )
    for key in HEADS:
        number = getattr(model_config, key)
        if number % size:
            return f"{key}: {number} of the model is not divisible by context: {size}; use a divisor of {number}"
    return None


class ContextGroup:
    """The group of this process, whose attention layers exchange heads for tokens."""

    def __init__(self, model, mesh):
        check(model.config, mesh.size())
        if not row_attention.is_installed(model):
            raise UserError(
                f"parallel.context: {mesh.size()} needs attention: sdpa or auto, and a model whose rows have no padding"
            )
        self.group, self.rank, self.size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        for layer in decoder_layers(model):
            row_attention.exchange(
                layer, functools.partial(to_heads, self.group), functools.partial(to_tokens, self.group)
            )

    def own(self, batch: dict) -> dict:
        """What this process computes of a micro-batch: an equal share of each row's tokens, in order. Sums over rows
        (`weight`, `bytes`) are counted by the first process."""
        ids = batch["inputs"]["input_ids"]
        length = ids.shape[1] // self.size
        assert length * self.size == ids.shape[1], "rows must have a multiple of `context` tokens"
        places = slice(self.rank * length, (self.rank + 1) * length)
        positions = batch["inputs"].get("position_ids")
        every = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
        own = dict(batch)
        own["inputs"] = {"input_ids": ids[:, places], "position_ids": every[:, places].contiguous()}
        own["labels"] = batch["labels"][:, places]
        own["row_positions"] = positions
        if self.rank > 0:
            own["weight"] = 0.0
            if "bytes" in batch:
                own["bytes"] = torch.zeros_like(batch["bytes"])
        return own


# ---- exchange --------------------------------------------------------------------------------------------------------


class Exchanged(torch.autograd.Function):
    """Parts [processes, ...]: part p goes to process p, and theirs for this one come back."""

    @staticmethod
    def forward(ctx, parts, group):
        ctx.group = group
        return _exchanged(parts, group)

    @staticmethod
    def backward(ctx, gradients):
        return _exchanged(gradients, ctx.group), None


def _exchanged(parts: torch.Tensor, group) -> torch.Tensor:
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def to_heads(group, values_BHTD: torch.Tensor) -> torch.Tensor:
    """All heads of this process's tokens -> its heads of all tokens."""
    count = dist.get_world_size(group)
    rows, heads, length, width = values_BHTD.shape
    parts = values_BHTD.view(rows, count, heads // count, length, width).transpose(0, 1)
    received = Exchanged.apply(parts, group)
    return received.permute(1, 2, 0, 3, 4).reshape(rows, heads // count, count * length, width)


def to_tokens(group, outputs_BTHD: torch.Tensor) -> torch.Tensor:
    """This process's heads of all tokens -> all heads of its tokens."""
    count = dist.get_world_size(group)
    rows, length, heads, width = outputs_BTHD.shape
    parts = outputs_BTHD.reshape(rows, count, length // count, heads, width).transpose(0, 1)
    received = Exchanged.apply(parts, group)
    return received.permute(1, 2, 0, 3, 4).reshape(rows, length // count, count * heads, width)
