"""What training a model costs: parameters, FLOPs, and the memory of one process, part by part. This is arithmetic:
nothing is allocated.

    size = count(model)                                  # also of a model on the meta device
    flops = training_flops(model, size, sequence_length=2048)
    parts = memory(model.config, size, layout, ...)      # bytes by part

tests/models/test_cost.py compares the estimates with measurements, and states the factor that is allowed.
"""

import re
from dataclasses import dataclass

from pipeline.models import frozen
from pipeline.models.families import family_of, num_experts

EXPERTS = re.compile(r"(^|\.)experts\.")  # routed experts; shared ones are called shared_expert(s)
# Of a layer's activations, what torch.compile's partitioner keeps: 144 of 231.8 kB per token for LLaMA 7B.
COMPILED_SHARE = 0.62
DEEPSPEED_BUCKET = 50_000_000  # elements of one buffer, which train/sharded.py sets; DeepSpeed's default is 500M, 2 GB


@dataclass(frozen=True)
class Size:
    """Numbers of parameters; a tied table counts once."""

    total: int
    embedding: int
    """Input table and, if it is a table of its own, the output layer."""
    lookup: int
    """Tables that are only looked up (input embedding unless tied, learned positions): no multiplication."""
    experts: int
    """Routed experts of a mixture of experts, all of them."""
    active: int
    """Parameters that one token passes through: of the routed experts only those that the router picks."""
    frozen: int = 0
    """Parameters without gradients: no gradient, no moments, no place in a checkpoint."""
    frozen_bytes: float = 0.0
    """Bytes that these take (models/frozen.py)."""
    cast: int = 0
    """Parameters that multiply and are kept in fp32: bf16 autocast makes a copy of each."""
    has_logits: bool = True
    """There is an output layer over the vocabulary; a reward model has none."""

    @property
    def body(self) -> int:
        return self.total - self.embedding

    @property
    def trained(self) -> int:
        return self.total - self.frozen

    @property
    def weight_bytes(self) -> float:
        return 4.0 * self.trained + self.frozen_bytes


def count(model) -> Size:
    import torch
    from torch import nn

    numel = frozen.numel
    parameters = list(model.parameters())
    total = sum(map(numel, parameters))
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(layer.weight): numel(layer.weight) for layer in (inputs, outputs) if layer is not None}
    output_id = id(outputs.weight) if outputs is not None else None
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    lookups = {id(table.weight): numel(table.weight) for table in embeddings if id(table.weight) != output_id}
    experts = sum(numel(parameter) for name, parameter in model.named_parameters() if EXPERTS.search(name))
    picked, per_layer = routed(model.config)
    active = total - experts + experts * picked // per_layer
    still = [parameter for parameter in parameters if not parameter.requires_grad]
    cast = sum(p.numel() for p in parameters if p.dtype == torch.float32 and id(p) not in lookups)
    return Size(
        total=total,
        embedding=sum(tables.values()),
        lookup=sum(lookups.values()),
        experts=experts,
        active=active,
        frozen=sum(map(numel, still)),
        frozen_bytes=sum(map(frozen.nbytes, still)),
        cast=cast,
        has_logits=outputs is not None,
    )


def routed(config) -> tuple[int, int]:
    """(experts that a token is sent to, experts of one layer); (1, 1) for a dense model."""
    config = config.get_text_config()
    per_layer = num_experts(config)
    if per_layer is None:
        return 1, 1
    return getattr(config, "num_experts_per_tok", None) or 1, per_layer


@dataclass(frozen=True)
class Flops:
    """Training FLOPs per token, forward and backward, without what activation checkpointing computes again."""

    full: float
    """6 per parameter that multiplies (4 if it is frozen), and 12 * layers * heads * head size * length for attention,
    not halved: PaLM (2022, appendix B), torchtitan."""
    causal: float
    """With half of the attention term: what a causal kernel has to compute."""


