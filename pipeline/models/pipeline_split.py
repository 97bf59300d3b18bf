"""Cutting a transformers causal LM into pipeline stages.

A stage is the family's own model with fewer layers, and the family's own forward runs them: masks, rotary positions and
logit caps are its code, not a copy. This works because `inputs_embeds` can replace `input_ids`, and that is what a
hidden state is to a later stage.
"""

import copy

from torch import nn

from pipeline.core.errors import UserError
from pipeline.models import cost
from pipeline.models.families import family_of, supporting

DIGITS = 6  # of sums that count as equal, so that rounding does not choose between equal cuts
EXPONENT = 8  # of the stages' costs in `partition`: high enough that the largest one decides


def partition(layer_costs: list[float], output_cost: float, num_stages: int) -> list[range]:
    """The layers of each stage such that the slowest stage is as fast as possible. The last stage also has
    `output_cost`.

    Minimises the sum of the stages' costs to the 8th power by dynamic programming: that is nearly the maximum, and of
    equal maxima the most even. Of equal cuts it takes the one with fewer layers in front, because the first stage of
    1F1B keeps the most micro-batches.
    """
    num_layers = len(layer_costs)
    mean = (sum(layer_costs) + output_cost) / num_stages
    cumulative = [0.0]
    for layer_cost in layer_costs:
        cumulative.append(cumulative[-1] + layer_cost / mean)
    # number of layers placed -> (sum, bounds), after each stage
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(num_stages):
        is_last = stage == num_stages - 1
        extra = output_cost / mean if is_last else 0.0
        stages_left = num_stages - stage - 1
        ends = [num_layers] if is_last else range(stage + 1, num_layers - stages_left + 1)
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in ends:
            following[end] = min(
                (round(total + (cumulative[end] - cumulative[start] + extra) ** EXPONENT, DIGITS), (*bounds, end))
                for start, (total, bounds) in best.items()
                if start < end
            )
        best = following
    bounds = best[num_layers][1]
    return [range(start, end) for start, end in zip(bounds, bounds[1:], strict=False)]


def split(model, parallel, sequence_length: int) -> list[range]:
    """The layers of each stage: as `parallel.layers` counts them, else in equal numbers (`partition: uniform`), else by
    estimated FLOPs, those of the output layer included."""
    check_layers(model.config, parallel)
    num_stages, num_layers = parallel.pipeline, model.config.num_hidden_layers
    sizes = parallel.layers
    if sizes is None and parallel.partition == "estimated":
        layer_flops, output_flops = forward_flops(model, sequence_length)
        return partition(layer_flops, output_flops, num_stages)
    if sizes is None:
        least, remainder = divmod(num_layers, num_stages)
        sizes = [least + (index < remainder) for index in range(num_stages)]
    ends = [sum(sizes[: index + 1]) for index in range(num_stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def forward_flops(model, sequence_length: int) -> tuple[list[float], float]:
    """Forward FLOPs per token in each layer and in the output layer: 2 per parameter that works for the token, and
    attention over half of the row on average."""
    _, layers_name, _ = family_of(model.config).layer_names
    picked, num_experts = cost.routed(model.config)
    attention = cost.attention_width(model.config) / model.config.num_hidden_layers * sequence_length
    layers = []
    for layer in getattr(model.base_model, layers_name):
        working = 0
        for name, parameter in layer.named_parameters():
            share = picked / num_experts if cost.EXPERTS.search(name) else 1
            working += parameter.numel() * share
        layers.append(2 * working + attention)
    return layers, 2.0 * model.get_output_embeddings().weight.numel()


def check(config) -> None:
    """Raise UserError for a family that cannot be cut."""
    if not family_of(config).pipeline:
        raise UserError(
            f"parallel.pipeline: the family {config.model_type} cannot be cut into stages here; these can:"
            f" {', '.join(supporting('pipeline'))}. Use zero: 0, 1, 2 or 3"
        )


def check_layers(config, parallel) -> None:
    """Raise UserError if a model of this configuration does not have the layers that the pipeline needs."""
    check(config)
    num_stages, num_layers, sizes = parallel.pipeline, config.num_hidden_layers, parallel.layers
    if num_layers < num_stages:
        raise UserError(
            f"parallel.pipeline: {num_stages} stages need at least as many layers, the model has {num_layers}; use"
            f" pipeline: {num_layers} or fewer"
        )
    if sizes is not None and sum(sizes) != num_layers:
        raise UserError(
            f"parallel.layers: {sizes} add up to {sum(sizes)} layers, the model has {num_layers}; make them add up to"
            f" {num_layers}"
        )


class NoPositions(nn.Module):
    """Replaces GPT-2's learned positions in every stage but the first, which has added them already. Its integer zero
    keeps the type of the hidden states."""

    def forward(self, position_ids):
        return position_ids.new_zeros(())


def cut(model, index: int, parts: list[range]) -> range:
    """Remove from `model`, in place, everything that stage `index` does not hold. Returns the layers that remain, by
    their global numbers.

    `config.num_hidden_layers` stays that of the whole model: GPT-2's initial weights depend on it.
    """
    check(model.config)
    base = model.base_model
    embedding_name, layers_name, norm_name = family_of(model.config).layer_names
    layers = parts[index]
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    model.config = base.config = config
    own_layers = [getattr(base, layers_name)[number] for number in layers]
    setattr(base, layers_name, nn.ModuleList(own_layers))
    if index > 0:
        setattr(base, embedding_name, nn.Identity())
        if hasattr(base, "wpe"):
            base.wpe, base.drop = NoPositions(), nn.Identity()
    if index < len(parts) - 1:
        setattr(base, norm_name, nn.Identity())
        model.lm_head = nn.Identity()
    return layers


def global_name(name: str, first_layer: int) -> str:
    """Name in the whole model of a module or parameter of a stage: `model.layers.0.x` becomes
    `model.layers.{first_layer}.x`."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part in ("layers", "h") and parts[position + 1].isdigit():
            parts[position + 1] = str(int(parts[position + 1]) + first_layer)
            break
    return ".".join(parts)
