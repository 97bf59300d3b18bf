"""The engine: what every training stage shares. A stage brings a model, a loss and micro-batches; the engine makes
updates of them.

A micro-batch is a dict: `inputs` (keyword tensors of the model's forward), `weight` (what the loss is averaged over:
tokens, pairs), and whatever else the loss reads. `loss_fn(outputs, batch)` returns the SUM of the loss over the
micro-batch and a dict of further sums; outputs are logits, or TokenLosses where the model's output layer computes the
losses itself (chunked_loss.py), from the batch's `labels`.

One step minimises (sum over the whole global batch) / (its total weight), so that micro-batch size, accumulation and
number of processes do not change the gradient. A non-finite loss or gradient norm leaves the weights untouched
(`applied: False`).
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.core.files import write_json
from pipeline.train import chunked_loss, distributed, layers, moe_aux_loss, state
from pipeline.train.config import TrainConfig
from pipeline.train.schedule import learning_rate

Loss = Callable[[torch.Tensor, dict], tuple[torch.Tensor, dict]]


class Engine:
    """Common part; see replicated.py, sharded.py and pipelined.py for how an update is made.

    model: the transformers model, for forward and generation (None where a pipeline holds only a part).
    data_rank, data_world: which share of a step's rows this process reads, and how many shares there are.
    step_count: calls of `step` so far, skipped updates included.
    shapes: of all parameters of the whole model, by name. fixed: names of those without gradients: no moments, and not
    in checkpoints, since the model that a run starts from has them.
    """

    layout: str

    def __init__(self, model, loss_fn: Loss, config: TrainConfig, name: str):
        self.model, self.loss_fn, self.config, self.name = model, loss_fn, config, name
        self.device = distributed.device()
        self.head = chunked_loss.installed(model)
        self.step_count = 0
        self.data_rank, self.data_world = distributed.rank(), distributed.world()
        self.balance = (
            moe_aux_loss.attach(model, config) if model is not None else None
        )  # before an engine wraps the model
        self.shapes, self.fixed = ({}, set()) if model is None else shapes_of(model)

    def step(
        self, micro_batches: list[dict], lr: float | None = None, admit: Callable[[float, float], bool] | None = None
    ) -> dict:
        """One update from this process's micro-batches. Collective; every data rank gives equally many micro-batches.

        admit(loss, grad_norm), both finite, is asked before the update; if it says no on any process, the update is not
        made and `refused` is True. Returns loss, grad_norm (before clipping), applied, weight, lr and the loss's
        further sums divided by the weight; equal on all processes.
        """
        if lr is None:
            lr = learning_rate(self.config.schedule, self.config.optimizer.lr, self.step_count, self.config.steps)
        rows = sum(len(batch["inputs"]["input_ids"]) for batch in micro_batches) if self.balance else 0
        weight, count, rows = self._data_sum(
            [float(sum(batch["weight"] for batch in micro_batches)), len(micro_batches), rows]
        )
        assert count == len(micro_batches) * self.data_world, "every data rank must give equally many micro-batches"
        if weight == 0:  # nothing to learn from: all labels masked
            self.step_count += 1
            return {"loss": 0.0, "grad_norm": 0.0, "applied": False, "weight": 0.0, "lr": lr}
        if self.balance:
            self.balance.begin(self.data_world / rows)  # gradients are averaged over data ranks
        self._admit, self._weight, self.refused = admit, weight, False
        loss, sums, norm, applied = self._update([self._to_device(batch) for batch in micro_batches], weight, lr)
        self.step_count += 1
        return {
            "loss": loss / weight,
            "grad_norm": norm,
            "applied": applied,
            "weight": weight,
            "lr": lr,
            **({"refused": True} if self.refused else {}),
            **{key: value / weight for key, value in sums.items()},
            **(self.balance.read(rows) if self.balance else {}),
        }

    def evaluate(self, micro_batches: list[dict]) -> dict:
        """Loss and further sums over the micro-batches of all data ranks, each divided by the total weight. No
        gradient, dropout off. Collective.

        Data ranks may have different numbers of micro-batches, at least one each: who has fewer repeats its first with
        weight 0, because forward passes of ZeRO-3 and of a pipeline are collective.
        """
        batches, counted = self._padded(micro_batches)
        with torch.no_grad():
            sums = self._forward_sums(batches, counted)
        keys = sorted(sums, key=str)
        weight, *values = self._data_sum(
            [float(sum(batch["weight"] for batch in micro_batches)), *(sums[key] for key in keys)]
        )
        return {**{key: value / max(weight, 1e-9) for key, value in zip(keys, values, strict=True)}, "weight": weight}

    def forward(
        self, micro_batches: list[dict], read: Callable[[torch.Tensor, dict], torch.Tensor]
    ) -> list[torch.Tensor]:
        """read(outputs, batch) of each of this process's micro-batches, fp32 on the CPU. No gradient, dropout off.
        Collective, with unequal numbers of micro-batches as in `evaluate`."""
        batches, counted = self._padded(micro_batches)
        results: list[torch.Tensor] = []

        def keep(outputs, batch):
            results.append(read(outputs, batch).detach().float().cpu())
            return torch.zeros((), device=self.device), {}

        loss_fn, self.loss_fn = self.loss_fn, keep
        try:
            with torch.no_grad():
                self._forward_sums(batches, counted)
        finally:
            self.loss_fn = loss_fn
        return self._results(results)[: len(micro_batches)]

    def _results(self, results: list[torch.Tensor]) -> list[torch.Tensor]:
        """What `forward` returns here; a process that does not compute outputs gets those of one that does."""
        return results

    def _padded(self, micro_batches: list[dict]) -> tuple[list[dict], list[bool]]:
        """Micro-batches on the device, as many on every data rank, and which of them count. Collective."""
        assert micro_batches, "every data rank needs at least one micro-batch"
        most = int(distributed.all_reduce_max([len(micro_batches)])[0])
        batches = [self._to_device(batch) for batch in micro_batches]
        missing = most - len(batches)
        return batches + batches[:1] * missing, [True] * len(batches) + [False] * missing

    def measured(self) -> dict[str, float]:
        """What the layout has to say of its speed since the last call, for the log. Collective."""
        return {}

    def advice(self) -> str | None:
        """What a run's measurements suggest to do otherwise."""
        return None

    @contextlib.contextmanager
    def gathered(self):
        """Inside, `model` has its full parameters on every process (ZeRO-3 keeps them in shards); do not change
        them. Collective."""
        yield

    def pieces(self) -> state.Part:
        """What this process writes of the run's state: views of live memory, whose every element some process writes
        once. Collective only in that all must save."""
        mine, common = self._saved()
        fragments = mine + state.share(common, self.data_rank, self.data_world)
        names = {fragment.name for fragment in fragments if fragment.kind == "weight"}
        updates = self._updates()
        parameters = {
            name: {"shape": shape, "updates": updates if isinstance(updates, int) else updates[name]}
            for name, shape in self.shapes.items()
            if name in names
        }
        return state.Part(
            fragments,
            parameters,
            {
                "format": state.FORMAT,
                "steps": self.step_count,
                "optimizer": self.config.optimizer.kind,
                "layout": self._layout(),
            },
        )

    def save(self, folder: Path) -> None:
        """Write what `load` needs to go on, in whatever layout. Collective."""
        part = self.pieces()
        state.write(folder / f"{self.name}-{distributed.rank():05d}.safetensors", part)
        if distributed.is_main():
            write_json(folder / f"{self.name}.json", part.summary)

    def state_bytes(self) -> int:
        """Bytes that a checkpoint takes, all processes together: fp32 weights and two moments of what is trained."""
        return 12 * sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.fixed)

    def load(self, folder: Path) -> str:
        """Go on from a folder that `save` wrote; in the same layout, bit for bit. Returns what changed in the layout,
        in words. Collective.

        Raises UserError if the folder holds another model, another optimizer's moments, or not all of the state.
        """
        reader = state.Reader(folder, self.name)
        trained = {name: shape for name, shape in self.shapes.items() if name not in self.fixed}
        reader.compare(trained, self.config.optimizer.kind)
        self._begin_moments(reader.parameters)
        mine, common = self._saved()
        for fragment in mine + common + self._copies():
            reader.fill(fragment)
        self._loaded()
        self.step_count = reader.steps
        return reader.changed(self._layout())

    def _layout(self) -> dict:
        parallel = self.config.parallel
        return {
            "processes": distributed.world(),
            "zero": parallel.zero if parallel.pipeline == 1 else None,
            "pipeline": parallel.pipeline,
            "offload": parallel.offload,
        }

    def _saved(self) -> tuple[list[state.Fragment], list[state.Fragment]]:
        """The pieces of `_held` that belong into a checkpoint."""
        mine, common = self._held()
        if not self.fixed:
            return mine, common
        return (
            [fragment for fragment in mine if fragment.name not in self.fixed],
            [fragment for fragment in common if fragment.name not in self.fixed],
        )

    def _held(self) -> tuple[list[state.Fragment], list[state.Fragment]]:
        """(pieces that this process alone answers for, pieces that all of its data ranks hold), as views of live
        memory."""
        raise AssertionError("an engine implements this")

    def _copies(self) -> list[state.Fragment]:
        """Pieces that this process needs and another one writes."""
        return []

    def _updates(self) -> int | dict[str, int]:
        """Updates that the moments have seen, of all parameters alike or by name."""
        raise AssertionError("an engine implements this")

    def _begin_moments(self, saved: dict[str, dict]) -> None:
        """Make the moments that `load` will fill; none for what was never updated."""
        raise AssertionError("an engine implements this")

    def _loaded(self) -> None:
        """Whatever must follow from weights that were filled."""

    def consolidated(self) -> dict[str, torch.Tensor] | None:
        """The whole model's weights under transformers' names, fp32 on the CPU, on the main process; None elsewhere.
        Collective."""
        raise AssertionError("an engine implements this")

    def trained_weights(self) -> dict[str, torch.Tensor] | None:
        """Like `consolidated`, but only the parameters that have gradients. Collective."""
        raise AssertionError("an engine implements this")

    def _admitted(self, loss_sum: float, norm: float) -> bool:
        """Whether a finite update may be made. Collective if there is somebody to ask: one process must not leave
        out what another applies."""
        if self._admit is not None:
            self.refused = bool(distributed.all_reduce_max([float(not self._admit(loss_sum / self._weight, norm))])[0])
        return not self.refused

    def _update(self, micro_batches: list[dict], weight: float, lr: float) -> tuple[float, dict, float, bool]:
        """(global loss sum, global further sums, gradient norm, applied)."""
        raise AssertionError("an engine implements this")

    def _forward_sums(self, micro_batches: list[dict], counted: list[bool]) -> dict[str, float]:
        raise AssertionError("an engine implements this")

    def _data_sum(self, values: list[float]) -> list[float]:
        """Sums over data ranks. Where several processes share the rows of one data rank, each must count once."""
        return distributed.all_reduce_sum(values)

    def _to_device(self, batch: dict) -> dict:
        def move(value):
            return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

        return {
            key: {k: move(v) for k, v in value.items()} if isinstance(value, dict) else move(value)
            for key, value in batch.items()
        }

    def _autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _forward(self, module, batch: dict) -> tuple[torch.Tensor, dict]:
        """(loss sum with gradient, further sums); the loss itself is computed outside autocast."""
        if self.head:
            self.head.expect([batch["labels"]])
        with self._autocast():
            outputs = module(**{"use_cache": False, **batch["inputs"]}).logits
        return self.loss_fn(outputs, batch)


