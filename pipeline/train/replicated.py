"""The replicated engine: one process, or torch's DistributedDataParallel over several."""

import contextlib
import warnings

import torch

from pipeline.train import distributed, phases, shards
from pipeline.train.engine import Engine, Sums, adamw, clip_gradients, finite, set_learning_rate
from pipeline.train.muon import Muon
from pipeline.train.state import Fragment


class Replicated(Engine):
    """Every process holds the whole model and optimizer; gradients are averaged by DDP on the last micro-batch of a
    step."""

    layout = "replicated"

    def __init__(self, model, loss_fn, config, name):
        super().__init__(model.to(distributed.device()), loss_fn, config, name)
        self.module = model
        if self.data_world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            with warnings.catch_warnings():  # torch 2.13 renames broadcast_buffers, 2.11 does not know the new name
                warnings.simplefilter("ignore", FutureWarning)
                self.module = torch.nn.parallel.DistributedDataParallel(
                    model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = (
            Muon(model, config, self.device)
            if config.optimizer.kind == "muon"
            else adamw(self.parameters, config, self.device)
        )
        self.optimizers = list(self.optimizer.parts.values()) if config.optimizer.kind == "muon" else [self.optimizer]
        self.named = dict(model.named_parameters())
        self.whole: tuple[int, list[Fragment]] = (-1, [])  # pieces, and of how many parameters the moments are there

    def _update(self, micro_batches, weight, lr):
        self.module.train()
        sums = Sums()
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with contextlib.nullcontext() if last or self.data_world == 1 else self.module.no_sync():
                phases.enter("forward")
                loss, metrics = self._forward(self.module, batch)
                sums.add(loss, metrics)
                phases.enter("backward")
                (loss * (self.data_world / weight)).backward()  # DDP averages over processes
        phases.enter("reduce")
        norm = clip_gradients(self.parameters, self.config.optimizer.max_grad_norm)
        found = sums.read()
        keys = sorted(found, key=str)
        total = dict(zip(keys, distributed.all_reduce_sum([found[key] for key in keys]), strict=True))
        norm, loss = float(norm), total.pop("loss")
        applied = finite(loss, norm) and self._admitted(loss, norm)
        phases.enter("update")
        if applied:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, total, norm, applied

    def _forward_sums(self, micro_batches, counted):
        self.model.eval()
        sums = Sums()
        for batch, counts in zip(micro_batches, counted, strict=True):
            if counts:
                sums.add(*self._forward(self.model, batch))
        self.model.train()
        return sums.read()

    def state_bytes(self):
        # Muon has one moment, AdamW two
        inner = self.optimizer.parts["muon"].param_groups if self.config.optimizer.kind == "muon" else []
        return super().state_bytes() - 4 * sum(parameter.numel() for group in inner for parameter in group["params"])

    def _held(self):
        # Updates are made in place, so the pieces stay the same ones. To find them takes a millisecond of every save.
        moments = sum(len(optimizer.state) for optimizer in self.optimizers)
        if self.whole[0] != moments:
            self.whole = moments, shards.whole(self.named, self.optimizers)
        return [], self.whole[1] + shards.buffers(self.model)

    def _updates(self):
        return shards.updates_whole(self.named, self.optimizers)

    def _begin_moments(self, saved):
        self.whole = -1, []  # the moments are about to be others
        shards.begin_whole(self.named, self.optimizers, saved)

    def consolidated(self):
        if not distributed.is_main():
            return None
        return {
            key: value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype).clone()
            for key, value in self.model.state_dict().items()
        }

    def trained_weights(self):
        if not distributed.is_main():
            return None
        return {
            name: parameter.detach().to("cpu", torch.float32, copy=True)
            for name, parameter in self.named.items()
            if name not in self.fixed
        }
