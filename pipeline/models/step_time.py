"""How long a training step takes, by arithmetic: matrix products at an achievable share of the peak, memory traffic of
everything else, collectives over the links of a cluster, and the bubble of a pipeline.

    shape = shape_of(model, sequence_length)
    seconds = step_seconds(shape, setup, cluster)        # by part

One micro-batch of a stage takes, forward and backward:

    products      for each matrix FLOPs / (SHARE * peak) + bytes read and written / bandwidth
    attention     causal FLOPs / (ATTENTION_SHARE * peak); backward 2.5 times the forward (Dao, 2023, section 3.1.2)
    elementwise   PASSES * bytes that a layer saves for its backward pass / bandwidth
    weights       casting, accumulating and updating them, bytes / bandwidth
    exposed       collectives that computing does not hide; those that it hides slow it by INTERFERENCE of their time

A collective over n devices moves (n - 1) / n of its bytes through the slower of the node's links and the network cards
of the group's devices in a node, at LINK_SHARE of their rate, plus a latency per step of its ring. The stages of a
pipeline of p compute m micro-batches in m + (p - 1) / chunks times the time of the slowest (1F1B; Narayanan et al.,
2021, section 2.2).

The constants are calibrated on published runs and tested on others: `python benchmarks/plan.py` prints both with their
errors. No figure of alma itself has been measured on a GPU.
"""

import math
from dataclasses import dataclass

from pipeline.models import cost
from pipeline.models.devices import Cluster

# Calibrated by benchmarks/plan.py on its calibration rows; the others take the value of the architecture that is most
# like them, which was not tested.
SHARE = {"ampere": 0.84, "hopper": 0.83}
ATTENTION_SHARE = {"ampere": 0.34, "hopper": 0.19}
PASSES = {"eager": 11.3, "compiled": 2.3}
INTERFERENCE = 0.25
# Not calibrated. NCCL's all-gathers and all-reduces reach 360 of 450 GB/s on an H100 node (nccl-tests).
LINK_SHARE = 0.8
LATENCY_IN_NODE, LATENCY_BETWEEN_NODES = 2e-6, 10e-6  # seconds per step of a ring
LIKE = {"ada": "ampere", "blackwell": "hopper", "cdna3": "hopper", "davinci": "ampere", "cpu": "ampere"}

ENDLESS = 1 << 30  # ranks of a tensor group: what is split is nothing

LOGIT_BYTES = {"eager": 28.0, "compiled": 14.0}
"""Read and written per logit: in bf16, its fp32 copy, its log-softmax and its gradient."""
UPDATE_BYTES = 40.0
"""Per parameter and step: AdamW reads and writes weight and two moments and reads the gradient, in fp32; its norm and
clipping are another 12."""


@dataclass(frozen=True)
class Shape:
    """What a model multiplies, per layer."""

    layers: int
    width: int
    vocabulary: int
    matrices: tuple[tuple[int, int, float], ...]
    """(inputs, outputs, share of the tokens that pass) of each matrix of a layer."""
    attention: float
    """Sum over heads of the widths of keys and values; 0 without attention."""
    heads: int
    saved: float
    """Bytes per token that a layer saves for its backward pass, without checkpointing."""
    layer_parameters: float
    table_parameters: float
    """Input and output tables."""
    orthogonalising: float = 0.0
    """FLOPs of Muon's products in one update, per layer."""
    saved_whole: float = 0.0
    """Of `saved`, what each rank of a tensor group has; none with sequence parallelism."""

    @property
    def parameters(self) -> float:
        return self.layers * self.layer_parameters + self.table_parameters

    def flops(self, length: int) -> float:
        """Training FLOPs per token as PaLM counts them: attention in full, no recomputation."""
        products = sum(rows * columns * share for rows, columns, share in self.matrices)
        return 6 * (self.layers * products + self.width * self.vocabulary) + 6 * self.layers * self.attention * length


