"""The pipelined engine: DeepSpeed's PipelineModule (1F1B) over data-parallel ranks, always with its ZeRO-1 optimizer.

Without that optimizer, in fp32, DeepSpeed 0.19.8 computes the gradient norm over the first stage only and lets NaN
gradients of the last stage reach the weights (observed: 1.154 instead of 1.648), so `zero: 0` and none use it too.
"""

import os

import torch
import torch.distributed as dist

from pipeline.core import distributed
from pipeline.models import pipeline_split
from pipeline.train import chunked_loss, moe_aux_loss, phases, shards
from pipeline.train.bubble import Bubble
from pipeline.train.engine import Engine, Sums, adamw, autocast, finite, set_learning_rate, shapes_of
from pipeline.train.sharded import GuardedAdamW, quiet, settings, start


class Stage(torch.nn.Module):
    """One stage, as one layer of the PipelineModule. The first stage takes ids (and positions), stages pass on hidden
    states (and positions), the last one returns logits."""

    def __init__(self, model, index: int, parts: list[range], config, fill):
        super().__init__()
        self.first, self.last, self.config = index == 0, index == len(parts) - 1, config
        layers = pipeline_split.cut(model, index, parts)
        self.offset = layers.start
        if any(parameter.is_meta for parameter in model.parameters()):
            model.to_empty(device="cpu")
            fill(model, lambda name: pipeline_split.global_name(name, self.offset))
        self.model = model

    @property
    def table(self):
        """The module whose `weight` the first and the last stage share if the model ties its embeddings."""
        return self.model.get_input_embeddings() if self.first else self.model.lm_head

    def forward(self, inputs):
        tensor, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        arguments = {"input_ids" if self.first else "inputs_embeds": tensor, "use_cache": False}
        if positions:
            arguments["position_ids"] = positions[0]
        with autocast(self.config, distributed.device()):
            if self.last:
                return self.model(**arguments).logits
            hidden = self.model.base_model(**arguments).last_hidden_state
        return (hidden, *positions) if positions else hidden


def even_groups(optimizer) -> None:
    """Give all stages the same number of parameter groups, by splitting some into groups of equal settings. Collective.

    DeepSpeed sums the gradient norm over the stages, group after group. With mu-P the embedding's learning rate makes a
    group that only the first stage has, and the stages would wait for each other forever.
    """
    most = int(distributed.all_reduce_max([len(optimizer.param_groups)])[0])
    while len(optimizer.param_groups) < most:
        group = max(optimizer.param_groups, key=lambda group: len(group["params"]))
        half = len(group["params"]) // 2
        group["params"], rest = group["params"][:half], group["params"][half:]
        optimizer.add_param_group(group | {"params": rest})


