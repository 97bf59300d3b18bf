"""The replicated engine: one process, or torch's DistributedDataParallel over several."""

import contextlib
import warnings

import torch

from pipeline.core import distributed
from pipeline.train import muon, phases, shards
from pipeline.train.engine import Engine, Sums, adamw, clip_gradients, finite, set_learning_rate
from pipeline.train.state import Fragment

NORM = "gradient_norm"  # key among a step's sums


class _Ordering(torch.nn.Module):
    """A model for DDP; called without inputs it gives every trained parameter a gradient of zero, last to first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        if inputs:
            return self.model(**inputs)
        return 0.0 * sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def casts_kept():
    """Inside, autocast keeps its casts of weights after a forward pass, for the next micro-batch: weights change only
    after the last one, and backward passes outside of autocast leave the casts' graphs usable."""
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()


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
                    _Ordering(model), device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
                )
            self._order_buckets()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if config.optimizer.kind == "muon":
            self.optimizer = muon.of_model(model, config, self.device)
            self.optimizers = self.optimizer.parts
        else:
            self.optimizer = adamw(self.parameters, config, self.device)
            self.optimizers = [self.optimizer]
        self.named = dict(model.named_parameters())
        # (number of parameters that had moments, fragments): see _held
        self.cached: tuple[int, list[Fragment]] = (-1, [])

    def _order_buckets(self) -> None:
        """Have DDP put its buckets in their final order now, and not after the first step. Collective.

        DDP starts with one bucket in the order of the parameters, and from the second backward pass on has buckets in
        the order in which the first one gave it gradients. Over more than two processes the order of a sum depends on
        where a number is in its bucket, so the first step after a resume differed in its last bits from the same step
        of a run that was not interrupted. This backward pass costs one sum of zeros; its order is that of the
        parameters, last to first."""
        self.module().backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _update(self, micro_batches, weight, lr):
        self.module.train()
        sums = Sums()
        with casts_kept() if len(micro_batches) > 1 else contextlib.nullcontext():
            for index, batch in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last or self.data_world == 1 else self.module.no_sync():
                    phases.enter("forward")
                    loss, metrics = self._forward(self.module, batch)
                    sums.add(loss, metrics)
                    phases.enter("backward")
                    (loss * (self.data_world / weight)).backward()  # DDP averages over processes
        phases.enter("reduce")
        sums.tensors[NORM] = clip_gradients(self.parameters, self.config.optimizer.max_grad_norm)
        total = sums.reduced(NORM)  # the only read of the device in a step
        norm, loss = total.pop(NORM), total.pop("loss")
        applied = finite(loss, norm) and self._accepted(loss, norm)
        phases.enter("update")
        if applied:
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, total, norm, applied

    def _forward_sums(self, micro_batches, counted):
        self.model.eval()
        sums = Sums()
        for batch, is_counted in zip(micro_batches, counted, strict=True):
            if is_counted:
                sums.add(*self._forward(self.model, batch))
        self.model.train()
        return sums.read()

    def state_bytes(self):
        total = super().state_bytes()
        if self.config.optimizer.kind == "muon":  # one moment, where AdamW has two
            total -= 4 * sum(self.named[name].numel() for name in muon.matrix_names(self.model))
        return total

    def _held(self):
        # Updates are made in place, so the fragments stay the same. Collecting them would take a millisecond per save.
        num_moments = sum(len(optimizer.state) for optimizer in self.optimizers)
        if self.cached[0] != num_moments:
            self.cached = num_moments, shards.whole(self.named, self.optimizers)
        return [], self.cached[1] + shards.buffers(self.model)

    def _updates(self):
        return shards.updates_whole(self.named, self.optimizers)

    def _begin_moments(self, saved):
        self.cached = -1, []  # the moments are about to be replaced
        shards.begin_whole(self.named, self.optimizers, saved)

    def consolidated(self):
        if not distributed.is_main():
            return None
        weights = {}
        for name, value in self.model.state_dict().items():
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            weights[name] = value.detach().to("cpu", dtype).clone()
        return weights

    def trained_weights(self):
        if not distributed.is_main():
            return None
        weights = {}
        for name, parameter in self.named.items():
            if name not in self.frozen_names:
                weights[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return weights
