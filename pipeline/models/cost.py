"""What training a model costs: parameters, FLOPs, and the memory of one process, part by part. This is arithmetic:
nothing is allocated.

    size = count(model)                                  # also of a model on the meta device
    flops = training_flops(model, size, sequence_length=2048)
    parts = memory(model.config, size, layout, ...)      # bytes by part

tests/models/test_cost.py compares the estimates with measurements, and states the factor that is allowed.
"""

import math
import re
from dataclasses import dataclass

from pipeline.models import frozen
from pipeline.models.families import family_of, num_experts
from pipeline.models.model_parts import decoder_layers, padded_numel

EXPERTS = re.compile(r"(^|\.)experts\.")  # routed experts; shared ones are called shared_expert(s)
# Of a layer's activations, what torch.compile's partitioner keeps: 144 of 231.8 kB per token for LLaMA 7B, and 173 with
# FSDP (simulated, docs/log.md, 69).
COMPILED_SHARE, COMPILED_SHARE_FSDP = 0.62, 0.746
LIVE_PARAMETERS = 1e9  # that DeepSpeed's ZeRO-3 keeps gathered at most (stage3_max_live_parameters)
MUON_BYTES = 14.0  # per element of a matrix while it is orthogonalised: 7 copies in bf16 (train/muon_sharded.py)
MUON_BUCKET = 32 << 20  # elements of the matrices that a process orthogonalises at a time, under FSDP
ENDS = 24.0  # bytes per token and width: the embedding's output, the last norm, the gradient of the hidden state
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
    four_bits: int = 0
    """Those of them that are kept in 4 bits."""
    cast: int = 0
    """Parameters that multiply and are kept in fp32: bf16 autocast makes a copy of each."""
    output_bytes: float = 0.0
    """Bytes that the chunked loss makes for the output layer's weight: its gradient, its copy in bf16."""
    has_logits: bool = True
    """There is an output layer over the vocabulary; a reward model has none."""
    inputs: int = 0
    """Sum over the matrices of all layers of the width of what they read, of routed experts those that are picked."""
    outputs: int = 0
    """The same of what they give."""
    norms: int = 0
    """Sum over layers of the widths of their norms, without those of single heads."""
    materialises_scores: bool = False
    """The family has no fused attention."""
    matrices: int = 0
    """Those parameters that Muon would train (train/muon.py)."""
    largest_matrix: int = 0
    """The elements of the largest of them."""
    largest_layer: int = 0
    """Parameters of the decoder layer that has most: one with experts, where others have none."""
    layer_shapes: tuple[tuple[int, ...], ...] = ()
    """Shapes of its parameters of two and three dimensions, without those in 4 bits."""

    @property
    def body(self) -> int:
        return self.total - self.embedding

    @property
    def trained(self) -> int:
        return self.total - self.frozen

    @property
    def weight_bytes(self) -> float:
        return 4.0 * self.trained + self.frozen_bytes

    def padding(self, ranks: int) -> float:
        """What FSDP's processes gather of a layer and hold of it, as a multiple of the layer: more than 1 where they
        cannot share its matrices evenly."""
        added = sum(padded_numel(shape, ranks) - math.prod(shape) for shape in self.layer_shapes)
        return 1.0 + added / self.largest_layer if self.largest_layer else 1.0

    @property
    def scale_bytes(self) -> float:
        """Of weight_bytes, those that every process has however the model is split."""
        return frozen.NF4_SCALE_BYTES * self.four_bits


def count(model) -> Size:
    import torch
    from torch import nn

    four_bits = frozen.in_four_bits(model)

    def numel(parameter) -> int:
        return four_bits.get(id(parameter), parameter.numel())

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
    uncast = lookups.keys() | four_bits.keys()
    cast = sum(p.numel() for p in parameters if p.dtype == torch.float32 and id(p) not in uncast)
    frozen_bytes = frozen.NF4_BYTES * sum(four_bits.values())
    frozen_bytes += sum(p.nbytes for p in still if id(p) not in four_bits)
    read, given, norms = _widths(model, picked)
    matrices = [
        p.numel() for p in parameters if p.requires_grad and p.dim() == 2 and min(p.shape) > 1 and id(p) not in tables
    ]
    largest_layer, layer_shapes = _largest_layer(model, four_bits)
    return Size(
        largest_layer=largest_layer,
        layer_shapes=layer_shapes,
        total=total,
        inputs=read,
        outputs=given,
        norms=norms,
        materialises_scores=not model._supports_sdpa,
        matrices=sum(matrices),
        largest_matrix=max(matrices, default=0),
        embedding=sum(tables.values()),
        lookup=sum(lookups.values()),
        experts=experts,
        active=active,
        frozen=sum(map(numel, still)),
        frozen_bytes=frozen_bytes,
        four_bits=sum(four_bits.values()),
        cast=cast,
        output_bytes=0.0 if outputs is None else _output_bytes(outputs.weight),
        has_logits=outputs is not None,
    )


