"""Changes to a model's layers before an engine takes it: attention, loss, compilation, recomputed activations.

A decoder layer is what transformers marks as one (GradientCheckpointingLayer). The layers of a pipeline stage are the
same modules, so all of this works there too.
"""

import functools
import types

import torch

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.models import attention, row_attention
from pipeline.models.model_parts import decoder_layers
from pipeline.train import chunked_loss, fp8
from pipeline.train.config import TrainConfig

# Results that selective checkpointing keeps: matrix products and attention. Everything between them (norms, rotations,
# activations) is cheap to compute again and makes up most of the bytes (Korthikanti et al., 2022, section 4). By name,
# because not every build of torch has every operator.
KEPT = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm")
ATTENTION = (
    "_scaled_dot_product_",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    "_varlen_attn",
)
# Recomputation would fill a cache of keys and values a second time.
NO_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}


def prepare(model, config: TrainConfig, **losses) -> None:
    """Set attention, output layer and compilation as a config says. losses: options of chunked_loss.install, for a
    stage with `head_chunk`. Raises UserError for what this model does not support."""
    attention.choose(model, config.attention, config.wide_precision, config.packed_rows(distributed.world()))
    chunk, can_chunk = config.head_chunk(), chunked_loss.can_install(model)
    if isinstance(chunk, int) and not can_chunk:
        raise UserError(
            f"stage {config.kind}: loss_chunk: {chunk} is not supported for the family {model.config.model_type}: it"
            " was not verified that its logits are the output layer's result, unchanged; use loss_chunk: auto"
        )
    if chunk is not None and can_chunk:
        chunked_loss.install(model, None if chunk == "auto" else chunk, compiled=config.compile, **losses)
    if config.precision == "fp8":
        fp8.convert(model, f"stage {config.kind}")
    if config.compile:
        compile(model)


def prepare_rows(model, config: TrainConfig, **losses) -> None:
    """The same for rows without padding, whose documents are kept apart by lengths (models/row_attention.py). Stages of
    a pipeline pass on hidden states and positions and no more, so they keep transformers' way."""
    prepare(model, config, **losses)
    if config.parallel.pipeline == 1:
        row_attention.install(model)


def checkpoint(model, how: str) -> None:
    """Keep fewer activations of each layer for the backward pass and compute the others again. how: "full" keeps only
    the layer's input (Chen et al., 2016), "selective" also the results of matrix products and attention. Results stay
    bit-identical if operations are deterministic.

    Done here because transformers before 5.23 recomputes around `__call__`, outside of what is compiled: torch then
    finds that compiled code changed what "selective" kept, and raises an error."""
    options: dict = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = functools.partial(torch.utils.checkpoint.create_selective_checkpoint_contexts, _policy)
    for layer in decoder_layers(model):
        layer.forward = types.MethodType(_recomputed(type(layer).forward, options), layer)


def _recomputed(forward, options: dict):
    """A layer's `forward` that keeps fewer activations in training."""

    @functools.wraps(forward)
    def recomputed(self, *args, **kwargs):
        if not self.training:
            return forward(self, *args, **kwargs)
        kwargs.update({name: value for name, value in NO_CACHE.items() if name in kwargs})
        return torch.utils.checkpoint.checkpoint(functools.partial(forward, self, **kwargs), *args, **options)

    return recomputed


def _policy(context, operator, *args, **kwargs):
    policy = torch.utils.checkpoint.CheckpointPolicy
    namespace, _, name = operator.name().partition("::")
    name = name.partition(".")[0]
    is_kept = namespace == "flash_attn" or name in KEPT or name.startswith(ATTENTION)
    return policy.MUST_SAVE if is_kept else policy.PREFER_RECOMPUTE


def compile(model) -> None:
    """torch.compile each layer separately. Equal layers share one graph, so compiling takes the time of one layer and
    not of the model, and it works wherever a process holds complete layers: alone, with DDP, ZeRO 0-2, and in the
    stages of a pipeline."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=False)