class Sums:
    """Adds up losses and further sums on the device and reads them once: each read waits for a GPU."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, loss: torch.Tensor, metrics: dict) -> None:
        for key, value in {"loss": loss, **metrics}.items():
            value = (
                value.detach().double()
                if isinstance(value, torch.Tensor)
                else torch.tensor(float(value), dtype=torch.float64)
            )
            self.tensors[key] = self.tensors[key] + value.to(self.tensors[key].device) if key in self.tensors else value

    def read(self) -> dict[str, float]:
        if not self.tensors:
            return {}
        device = self.tensors["loss"].device
        values = torch.stack([value.to(device) for value in self.tensors.values()]).tolist()
        return dict(zip(self.tensors, values, strict=True))


def shapes_of(model) -> tuple[dict[str, list[int]], set[str]]:
    """(shape of each parameter, names of those that are not trained)."""
    parameters = dict(model.named_parameters())
    shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
    return shapes, {name for name, parameter in parameters.items() if not parameter.requires_grad}


def decayed(parameter: torch.Tensor) -> bool:
    """Weight decay is for matrices: norms, biases and other vectors keep their scale. Shapes are asked before ZeRO-3
    empties them."""
    return getattr(parameter, "ds_shape", parameter.shape).__len__() >= 2


def lr_scale(parameter: torch.Tensor) -> float:
    """A parameter's share of the learning rate: 1, or what mu-P says (models/mup.py)."""
    return getattr(parameter, "lr_scale", 1.0)


