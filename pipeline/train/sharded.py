"""The sharded engine: DeepSpeed ZeRO 0-3 (Rajbhandari et al., 2020) through `deepspeed.initialize`, called here so
that a bad step can be discarded."""

import contextlib
import io
import logging
import warnings

import torch

from pipeline.models.cost import DEEPSPEED_BUCKET
from pipeline.train import distributed, phases, shards
from pipeline.train.engine import Engine, Sums, adamw, clip_gradients, finite, set_learning_rate


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that asks `allow()` before it touches a weight. DeepSpeed looks at gradients before it calls `step`, not
    at the loss."""

    allow = staticmethod(lambda: True)

    def step(self, closure=None):
        if self.allow():
            return super().step(closure)
        for group in self.param_groups:  # DeepSpeed links the moments after the first call, so they must exist
            self._init_group(group, [], [], [], [], [], [])
        return None


class Autocast(torch.nn.Module):
    """The model's forward in bf16 autocast. DeepSpeed itself is told fp32: weights, gradients and their sums over
    processes stay fp32, so that a run's numbers do not depend on its layout (DeepSpeed's own bf16 rounds gradients
    before it adds them up)."""

    def __init__(self, model, enabled: bool):
        super().__init__()
        self.model, self.enabled = model, enabled

    def forward(self, *args, **kwargs):
        with torch.autocast(distributed.device().type, dtype=torch.bfloat16, enabled=self.enabled):
            return self.model(*args, **kwargs)


def settings(config, micro: int, accumulation: int, ranks: int) -> dict:
    """DeepSpeed's configuration. Batch sizes in it serve its own bookkeeping; `Engine.step` decides what a step is."""
    zero = 1 if config.parallel.pipeline > 1 else config.parallel.zero
    sharding: dict = {
        "stage": zero,
        "reduce_bucket_size": DEEPSPEED_BUCKET,
        "allgather_bucket_size": DEEPSPEED_BUCKET,
        "overlap_comm": False,
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
    }


def start() -> None:
    """DeepSpeed over the process group that exists, without the shared-memory all-reduce that it compiles for CPUs
    at its first start: that takes 31 s and a C++ compiler, and a run must not end because a machine has none. gloo
    does this work."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    # DeepSpeed calls functions that torch 2.13 has renamed, some of them at each step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    deepspeed.init_distributed(dist_init_required=False)


@contextlib.contextmanager
def quiet():
    """DeepSpeed prints some dozens of lines on a start; warnings and errors stay."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(max(level, logging.WARNING))


class Sharded(Engine):
    """ZeRO: optimizer state (1), gradients (2) and parameters (3) are split over the processes; 0 splits nothing."""

    layout = "sharded"

    def __init__(self, model, loss_fn, config, name):
        super().__init__(model, loss_fn, config, name)
        import deepspeed

        self.stage = config.parallel.zero
        model.to(self.device)
        self.optimizer = adamw(model.parameters(), config, self.device, GuardedAdamW)
        with quiet():
            start()
            wrapped = Autocast(model, config.precision == "bf16")
            self.engine, *_ = deepspeed.initialize(
                model=wrapped,
                optimizer=self.optimizer,
                config=settings(config, 1, 1, self.data_world),
                dist_init_required=False,
            )
        self.named = dict(model.named_parameters())
        self.frozen = {name: parameter for name, parameter in self.named.items() if not parameter.requires_grad}

    def _forward(self, module, batch):
        if self.head:
            self.head.expect([batch["labels"]])
        return self.loss_fn(module(**{"use_cache": False, **batch["inputs"]}).logits, batch)

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
        found = sums.read()
        keys = sorted(found, key=str)
        total = dict(zip(keys, distributed.all_reduce_sum([found[key] for key in keys]), strict=True))
        loss = total.pop("loss")
        norm = None
        if self.stage == 0:  # DeepSpeed neither keeps this norm nor looks whether it is finite
            norm = float(clip_gradients(list(self.engine.module.parameters()), self.config.optimizer.max_grad_norm))
        allowed = (finite(loss) if norm is None else finite(loss, norm)) and (
            norm is None or self._admitted(loss, norm)
        )
        asked = norm is not None

        # first asked on all processes at the same point: after the gradient norm was found finite, before the update
        def allow() -> bool:
            nonlocal allowed, asked
            if allowed and not asked:
                allowed, asked = self._admitted(loss, float(self.engine.optimizer._global_grad_norm)), True
            return allowed

        self.optimizer.allow = allow
        set_learning_rate(self.engine.optimizer, lr)
        phases.enter("update")
        self.engine.step()
        applied = allowed and self.engine.was_step_applied()
        if norm is None:
            norm = (
                float(self.engine.get_global_grad_norm()) if applied or self.engine.was_step_applied() else float("inf")
            )
        return loss, total, norm, applied

    def _forward_sums(self, micro_batches, counted):
        self.engine.eval()
        sums = Sums()
        for batch, counts in zip(micro_batches, counted, strict=True):
            loss, metrics = self._forward(self.engine, batch)
            if counts:
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
            # Its hooks would give the parameters back after the first forward. Taken off and put on again as in TRL's
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
            state = self.model.state_dict() if distributed.is_main() else {}
            return {key: value.detach().cpu().clone() for key, value in state.items()} or None
        import deepspeed

        state = {}
        for key, value in self.model.state_dict(keep_vars=True).items():  # one at a time: a GPU may not hold them all
            with deepspeed.zero.GatheredParameters([value] if hasattr(value, "ds_id") else []):
                if distributed.is_main():
                    state[key] = value.detach().cpu().clone()
        return state if distributed.is_main() else None

    def trained_weights(self):
        import deepspeed

        weights = {}
        for name, parameter in self.named.items():
            if name in self.fixed:
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
        return (
            shards.updates_whole(self.named, [self.optimizer])
            if self.stage == 0
            else shards.updates_flat(self.engine.optimizer)
        )

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
