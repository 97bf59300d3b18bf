"""The peak memory of the fullest process of a layout at full size, simulated: the stage's own code runs on fake tensors,
which have shapes and no data, in a process group that sends nothing.

    bytes = peak(config, model_config, world)

Counted are the storages that are alive after each operation. Not simulated are DeepSpeed's own tensors, for which the
measured bytes per parameter stand (STATES; docs/log.md, 38), what the CUDA context and NCCL take, and fragmentation. A
model of many layers is simulated with a few, twice, and continued in a straight line: all its layers are alike.
"""

import contextlib
import copy
import gc
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models import pipeline_split
from pipeline.train import chunked_loss, fsdp, layers
from pipeline.train.engine import Sums

# Bytes of weights, gradients and optimizer per parameter on each of n data ranks: a + b/n. Measured, docs/log.md 38.
STATES = {None: (16, 0), 0: (16, 0), 1: (8, 12), 2: (4, 16), 3: (0, 20)}


class Live(TorchDispatchMode):
    """The most bytes of storages that operations have made and that are alive at a time."""

    def __init__(self, ignored: list[torch.Tensor] = ()):
        super().__init__()
        self.references: dict[int, StorageWeakRef] = {}
        self.ignored = {tensor.untyped_storage()._cdata for tensor in ignored}
        self.peak = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        for value in tree_leaves(outputs):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.ignored:
                    self.references.setdefault(storage._cdata, StorageWeakRef(storage))
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
def processes(world: int) -> Iterator[None]:
    """This process as rank 0 of `world`, one node of 8 after another, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    values = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(min(8, world))}
    values["ACCELERATE_USE_CPU"] = "true"
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def peak(config, model_config, world: int) -> float:
    """Bytes of the fullest process. config: of stage pretrain, with `batch_size` rows over `world` processes."""
    depth = config.parallel.pipeline
    if depth == 1:
        return _continued(config, model_config, world, model_config.num_hidden_layers, None)
    with torch.device("meta"):
        parts = pipeline_split.split(_model(model_config, config), config.parallel, config.sequence_length)
    stages = {0, depth - 1}
    return max(_continued(config, model_config, world, len(parts[index]), index) for index in stages)


def _continued(config, model_config, world: int, num_layers: int, stage: int | None) -> float:
    few = getattr(model_config, "first_k_dense_replace", 0) + 2
    if num_layers <= few + 2:
        return _peak_of(config, model_config, world, num_layers, stage)
    first, second = (_peak_of(config, model_config, world, count, stage) for count in (few, few + 2))
    return first + (num_layers - few) * (second - first) / 2


def _peak_of(config, model_config, world: int, num_layers: int, stage: int | None) -> float:
    """Bytes of a process with `num_layers` layers, of a pipeline stage or of the complete model."""
    depth = config.parallel.pipeline
    model_config = copy.deepcopy(model_config)
    model_config.num_hidden_layers = num_layers if stage is None else num_layers + depth - 1
    for key in ("layer_types", "mlp_layer_types"):
        if getattr(model_config, key, None):
            setattr(model_config, key, getattr(model_config, key)[: model_config.num_hidden_layers])
    gc.collect()
    with torch.device("meta"):
        model = _model(model_config, config)
    if config.activation_checkpointing != "none":
        layers.checkpoint(model, config.activation_checkpointing)
    if config.parallel.shard:
        with processes(world):
            mesh = fsdp.mesh_of(config.parallel, torch.device("cpu"))  # its ranks are real numbers
            parts = {"mesh_of": lambda *_: mesh, "without_weights": lambda model: None}
            with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.multiple(fsdp, **parts):
                return _sharded(config, model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _local(config, model, world, num_layers, stage)


def _model(model_config, config):
    import transformers

    from pipeline.models import experts

    model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).train()
    experts.install(model)
    layers.prepare(model, config)
    return model


def _batch(config, rows: int) -> dict:
    ids = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if config.document_mask:
        inputs["position_ids"] = torch.zeros(rows, config.sequence_length, dtype=torch.long)
    return {"inputs": inputs, "labels": ids, "weight": 1.0}


def _sharded(config, model) -> float:
    """One step of the FSDP engine: two micro-batches and the optimizer's moments."""
    live = Live()
    with live:
        engine = fsdp.FullySharded(model, _loss, config, "model", fill=lambda part, name: None)
        moments = [torch.empty_like(parameter) for parameter in engine.parameters for _ in range(2)]
        live.peak = 0
        rows = config.micro_rows(engine.data_world)
        for _ in range(2):
            loss, metrics = engine._forward(engine.model, _batch(config, rows))
            Sums().add(loss, metrics)
            del metrics
            loss.backward()
            del loss
        assert moments
    return live.peak


def _loss(outputs, batch):
    if isinstance(outputs, chunked_loss.TokenLosses):
        return outputs.total, {}
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum"), {}


def _local(config, model_config, world: int, num_layers: int, stage: int | None) -> float:
    raise NotImplementedError
