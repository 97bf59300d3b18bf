"""Cutting a transformers causal LM into pipeline stages.

A stage is the family's own model with fewer layers, and its own forward runs them: masks, rotary positions and logit caps are the family's code
and not a copy. What makes this possible is that `inputs_embeds` may stand in for `input_ids`, which is what a hidden state is to a later stage.
"""

import copy

from pipeline.errors import UserError

# Families whose stages in a row were seen to give the whole model's logits (tests/test_parallel.py). Others may scale their embeddings in the
# model's forward (gemma), or keep state between layers, and would be wrong without a sign of it.
FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "olmo2", "smollm3", "phi3", "glm4")


def split(num_layers: int, stages: int) -> list[range]:
    """Which layers each stage holds; earlier stages take the remainder, because the last one has the output layer too."""
    if num_layers < stages:
        raise UserError(f"parallel.pipeline: {stages} stages need at least as many layers, the model has {num_layers}; use pipeline: {num_layers} or fewer")
    size, extra = divmod(num_layers, stages)
    bounds = [0]
    for index in range(stages):
        bounds.append(bounds[-1] + size + (index < extra))
    return [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]


def check(config) -> None:
    """Raise UserError for a family that cannot be cut."""
    if config.model_type not in FAMILIES:
        raise UserError(f"parallel.pipeline: the family {config.model_type} cannot be cut into stages here; these can: {', '.join(FAMILIES)}. Use zero: 0, 1, 2 or 3")


def cut(model, index: int, stages: int) -> range:
    """Take from `model`, in place, everything that stage `index` of `stages` does not hold. Returns the layers that stay, by their global numbers."""
    from torch import nn

    check(model.config)
    base = model.base_model
    layers = split(len(base.layers), stages)[index]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.tie_word_embeddings = len(layers), False
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[layers.start : layers.stop]
    model.config = base.config = config
    base.layers = nn.ModuleList([base.layers[i] for i in layers])
    if index > 0:
        base.embed_tokens = nn.Identity()
    if index < stages - 1:
        base.norm = nn.Identity()
        model.lm_head = nn.Identity()
    return layers


def global_name(name: str, first_layer: int) -> str:
    """Name in the whole model of a module or parameter of a stage: `model.layers.0.x` -> `model.layers.{first_layer}.x`."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part == "layers" and parts[position + 1].isdigit():
            parts[position + 1] = str(int(parts[position + 1]) + first_layer)
            break
    return ".".join(parts)
