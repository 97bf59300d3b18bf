"""The memory of one process of the FSDP engine at full size, simulated: the engine's own code runs on fake tensors, which
have shapes and no data, in a process group that sends nothing.

    building, training = peaks(config, model_config, world)       # bytes

Counted are the storages that are alive after each operation. What the CUDA context, NCCL and fragmentation take is not
simulated.
"""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.train import chunked_loss, fsdp, layers


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
def processes(world: int) -> Iterator[None]:
    """This process as rank 0 of `world`, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    values = {"RANK": "0", "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(min(8, world))}
    with mock.patch.dict(os.environ, values | {"ACCELERATE_USE_CPU": "true"}):
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def peaks(config, model_config, world: int) -> tuple[int, int]:
    """Bytes while the engine is built, and in a step of two micro-batches with the optimizer's moments."""
    import transformers

    from pipeline.models import experts

    with processes(world):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model_config, dtype=torch.float32).train()
        experts.install(model)
        layers.prepare(model, config)
        if config.activation_checkpointing != "none":
            layers.checkpoint(model, config.activation_checkpointing)
        mesh = fsdp.mesh_of(config.parallel, torch.device("cpu"))  # its ranks are real numbers
        replaced = {"mesh_of": lambda *_: mesh, "without_weights": lambda model: None}
        with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.multiple(fsdp, **replaced), Live() as live:
            engine = fsdp.FullySharded(model, _loss, config, "model", fill=lambda part, global_name: None)
            building, live.peak = live.peak, 0
            moments = [torch.empty_like(parameter) for parameter in engine.parameters for _ in range(2)]
            for _ in range(2):
                _micro_batch(engine, config)
            assert moments
            return building, live.peak


def _micro_batch(engine, config) -> None:
    ids = torch.zeros(config.micro_rows(engine.data_world), config.sequence_length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if config.document_mask:
        inputs["position_ids"] = torch.zeros_like(ids)
    loss, _ = engine._forward(engine.model, {"inputs": inputs, "labels": ids})
    loss.backward()


def _loss(outputs, batch):
    if isinstance(outputs, chunked_loss.TokenLosses):
        return outputs.total, {}
    logits = outputs.flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum"), {}
