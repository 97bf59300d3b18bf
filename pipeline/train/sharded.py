"""The sharded engine: DeepSpeed ZeRO 0-3 (Rajbhandari et al., 2020) through `deepspeed.initialize`, called here so
that a bad step can be discarded."""

import contextlib
import io
import logging
import warnings

import torch

from pipeline.core import distributed
from pipeline.models import publish
from pipeline.models.cost import DEEPSPEED_BUCKET
from pipeline.models.folder_weights import Fill
from pipeline.models.model_parts import Parts
from pipeline.train import phases, shards
from pipeline.train.engine import Engine, Sums, adamw, autocast, clip_gradients, finite, set_learning_rate


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that calls `allow()` before it changes a weight. Before it calls `step`, DeepSpeed checks the gradients but
    not the loss."""

    allow = staticmethod(lambda: True)

    def step(self, closure=None):
        if self.allow():
            return super().step(closure)
        for group in self.param_groups:  # DeepSpeed links the moments after the first call, so they must exist
            self._init_group(group, [], [], [], [], [], [])
        return None


class Autocast(torch.nn.Module):
    """The model's forward in bf16 autocast. DeepSpeed itself runs in fp32: weights, gradients and their sums over
    processes stay fp32, so the numbers of a run do not depend on its layout (DeepSpeed's own bf16 rounds gradients
    before it adds them up)."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config = model, config

    def forward(self, *args, **kwargs):
        with autocast(self.config, distributed.device()):
            return self.model(*args, **kwargs)