@dataclass(frozen=True)
class Setup:
    """How a run is divided and computed, whatever the framework."""

    length: int
    micro: float
    """Rows of a micro-batch."""
    accumulation: int = 1
    """Micro-batches of a step on one data rank."""
    data: int = 1
    """Data-parallel ranks."""
    shard: int = 1
    """Data ranks that share one copy of the weights; 1: each has its own."""
    tensor: int = 1
    context: int = 1
    """Data ranks that share their rows, and exchange heads for tokens in attention."""
    stages: int = 1
    chunks: int = 1
    """Parts of the model that a stage holds (interleaved 1F1B)."""
    shares_optimizer: bool = False
    """Each data rank updates a part of the weights, which are gathered afterwards (ZeRO-1 and 2)."""
    reduces_each: bool = False
    """Gradients are summed over data ranks after each micro-batch; with `shard` they always are."""
    gather_bytes: float = 2.0
    """Per parameter that is gathered."""
    reduce_bytes: float = 4.0
    hidden_bytes: float = 2.0
    """Per number that is sent between stages."""
    gradient_bytes: float = 2.0
    """Per number of a hidden state's gradient that a tensor group sums."""
    overlaps: bool = True
    """Collectives run while layers compute."""
    recomputed: tuple[float, float] = (0.0, 0.0)
    """Share of the forward pass that is computed again: of matrix products and attention, of everything else."""
    compiled: bool = False
    materialises_scores: bool = False
    """Attention's scores are written to memory."""
    muon: bool = False
    """Matrices are orthogonalised, each on one of the processes that share it, and on all that hold all of it."""

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.stages

    @property
    def step_tokens(self) -> int:
        return round(self.data * self.accumulation * self.micro * self.length)


def saved_bytes(width: int, queries: int, keys: int, inner: int, gated: bool, residual: float) -> float:
    """Bytes per token that a layer saves, 16-bit inputs of products, residual stream of `residual` bytes per number
    (as cost.layer_bytes counts)."""
    products = 2.0 * (2 * width + 2 * queries + 2 * keys + (4 if gated else 2) * inner)
    return products + (4 if gated else 2) * residual * width