def training_flops(model, size: Size, sequence_length: int) -> Flops:
    attention = 6.0 * attention_width(model.config) * sequence_length
    multiplied = size.active - size.lookup
    # A frozen weight is multiplied twice, not three times: it has no gradient of its own. What is trained beside frozen
    # weights (adapters, a score layer) is taken to be multiplied.
    still = max(0, multiplied - size.trained)
    dense = 6.0 * multiplied - 2.0 * still
    return Flops(dense + attention, dense + attention / 2)


def attention_width(config) -> int:
    """Sum over layers and heads of the widths of keys and values: for each of them, a token's scores and mixtures cost
    2 FLOPs per position, forward.

    0 for a model without attention. Latent attention (DeepSeek-V2, section 2.1) has keys and values of different
    widths.
    """
    heads = getattr(config, "num_attention_heads", None)
    if not heads or not family_of(config).attention:
        return 0
    if getattr(config, "qk_nope_head_dim", None):
        key_and_value = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        key_and_value = 2 * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return config.num_hidden_layers * heads * key_and_value


# ---- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over its processes. `zero`: stage of ZeRO, None for DDP."""

    ranks: int = 1
    """Data-parallel ranks."""
    depth: int = 1
    """Pipeline stages."""
    zero: int | None = None
    micro: int = 1
    """Rows of one micro-batch."""
    accumulation: int = 1
    """Micro-batches per step on one rank."""
    precision: str = "bf16"
    optimizer: str = "adamw"
    checkpointing: str = "none"
    """none, selective or full."""
    attention: str = "sdpa"
    """eager keeps the scores of every pair of positions."""
    head_rows: int | None = None
    """Positions whose logits exist at a time, with a chunked loss; None: all of a micro-batch."""
    offload: bool = False
    shard: int | None = None
    """Ranks that share one copy of the model (FSDP); None: see `zero`."""
    compiled: bool = False
    """Layers are compiled, which recomputes what is cheap."""


