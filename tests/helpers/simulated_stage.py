"""The peak memory of a pretraining stage's fullest process at full size, without allocating it: its forward and backward
passes run on fake tensors, which have shapes and no data.

    peak(config, model_config, world)       # Peak(states, computing), bytes

`computing` is what the operations of a step make and have alive at the same time: with a pipeline of 1F1B as many
micro-batches in flight as the stage holds, then one backward pass. `states` are weights, gradients and optimizer in
bytes per parameter as the engines keep them (STATES; counted: docs/log.md, 38). Not simulated: the CUDA context, NCCL,
fragmentation. Of a model with many layers two small numbers of layers are simulated and continued in a straight line,
because its layers are alike.
"""

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models import experts, pipeline_split
from pipeline.models.families import family_of
from pipeline.models.model_parts import decoder_layers
from pipeline.train import chunked_loss, layers

# ZeRO stage (None: DDP) -> (a, b): a + b / n bytes of weights, gradients and optimizer per parameter on n data ranks.
STATES = {None: (16, 0), 0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 20)}
# DeepSpeed's ZeRO-3 keeps at most this many parameters gathered (stage3_max_live_parameters).
LIVE_PARAMETERS = 1e9
BUCKETS = 2 * 4 * 50_000_000  # bytes that ZeRO's two buffers take


class Peak(NamedTuple):
    states: float
    computing: float

    @property
    def total(self) -> float:
        return self.states + self.computing


class Live(TorchDispatchMode):
    """The most bytes of storages that operations made and that are alive at the same time; `ignored` are not counted."""

    def __init__(self, ignored: list[torch.Tensor]):
        super().__init__()
        self.ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.ignored and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.now += storage.nbytes()
        if self.now > self.peak:
            self.sweep()
        return outputs

    def sweep(self) -> None:
        for key in [key for key, (reference, _) in self.alive.items() if reference.expired()]:
            self.now -= self.alive.pop(key)[1]
        self.peak = max(self.peak, self.now)


def peak(config, model_config, world: int) -> Peak:
    """Of the fullest process. config: of stage pretrain."""
    depth = config.parallel.pipeline
    if depth == 1:
        found = _continued(config, model_config, world, model_config.num_hidden_layers, None)
        if config.parallel.zero == 3:
            count = (found.states - BUCKETS) * world / STATES[3][1]
            found = found._replace(states=found.states + 4 * min(LIVE_PARAMETERS, count))
        return found
    with torch.device("meta"):
        parts = pipeline_split.split(_model(model_config), config.parallel, config.sequence_length)
    found = [_continued(config, model_config, world, len(parts[index]), index) for index in {0, depth - 1}]
    return max(found, key=lambda one: one.total)


def _continued(config, model_config, world: int, num_layers: int, stage: int | None) -> Peak:
    few = (getattr(model_config, "first_k_dense_replace", None) or 0) + 2
    if num_layers <= few + 2:
        return _peak_of(config, model_config, world, num_layers, stage)
    first, second = (_peak_of(config, model_config, world, count, stage) for count in (few, few + 2))
    more = (num_layers - few) / 2
    return Peak(*(one + more * (two - one) for one, two in zip(first, second, strict=True)))


def _peak_of(config, model_config, world: int, num_layers: int, stage: int | None) -> Peak:
    depth = config.parallel.pipeline
    model_config = copy.deepcopy(model_config)
    model_config.num_hidden_layers = num_layers if stage is None else num_layers + depth - 1
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(model_config, key, None):
            setattr(model_config, key, getattr(model_config, key)[: model_config.num_hidden_layers])
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _model(model_config)
        _prepare(model, config)
        if stage is not None:
            ends = [(number if number < stage else number + num_layers - 1) + 1 for number in range(depth)]
            starts = [0, *ends[:-1]]
            pipeline_split.cut(model, stage, [range(*bounds) for bounds in zip(starts, ends, strict=True)])
        return _measured(config, model, world, stage)


def _model(model_config):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).train()
    experts.install(model)
    return model


def _prepare(model, config) -> None:
    """As engine.build and layers.prepare do on a GPU without flash-attn."""
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    if config.loss_chunk is not None and family_of(model.config).chunked_loss:
        chunk = config.loss_chunk
        if chunk == "auto":
            chunk = chunked_loss.chunk_of(model.config.vocab_size, "cuda")
        chunked_loss.install(model, chunk, config.z_loss)
    if config.activation_checkpointing != "none":
        layers.checkpoint(model, config.activation_checkpointing)
    if config.compile:
        compile_layers(model)


class Uncompiled(torch.nn.Module):
    """A layer whose parameters can be exchanged, and that is called as its class says."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return type(self.layer).forward(self.layer, *args, **kwargs)


def compile_layers(model) -> None:
    """What torch.compile keeps of a layer for its backward pass: its forward and backward graphs, cut by the compiler's
    partitioner, which recomputes what is cheap. The graphs run operation by operation, where the compiler fuses, so
    what exists only inside a layer is more than in truth."""
    for layer in decoder_layers(model):
        layer.forward = _graphs(Uncompiled(layer))


def _graphs(module):
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def call(parameters, *args, **kwargs):
        return torch.func.functional_call(module, parameters, args, kwargs)

    traced = aot_function(
        call,
        lambda graph, inputs: graph,
        lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    # looked up at each call: FSDP exchanges them
    return lambda *args, **kwargs: traced(dict(module.named_parameters()), *args, **kwargs)


def _measured(config, model, world: int, stage: int | None) -> Peak:
    depth = config.parallel.pipeline
    ranks = world // depth
    rows = config.micro_rows(world)
    accumulation = config.batch_size // ranks // rows
    zero = 1 if depth > 1 else config.parallel.zero
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)  # part of the states
    own = [*parameters, *(parameter.grad for parameter in parameters), *model.buffers()]
    live, outputs = Live(own), []
    with live, _linear(zero):
        for _ in range(min(accumulation, depth - (stage or 0))):
            outputs.append(_forward(config, model, rows, stage))
        _backward(outputs.pop(0))
        live.sweep()
    count = sum(parameter.numel() for parameter in parameters)
    whole, shared = STATES[zero]
    states = count * (whole + shared / ranks)
    return Peak(states + (BUCKETS if zero else 0), live.peak)


def _forward(config, model, rows: int, stage: int | None):
    first, last = stage in (None, 0), stage in (None, config.parallel.pipeline - 1)
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    arguments: dict = {"input_ids": ids, "use_cache": False}
    if not first:
        hidden = torch.zeros(rows, config.sequence_length, model.config.hidden_size, requires_grad=True)
        arguments = {"inputs_embeds": hidden, "use_cache": False}
    if config.document_mask:
        arguments["position_ids"] = torch.arange(config.sequence_length).expand(rows, -1).contiguous()
    head = chunked_loss.installed(model) if last else None
    if head:
        head.expect([{"labels": ids}])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
        if not last:
            return model.base_model(**arguments).last_hidden_state
        outputs = model(**arguments).logits
    if head:
        return outputs.total
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1).float(), ids.flatten(), reduction="sum")


def _backward(output) -> None:
    output.backward(torch.ones_like(output) if output.dim() else None)


@dataclasses.dataclass
class _linear:
    """Under ZeRO-3, DeepSpeed's linear function, which keeps the weight itself and not its copy in bf16."""

    zero: int | None

    def __enter__(self):
        self.before = torch.nn.functional.linear
        if self.zero == 3:
            from deepspeed.runtime.zero.linear import zero3_linear_wrap

            torch.nn.functional.linear = zero3_linear_wrap

    def __exit__(self, *_):
        torch.nn.functional.linear = self.before
