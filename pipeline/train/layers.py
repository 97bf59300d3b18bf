"""What is done to a model's layers before an engine takes it: attention, loss, compilation, recomputation of
activations.

A decoder layer is what transformers marks as one (GradientCheckpointingLayer); the layers of a pipeline's stage are the
same modules, so both work there too.
"""

import functools
import types

import torch

from pipeline.core.errors import UserError
from pipeline.models import attention
from pipeline.models.families import family_of
from pipeline.train import chunked_loss, distributed

# Results that selective checkpointing keeps: matrix products and attention. What lies between them (norms, rotations,
# activations) is cheap to compute again and makes up most of the bytes (Korthikanti et al., 2022, section 4). Names,
# since not every build of torch has every operator.
KEPT = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
ATTENTION = (
    "_scaled_dot_product_",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
)
# A cache of keys and values would be filled a second time.
NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}


def prepare(model, config) -> None:
    """Attention, output layer and compilation as a pretraining stage's config says. Raises UserError for what this
    model cannot have."""
    rows = config.micro_rows(distributed.world()) if config.document_mask else 1
    attention.choose(model, config.attention, config.precision, rows)
    can_chunk = family_of(model.config).chunked_loss
    if isinstance(config.loss_chunk, int) and not can_chunk:
        raise UserError(
            f"stage {config.kind}: loss_chunk: {config.loss_chunk} is not supported for the family"
            f" {model.config.model_type}: it was not verified that its logits are the output layer's result, unchanged;"
            " use loss_chunk: auto"
        )
    if config.loss_chunk is not None and can_chunk:
        chunk = None if config.loss_chunk == "auto" else config.loss_chunk
        chunked_loss.install(model, chunk, config.z_loss, config.compile)
    if config.compile:
        compile(model)


def of(model) -> list[torch.nn.Module]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpoint(model, how: str) -> None:
    """Keep less of each layer's activations for the backward pass and compute the rest again. how: "full" keeps the
    layer's input alone (Chen et al., 2016), "selective" also the results of matrix products and attention. Results
    stay the same to the bit where operations are deterministic.

    Done here and not by transformers, which before 5.23 recomputes around `__call__`, outside of what is compiled:
    torch then finds what "selective" kept changed by the compiled code, and ends with an error."""
    options: dict = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, _policy)
    for layer in of(model):
        layer.forward = types.MethodType(_recomputed(type(layer).forward, options), layer)


def _recomputed(forward, options: dict):
    """A layer's `forward` that keeps less while it trains."""

    @functools.wraps(forward)
    def keeping_less(self, *args, **kwargs):
        if not self.training:
            return forward(self, *args, **kwargs)
        kwargs |= {name: empty for name, empty in NO_CACHE.items() if name in kwargs}
        return torch.utils.checkpoint.checkpoint(functools.partial(forward, self, **kwargs), *args, **options)

    return keeping_less


def _policy(context, operator, *args, **kwargs):
    keep = torch.utils.checkpoint.CheckpointPolicy
    space, _, name = operator.name().partition("::")
    name = name.partition(".")[0]
    kept = space == "flash_attn" or name in KEPT or name.startswith(ATTENTION)
    return keep.MUST_SAVE if kept else keep.PREFER_RECOMPUTE


def compile(model) -> None:
    """torch.compile each layer by itself. Equal layers share one graph, so it takes the time of one layer and not of
    the model, and it works wherever layers are whole: alone, under DDP, ZeRO 0-2, and in a pipeline's stages."""
    for layer in of(model):
        layer.compile(dynamic=False)