def settings(config, micro: int, accumulation: int, ranks: int) -> dict:
    """DeepSpeed's configuration. Its batch sizes are for its own bookkeeping; `Engine.step` decides what a step is."""
    zero = 1 if config.parallel.pipeline > 1 else config.parallel.zero
    sharding: dict = {
        "stage": zero,
        "reduce_bucket_size": DEEPSPEED_BUCKET,
        "allgather_bucket_size": DEEPSPEED_BUCKET,
        "overlap_comm": overlaps(config, distributed.device()),
    }
    if zero == 3:
        sharding |= {
            "stage3_prefetch_bucket_size": DEEPSPEED_BUCKET,
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.parallel.offload:
        sharding["offload_optimizer"] = {"device": "cpu"}
        if zero == 3:
            sharding["offload_param"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * ranks,
        "gradient_clipping": config.optimizer.max_grad_norm if zero else 0.0,
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # offload keeps torch's AdamW: equal numbers on every layout
        "steps_per_print": 2**31 - 1,
        # On by default, it waits for the whole device before and after each micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }


def overlaps(config, device: torch.device) -> bool:
    """Whether gradients are sent, and with ZeRO-3 weights gathered, while the device computes. It takes streams, which
    a CPU does not have, and a pipeline of DeepSpeed's cannot."""
    return device.type == "cuda" and config.parallel.pipeline == 1


def start() -> None:
    """Start DeepSpeed on the existing process group, without the shared-memory all-reduce that it would compile for
    CPUs at its first start: that takes 31 s and a C++ compiler, which a machine may not have. gloo is used instead."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    # DeepSpeed calls functions that torch 2.13 has renamed, some of them at each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(dist_init_required=False)


@contextlib.contextmanager
def quiet():
    """Without the dozens of lines that DeepSpeed prints when it starts; warnings and errors stay."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))


def split_parameters(model, fill: Fill | None, options: dict) -> None:
    """Split the parameters of a model over the processes as ZeRO-3 keeps them, one part of the model after another.
    Each part is filled on every process; DeepSpeed sends the main process's values to the others. Collective."""
    import deepspeed

    parts = Parts(model)
    for name in parts.names:
        deepspeed.zero.Init(module=parts.materialise(name, fill), config_dict_or_path=options)
    parts.check_complete()
    for buffer in model.buffers():
        buffer.data = buffer.data.to(distributed.device())


class Sharded(Engine):
    """ZeRO: optimizer state (1), gradients (2) and parameters (3) are split over the processes; 0 splits nothing."""

    layout = "sharded"

    def __init__(self, model, loss_fn, config, name, fill: Fill | None = None):
        super().__init__(model, loss_fn, config, name)
        import deepspeed

        self.stage = config.parallel.zero
        options = settings(config, 1, 1, self.data_world)
        with quiet():
            start()
            if self.stage == 3:
                split_parameters(model, fill, options)
            else:
                model.to(self.device)
            self.optimizer = adamw(model.parameters(), config, self.device, GuardedAdamW)
            wrapped = Autocast(model, config)
            self.engine, *_ = deepspeed.initialize(
                model=wrapped, optimizer=self.optimizer, config=options, dist_init_required=False
            )
        self.named = dict(model.named_parameters())
        self.frozen = {name: parameter for name, parameter in self.named.items() if name in self.frozen_names}

    def _forward(self, module, batch):
        if self.head:
            self.head.expect([batch])
        outputs = module(**({"use_cache": False} | batch["inputs"])).logits
        return self.loss_fn(outputs, batch)

    def _update(self, micro_batches, weight, lr):
        self.engine.train()
        sums = Sums()
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            phases.enter("forward")
            loss, metrics = self._forward(self.engine, batch)
            sums.add(loss, metrics)
            phases.enter("backward")
            # DeepSpeed averages over processes
            self.engine.backward(loss * (self.data_world / weight), scale_wrt_gas=False)
        phases.enter("reduce")
        total = sums.reduced()
        loss = total.pop("loss")
        set_learning_rate(self.engine.optimizer, lr)
        if self.stage == 0:
            norm, applied = self._apply_without_zero(loss)
        else:
            norm, applied = self._apply(loss)
        return loss, total, norm, applied

    def _apply_without_zero(self, loss: float) -> tuple[float, bool]:
        """(gradient norm, applied) with ZeRO-0, where DeepSpeed neither keeps the norm nor checks that it is finite."""
        norm = float(clip_gradients(list(self.engine.module.parameters()), self.config.optimizer.max_grad_norm))
        allowed = finite(loss, norm) and self._accepted(loss, norm)
        self.optimizer.allow = lambda: allowed
        phases.enter("update")
        self.engine.step()
        return norm, allowed and self.engine.was_step_applied()

    def _apply(self, loss: float) -> tuple[float, bool]:
        """(gradient norm, applied) with ZeRO 1 to 3."""
        allowed, norm = finite(loss), None

        # Called for each parameter group. The first call is at the same point on all processes: after the gradient norm
        # was found to be finite, before the update.
        def allow() -> bool:
            nonlocal allowed, norm
            if allowed and norm is None:
                norm = float(self.engine.optimizer._global_grad_norm)
                allowed = self._accepted(loss, norm)
            return allowed

        self.optimizer.allow = allow
        phases.enter("update")
        self.engine.step()
        stepped = self.engine.was_step_applied()
        if not stepped:
            norm = float("inf")
        elif norm is None:
            norm = float(self.engine.get_global_grad_norm())
        return norm, allowed and stepped

    def _forward_sums(self, micro_batches, counted):
        self.engine.eval()
        sums = Sums()
        for batch, is_counted in zip(micro_batches, counted, strict=True):
            loss, metrics = self._forward(self.engine, batch)
            if is_counted:
                sums.add(loss, metrics)
        self.engine.train()
        return sums.read()

    @contextlib.contextmanager
    def gathered(self):
        if self.stage != 3:
            yield
            return
        import deepspeed

        offload = self.engine.optimizer.parameter_offload
        parameters = list(self.engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            # Its hooks would release the parameters after the first forward. Removed and added again, as in TRL's
            # unwrap_model_for_generation.
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                coordinator = offload.get_param_coordinator()
                if not coordinator.is_invalid_trace():
                    coordinator._invalidate_trace()
                offload._register_deepspeed_module(offload.module)

    def consolidated(self):
        if self.stage != 3:
            if not distributed.is_main():
                return None
            return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        import deepspeed

        weights = {}
        for name, value in self.model.state_dict(keep_vars=True).items():  # one at a time: a GPU may not hold them all
            with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
                if distributed.is_main():
                    weights[name] = value.detach().cpu().clone()
        return weights if distributed.is_main() else None

    def publish(self, model_config, tokenizer_folder, folder, parent=None):
        if self.stage == 3 and publish.can_publish_parts(model_config):
            publish.publish_parts(self._complete, model_config, tokenizer_folder, folder, parent)
        else:
            super().publish(model_config, tokenizer_folder, folder, parent)

    def _complete(self, name: str) -> torch.Tensor:
        """A complete parameter or buffer, on the device. Collective."""
        import deepspeed

        if name not in self.named:
            return self.model.get_buffer(name)
        with deepspeed.zero.GatheredParameters([self.named[name]]):
            return self.named[name].detach().clone()

    def trained_weights(self):
        import deepspeed

        weights = {}
        for name, parameter in self.named.items():
            if name in self.frozen_names:
                continue
            with deepspeed.zero.GatheredParameters([parameter] if self.stage == 3 else []):
                if distributed.is_main():
                    weights[name] = parameter.detach().cpu().clone()
        return weights if distributed.is_main() else None

    def _held(self):
        common = shards.buffers(self.model)
        if self.stage == 0:
            return [], shards.whole(self.named, [self.optimizer]) + common
        if self.stage == 3:
            return shards.scattered(self.named, self.engine.optimizer), common
        return shards.split(self.named, self.engine.optimizer), shards.whole(self.frozen, []) + common

    def _updates(self):
        if self.stage == 0:
            return shards.updates_whole(self.named, [self.optimizer])
        return shards.updates_flat(self.engine.optimizer)

    def _begin_moments(self, saved):
        if self.stage == 0:
            shards.begin_whole(self.named, [self.optimizer], saved)
            return
        begin = shards.begin_scattered if self.stage == 3 else shards.begin_split
        begin(self.engine.optimizer, max(entry["updates"] for entry in saved.values()))

    def _loaded(self):
        if self.stage == 3:
            shards.spread(self.engine.optimizer)
        elif self.stage:
            self.engine.optimizer.update_lp_params()