def _largest_layer(model, four_bits: dict[int, int]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """(largest_layer, layer_shapes) of Size."""
    sizes = []
    for layer in decoder_layers(model):
        parameters = list(layer.parameters())
        count = sum(four_bits.get(id(parameter), parameter.numel()) for parameter in parameters)
        shapes = [tuple(p.shape) for p in parameters if p.dim() >= 2 and id(p) not in four_bits]
        sizes.append((count, tuple(shapes)))
    return max(sizes, default=(0, ()))


def _output_bytes(weight) -> float:
    import torch

    if weight.requires_grad:
        # the gradient, kept in fp32 until the backward pass, and its product of one chunk (train/chunked_loss.py)
        return 7.0 * weight.numel()
    return 2.0 * weight.numel() if weight.dtype == torch.float32 else 0.0


def _widths(model, picked: int) -> tuple[int, int, int]:
    """(inputs, outputs, norms) of Size."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    read = given = norms = 0
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            read, given = read + module.in_features, given + module.out_features
        elif isinstance(module, Conv1D):
            read, given = read + module.nx, given + module.nf
        elif name.endswith("experts"):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 3:
                    read, given = read + picked * parameter.shape[2], given + picked * parameter.shape[1]
        elif "norm" in type(module).__name__.lower() and ".layers." in f".{name}" and hasattr(module, "weight"):
            width = module.weight.numel()
            norms += width if width >= model.config.hidden_size else 0
    return read, given, norms


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
    stage_layers: tuple[int, ...] = ()
    """Layers of each pipeline stage; empty: equal numbers."""
    shard: int | None = None
    """Ranks that share one copy of the model (FSDP); None: see `zero`."""
    context: int = 1
    """Ranks that share the tokens of each row."""
    tensor: int = 1
    """Ranks that split each matrix and compute the same rows."""
    compiled: bool = False
    """Layers are compiled, which recomputes what is cheap."""
    loss_tokens: int | None = None
    """Tokens of a row that have logits; None: all."""

    @property
    def splits_weights(self) -> bool:
        return self.shard is not None or self.zero == 3


def memory(config, size: Size, sequence_length: int, layout: Layout) -> dict[str, float]:
    """Bytes at the peak of a step on the process that needs most, by part: weights, gradients, optimizer, activations,
    logits, temporary. tests/test_fits.py holds the sum to a simulation at full size."""
    stages = [_stage_memory(config, size, sequence_length, layout, index) for index in {0, layout.depth - 1}]
    return max(stages, key=lambda parts: sum(parts.values()))


def _stage_memory(config, size: Size, sequence_length: int, layout: Layout, index: int) -> dict[str, float]:
    """Of one pipeline stage. The peak is at the end of a forward pass, where all copies of weights and the logits
    exist, or while the first layer is computed again."""
    tokens = layout.micro * sequence_length / layout.context
    depth, first, last = layout.depth, index == 0, index == layout.depth - 1
    num_layers = layout.stage_layers[index] if layout.stage_layers else -(-config.num_hidden_layers // depth)
    share = num_layers / config.num_hidden_layers
    tables = size.embedding / (2 if depth > 1 else 1)  # each end of a pipeline has one
    if config.tie_word_embeddings:
        tables = float(size.embedding)
    own = share * size.body + (tables if first or last else 0.0)
    if layout.shard:
        own += (size.padding(layout.shard) - 1.0) * size.body
    parts = state_bytes(size, layout, own / size.total)
    kept, complete = layer_bytes(config, size, sequence_length, layout)
    # 1F1B: the first stage has as many micro-batches in flight as there are stages
    in_flight = min(layout.accumulation, depth - index)
    parts["activations"] = tokens * (num_layers * kept * in_flight + ENDS * config.hidden_size)
    logits = 0.0
    if size.has_logits and last:
        with_logits = tokens if layout.loss_tokens is None else layout.micro * layout.loss_tokens
        logits = _logits_bytes(config, size, with_logits, layout)
    copies, again = _weight_copies(config, size, share, in_flight, layout)
    again += tokens * complete if layout.checkpointing != "none" else 0.0
    if layout.shard:
        copies, again = _sharded_bytes(config, size, again, layout)
    if copies + logits >= again:
        parts["logits"], parts["temporary"] = logits, copies
    else:
        parts["logits"], parts["temporary"] = 0.0, again
    parts["temporary"] += _buffer_bytes(size, own, layout)
    if layout.optimizer == "muon":
        # activations and logits are gone when weights are updated
        while_computing = parts["activations"] + parts["logits"]
        parts["temporary"] = max(parts["temporary"], _orthogonalising_bytes(size, layout) - while_computing)
    return parts


def _orthogonalising_bytes(size: Size, layout: Layout) -> float:
    """Of Muon's update: of one matrix, and under FSDP of as many as a process has at a time."""
    elements = size.largest_matrix
    if layout.shard:
        elements = max(elements, min(MUON_BUCKET, size.matrices / layout.shard))
    return MUON_BYTES * elements


def _zero_stage(layout: Layout) -> int | None:
    """The pipelined engine always has DeepSpeed's ZeRO-1 optimizer."""
    return 1 if layout.depth > 1 else layout.zero


def state_bytes(size: Size, layout: Layout, share: float = 1.0) -> dict[str, float]:
    """Bytes of weights, gradients and optimizer on one process, of this share of the parameters. What is frozen has a
    weight only."""
    zero, ranks = _zero_stage(layout), layout.ranks
    trained = size.trained * share
    # Adam keeps two moments; Muon one, for the matrices. DeepSpeed's ZeRO keeps an fp32 copy of the rank's share in
    # addition to fp32 weights.
    moment_bytes = 8.0
    if layout.optimizer == "muon" and size.trained:
        moment_bytes -= 4.0 * size.matrices / size.trained
    copy_bytes = 4.0 if zero else 0.0
    shard = (layout.shard or 1) * layout.tensor
    weight_ranks = ranks if zero == 3 else shard
    gradient_ranks = ranks if zero in (2, 3) else shard
    optimizer_ranks = ranks if zero in (1, 2, 3) else shard
    parts = {
        "weights": ((size.weight_bytes - size.scale_bytes) / weight_ranks + size.scale_bytes) * share,
        "gradients": 4.0 * trained / gradient_ranks,
        "optimizer": (moment_bytes + copy_bytes) * trained / optimizer_ranks,
    }
    if layout.offload:
        parts["optimizer"] = 0.0
        if zero == 3:
            parts["weights"] = 0.0
    return parts


def _logits_bytes(config, size: Size, tokens: int, layout: Layout) -> float:
    if layout.head_rows:
        # per logit its fp32 log-softmax and its gradient
        return (8.0 * min(tokens, layout.head_rows) * config.vocab_size + size.output_bytes) / layout.tensor
    # per logit itself, its fp32 copy (bf16 only), its log-softmax, its gradient: never all at the same time
    capped = 2.0 if getattr(config, "final_logit_softcapping", None) else 0.0
    return (12.0 + capped) * tokens * config.vocab_size


def _weight_copies(config, size: Size, share: float, in_flight: int, layout: Layout) -> tuple[float, float]:
    """(bytes of bf16 copies of weights at the end of a forward pass, bytes while one layer is computed again).

    Autocast keeps a copy of each fp32 matrix until the backward pass has used it, for each micro-batch in flight. With
    checkpointing the copies go at the end of the forward pass. Experts are cast outside of autocast
    (models/experts.py). DeepSpeed's ZeRO-3 has copies of experts only, FSDP has none."""
    if layout.precision != "bf16" or layout.shard:
        return 0.0, 0.0
    dense = 2.0 * share * max(0, size.cast - size.experts - size.embedding + size.lookup)
    experts = 2.0 * share * size.experts
    if layout.zero == 3:
        one_layer = 2.0 * size.experts / config.num_hidden_layers
        return (experts, 0.0) if layout.checkpointing == "none" else (0.0, one_layer)
    if layout.checkpointing == "none":
        return in_flight * (dense + experts), 0.0
    return dense, 2.0 * (size.body - size.lookup) / config.num_hidden_layers


def _sharded_bytes(config, size: Size, again: float, layout: Layout) -> tuple[float, float]:
    """(bytes at the end of a forward pass, bytes in the backward pass of a layer) of FSDP, in addition to activations
    and logits. again: bytes of a layer that is computed again.

    While a layer computes its gradients, it and the next one are gathered, and the previous one's gradients are reduced
    in fp32; its own have the type of its gathered weights. A table that is input and output layer at once is gathered
    throughout, and its gradient waits for both."""
    gathered = 2.0 if layout.precision == "bf16" else 4.0
    layer = (size.largest_layer or size.body / config.num_hidden_layers) / layout.tensor
    tables, lookup = size.embedding / layout.tensor, size.lookup / layout.tensor
    trained = layer * size.trained / size.total
    packed = size.four_bits / config.num_hidden_layers
    gathered_layer = gathered * (layer - packed) + packed / 2
    backward = size.padding(layout.shard) * (2 * gathered_layer + 4.0 * trained) + max(gathered * trained, again)
    if config.tie_word_embeddings:
        return 4.0 * tables, backward + 8.0 * tables
    return 4.0 * (tables - lookup), backward


def _buffer_bytes(size: Size, own: float, layout: Layout) -> float:
    """Of the engine: gathered weights, buffers for reducing. own: parameters of this process's stage."""
    zero = _zero_stage(layout)
    total = 2 * 4.0 * min(DEEPSPEED_BUCKET, own) if zero else 0.0
    if zero == 3:
        total += 4.0 * min(LIVE_PARAMETERS, size.total)
    return total


def layer_bytes(config, size: Size, sequence_length: int, layout: Layout) -> tuple[float, float]:
    """(bytes per token and layer kept for the backward pass, the same without activation checkpointing).

    Counted as in Korthikanti et al. (2022), section 4.1, for what transformers' layers save: their 34 * hidden is for
    GPT with 16-bit residuals and dropout; here residuals and norms are fp32 (autocast), and each matrix keeps a 16-bit
    copy of its own of what it reads. Selective recomputation is theirs too: there of the attention's scores, which
    fused attention never keeps, and here of everything but matrix products and attention (train/layers.py). A tensor
    group splits what is between the first and the last matrix of a block, and nothing of the residual stream and norms.
    """
    item = 2.0 if layout.precision == "bf16" else 4.0
    layers, width = config.num_hidden_layers, config.hidden_size
    heads = getattr(config, "num_attention_heads", None) or 1
    queries, keys, values = attention_widths(config, heads)
    picked, per_layer = routed(config)
    inner = inner_width(config) * (picked if per_layer > 1 else 1)
    gated = per_layer > 1 or hasattr(config, "rms_norm_eps")  # families with RMSNorm have gated layers
    scores = heads * sequence_length / layout.tensor if layout.attention == "eager" or size.materialises_scores else 0
    read, given = size.inputs / layers, size.outputs / layers
    split = queries + inner  # read by the last matrix of a block, whose inputs a tensor group splits
    # What products read: with autocast a copy for each, in fp32 the same tensor for all that read the hidden state
    products = item * ((read - split if item == 2 else 2 * width) + split / layout.tensor)
    # queries, and keys and values repeated for each head; gate and its activation and up
    between = item * (queries + queries + values + (3 if gated else 1) * inner) / layout.tensor
    # RMSNorm keeps its input and, for the gradient of its weight, the normalised copy, in fp32; LayerNorm its input
    norm_bytes = 4.0 if size.frozen else 8.0
    norms = norm_bytes * (size.norms / layers or 2 * width) if gated else 8.0 * width
    # openai-gpt calls gelu_new "gelu", under another key
    if not gated and "new" in str(getattr(config, "activation_function", "")) or getattr(config, "afn", "") == "gelu":
        norms += 4 * item * inner  # gelu_new in Python: four more copies
    if family_of(config).qk_norm:
        norms += norm_bytes * (queries + keys) / layout.tensor
    complete = products + between + norms + _score_bytes(config, item) * scores + (2.0 * width if gated else 0.0)
    if layout.compiled:
        complete *= COMPILED_SHARE_FSDP if layout.shard else COMPILED_SHARE
    if layout.checkpointing == "full":
        return 4.0 * width, complete
    if layout.checkpointing == "selective":
        given = 2 * width + (given - 2 * width) / layout.tensor
        return 4.0 * width + item * (given + queries / layout.tensor + scores), complete
    return complete, complete


def _score_bytes(config, item: float) -> float:
    """Kept per attention score that is written to memory: scores, softmax and its copy; a cap; a mask of dropout and
    what it leaves."""
    kept = 3 * item
    if getattr(config, "attn_logit_softcapping", None):
        kept += item
    if getattr(config, "attn_pdrop", 0.0) or getattr(config, "attention_dropout", 0.0):
        kept += item + 1
    return kept


def attention_widths(config, heads: int) -> tuple[int, int, int]:
    """Widths of the queries, of the keys as they are computed, and of the values repeated for each head."""
    if getattr(config, "qk_nope_head_dim", None):
        queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return queries, queries, heads * config.v_head_dim
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head, heads * head


def inner_width(config) -> int:
    """Width of the feed-forward layer, or of one expert."""
    for key in ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner"):
        width = getattr(config, key, None)
        if width:
            return width
    return 4 * config.hidden_size


def checkpoint_bytes(size: Size, optimizer: str = "adamw") -> float:
    """Bytes of one training checkpoint: fp32 weights and moments of what is trained, whatever the layout."""
    return 12.0 * size.trained - (4.0 * size.matrices if optimizer == "muon" else 0.0)
