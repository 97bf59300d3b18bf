"""The engine: what every training stage shares. A stage brings a model, a loss and micro-batches; the engine makes
updates.

A micro-batch is a dict: `inputs` (keyword tensors of the model's forward), `weight` (what the loss is averaged over:
tokens, pairs), and whatever else the loss reads. `loss_fn(outputs, batch)` returns the SUM of the loss over the
micro-batch and a dict of further sums; outputs are logits, or TokenLosses if the model's output layer computes the
losses itself (chunked_loss.py) from the batch's `labels` and `label_weights`.

One step minimises (sum over the global batch) / (its total weight), so micro-batch size, accumulation and number of
processes do not change the gradient. A non-finite loss or gradient norm leaves the weights unchanged (`applied:
False`)."""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.core import accelerators, distributed
from pipeline.core.files import write_json
from pipeline.core.terminal import say
from pipeline.models import publish, row_attention
from pipeline.models.model_parts import Parts
from pipeline.train import chunked_loss, layers, moe_aux_loss, state
from pipeline.train.config import TrainConfig
from pipeline.train.schedule import learning_rate

Loss = Callable[[torch.Tensor, dict], tuple[torch.Tensor, dict]]
Read = Callable[[torch.Tensor, dict], torch.Tensor]
"""(outputs, batch) -> what is kept of a micro-batch."""
Accept = Callable[[float, float], bool]
"""(loss, gradient norm), both finite -> whether the update may be made."""


