"""Cutting a transformers causal LM into pipeline stages.

A stage is the family's own model with fewer layers, and its own forward runs them: masks, rotary positions and logit caps are the family's code
and not a copy. What makes this possible is that `inputs_embeds` may stand in for `input_ids`, which is what a hidden state is to a later stage.
"""

import copy

from torch import nn

from pipeline.errors import UserError

# Families whose stages in a row were seen to give the whole model's logits (tests/test_families.py). Others may scale their embeddings in the
# model's forward (gemma), or keep state between layers, and would be wrong without a sign of it.
FAMILIES = ("gpt2", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmo2", "smollm3", "phi3", "glm", "glm4", "deepseek_v3")

# Attributes of the base model: embedding of ids, layers, norm after the last layer.
NAMES = {"gpt2": ("wte", "h", "ln_f")}
COMMON_NAMES = ("embed_tokens", "layers", "norm")


def names(config) -> tuple[str, str, str]:
    return NAMES.get(config.model_type, COMMON_NAMES)


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


class NoPositions(nn.Module):
    """In place of GPT-2's learned positions in every stage but the first, which has added them already. An integer keeps the hidden states' type."""

    def forward(self, position_ids):
        return position_ids.new_zeros(())


def cut(model, index: int, stages: int) -> range:
    """Take from `model`, in place, everything that stage `index` of `stages` does not hold. Returns the layers that stay, by their global numbers.

    `config.num_hidden_layers` stays the whole model's: initial weights of GPT-2 depend on it.
    """
    check(model.config)
    base = model.base_model
    embedding, inner, norm = names(model.config)
    layers = split(len(getattr(base, inner)), stages)[index]
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
    if index < stages - 1:
        setattr(base, norm, nn.Identity())
        model.lm_head = nn.Identity()
    return layers


def global_name(name: str, first_layer: int) -> str:
    """Name in the whole model of a module or parameter of a stage: `model.layers.0.x` -> `model.layers.{first_layer}.x`."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part in ("layers", "h") and parts[position + 1].isdigit():
            parts[position + 1] = str(int(parts[position + 1]) + first_layer)
            break
    return ".".join(parts)
