"""Cutting a transformers causal LM into pipeline stages.

A stage is the family's own model with fewer layers, and its own forward runs them: masks, rotary positions and logit
caps are the family's code and not a copy. What makes this possible is that `inputs_embeds` may stand in for
`input_ids`, which is what a hidden state is to a later stage.
"""

import copy

from torch import nn

from pipeline.core.errors import UserError
from pipeline.models import cost

# Families whose stages in a row were seen to give the whole model's logits (test_families.py). Others may scale
# their embeddings in the model's forward (gemma), or keep state between layers, and would be wrong without a sign of
# it.
FAMILIES = (
    "gpt2",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "olmo2",
    "smollm3",
    "phi3",
    "glm",
    "glm4",
    "deepseek_v3",
)

# Attributes of the base model: embedding of ids, layers, norm after the last layer.
NAMES = {"gpt2": ("wte", "h", "ln_f")}
COMMON_NAMES = ("embed_tokens", "layers", "norm")


def names(config) -> tuple[str, str, str]:
    return NAMES.get(config.model_type, COMMON_NAMES)


def partition(costs: list[float], output: float, stages: int) -> list[range]:
    """Which layers each stage holds so that the slowest stage is as fast as can be: `costs` of the layers, of which the
    last stage has `output` on top.

    Minimises the sum of the stages' costs to the eighth power, by dynamic programming: nearly the maximum, and among
    equal maxima the most even. Of equal cuts the one with fewer layers in front: the first stage of 1F1B keeps the most
    micro-batches.
    """
    scale = (sum(costs) + output) / stages
    reach = [0.0]
    for layer in costs:
        reach.append(reach[-1] + layer / scale)
    # layers placed -> (sum, bounds), after each stage
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for stage in range(stages):
        last = stage == stages - 1
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for end in [len(costs)] if last else range(stage + 1, len(costs) - (stages - stage - 1) + 1):
            extra = output / scale if last else 0.0
            following[end] = min(
                (total + (reach[end] - reach[start] + extra) ** 8, (*bounds, end))
                for start, (total, bounds) in best.items()
                if start < end
            )
        best = following
    bounds = best[len(costs)][1]
    return [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]


def split(model, parallel, sequence_length: int) -> list[range]:
    """The layers of each stage: those that `parallel.layers` counts, else evenly (`partition: uniform`) or by
    estimated FLOPs, the output layer's among them."""
    check_layers(model.config, parallel)
    count, total, sizes = parallel.pipeline, model.config.num_hidden_layers, parallel.layers
    if sizes is None and parallel.partition == "uniform":
        sizes = [total // count + (index < total % count) for index in range(count)]
    if sizes is None:
        return partition(*flops(model, sequence_length), count)
    ends = [sum(sizes[: index + 1]) for index in range(count)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def flops(model, sequence_length: int) -> tuple[list[float], float]:
    """Forward FLOPs of a token in each layer and in the output layer: 2 a parameter that works for it, and attention
    over half of the row on average."""
    _, inner, _ = names(model.config)
    picked, of = cost.routed(model.config)
    attention = cost.attention_width(model.config) / model.config.num_hidden_layers * sequence_length
    layers = []
    for layer in getattr(model.base_model, inner):
        working = sum(
            parameter.numel() * (picked / of if cost.EXPERTS.search(name) else 1)
            for name, parameter in layer.named_parameters()
        )
        layers.append(2 * working + attention)
    return layers, 2.0 * model.get_output_embeddings().weight.numel()


def check(config) -> None:
    """Raise UserError for a family that cannot be cut."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"parallel.pipeline: the family {config.model_type} cannot be cut into stages here; these can:"
            f" {', '.join(FAMILIES)}. Use zero: 0, 1, 2 or 3"
        )


def check_layers(config, parallel) -> None:
    """Raise UserError if a model of this configuration has not the layers that the pipeline asks for."""
    check(config)
    count, total, sizes = parallel.pipeline, config.num_hidden_layers, parallel.layers
    if total < count:
        raise UserError(
            f"parallel.pipeline: {count} stages need at least as many layers, the model has {total}; use pipeline:"
            f" {total} or fewer"
        )
    if sizes is not None and sum(sizes) != total:
        raise UserError(
            f"parallel.layers: {sizes} are {sum(sizes)} layers, the model has {total}; make them add up to {total}"
        )


class NoPositions(nn.Module):
    """In place of GPT-2's learned positions in every stage but the first, which has added them already. An integer
    keeps the hidden states' type."""

    def forward(self, position_ids):
        return position_ids.new_zeros(())


def cut(model, index: int, parts: list[range]) -> range:
    """Take from `model`, in place, everything that stage `index` does not hold. Returns the layers that stay, by their
    global numbers.

    `config.num_hidden_layers` stays the whole model's: initial weights of GPT-2 depend on it.
    """
    check(model.config)
    base = model.base_model
    embedding, inner, norm = names(model.config)
    layers = parts[index]
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    model.config = base.config = config
    setattr(base, inner, nn.ModuleList([getattr(base, inner)[i] for i in layers]))
    if index > 0:
        setattr(base, embedding, nn.Identity())
        if hasattr(base, "wpe"):
            base.wpe, base.drop = NoPositions(), nn.Identity()
    if index < len(parts) - 1:
        setattr(base, norm, nn.Identity())
        model.lm_head = nn.Identity()
    return layers


def global_name(name: str, first_layer: int) -> str:
    """Name in the whole model of a module or parameter of a stage: `model.layers.0.x` ->
    `model.layers.{first_layer}.x`."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part in ("layers", "h") and parts[position + 1].isdigit():
            parts[position + 1] = str(int(parts[position + 1]) + first_layer)
            break
    return ".".join(parts)