def set_learning_rate(optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def adamw(parameters, config: TrainConfig, device: torch.device, kind=torch.optim.AdamW) -> torch.optim.AdamW:
    """AdamW over named parameters with decay on matrices alone.

    `fused` on both devices: one update of 4.2M parameters takes 5.5 ms of one CPU core, 14.6 ms with foreach, 15.8 ms
    with a plain loop.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    options = config.optimizer
    groups = []
    for scale in sorted({lr_scale(p) for p in trained}, reverse=True):
        part = [p for p in trained if lr_scale(p) == scale]
        own = {"lr_scale": scale} if scale != 1 else {}
        # Decay is lr * weight_decay a step: where the learning rate is scaled, that stays what it is elsewhere.
        groups.append({"params": [p for p in part if decayed(p)], "weight_decay": options.weight_decay / scale, **own})
        groups.append({"params": [p for p in part if not decayed(p)], "weight_decay": 0.0, **own})
    return kind(
        [group for group in groups if group["params"]], lr=options.lr, betas=options.betas, eps=options.eps, fused=True
    )


NORM_PIECE = 2**10


def clip_gradients(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale gradients in place to a global norm of at most `max_norm`; returns the norm before that. Shape: [].

    On a CPU torch (2.13) adds up the squares of a tensor in fp32 one after another: for a table of 4096 x 256 the norm
    was wrong by 1.0e-4, while DeepSpeed's engines, which add in fp64, had it right. From norms of pieces of 1024 it is
    right to 2e-8 in the same time (docs/log.md, 6).
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if gradients and gradients[0].device.type == "cpu":
        flat = [gradient.flatten() for gradient in gradients]
        whole = [len(gradient) // NORM_PIECE * NORM_PIECE for gradient in flat]
        pieces = [
            torch.linalg.vector_norm(gradient[:end].view(-1, NORM_PIECE), dim=1)
            for gradient, end in zip(flat, whole, strict=True)
        ]
        rests = [torch.linalg.vector_norm(gradient[end:]).view(1) for gradient, end in zip(flat, whole, strict=True)]
        norm = torch.linalg.vector_norm(torch.cat([*pieces, *rests]).double()).float()
    else:
        norm = torch.nn.utils.get_total_norm(gradients)
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def finite(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def build(model, loss_fn: Loss, config: TrainConfig, *, name: str = "model", fill=None) -> Engine:
    """The engine that `config.parallel` asks for. The model's weights are taken as they are, equal on every process.

    A pipeline also takes a model on the meta device: fill(part, global_name) then fills the part that a process keeps.
    """
    distributed.setup(config)
    if config.activation_checkpointing != "none":
        layers.checkpoint(model, config.activation_checkpointing)
    if config.parallel.pipeline > 1:
        from pipeline.train.pipelined import Pipelined

        return Pipelined(model, loss_fn, config, name, fill)
    if config.parallel.zero is not None:
        from pipeline.train.sharded import Sharded

        return Sharded(model, loss_fn, config, name)
    from pipeline.train.replicated import Replicated

    return Replicated(model, loss_fn, config, name)