def memory(config, size: Size, sequence_length: int, layout: Layout) -> dict[str, float]:
    """Bytes at the peak of a step on the process that needs most, by part: weights, gradients, optimizer, activations,
    logits, temporary."""
    tokens = layout.micro * sequence_length
    parts = state_bytes(size, layout)
    # 1F1B: the first stage has as many micro-batches in flight as there are stages
    in_flight = min(layout.accumulation, layout.depth)
    num_layers = -(-config.num_hidden_layers // layout.depth)
    kept, complete = layer_bytes(config, sequence_length, layout)
    recomputed = complete if layout.checkpointing != "none" else 0.0
    parts["activations"] = tokens * (num_layers * kept * in_flight + recomputed)
    parts["logits"] = _logits_bytes(config, tokens, layout) if size.has_logits else 0.0
    parts["temporary"] = _temporary_bytes(size, layout)
    return parts


def _zero_stage(layout: Layout) -> int | None:
    """The pipelined engine always has DeepSpeed's ZeRO-1 optimizer."""
    return 1 if layout.depth > 1 else layout.zero


def state_bytes(size: Size, layout: Layout) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on one process. What is frozen has a weight only."""
    zero, ranks = _zero_stage(layout), layout.ranks
    # stages are cut evenly, except for the tables at both ends
    trained = size.trained / layout.depth
    # Adam keeps two moments; Muon one, for the matrices, which are nearly all. DeepSpeed's ZeRO keeps an fp32 copy of
    # the rank's share in addition to fp32 weights.
    moment_bytes = 4.0 if layout.optimizer == "muon" else 8.0
    copy_bytes = 4.0 if zero else 0.0
    weight_ranks = ranks if zero == 3 else layout.shard or 1
    gradient_ranks = ranks if zero in (2, 3) else layout.shard or 1
    optimizer_ranks = ranks if zero in (1, 2, 3) else layout.shard or 1
    parts = {
        "weights": size.weight_bytes / layout.depth / weight_ranks,
        "gradients": 4.0 * trained / gradient_ranks,
        "optimizer": (moment_bytes + copy_bytes) * trained / optimizer_ranks,
    }
    if layout.offload:
        parts["optimizer"] = 0.0
        if zero == 3:
            parts["weights"] = 0.0
    return parts


def _logits_bytes(config, tokens: int, layout: Layout) -> float:
    if layout.head_rows:
        # per logit its fp32 log-softmax and its gradient; and the gradient of the output layer, kept until the backward
        # pass (train/chunked_loss.py)
        output_layer = config.vocab_size * config.hidden_size
        return 8.0 * min(tokens, layout.head_rows) * config.vocab_size + 4.0 * output_layer
    # per logit itself, its fp32 copy (bf16 only), its log-softmax, its gradient in both precisions
    return (12.0 if layout.precision == "fp32" else 14.0) * tokens * config.vocab_size


def _temporary_bytes(size: Size, layout: Layout) -> float:
    weights = size.total / layout.depth
    total = 0.0
    if layout.precision == "bf16":
        # autocast keeps a bf16 copy of each fp32 matrix until the backward pass has used it
        total += 2.0 * size.cast / layout.depth
    if _zero_stage(layout):
        # DeepSpeed's buffers for reducing and gathering
        total += 2 * 4.0 * min(DEEPSPEED_BUCKET, weights)
    return total


def layer_bytes(config, sequence_length: int, layout: Layout) -> tuple[float, float]:
    """(bytes per token and layer kept for the backward pass, the same without activation checkpointing).

    Counted as in Korthikanti et al. (2022), section 4.1, for what transformers' layers save: their 34 * hidden is for
    GPT with 16-bit residuals and dropout; here residuals and norms are fp32 (autocast), and inputs of matrix products
    have 2 or 4 bytes per number. Selective recomputation is theirs too: there of the attention's scores, which fused
    attention never keeps, and here of everything but matrix products and attention (train/layers.py).
    """
    item = 2.0 if layout.precision == "bf16" else 4.0
    width = config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or width // heads
    queries = heads * head
    keys = (getattr(config, "num_key_value_heads", None) or heads) * head
    picked, per_layer = routed(config)
    inner = _inner_width(config) * (picked if per_layer > 1 else 1)
    gated = per_layer > 1 or hasattr(config, "rms_norm_eps")  # families with RMSNorm have gated layers
    scores = 3 * item * heads * sequence_length if layout.attention == "eager" else 0.0
    # inputs of products; queries, keys, values; gate, up, activation, product
    matrices = item * (2 * width + 2 * queries + 2 * keys + (4 if gated else 2) * inner)
    # RMSNorm keeps its input and the normalised copy, in fp32; LayerNorm its input
    norms = 16.0 * width if gated else 8.0 * width
    if not gated and "new" in str(getattr(config, "activation_function", "")):
        norms += 4 * item * inner  # gelu_new in Python: four more copies
    if family_of(config).qk_norm:
        norms += 8.0 * (queries + keys)
    complete = matrices + norms + scores
    if layout.compiled:
        complete *= COMPILED_SHARE
    if layout.checkpointing == "full":
        return 4.0 * width, complete
    if layout.checkpointing == "selective":
        kept = item * (2 * queries + 2 * keys + 2 * width + (2 if gated else 1) * inner)
        return 4.0 * width + kept, complete
    return complete, complete


def cache_bytes(config, rows: int, length: int) -> float:
    """Bytes of the keys and values of `rows` sequences while they are sampled, in fp32."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0
    share = (getattr(config, "num_key_value_heads", None) or heads) / heads
    return 4.0 * attention_width(config) * share * rows * length


def _inner_width(config) -> int:
    """Width of the feed-forward layer, or of one expert."""
    for key in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"):
        width = getattr(config, key, None)
        if width:
            return width
    return 4 * config.hidden_size


def checkpoint_bytes(size: Size, optimizer: str = "adamw") -> float:
    """Bytes of one training checkpoint: fp32 weights and moments of what is trained, whatever the layout."""
    return size.trained * (8.0 if optimizer == "muon" else 12.0)
