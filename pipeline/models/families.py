"""What each model family supports: one row per transformers `model_type`.

To admit a family, add its row here and a tiny recipe for it in tests/helpers/families.py. The tests then check every
claim of the row; a claim that fails its test is not made. A family without a row can still be trained: with data
parallelism and ZeRO, whole logits, and rows that are not masked by document.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.core.errors import UserError


@dataclass(frozen=True)
class Family:
    """The defaults claim nothing, so they hold for any causal LM of transformers."""

    document_mask: bool = False
    """Tokens see only their own document when positions restart with each. Leaks were observed in openai-gpt, opt,
    bloom, mamba, mamba2 and rwkv."""
    pipeline: bool = False
    """Stages in sequence give the logits of the whole model. Families that scale embeddings in the model's forward
    (gemma), or keep state between layers, would be silently wrong."""
    chunked_loss: bool = False
    """Logits are the result of the output layer, neither scaled nor capped nor cast afterwards."""
    depth_init: bool = False
    """Layers add the outputs of `o_proj`, `down_proj`, `out_proj` or `fc2` to the residual stream unchanged, so
    `init: depth` can scale those weights."""
    own_depth_init: bool = False
    """transformers' initial values are already scaled by depth."""
    mup: bool = False
    """`mup` keeps a learning rate good across widths."""
    router: Literal["softmax", "sigmoid"] | None = None
    """What turns the router's logits into affinities; None: no experts, or the balancing loss was not checked."""
    unlimited_positions: bool = False
    """There are no position embeddings: max_position_embeddings only says what a model was trained with."""
    attention: bool = True
    """Layers have attention (recurrent families do not)."""
    tensor: bool = False
    """Layers can be split over a tensor group as transformers' plan says: whole heads and inner columns, without
    gathering activations inside a block (train/tensor_parallel.py)."""
    qk_norm: bool = False
    """Queries and keys are normalised, in fp32."""
    layer_names: tuple[str, str, str] = ("embed_tokens", "layers", "norm")
    """Attributes of the base model: embedding of ids, list of layers, norm after the last layer."""
    unlisted_keys: tuple[str, ...] = ()
    """Configuration keys that the family's code or ours (train/moe_aux_loss.py) reads, and that its configuration class
    does not list."""


UNKNOWN = Family()

FAMILIES = {
    # document_mask, pipeline, chunked_loss: dense decoders
    "llama": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, mup=True, tensor=True),
    "mistral": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, mup=True, tensor=True),
    "qwen2": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, mup=True, tensor=True),
    "qwen3": Family(
        document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, mup=True, tensor=True, qk_norm=True
    ),
    "smollm3": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True),
    "phi3": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True),
    "glm": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True),
    "glm4": Family(document_mask=True, pipeline=True, chunked_loss=True),
    "olmo2": Family(document_mask=True, pipeline=True, chunked_loss=True, qk_norm=True),
    "olmo3": Family(qk_norm=True),
    "gemma": Family(document_mask=True, chunked_loss=True, depth_init=True),
    "gemma2": Family(document_mask=True),
    "gemma3_text": Family(document_mask=True, qk_norm=True),
    "gpt2": Family(
        document_mask=True, pipeline=True, chunked_loss=True, own_depth_init=True, layer_names=("wte", "h", "ln_f")
    ),
    "gpt_neox": Family(chunked_loss=True),
    "opt": Family(depth_init=True),
    "bloom": Family(chunked_loss=True, unlimited_positions=True),
    # mixtures of experts
    "mixtral": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, router="softmax"),
    "qwen2_moe": Family(document_mask=True, pipeline=True, chunked_loss=True, depth_init=True, router="softmax"),
    "qwen3_moe": Family(
        document_mask=True,
        pipeline=True,
        chunked_loss=True,
        depth_init=True,
        router="softmax",
        qk_norm=True,
        unlisted_keys=("head_dim",),
    ),
    "deepseek_v3": Family(
        document_mask=True,
        pipeline=True,
        chunked_loss=True,
        depth_init=True,
        router="sigmoid",
        unlisted_keys=("router_aux_loss_coef",),
    ),
    # recurrent
    "mamba": Family(unlimited_positions=True, attention=False),
    "mamba2": Family(unlimited_positions=True, attention=False),
    "rwkv": Family(unlimited_positions=True, attention=False),
}

# Keys by which configuration classes say how large a model is. `attribute_map` of a class translates most of them
# (GPT-2: hidden_size is n_embd), but recipes may use either name.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size")
INNER_KEYS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "q_lora_rank",
    "kv_lora_rank",
)
HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads")
HEAD_SIZE_KEYS = ("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


def family_of(config) -> Family:
    """The row for a transformers configuration."""
    return FAMILIES.get(config.model_type, UNKNOWN)


def supporting(feature: str) -> list[str]:
    """Names of the families whose row has this feature, in the order of the table."""
    return [name for name, family in FAMILIES.items() if getattr(family, feature)]


def positions(config) -> int | None:
    """The longest row, in tokens, that a model of this configuration has positions for; None: there is no limit."""
    if family_of(config).unlimited_positions:
        return None
    return getattr(config, "max_position_embeddings", None)


def num_experts(config) -> int | None:
    """Experts of one layer; None for a dense model."""
    for key in EXPERT_KEYS:
        number = getattr(config, key, None)
        if number:
            return number
    return None


def balance_coefficient(model_config) -> float:
    """The model's `router_aux_loss_coef`; 0 for a model without experts. Raises UserError for routers with which the
    loss was not verified."""
    if not hasattr(model_config, "num_experts_per_tok"):
        return 0.0
    value = getattr(model_config, "router_aux_loss_coef", 0.0) or 0.0
    if value and family_of(model_config).router is None:
        raise UserError(
            f"router_aux_loss_coef: the balancing loss was not verified with the routers of {model_config.model_type},"
            f" only with {', '.join(supporting('router'))}; set it to 0"
        )
    return value