class Pipelined(Engine):
    """Process p holds stage p // data_world of data rank p % data_world. All processes of a pipeline get the same
    micro-batches.

    Inputs may be `input_ids` and `position_ids`. `model` is None: no process holds the complete model.
    """

    layout = "pipelined"

    def __init__(self, model, loss_fn, config, name, fill=None):
        super().__init__(None, loss_fn, config, name)
        import deepspeed
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

        os.environ.setdefault("LOCAL_RANK", "0")
        self.count = config.parallel.pipeline
        pipeline_split.check(model.config)
        self.parts = pipeline_split.split(model, config.parallel, config.sequence_length)
        self.data_world = distributed.world() // self.count
        self.data_rank, self.index = distributed.rank() % self.data_world, distributed.rank() // self.data_world
        self.tied = bool(model.config.tie_word_embeddings)
        # before the model is cut
        self.shapes, self.frozen_names = shapes_of(model)
        table = model.get_input_embeddings().weight
        table_name = next(name for name, parameter in model.named_parameters() if parameter is table)
        self.micro_batches: list[dict] = []
        self.sums, self.scale = Sums(), 1.0

        def spec(index: int):
            arguments = (Stage, model, index, self.parts, config, fill)
            if self.tied and index in (0, self.count - 1):
                return TiedLayerSpec("table", *arguments, tied_weight_attr="table.weight")
            return LayerSpec(*arguments)

        micro = config.micro_batch or config.batch_size // self.data_world
        accumulation = config.batch_size // self.data_world // micro
        with quiet():
            start()
            with torch.no_grad():  # tied weights are broadcast here, which autograd must not see
                module = PipelineModule(
                    [spec(index) for index in range(self.count)],
                    num_stages=self.count,
                    loss_fn=self._loss,
                    partition_method="uniform",
                    seed_layers=False,
                )
            self.stage = next(layer for layer in module.forward_funcs if isinstance(layer, Stage))
            self.balance = moe_aux_loss.attach(self.stage.model, config, self.stage.offset)
            # DeepSpeed takes the complete stage for a copy and would exclude it from the gradient norm.
            if self.tied and self.stage.last:
                for parameter in self.stage.parameters():
                    parameter.ds_pipe_replicated = parameter is self.stage.table.weight
            self.head = chunked_loss.installed(self.stage.model) if self.stage.last else None
            self.optimizer = adamw(module.parameters(), config, self.device, GuardedAdamW)
            even_groups(self.optimizer)
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=settings(config, micro, accumulation, self.data_world),
                dist_init_required=False,
            )
        self.input_shapes: list | None = None  # of the last micro-batches
        self.bubble = Bubble(self.engine, self.device, self.index, self.count, self.data_world)
        self.named = {self._global_name(name): parameter for name, parameter in self.stage.model.named_parameters()}
        self.copied = {}  # the last stage reads the tied table, and the first one writes it
        if self.tied and self.stage.last:
            table = self.stage.table.weight
            self.named = {name: parameter for name, parameter in self.named.items() if parameter is not table}
            self.copied = {table_name: table}

    def _global_name(self, name: str) -> str:
        return pipeline_split.global_name(name, self.stage.offset)

    def measured(self):
        return self.bubble.measured(self.engine.micro_batches)

    def advice(self):
        text = self.bubble.advice(self.parts)
        return f"pipeline   {text}" if text else None

    def _loss(self, outputs, _):
        """Called on the last stage, for one micro-batch after the other."""
        batch, is_counted = next(self.expected)
        loss, metrics = self.loss_fn(outputs, batch)
        if is_counted:
            self.sums.add(loss, metrics)
        return loss * self.scale

    def _begin(self, micro_batches, counted, scale: float):
        """Prepare for a pass over micro-batches; returns the iterator that DeepSpeed reads. scale: of their losses."""
        # On the last stage the k-th forward pass of a step is its k-th micro-batch. To read its number, which DeepSpeed
        # moves to the device, would wait for it.
        self.expected, self.sums, self.scale = zip(micro_batches, counted, strict=True), Sums(), scale
        shapes = [[(key, *value.shape) for key, value in batch["inputs"].items()] for batch in micro_batches]
        assert all(shape == shapes[0] for shape in shapes), "micro-batches of a pipeline must have one shape"
        # With positions, two tensors are sent between stages: a stage that expects one would wait forever.
        if shapes[0] != self.input_shapes:
            self.engine.reset_activation_shape()
            self.input_shapes = shapes[0]
        if self.head:
            self.head.expect(micro_batches)

        def feed():
            for batch in micro_batches:
                inputs = batch["inputs"]
                assert set(inputs) <= {"input_ids", "position_ids"}, "a pipeline takes input_ids and position_ids"
                tensors = [inputs[key] for key in ("input_ids", "position_ids") if key in inputs]
                yield tuple(tensors), torch.tensor(0)  # labels, which DeepSpeed asks for

        return feed()

    def _update(self, micro_batches, weight, lr):
        count = len(micro_batches)
        # DeepSpeed averages over micro-batches and data ranks.
        feed = self._begin(micro_batches, [True] * count, self.data_world * count / weight)
        if self.engine.micro_batches != count:
            self.engine.set_train_batch_size(self.engine.train_micro_batch_size_per_gpu() * count * self.data_world)
        total: dict[str, float] = {}

        # Called for each parameter group. The first call is at the same point on all processes: after the gradient norm
        # was found to be finite, before the update.
        def allow() -> bool:
            if not total:
                total.update(self._totals())
                if finite(total["loss"]):
                    self._accepted(total["loss"], float(self.engine.optimizer._global_grad_norm))
            return finite(total["loss"]) and not self.refused

        self.optimizer.allow = allow
        set_learning_rate(self.engine.optimizer, lr)
        phases.enter("pipeline")  # forward, backward, reduction and update, interleaved
        with self.bubble.clock:
            self.engine.train_batch(feed)
        phases.enter("reduce")
        applied = self.engine.was_step_applied()
        norm = float(self.engine.get_global_grad_norm()) if applied else float("inf")
        if not total:
            total.update(self._totals())
        loss = total.pop("loss")
        return loss, total, norm, applied and finite(loss) and not self.refused

    def _forward_sums(self, micro_batches, counted):
        feed = self._begin(micro_batches, counted, 1.0)
        with quiet():
            self.engine.eval_batch(
                feed, compute_loss=True, reduce_output=None, bcast_loss=False, num_micro_batches=len(micro_batches)
            )
        return self._with_all_keys(self.sums.read())

    def _results(self, results):
        last = (self.count - 1) * self.data_world + self.data_rank
        return distributed.all_gather_object(results)[last]

    def _with_all_keys(self, sums: dict) -> dict:
        """The last stage has the sums; the others learn their keys. Collective."""
        keys = max(distributed.all_gather_object(sorted(sums, key=str)), key=len)
        return {key: sums.get(key, 0.0) for key in keys}

    def _totals(self) -> dict[str, float]:
        sums = self._with_all_keys(self.sums.read())
        return dict(zip(sums, self._data_sum(list(sums.values())), strict=True))

    def _data_sum(self, values):
        return distributed.all_reduce_sum(values if self.index == self.count - 1 else [0.0] * len(values))

    def consolidated(self):
        """Stage after stage, the first data rank sends its tensors to the main process over the CPU."""
        cpu = torch.device("cpu")
        own = {}
        for name, value in self.stage.model.state_dict().items():
            own[self._global_name(name)] = value.detach().to(cpu).contiguous()
        weights = {name: value.clone() for name, value in own.items()}
        for index in range(1, self.count):
            source = index * self.data_world
            if distributed.rank() == source:
                description = [(name, value.shape, value.dtype) for name, value in own.items()]
                dist.send_object_list([description], dst=0, device=cpu)
                for value in own.values():
                    dist.send(value, dst=0)
            elif distributed.is_main():
                received: list = [None]
                dist.recv_object_list(received, src=source, device=cpu)
                for name, shape, dtype in received[0]:
                    weights[name] = torch.empty(shape, dtype=dtype)
                    dist.recv(weights[name], src=source)
        return weights if distributed.is_main() else None

    def _held(self):
        buffers = []
        for fragment in shards.buffers(self.stage.model):
            buffers.append(fragment._replace(name=self._global_name(fragment.name)))
        return shards.split(self.named, self.engine.optimizer), buffers

    def _copies(self):
        return shards.split(self.copied, self.engine.optimizer)

    def _updates(self):
        return shards.updates_flat(self.engine.optimizer)

    def _begin_moments(self, saved):
        shards.begin_split(self.engine.optimizer, max(entry["updates"] for entry in saved.values()))

    def _loaded(self):
        self.engine.optimizer.update_lp_params()