class Engine:
    """Common part; replicated.py, sharded.py, fsdp.py and pipelined.py make the updates.

    model: the transformers model, for forward and generation (None in a pipeline, where each process holds a part).
    data_rank, data_world: which share of a step's rows this process reads, and how many shares there are.
    step_count: calls of `step` so far, skipped updates included.
    shapes: of all parameters of the whole model, by name. frozen_names: of those without gradients, which have no
    moments and are not in checkpoints, because the model that a run starts from has them.
    """

    layout: str
    samples_together = False
    """Whether all processes must sample the same, because each forward pass is collective."""

    def __init__(self, model, loss_fn: Loss, config: TrainConfig, name: str):
        self.model, self.loss_fn, self.config, self.name = model, loss_fn, config, name
        self.device = distributed.device()
        self.head = chunked_loss.installed(model)
        self.step_count = 0
        self.data_rank, self.data_world = distributed.rank(), distributed.world()
        self.balance: moe_aux_loss.Balance | None = None
        self.shapes: dict[str, list[int]] = {}
        self.frozen_names: set[str] = set()
        if model is not None:
            self.balance = moe_aux_loss.attach(model, config)  # before an engine wraps the model
            self.shapes, self.frozen_names = shapes_of(model)

    def step(self, micro_batches: list[dict], lr: float | None = None, accept: Accept | None = None) -> dict:
        """One update from this process's micro-batches. Collective; every data rank gives the same number of
        micro-batches.

        accept is called before the update; if it returns False on any process, the update is not made and `refused` is
        True. Returns loss, grad_norm (before clipping), applied, weight, lr and the loss's further sums divided by the
        weight; equal on all processes.
        """
        if lr is None:
            lr = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step_count, self.config.steps)
        micro_batches = [self._own(batch) for batch in micro_batches]
        own_weight = float(sum(batch["weight"] for batch in micro_batches))
        own_rows = sum(len(batch["inputs"]["input_ids"]) for batch in micro_batches) if self.balance else 0
        weight, count, rows = self._data_sum([own_weight, len(micro_batches), own_rows])
        assert count == len(micro_batches) * self._num_losses(), "data ranks must give the same number of micro-batches"
        if weight == 0:  # nothing to learn from: all labels are masked
            self.step_count += 1
            return {"loss": 0.0, "grad_norm": 0.0, "applied": False, "weight": 0.0, "lr": lr}
        if self.balance:
            self.balance.begin(self.data_world / rows)  # gradients are averaged over data ranks
        self._accept, self._weight, self.refused = accept, weight, False
        loss, sums, norm, applied = self._update([self._to_device(batch) for batch in micro_batches], weight, lr)
        self.step_count += 1
        stats = {"loss": loss / weight, "grad_norm": norm, "applied": applied, "weight": weight, "lr": lr}
        if self.refused:
            stats["refused"] = True
        for key, value in sums.items():
            stats[key] = value / weight
        if self.balance:
            stats.update(self.balance.read(rows))
        return stats

    def evaluate(self, micro_batches: list[dict], read: Read | None = None) -> dict:
        """Loss and further sums over the micro-batches of all data ranks, each divided by the total weight. No
        gradient, dropout off. Collective.

        Data ranks may have different numbers of micro-batches, at least one each: those with fewer repeat their first
        one with weight 0, because forward passes of ZeRO-3 and of a pipeline are collective. With `read`, the entry
        `results` has read(outputs, batch) of each of this process's micro-batches, fp32 on the CPU.
        """
        micro_batches = [self._own(batch) for batch in micro_batches]
        batches, counted = self._padded(micro_batches)
        results: list[torch.Tensor] = []
        loss_fn = self.loss_fn
        if read is not None:
            self.loss_fn = _reading(loss_fn, read, results)
        try:
            with torch.no_grad():
                sums = self._forward_sums(batches, counted)
        finally:
            self.loss_fn = loss_fn
        keys = sorted(sums, key=str)
        own_weight = float(sum(batch["weight"] for batch in micro_batches))
        weight, *totals = self._data_sum([own_weight, *(sums[key] for key in keys)])
        means = {key: total / max(weight, 1e-9) for key, total in zip(keys, totals, strict=True)}
        means["weight"] = weight
        if read is not None:
            means["results"] = self._results(results)[: len(micro_batches)]
        return means

    def forward(self, micro_batches: list[dict], read: Read) -> list[torch.Tensor]:
        """read(outputs, batch) of each of this process's micro-batches, fp32 on the CPU. No gradient, dropout off.
        Collective, with unequal numbers of micro-batches as in `evaluate`."""
        batches, counted = self._padded([self._own(batch) for batch in micro_batches])
        results: list[torch.Tensor] = []

        def no_loss(outputs, batch):
            return torch.zeros((), device=self.device), {}

        loss_fn, self.loss_fn = self.loss_fn, _reading(no_loss, read, results)
        try:
            with torch.no_grad():
                self._forward_sums(batches, counted)
        finally:
            self.loss_fn = loss_fn
        return self._results(results)[: len(micro_batches)]

    def _results(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `forward` returns here; a process that computes no outputs gets those of one that does."""
        return results

    def _padded(self, micro_batches: list[dict]) -> tuple[list[dict], list[bool]]:
        """Micro-batches on the device, as many on every data rank, and which of them count. Collective."""
        assert micro_batches, "every data rank needs at least one micro-batch"
        most = int(distributed.all_reduce_max([len(micro_batches)])[0])
        batches = [self._to_device(batch) for batch in micro_batches]
        missing = most - len(batches)
        return batches + batches[:1] * missing, [True] * len(batches) + [False] * missing

    def measured(self) -> dict[str, float]:
        """Measurements of the layout since the last call, for the log. Collective."""
        return {}

    def advice(self) -> str | None:
        """A change of the recipe that the run's measurements suggest, or None."""
        return None

    @contextlib.contextmanager
    def gathered(self):
        """Inside, `model` has its complete parameters on every process (ZeRO-3 and FSDP keep them in shards); do not
        change them. Collective."""
        yield

    @contextlib.contextmanager
    def sampling(self):
        """Inside, a model that the processes which get it may sample from, all the same; None on the others.
        Collective."""
        with self.gathered():
            yield self.model if distributed.is_main() else None

    # ---- saving and loading ------------------------------------------------------------------------------------------

    def part(self) -> state.Part:
        """What this process writes of the run's state: views of live memory. Over all processes, each element is
        written once. No communication, but all processes must save."""
        own, common = self._saved()
        fragments = own + self._share(common)
        names = {fragment.name for fragment in fragments if fragment.kind == "weight"}
        updates = self._updates()
        parameters = {}
        for name, shape in self.shapes.items():
            if name in names:
                count = updates if isinstance(updates, int) else updates[name]
                parameters[name] = {"shape": shape, "updates": count}
        summary = {
            "format": state.format_of(fragments),
            "steps": self.step_count,
            "optimizer": self.config.optimizer.kind,
            "layout": self._layout(),
        }
        return state.Part(fragments, parameters, summary)

    def save(self, folder: Path) -> None:
        """Write what `load` needs to resume, in any layout. Collective."""
        part = self.part()
        state.write(folder / f"{self.name}-{distributed.rank():05d}.safetensors", part)
        if distributed.is_main():
            write_json(folder / f"{self.name}.json", part.summary)

    def state_bytes(self) -> int:
        """Bytes of a checkpoint, all processes together: fp32 weights and two moments of what is trained."""
        return 12 * sum(math.prod(shape) for shape in self._trained_shapes().values())

    def load(self, folder: Path) -> str:
        """Resume from a folder that `save` wrote; in the same layout, bit for bit. Returns what differs in the layout,
        in words. Collective.

        Raises UserError if the folder has another model, another optimizer's moments, or only a part of the state.
        """
        reader = state.Reader(folder, self.name, distributed.rank(), distributed.world(), distributed.all_gather_object)
        reader.compare(self._trained_shapes(), self.config.optimizer.kind)
        self._begin_moments(reader.parameters)
        own, common = self._saved()
        for fragment in own + common + self._copies():
            reader.fill(fragment)
        self._loaded()
        self.step_count = reader.steps
        return reader.changed(self._layout())

    def weight_views(self) -> list[torch.Tensor]:
        """The elements of trained weights that this process holds, as flat views of live memory, in an order that stays
        the same."""
        own, common = self._saved()
        fragments = [*own, *common, *self._copies()]
        return [fragment.values for fragment in fragments if fragment.kind == "weight"]

    @torch.no_grad()
    def set_weights(self, values: list[torch.Tensor]) -> None:
        """Replace trained weights by values in the order of `weight_views`. Collective."""
        for view, value in zip(self.weight_views(), values, strict=True):
            view.copy_(value)
        self._loaded()

    def _trained_shapes(self) -> dict[str, list[int]]:
        return {name: shape for name, shape in self.shapes.items() if name not in self.frozen_names}

    def _layout(self) -> dict:
        parallel = self.config.parallel
        return {
            "processes": distributed.world(),
            "zero": parallel.zero if parallel.pipeline == 1 else None,
            "pipeline": parallel.pipeline,
            "offload": parallel.offload,
        }

    def _saved(self) -> tuple[list[state.Fragment], list[state.Fragment]]:
        """The fragments of `_held` that belong in a checkpoint."""
        own, common = self._held()
        if self.frozen_names:
            own = [fragment for fragment in own if fragment.name not in self.frozen_names]
            common = [fragment for fragment in common if fragment.name not in self.frozen_names]
        return own, common

    def _held(self) -> tuple[list[state.Fragment], list[state.Fragment]]:
        """(fragments that only this process writes, fragments that all of its data ranks hold), as views of live
        memory."""
        raise AssertionError("an engine implements this")

    def _share(self, common: list[state.Fragment]) -> list[state.Fragment]:
        """What this process writes of the fragments that all of its data ranks hold."""
        return state.share(common, self.data_rank, self.data_world)

    def _copies(self) -> list[state.Fragment]:
        """Fragments that this process needs and another one writes."""
        return []

    def _updates(self) -> int | dict[str, int]:
        """Updates that the moments have seen, of all parameters alike or by name."""
        raise AssertionError("an engine implements this")

    def _begin_moments(self, saved: dict[str, dict]) -> None:
        """Create the moments that `load` will fill; none for what was never updated."""
        raise AssertionError("an engine implements this")

    def _loaded(self) -> None:
        """What an engine must do after its weights were filled."""

    def consolidated(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights under transformers' names, fp32 on the CPU, on the main process; None elsewhere.
        Collective."""
        raise AssertionError("an engine implements this")

    def publish(self, model_config, tokenizer_folder: Path, folder: Path, parent: Path | None = None) -> None:
        """Write a model folder (models/publish.py). Collective."""
        weights = self.consolidated()
        if distributed.is_main():
            publish.publish(weights, model_config, tokenizer_folder, folder, parent)

    def trained_weights(self) -> dict[str, torch.Tensor] | None:
        """Like `consolidated`, but only the parameters that have gradients. Collective."""
        raise AssertionError("an engine implements this")

    # ---- updates -----------------------------------------------------------------------------------------------------

    def _accepted(self, loss_sum: float, norm: float) -> bool:
        """Whether a finite update may be made. Collective if `accept` was given: one process must not skip what another
        one applies."""
        if self._accept is not None:
            refused = not self._accept(loss_sum / self._weight, norm)
            self.refused = bool(distributed.all_reduce_max([float(refused)])[0])
        return not self.refused

    def _update(self, micro_batches: list[dict], weight: float, lr: float) -> tuple[float, dict, float, bool]:
        """(global loss sum, global further sums, gradient norm, applied)."""
        raise AssertionError("an engine implements this")

    def _forward_sums(self, micro_batches: list[dict], counted: list[bool]) -> dict[str, float]:
        raise AssertionError("an engine implements this")

    def _own(self, batch: dict) -> dict:
        """What this process computes of a micro-batch of its data rank."""
        return batch

    def _num_losses(self) -> int:
        """Processes whose losses are added up."""
        return self.data_world

    def _data_sum(self, values: list[float]) -> list[float]:
        """Sums over data ranks. If several processes share the rows of one data rank, these are counted once."""
        return distributed.all_reduce_sum(values)

    def _to_device(self, batch: dict) -> dict:
        def move(value):
            return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        moved = {key: move(value) for key, value in batch.items()}
        inputs = batch["inputs"]
        moved["inputs"] = {key: move(value) for key, value in inputs.items()}
        positions = batch["row_positions"] if "row_positions" in batch else inputs.get("position_ids")
        if positions is not None and row_attention.is_installed(self.model):
            dtype = torch.bfloat16 if self.config.wide_precision == "bf16" else torch.float32
            moved["inputs"] |= row_attention.document_inputs(self.model, positions, self.device, dtype)
        return moved

    def _autocast(self):
        return autocast(self.config, self.device)

    def _forward(self, module, batch: dict) -> tuple[torch.Tensor, dict]:
        """(loss sum with gradient, further sums); the loss itself is computed outside autocast."""
        if self.head:
            self.head.expect([batch])
        with self._autocast():
            outputs = module(**({"use_cache": False} | batch["inputs"])).logits
        return self.loss_fn(outputs, batch)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context of a forward pass. With activation checkpointing autocast keeps no casts of weights: it would keep
    those of all layers until the forward pass ends, 2 bytes a parameter, where each is used once."""
    return torch.autocast(
        device.type,
        dtype=torch.bfloat16,
        enabled=config.wide_precision == "bf16",
        cache_enabled=config.activation_checkpointing == "none",
    )


def _reading(loss_fn: Loss, read: Read, results: list[torch.Tensor]) -> Loss:
    """A loss function that also appends what `read` gives to `results`, fp32 on the CPU."""

    def reading(outputs, batch):
        results.append(read(outputs, batch).detach().float().cpu())
        return loss_fn(outputs, batch)

    return reading


class Sums:
    """Adds up losses and further sums on the device and reads them once, because each read waits for the GPU."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, loss: torch.Tensor, metrics: dict) -> None:
        for key, value in ({"loss": loss} | metrics).items():
            if isinstance(value, torch.Tensor):
                value = accelerators.double(value.detach())
            else:
                value = torch.tensor(float(value), dtype=torch.float64)
            if key in self.tensors:
                value = self.tensors[key] + value.to(self.tensors[key].device)
            self.tensors[key] = value

    def scale(self, factor: float) -> None:
        self.tensors = {key: value * factor for key, value in self.tensors.items()}

    def read(self) -> dict[str, float]:
        if not self.tensors:
            return {}
        device = self.tensors["loss"].device
        values = torch.stack([value.to(device) for value in self.tensors.values()]).tolist()
        return dict(zip(self.tensors, values, strict=True))

    def reduced(self, *equal: str) -> dict[str, float]:
        """Sums over all processes; those named `equal` are the same on all and stay as they are. Collective."""
        own = self.read()
        keys = sorted((key for key in own if key not in equal), key=str)
        sums = dict(zip(keys, distributed.all_reduce_sum([own[key] for key in keys]), strict=True))
        return sums | {key: own[key] for key in equal}


def shapes_of(model) -> tuple[dict[str, list[int]], set[str]]:
    """(shape of each parameter, names of those that are not trained)."""
    parameters = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    return shapes, {name for name, parameter in parameters.items() if not parameter.requires_grad}


def decayed(parameter: torch.Tensor) -> bool:
    """Weight decay is for matrices: norms, biases and other vectors keep their scale. ZeRO-3 empties parameters and
    keeps their shape in `ds_shape`."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2


def lr_scale(parameter: torch.Tensor) -> float:
    """The factor of a parameter's learning rate: 1, or what mu-P says (models/mup.py)."""
    return getattr(parameter, "lr_scale", 1.0)


def set_learning_rate(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def adamw(parameters, config: TrainConfig, device: torch.device, kind=torch.optim.AdamW) -> torch.optim.AdamW:
    """AdamW with decay on matrices only.

    `fused` on both devices: one update of 4.2M parameters takes 5.5 ms of one CPU core, 14.6 ms with foreach, 15.8 ms
    with a plain loop.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = config.optimizer
    groups: list[dict] = []
    for scale in sorted({lr_scale(parameter) for parameter in trained}, reverse=True):
        scaled = [parameter for parameter in trained if lr_scale(parameter) == scale]
        matrices = [parameter for parameter in scaled if decayed(parameter)]
        others = [parameter for parameter in scaled if not decayed(parameter)]
        # Decay per step is lr * weight_decay: it stays the same if the learning rate is scaled.
        for params, weight_decay in ((matrices, options.weight_decay / scale), (others, 0.0)):
            group = {"params": params, "weight_decay": weight_decay}
            if scale != 1:
                group["lr_scale"] = scale
            if params:
                groups.append(group)
    fused = device.type != "npu"  # not among the kernels that torch_npu lists
    return kind(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=fused)


NORM_BLOCK = 2**10  # elements


def clip_gradients(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients in place to a global norm of at most `max_norm`; returns the norm before that. Shape: []."""
    norm = gradient_norm([parameter.grad for parameter in parameters if parameter.grad is not None]).float()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def gradient_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The global norm of gradients, fp64 []; 0 without any.

    On a CPU torch (2.13) adds up the squares of a tensor in fp32 one after another: for a table of 4096 x 256 the norm
    was wrong by 1.0e-4, while DeepSpeed's engines, which add in fp64, were right. From the norms of blocks of 1024
    elements it is right to 2e-8 in the same time (docs/log.md, 6).
    """
    if not gradients:
        return torch.zeros((), dtype=torch.float64)
    if gradients[0].device.type != "cpu":
        return accelerators.double(torch.nn.utils.get_total_norm(gradients))
    blocks, rests = [], []
    for gradient in gradients:
        flat = gradient.flatten()
        end = len(flat) // NORM_BLOCK * NORM_BLOCK
        blocks.append(torch.linalg.vector_norm(flat[:end].view(-1, NORM_BLOCK), dim=1))
        rests.append(torch.linalg.vector_norm(flat[end:]).view(1))
    return torch.linalg.vector_norm(torch.cat([*blocks, *rests]).double())


def finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bf16; a CPU without them takes about seven times longer than
    in fp32 (docs/log.md, 49)."""
    if device.type != "cpu":
        return True
    return any(found for name, found in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@functools.cache
def _warn_of_slow_bf16(stage: str) -> None:
    say(
        f"{stage}: WARNING: precision: bf16 is slower than fp32 on this processor, which has no bf16 instructions;"
        " precision: fp32 is faster here and more exact",
        distributed.rank(),
    )


def build(model, loss_fn: Loss, config: TrainConfig, *, name: str = "model", fill=None) -> Engine:
    """The engine that `config.parallel` asks for. The model's weights must be equal on every process.

    The model may be on the meta device: fill(part, global_name) then fills the part that a process keeps, or one part
    after another."""
    distributed.setup(config)
    if config.wide_precision == "bf16" and not multiplies_bf16(distributed.device()):
        _warn_of_slow_bf16(config.kind)
    if config.activation_checkpointing != "none":
        layers.checkpoint(model, config.activation_checkpointing)
    if config.parallel.pipeline > 1:
        from pipeline.train.pipelined import Pipelined

        return Pipelined(model, loss_fn, config, name, fill)
    if config.parallel.shard is not None:
        from pipeline.train.fsdp import FullySharded

        return FullySharded(model, loss_fn, config, name, fill)
    if config.parallel.zero != 3 and any(parameter.is_meta for parameter in model.parameters()):
        Parts(model).materialise_all(fill, distributed.device())
    if config.parallel.zero is not None:
        from pipeline.train.sharded import Sharded

        return Sharded(model, loss_fn, config, name, fill)
    from pipeline.train.replicated import Replicated

    return Replicated(model, loss_fn, config, name)