def shape_of(model, sequence_length: int) -> Shape:
    """The shape of a transformers model, which may be on the meta device. Its last layer stands for all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    config = model.config
    picked, _ = cost.routed(config)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    matrices = []
    for name, parameter in layers[-1].named_parameters():
        if parameter.dim() == 2:
            matrices.append((parameter.shape[1], parameter.shape[0], 1.0))
        elif parameter.dim() == 3 and cost.EXPERTS.search(name):  # [experts, outputs, inputs]
            matrices.append((parameter.shape[2], parameter.shape[1], float(picked)))
    size = cost.count(model)
    _, saved = cost.layer_bytes(config, size, sequence_length, cost.Layout())
    _, saved_whole = cost.layer_bytes(config, size, sequence_length, cost.Layout(tensor=ENDLESS))
    # five iterations, of which each multiplies the shorter side with the longer one twice and with itself once
    short_and_long = [sorted(parameter.shape) for parameter in layers[-1].parameters() if parameter.dim() == 2]
    orthogonalising = 5.0 * sum(4 * short**2 * long + 2 * short**3 for short, long in short_and_long)
    return Shape(
        orthogonalising=orthogonalising,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        matrices=tuple(matrices),
        attention=cost.attention_width(config) / config.num_hidden_layers,
        heads=getattr(config, "num_attention_heads", None) or 0,
        saved=saved,
        layer_parameters=size.body / config.num_hidden_layers,
        table_parameters=size.embedding,
        saved_whole=saved_whole,
    )


def setup_of(layout: cost.Layout, length: int) -> Setup:
    """What alma's engines do under a layout. To everything but attention, processes that share rows are data ranks with
    a part of a row each."""
    recomputed = {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}[layout.checkpointing]
    common = {
        "length": length,
        "micro": layout.micro / layout.context,
        "accumulation": layout.accumulation,
        "data": layout.ranks * layout.context,
        "context": layout.context,
        "recomputed": recomputed,
        "compiled": layout.compiled,
        "muon": layout.optimizer == "muon",
    }
    if layout.depth > 1:  # ZeRO-1 among the data ranks of a stage, fp32 hidden states
        return Setup(
            **common, stages=layout.depth, shares_optimizer=True, gather_bytes=4.0, hidden_bytes=4.0, overlaps=False
        )
    if layout.shard:  # FSDP2: bf16 gathers, fp32 sums
        return Setup(**common, shard=layout.shard, tensor=layout.tensor, gradient_bytes=4.0)
    if layout.zero is None:  # DDP overlaps the sum with the last backward pass
        return Setup(**common)
    # DeepSpeed in fp32 without overlap (train/sharded.py)
    if layout.zero == 3:
        return Setup(**common, shard=layout.ranks, gather_bytes=4.0, overlaps=False)
    return Setup(
        **common, shares_optimizer=layout.zero > 0, reduces_each=layout.zero == 2, gather_bytes=4.0, overlaps=False
    )


# ---- the time of a step ----------------------------------------------------------------------------------------------


def step_seconds(shape: Shape, setup: Setup, cluster: Cluster) -> dict[str, float]:
    """Seconds of one step by part: products, attention, elementwise, weights, communication (what is not hidden),
    bubble."""
    forward, backward = _compute(shape, setup, cluster)
    parts = {name: forward[name] + backward[name] for name in forward}
    hidden, exposed = _each_micro_batch(shape, setup, cluster, sum(forward.values()), sum(backward.values()))
    parts["communication"] = exposed + INTERFERENCE * hidden
    one = sum(parts.values())
    parts = {name: seconds * setup.accumulation for name, seconds in parts.items()}
    parts["weights"] += _update(shape, setup, cluster)
    parts["communication"] += _each_step(shape, setup, cluster, sum(backward.values()))
    parts["bubble"] = one * (setup.stages - 1) / setup.chunks
    return parts


def tokens_per_second(shape: Shape, setup: Setup, cluster: Cluster) -> float:
    """Of all devices."""
    return setup.step_tokens / sum(step_seconds(shape, setup, cluster).values())


def mfu(shape: Shape, setup: Setup, cluster: Cluster) -> float:
    """Model FLOPs utilisation, attention in full."""
    rate = tokens_per_second(shape, setup, cluster) * shape.flops(setup.length)
    return rate / (cluster.device.peak * setup.devices)


def _mode(setup: Setup) -> str:
    return "compiled" if setup.compiled else "eager"


def _share(table: dict[str, float], cluster: Cluster) -> float:
    architecture = cluster.device.architecture
    return table[architecture if architecture in table else LIKE[architecture]]


def _compute(shape: Shape, setup: Setup, cluster: Cluster) -> tuple[dict[str, float], dict[str, float]]:
    """(forward, backward) seconds of one micro-batch on the slowest stage, by part."""
    device, tokens = cluster.device, setup.micro * setup.length
    layers, has_head = _slowest_stage(shape, setup.stages)
    product = layers * sum(
        _product(rows, columns, tokens * uses, setup, cluster) for rows, columns, uses in shape.matrices
    )
    head = has_head * _product(shape.width, shape.vocabulary, tokens, setup, cluster)
    causal = shape.attention * setup.length * tokens / setup.tensor  # 2 FLOPs per position, half of the positions
    attention = layers * causal / (_share(ATTENTION_SHARE, cluster) * device.peak)
    per_byte = 1 / device.bandwidth
    saved = shape.saved_whole + (shape.saved - shape.saved_whole) / setup.tensor
    if setup.materialises_scores:
        saved += 5.0 * shape.heads * setup.length / setup.tensor  # Korthikanti et al. (2022), section 4.1
    elementwise = layers * PASSES[_mode(setup)] * saved * tokens * per_byte
    logits = has_head * LOGIT_BYTES[_mode(setup)] * tokens * shape.vocabulary / setup.tensor * per_byte
    parameters = _own_parameters(shape, setup)
    weights = 26.0 if setup.shard == 1 else 10.0  # cast, gradient written, cast up and accumulated; or gathered in bf16
    casts = weights * parameters * per_byte
    again, rest_again = setup.recomputed
    forward = {
        "products": product + head,
        "attention": attention,
        "elementwise": elementwise / 3 + logits / 2,
        "weights": casts / 4,
    }
    backward = {
        "products": (2 + again) * product + 2 * head,
        "attention": (2.5 + again) * attention,
        "elementwise": elementwise * 2 / 3 + rest_again * elementwise / 3 + logits / 2,
        "weights": casts * 3 / 4,
    }
    return forward, backward


def _slowest_stage(shape: Shape, stages: int) -> tuple[float, float]:
    """(layers, output layers) of the stage that takes longest, if layers are distributed as evenly as possible."""
    one = sum(rows * columns * uses for rows, columns, uses in shape.matrices)
    head = shape.width * shape.vocabulary / one  # in layers
    for layers in range(shape.layers // stages, shape.layers + 1):
        for limit, has_head in ((layers, 0.0), (layers + head, 1.0)):
            in_last = math.floor(limit - head + 1e-9)
            if in_last >= 0 and (stages - 1) * int(limit) + in_last >= shape.layers:
                return float(layers), has_head
    return float(shape.layers), 1.0


def _product(inputs: int, outputs: int, tokens: float, setup: Setup, cluster: Cluster) -> float:
    """Seconds of one product of bf16 matrices, split over the tensor-parallel ranks."""
    device = cluster.device
    flops = 2.0 * tokens * inputs * outputs / setup.tensor
    bytes_moved = 2.0 * (tokens * (inputs + outputs) / setup.tensor + inputs * outputs / setup.tensor)
    return flops / (_share(SHARE, cluster) * device.peak) + bytes_moved / device.bandwidth


def _own_parameters(shape: Shape, setup: Setup) -> float:
    """That a device computes with: its stage's part and its part of each tensor."""
    return shape.parameters / (setup.stages * setup.tensor)


# ---- communication ---------------------------------------------------------------------------------------------------


