"""The memory of one process of the FSDP engine at full size, simulated: the engine's own code runs on fake tensors, which
have shapes and no data, in a process group that sends nothing.

    building, training = peaks(config, model_config, world)       # bytes
    peak(config, model_config, world)                             # of training, from a few layers

Counted are the storages that are alive after each operation. What the CUDA context, NCCL and fragmentation take is not
simulated. Compiled layers are simulated as in simulated_stage.py, without recomputed activations only: with
`activation_checkpointing` the compiler chooses what it recomputes.

What is alive also depends on when Python collects garbage, and with it on everything that a process has done before, so
`peak` simulates each number of layers in a process of its own.
"""

import contextlib
import copy
import gc
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from alone import alone
from simulated_stage import compile_layers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.train import chunked_loss, fsdp, layers

HEADS = {"reward": "AutoModelForSequenceClassification"}  # by kind of stage


class Live(TorchDispatchMode):
    """The most bytes of storages that operations have made and that are alive at a time."""

    def __init__(self):
        super().__init__()
        self.references: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        known = len(self.references)
        for value in tree_leaves(outputs):
            # a DTensor is only a label on its local tensor
            if isinstance(value, torch.Tensor) and not isinstance(value, DTensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                self.references.setdefault(storage._cdata, StorageWeakRef(storage))
        if len(self.references) > known:
            self.peak = max(self.peak, self.now())
        return outputs

    def now(self) -> int:
        """Bytes now. fully_shard empties and fills storages in place, so each is asked for its size."""
        total = 0
        for key, reference in list(self.references.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.references[key]
            else:
                total += storage.nbytes()
        return total


@contextlib.contextmanager
def processes(world: int, local: int = 8) -> Iterator[None]:
    """This process as rank 0 of `world`, `local` on its node, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    values = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local)}
    with mock.patch.dict(os.environ, values | {"ACCELERATE_USE_CPU": "true"}):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def peak(config, model_config, world: int) -> float:
    """Bytes of a step at full depth: of two small numbers of layers, continued in a straight line, because a model's
    layers are alike."""
    few = (getattr(model_config, "first_k_dense_replace", None) or 0) + 3
    if model_config.num_hidden_layers <= few + 2:
        return alone(peaks, config, model_config, world)[1]
    first, second = (alone(peaks, config, with_layers(model_config, count), world)[1] for count in (few, few + 2))
    return first + (model_config.num_hidden_layers - few) / 2 * (second - first)


def with_layers(model_config, count: int):
    """A configuration with fewer layers."""
    model_config = copy.deepcopy(model_config)
    model_config.num_hidden_layers = count
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(model_config, key, None):
            setattr(model_config, key, getattr(model_config, key)[:count])
    return model_config


def peaks(config, model_config, world: int) -> tuple[int, int]:
    """Bytes while the engine is built, and in a step of two micro-batches with the optimizer's moments. As in the
    engine's step, gradients are summed over copies in the last one: torch keeps each of these sums until its end."""
    with simulated(config, world) as live:
        model = on_meta(config, model_config)
        engine = engine_of(model, loss, config, "model")
        building, live.peak = live.peak, 0
        moments = moments_of(engine)
        for index in range(2):
            gc.collect()  # the first pass also traces what is compiled
            live.peak = 0
            if engine.num_copies > 1:
                engine.model.set_requires_all_reduce(index == 1)
            micro_batch(engine, config)
        assert moments
        return building, live.peak


def fused(query, key, value, *words, attend=torch.nn.functional.scaled_dot_product_attention, **options):
    """Attention that keeps no scores where values are narrower than keys, too: DeepSeek-V3's are 128 and 192 wide. On a
    GPU torch has a kernel for it (memory-efficient attention: both widths divisible by 8), on a CPU it writes down three
    matrices [heads, T, T] in fp32, 24 GiB."""
    width = value.shape[-1]
    if width == query.shape[-1]:
        return attend(query, key, value, *words, **options)
    padded = torch.nn.functional.pad(value, (0, query.shape[-1] - width))
    return attend(query, key, padded, *words, **options)[..., :width]


@contextlib.contextmanager
def simulated(config, world: int) -> Iterator[Live]:
    """Rank 0 of `world` processes on fake tensors. What operations make is counted by the object that is yielded."""
    with processes(world, config.run.processes):
        mesh = fsdp.mesh_of(config.parallel, torch.device("cpu"))  # its ranks are real numbers
        with (
            mock.patch.object(fsdp, "mesh_of", lambda *_: mesh),
            mock.patch.object(fsdp, "without_weights", empty_copy),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused),
            FakeTensorMode(allow_non_fake_inputs=True),
            Live() as live,
        ):
            yield live


def on_meta(config, model_config, reward: bool = False):
    """A model as a stage has it before its engine is built: as engine.build and layers.prepare do it on a GPU, and with
    causal attention that has no mask, as row_attention's kernel."""
    import transformers

    from pipeline.models import experts

    assert not (config.compile and config.activation_checkpointing != "none"), "is not simulated"
    kind = HEADS["reward"] if reward else HEADS.get(config.kind, "AutoModelForCausalLM")
    with unset_fake_temporarily(), torch.device("meta"):
        model = getattr(transformers, kind).from_config(model_config, dtype=torch.float32).train()
    experts.install(model)
    prepare = layers.prepare_rows if config.kind == "pretrain" else layers.prepare
    losses = {"per_token": True} if config.kind in ("dpo", "kto") else {}
    with mock.patch.object(layers, "compile", compile_layers):
        prepare(model, config, **losses)
    head = chunked_loss.installed(model)
    if head is not None:
        head.compiled = False  # its kernel keeps nothing that the others do not
    if head is not None and head.chunk is None:
        head.chunk = chunked_loss.chunk_of(model_config.vocab_size, "cuda")
    if config.activation_checkpointing != "none":
        layers.checkpoint(model, config.activation_checkpointing)
    return model


def empty_copy(model, copied=fsdp.without_weights):
    """Of a model on the meta device. Fake tensors cannot be copied deeply."""
    with unset_fake_temporarily():
        return copied(model)


def engine_of(model, loss, config, name: str):
    return fsdp.FullySharded(model, loss, config, name, fill=lambda part, global_name: None)


def moments_of(engine) -> list[torch.Tensor]:
    """What AdamW keeps after its first update."""
    return [torch.empty_like(parameter) for parameter in engine.parameters for _ in range(2)]


def micro_batch(engine, config) -> None:
    """Rows of the largest size. Which positions have labels depends on data, so all have one."""
    rows = config.micro_rows(engine.data_world) * config.sequences_per_row()
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if config.kind == "sft":
        inputs["position_ids"] = torch.arange(config.sequence_length).expand(rows, -1).contiguous()
    total, _ = engine._forward(engine.model, {"inputs": inputs, "labels": ids})
    total.backward()


def loss(outputs, batch):
    if isinstance(outputs, chunked_loss.TokenLosses):
        return outputs.nll_BT.sum() if outputs.nll_BT.requires_grad else outputs.total, {}
    if outputs.dim() == 2:  # scores
        return outputs.sum(), {}
    logits = outputs.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum"), {}
