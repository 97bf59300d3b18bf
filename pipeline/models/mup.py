"""Initial weights and learning rates that follow a model's depth and width: the keys `init` and `mup` of a model block.

`init: depth` divides what writes into the residual stream by sqrt(2 * layers), so that the stream's size does not grow
with depth (GPT-2: Radford et al., 2019, section 2.3). GPT-2's own class does that already.

`mup: {base_width: B}` keeps a learning rate found at width B good at other widths W (Yang et al., 2022, Tensor Programs
V, Adam's column of table 3), r = B / W:

                       initial deviation      learning rate
    embedding, vectors          1                   1
    hidden matrices          sqrt(r)                r
    output layer                r                   r

relative to `initializer_range` and `optimizer.lr`, which are meant at width B. Heads keep their size and grow in
number, so attention's 1 / sqrt(head_dim) is a constant; the feed-forward width is meant to grow with W. Weight decay
per step stays that of the plain learning rate. Adam's way: refused with Muon.
"""

import math

from pipeline.core.errors import UserError

# Families whose layers add the outputs of these modules to the residual stream, as they are.
DEPTH = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "glm",
    "deepseek_v3",
    "smollm3",
    "phi3",
    "gemma",
    "opt",
)
WRITES = (".o_proj", ".down_proj", ".out_proj", ".fc2")
WIDTH = ("llama", "mistral", "qwen2", "qwen3")  # checked by tests/models/test_mup.py


def check(block: dict, config) -> None:
    """Raise UserError for values of `init` and `mup` that cannot be had."""
    if (wanted := block.get("init")) is not None:
        if wanted != "depth":
            raise UserError(
                f"model.init: {wanted!r} is unknown; write depth, or leave it out for the family's own initial values"
            )
        if config.model_type not in DEPTH:
            said = (
                "does so by itself, leave it out" if config.model_type == "gpt2" else f"is not among {', '.join(DEPTH)}"
            )
            raise UserError(f"model.init: depth: {config.model_type} {said}")
    if (wanted := block.get("mup")) is None:
        return
    if (
        not isinstance(wanted, dict)
        or set(wanted) != {"base_width"}
        or type(wanted["base_width"]) is not int
        or wanted["base_width"] < 1
    ):
        raise UserError(
            f"model.mup: {wanted!r}, expected {{base_width: N}}, the hidden_size at which lr and initializer_range were"
            " chosen"
        )
    if config.model_type not in WIDTH:
        raise UserError(f"model.mup: not checked for {config.model_type}, only for {', '.join(WIDTH)}; leave it out")
    if config.tie_word_embeddings:
        raise UserError(
            "model.mup: input and output scale differently with the width, so they cannot share a table; set"
            " tie_word_embeddings: false"
        )


def kept(block: dict) -> dict:
    """What the configuration keeps of the two keys, so that a published model says how it was made and training can
    go on."""
    return {
        **({"depth_scaled_init": True} if block.get("init") else {}),
        **({"mup_base_width": block["mup"]["base_width"]} if block.get("mup") else {}),
    }


def initial(model) -> None:
    """Scale the family's initial values in place. `model` may be a stage of a pipeline: its configuration names the
    whole model's layers."""
    config = model.config
    if getattr(config, "depth_scaled_init", False):
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight").endswith(WRITES):
                parameter.mul_(1 / math.sqrt(2 * config.num_hidden_layers))
    if base := getattr(config, "mup_base_width", None):
        ratio = base / config.hidden_size
        for kind, parameter in _kinds(model):
            parameter.mul_({"hidden": math.sqrt(ratio), "output": ratio, "other": 1.0}[kind])
    learning_rates(model)


def learning_rates(model) -> None:
    """Note on each parameter its share of the learning rate (`lr_scale`), where it is not 1."""
    if base := getattr(model.config, "mup_base_width", None):
        for kind, parameter in _kinds(model):
            if kind != "other":
                parameter.lr_scale = base / model.config.hidden_size


def _kinds(model):
    output = getattr(model.get_output_embeddings(), "weight", None)
    for name, parameter in model.named_parameters():
        yield (
            (
                "output"
                if parameter is output
                else "hidden"
                if parameter.dim() == 2 and "embed_tokens" not in name
                else "other"
            ),
            parameter,
        )