def ring_seconds(num_bytes: float, size: int, stride: int, cluster: Cluster) -> float:
    """One all-gather or reduce-scatter of `num_bytes` (in total) over `size` devices that are `stride` apart. An
    all-reduce takes two."""
    if size == 1:
        return 0.0
    device = cluster.device
    in_node = max(1, min(size, device.per_node // stride))
    rate = device.link
    hops = (size - 1) * LATENCY_IN_NODE
    if in_node < size:
        rate = min(rate, in_node * device.network)
        hops = (size // in_node) * LATENCY_BETWEEN_NODES + (size - size // in_node) * LATENCY_IN_NODE
    return num_bytes * (size - 1) / size / (LINK_SHARE * rate) + hops


def _each_micro_batch(shape: Shape, setup: Setup, cluster: Cluster, forward: float, backward: float):
    """(hidden, exposed) seconds of communication in one micro-batch."""
    tokens = setup.micro * setup.length
    layers = shape.layers / setup.stages
    hidden = exposed = 0.0
    if (
        setup.tensor > 1
    ):  # two sums forward and two backward in each layer (Shoeybi et al., 2019), each gather + scatter
        output, gradient = (
            2 * ring_seconds(size * tokens * shape.width, setup.tensor, 1, cluster)
            for size in (2.0, setup.gradient_bytes)
        )
        exposed += layers * (output * (2 + 2 * setup.recomputed[0]) + 2 * gradient)
    if setup.context > 1:  # queries, keys and values, outputs, and their gradients; each of them moves one part of it
        sent = 2.0 * 2 * shape.attention * tokens
        exposed += layers * (2 + setup.recomputed[0]) * ring_seconds(sent, setup.context, 1, cluster)
    if setup.stages > 1:  # a hidden state and its gradient, to another node
        rate = cluster.device.network if setup.data * setup.tensor >= cluster.device.per_node else cluster.device.link
        sent = setup.hidden_bytes * tokens * shape.width / setup.tensor
        seconds = 2 * setup.chunks * sent / (LINK_SHARE * rate)
        exposed, hidden = (exposed, hidden + seconds) if setup.overlaps else (exposed + seconds, hidden)
    parameters = _own_parameters(shape, setup)
    per_layer = parameters / max(1.0, layers)
    if setup.shard > 1:
        gather = layers * ring_seconds(setup.gather_bytes * per_layer, setup.shard, setup.tensor, cluster)
        scatter = layers * ring_seconds(setup.reduce_bytes * per_layer, setup.shard, setup.tensor, cluster)
        hide, show = _overlapped(setup.overlaps, forward, gather)
        hide_back, show_back = _overlapped(setup.overlaps, backward, gather + scatter)
        hidden, exposed = hidden + hide + hide_back, exposed + show + show_back
    elif setup.reduces_each:
        exposed += 2 * ring_seconds(setup.reduce_bytes * parameters, setup.data, setup.tensor, cluster)
    return hidden, exposed


def _each_step(shape: Shape, setup: Setup, cluster: Cluster, backward: float) -> float:
    """Seconds of communication once a step: gradients summed over copies, and updated weights gathered."""
    parameters = _own_parameters(shape, setup)
    copies = setup.data // setup.shard
    seconds = 0.0
    if copies > 1 and not setup.reduces_each:
        own = setup.reduce_bytes * parameters / setup.shard
        reduce = 2 * ring_seconds(own, copies, setup.shard * setup.tensor, cluster)
        hide, show = _overlapped(setup.overlaps, backward, reduce)
        seconds += show + INTERFERENCE * hide
    if setup.shares_optimizer:
        gather = ring_seconds(setup.gather_bytes * parameters, setup.data, setup.tensor, cluster)
        hide, show = _overlapped(setup.overlaps, backward / 2, gather)
        seconds += show + INTERFERENCE * hide
    if setup.muon and setup.shard > 1:  # bf16, to the process that orthogonalises and back, nothing hidden
        exchanged = 2 * 2.0 * parameters / setup.shard
        seconds += ring_seconds(exchanged, setup.shard, setup.tensor, cluster)
    return seconds


def _overlapped(overlaps: bool, compute: float, communication: float) -> tuple[float, float]:
    """(hidden, exposed) seconds."""
    hidden = min(compute, communication) if overlaps else 0.0
    return hidden, communication - hidden


def _update(shape: Shape, setup: Setup, cluster: Cluster) -> float:
    own = setup.data if setup.shares_optimizer else setup.shard
    seconds = UPDATE_BYTES * _own_parameters(shape, setup) / own / cluster.device.bandwidth
    if setup.muon:
        flops = shape.layers * shape.orthogonalising / setup.shard
        seconds += flops / (_share(SHARE, cluster) * cluster.device.peak)
    return seconds
