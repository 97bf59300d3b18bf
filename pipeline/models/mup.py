"""Initial weights and learning rates that follow a model's depth and width: the keys `init` and `mup` of a model block.

`init: depth` divides what writes into the residual stream by sqrt(2 * layers), so that its size does not grow with
depth (GPT-2: Radford et al., 2019, section 2.3). transformers' GPT-2 does that already.

`mup: {base_width: B}` keeps a learning rate that was tuned at width B good at other widths W (Yang et al., 2022,
Tensor Programs V, Adam's column of table 3), r = B / W:

                       initial deviation      learning rate
    embedding, vectors          1                   1
    hidden matrices          sqrt(r)                r
    output layer                r                   r

relative to `initializer_range` and `optimizer.lr`, which hold at width B. Heads keep their size and grow in number,
so attention's 1 / sqrt(head_dim) is a constant; the feed-forward width should grow with W. Weight decay per step stays
that of the unscaled learning rate. The table is for Adam: refused with Muon.
"""

import math
from collections.abc import Callable

from pipeline.core.errors import UserError
from pipeline.models.families import family_of, supporting

# Modules whose outputs are added to the residual stream.
RESIDUAL_WRITERS = (".o_proj", ".down_proj", ".out_proj", ".fc2")


def check(block: dict, config) -> None:
    """Raise UserError for values of `init` and `mup` that a model of this configuration cannot have."""
    if block.get("init") is not None:
        _check_init(block["init"], config)
    if block.get("mup") is not None:
        _check_mup(block["mup"], config)


def _check_init(value, config) -> None:
    if value != "depth":
        raise UserError(
            f"model.init: {value!r} is unknown; write depth, or remove the key for the family's own initial values"
        )
    family = family_of(config)
    if family.own_depth_init:
        raise UserError(
            f"model.init: depth: the initial values of {config.model_type} are scaled by depth already; remove the key"
        )
    if not family.depth_init:
        raise UserError(
            f"model.init: depth: not verified for {config.model_type}, only for"
            f" {', '.join(supporting('depth_init'))}; remove the key"
        )


def _check_mup(value, config) -> None:
    is_valid = isinstance(value, dict) and set(value) == {"base_width"} and type(value["base_width"]) is int
    if not is_valid or value["base_width"] < 1:
        raise UserError(
            f"model.mup: {value!r}, expected {{base_width: N}}, the hidden_size at which lr and initializer_range were"
            " chosen"
        )
    if not family_of(config).mup:
        raise UserError(
            f"model.mup: not verified for {config.model_type}, only for {', '.join(supporting('mup'))}; remove the key"
        )
    if config.tie_word_embeddings:
        raise UserError(
            "model.mup: input and output scale differently with the width, so they cannot share a table; set"
            " tie_word_embeddings: false"
        )


def config_keys(block: dict) -> dict:
    """Configuration keys that record `init` and `mup`, so that a published model says how it was made and training can
    continue."""
    keys = {}
    if block.get("init"):
        keys["depth_scaled_init"] = True
    if block.get("mup"):
        keys["mup_base_width"] = block["mup"]["base_width"]
    return keys


def scale_initial_values(part, global_name: Callable[[str], str], model) -> None:
    """Scale the family's initial values in place, those of a part of a model. `model` may be one stage of a pipeline:
    its configuration counts the whole model's layers."""
    config = model.config
    if getattr(config, "depth_scaled_init", False):
        for name, parameter in part.named_parameters():
            if name.removesuffix(".weight").endswith(RESIDUAL_WRITERS):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    ratio = _width_ratio(config)
    if ratio is not None:
        factors = {"hidden": math.sqrt(ratio), "output": ratio, "other": 1.0}
        for kind, parameter in _kinds(part, global_name, model):
            parameter.mul_(factors[kind])
    scale_learning_rates(part, global_name, model)


def scale_learning_rates(part, global_name: Callable[[str], str] = str, model=None) -> None:
    """Note the factor of the learning rate on each parameter for which it is not 1, as the attribute `lr_scale`. part:
    a model, or a part of `model`."""
    model = part if model is None else model
    ratio = _width_ratio(model.config)
    if ratio is None:
        return
    for kind, parameter in _kinds(part, global_name, model):
        if kind != "other":
            parameter.lr_scale = ratio


def _width_ratio(config) -> float | None:
    """r of the table above; None without mu-P."""
    base_width = getattr(config, "mup_base_width", None)
    return base_width / config.hidden_size if base_width else None


def _kinds(part, global_name: Callable[[str], str], model):
    """(kind, parameter) of each parameter of a part of a model; kinds are the rows of the table above: output, hidden,
    other."""
    output = getattr(model.get_output_embeddings(), "weight", None)
    for name, parameter in part.named_parameters():
        if parameter is output:
            yield "output", parameter
        elif parameter.dim() == 2 and "embed_tokens" not in global_name(name):
            yield "hidden", parameter
        else:
            yield "other", parameter
