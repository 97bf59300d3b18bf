"""What training a model costs: parameters, FLOPs, and the memory of one process, part by part. Arithmetic alone;
nothing is allocated.

    size = count(model)                                  # also of a model on the meta device
    flops = training_flops(model, size, sequence_length=2048)
    parts = memory(model.config, size, layout, ...)      # bytes by part

Estimates are held against measurements in tests/models/test_cost.py, with the factor that is allowed.
"""

import re
from dataclasses import dataclass

EXPERTS = re.compile(r"(^|\.)experts\.")  # routed experts; shared ones are called shared_expert(s)
QK_NORM = ("qwen3", "gemma3", "olmo2", "olmo3")  # families that normalise queries and keys, in fp32
BUCKET = 50_000_000  # elements of one of DeepSpeed's buffers, as train/sharded.py sets it


@dataclass(frozen=True)
class Size:
    """Numbers of parameters; a tied table counts once."""

    total: int
    embedding: int
    """Input table and, if it is its own, the output layer."""
    lookup: int
    """Tables that are only looked up (input embedding unless tied, learned positions): no multiplication."""
    experts: int
    """Routed experts of a mixture of experts, all of them."""
    active: int
    """Parameters that one token passes through: of the routed experts only those that the router picks."""
    frozen: int = 0
    """Parameters without gradients: no gradient, no moments, no place in a checkpoint."""

    @property
    def body(self) -> int:
        return self.total - self.embedding


def count(model) -> Size:
    from torch import nn

    total = sum(parameter.numel() for parameter in model.parameters())
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(layer.weight): layer.weight.numel() for layer in (inner, outer) if layer is not None}
    multiplied = id(outer.weight) if outer is not None else None
    lookups = {
        id(part.weight): part.weight.numel()
        for part in model.modules()
        if isinstance(part, nn.Embedding) and id(part.weight) != multiplied
    }
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if EXPERTS.search(name))
    picked, of = routed(model.config)
    active = total - experts + experts * picked // of
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return Size(total, sum(tables.values()), sum(lookups.values()), experts, active, frozen)


def routed(config) -> tuple[int, int]:
    """(experts that a token goes to, experts of a layer); (1, 1) for a dense model. Families have three names for
    the second."""
    config = config.get_text_config()
    number = next(
        (
            value
            for key in ("num_local_experts", "num_experts", "n_routed_experts")
            if (value := getattr(config, key, None))
        ),
        None,
    )
    return (getattr(config, "num_experts_per_tok", None) or 1, number) if number else (1, 1)


@dataclass(frozen=True)
class Flops:
    """Training FLOPs of one token, forward and backward, without what activation checkpointing computes again."""

    full: float
    """6 a parameter that multiplies, and 12 * layers * heads * head size * length for attention, not halved: PaLM
    (2022, appendix B), torchtitan."""
    causal: float
    """Half of the attention term: what a causal kernel has to compute."""


def training_flops(model, size: Size, sequence_length: int) -> Flops:
    attention = 6.0 * attention_width(model.config) * sequence_length
    dense = 6.0 * (size.active - size.lookup)
    return Flops(dense + attention, dense + attention / 2)


def attention_width(config) -> int:
    """Sum over the layers of the widths of keys and values, over all heads: a token's scores and mixtures cost 2 FLOPs
    each of it per position, forward.

    0 for a model without attention (Mamba, RWKV). Latent attention (DeepSeek-V2, section 2.1) has keys and values of
    different width.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not heads or config.model_type in ("mamba", "mamba2", "rwkv"):
        return 0
    if getattr(config, "qk_nope_head_dim", None):
        return (
            config.num_hidden_layers * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        )
    return config.num_hidden_layers * heads * 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a run lies on its processes. `zero`: stage of ZeRO, None for DDP."""

    ranks: int = 1
    """Data-parallel ranks."""
    depth: int = 1
    """Pipeline stages."""
    zero: int | None = None
    micro: int = 1
    """Rows of one micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step on one rank."""
    precision: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    """none, selective or full."""
    attention: str = "sdpa"
    """eager keeps the scores of every pair of positions."""
    head_rows: int | None = None
    """Positions whose logits exist at a time, with a chunked head; none: all of a micro-batch."""
    offload: bool = False


def memory(config, size: Size, sequence_length: int, layout: Layout) -> dict[str, float]:
    """Bytes at the peak of a step on the fullest process, by part: weights, gradients, optimizer, activations,
    logits, temporary."""
    zero = 1 if layout.depth > 1 else layout.zero
    share = size.total / layout.depth  # stages are cut evenly, up to the tables at both ends
    ranks = layout.ranks
    split = {None: (1, 1, 1), 0: (1, 1, 1), 1: (1, 1, ranks), 2: (1, ranks, ranks), 3: (ranks, ranks, ranks)}[zero]
    # Adam keeps two moments; Muon one, for the matrices, which are nearly all. DeepSpeed's ZeRO keeps an fp32 copy of
    # the rank's share beside fp32 weights.
    moments = 4.0 if layout.optimizer == "muon" else 8.0
    trained = (size.total - size.frozen) / layout.depth
    parts = {
        "weights": 4.0 * share / split[0],
        "gradients": 4.0 * trained / split[1],
        "optimizer": (moments + (4.0 if zero else 0.0)) * trained / split[2],
    }
    if layout.offload:
        parts["optimizer"] = 0.0
        if zero == 3:
            parts["weights"] = 0.0
    tokens = layout.micro * sequence_length
    # 1F1B: the first stage has as many micro-batches in flight as there are stages
    flying = min(layout.accumulation, layout.depth)
    layers = -(-config.num_hidden_layers // layout.depth)
    kept, whole = layer_bytes(config, sequence_length, layout)
    parts["activations"] = tokens * (layers * kept * flying + (whole if layout.checkpointing != "none" else 0.0))
    # of each logit itself, its fp32 log-softmax, its gradient; and the gradient of the layer, kept until the backward
    # pass (train/head.py)
    if layout.head_rows:
        parts["logits"] = (
            8.0 * min(tokens, layout.head_rows) * config.vocab_size + 4.0 * config.vocab_size * config.hidden_size
        )
    else:  # itself, its fp32 copy (bf16 only), its log-softmax, its gradient in both precisions
        parts["logits"] = (12.0 if layout.precision == "fp32" else 14.0) * tokens * config.vocab_size
    # autocast keeps a bf16 copy of each matrix until the backward pass has used it; DeepSpeed has buffers for reducing
    # and gathering.
    parts["temporary"] = (2.0 * (share - size.lookup / layout.depth) if layout.precision == "bf16" else 0.0) + (
        2 * 4.0 * min(BUCKET, share) if zero else 0.0
    )
    return parts


def layer_bytes(config, sequence_length: int, layout: Layout) -> tuple[float, float]:
    """(bytes a token and layer kept for the backward pass, the same without checkpointing).

    Counted as in Korthikanti et al. (2022), section 4.1, for what transformers' layers save: their 34 * hidden is for
    GPT with 16-bit residuals and dropout; here residuals and norms are fp32 (autocast), and matrices see 2 or 4 bytes a
    number. Selective recomputation is theirs too: of the attention's scores, which fused attention never keeps, and
    here of all but matrix products and attention (train/layers.py).
    """
    item = 2.0 if layout.precision == "bf16" else 4.0
    width = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or width // heads
    queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    inner = (
        getattr(config, "moe_intermediate_size", None)
        or getattr(config, "intermediate_size", None)
        or getattr(config, "ffn_dim", None)
        or getattr(config, "n_inner", None)
        or 4 * width
    )
    picked, of = routed(config)
    inner *= picked if of > 1 else 1
    gated = of > 1 or hasattr(config, "rms_norm_eps")  # families with RMSNorm have gated layers
    scores = 3 * item * heads * sequence_length if layout.attention == "eager" else 0.0
    # inputs of products; queries, keys, values; gate, up, activation, product
    matrices = item * (2 * width + 2 * queries + 2 * keys + (4 if gated else 2) * inner)
    # RMSNorm keeps its input and the normalised copy, in fp32; LayerNorm its input
    norms = 16.0 * width if gated else 8.0 * width
    if not gated and "new" in str(getattr(config, "activation_function", "")):
        norms += 4 * item * inner  # gelu_new in Python: four more copies
    if config.model_type.startswith(QK_NORM):
        norms += 8.0 * (queries + keys)
    whole = matrices + norms + scores
    if layout.checkpointing == "full":
        return 4.0 * width, whole
    if layout.checkpointing == "selective":
        return 4.0 * width + item * (2 * queries + 2 * keys + 2 * width + (2 if gated else 1) * inner), whole
    return whole, whole


def checkpoint_bytes(size: Size, optimizer: str = "adamw") -> float:
    """Of one training checkpoint: fp32 weights and moments of what is trained, whatever the layout."""
    return (size.total - size.frozen) * (8.0 if optimizer == "muon" else 12.0)
