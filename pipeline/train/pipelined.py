"""The pipelined engine: DeepSpeed's PipelineModule (1F1B) over data-parallel ranks, always with its ZeRO-1 optimizer.

Without that optimizer, in fp32, DeepSpeed 0.19.8 takes the gradient norm over the first stage alone and lets NaN
gradients of the last stage reach the weights (seen: 1.154 where the norm was 1.648), so `zero: 0` and none use it too.
"""

import os

import torch
import torch.distributed as dist

from pipeline.models import pipeline_split
from pipeline.train import chunked_loss, distributed, moe_aux_loss, phases, shards
from pipeline.train.bubble import Bubble
from pipeline.train.engine import Engine, Sums, adamw, finite, set_learning_rate, shapes_of
from pipeline.train.sharded import GuardedAdamW, quiet, settings, start


class Stage(torch.nn.Module):
    """One stage as one layer of the PipelineModule: ids (and positions) in, hidden states (and positions) on, logits
    out at the end."""

    def __init__(self, model, index: int, parts: list[range], bf16: bool, fill):
        super().__init__()
        self.first, self.last, self.bf16 = index == 0, index == len(parts) - 1, bf16
        layers = pipeline_split.cut(model, index, parts)
        self.offset = layers.start
        if any(parameter.is_meta for parameter in model.parameters()):
            model.to_empty(device="cpu")
            fill(model, lambda name: pipeline_split.global_name(name, self.offset))
        self.model = model

    @property
    def table(self):
        """The module whose `weight` first and last stage share if the model ties its embeddings."""
        return self.model.get_input_embeddings() if self.first else self.model.lm_head

    def forward(self, inputs):
        tensor, *positions = inputs if isinstance(inputs, tuple) else (inputs,)
        given = {
            "input_ids" if self.first else "inputs_embeds": tensor,
            "use_cache": False,
            **({"position_ids": positions[0]} if positions else {}),
        }
        with torch.autocast(distributed.device().type, dtype=torch.bfloat16, enabled=self.bf16):
            if self.last:
                return self.model(**given).logits
            hidden = self.model.base_model(**given).last_hidden_state
        return (hidden, *positions) if positions else hidden


def even_groups(optimizer) -> None:
    """Give all stages equally many parameter groups, by cutting some into groups of equal settings. Collective.

    DeepSpeed adds up the gradient norm of one group after the other over the stages. With mu-P the embedding's rate
    makes a group that the first stage alone has, and the stages waited for each other for ever.
    """
    most = int(distributed.all_reduce_max([len(optimizer.param_groups)])[0])
    while len(optimizer.param_groups) < most:
        group = max(optimizer.param_groups, key=lambda group: len(group["params"]))
        half = len(group["params"]) // 2
        group["params"], rest = group["params"][:half], group["params"][half:]
        optimizer.add_param_group({**group, "params": rest})


class Pipelined(Engine):
    """Process p holds stage p // data_world of data rank p % data_world. Every process of a pipeline is given the same
    micro-batches.

    Inputs may be `input_ids` and `position_ids`. `model` is None: no process holds it whole.
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
        self.shapes, self.fixed = shapes_of(model)
        table_name = next(
            key for key, parameter in model.named_parameters() if parameter is model.get_input_embeddings().weight
        )
        self.micro_batches: list[dict] = []
        self.sums, self.scale = Sums(), 1.0

        def spec(index: int):
            arguments = (Stage, model, index, self.parts, config.precision == "bf16", fill)
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
            self.part = next(layer for layer in module.forward_funcs if isinstance(layer, Stage))
            self.balance = moe_aux_loss.attach(self.part.model, config, self.part.offset)
            # DeepSpeed takes the whole layer for a copy and would leave it out of the gradient norm
            if self.tied and self.part.last:
                for parameter in self.part.parameters():
                    parameter.ds_pipe_replicated = parameter is self.part.table.weight
            self.head = chunked_loss.installed(self.part.model) if self.part.last else None
            self.optimizer = adamw(module.parameters(), config, self.device, GuardedAdamW)
            even_groups(self.optimizer)
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=settings(config, micro, accumulation, self.data_world),
                dist_init_required=False,
            )
        self.shape = None
        self.bubble = Bubble(self.engine, self.device, self.index, self.count, self.data_world)
        self.named = {
            pipeline_split.global_name(key, self.part.offset): parameter
            for key, parameter in self.part.model.named_parameters()
        }
        self.copied = {}  # the tied table's second end reads it and leaves writing to the first
        if self.tied and self.part.last:
            self.named = {
                key: parameter for key, parameter in self.named.items() if parameter is not self.part.table.weight
            }
            self.copied = {table_name: self.part.table.weight}

    def measured(self):
        return self.bubble.measured(self.engine.micro_batches)

    def advice(self):
        said = self.bubble.advice(self.parts)
        return said and f"pipeline   {said}"

    def _loss(self, outputs, index):
        """Called on the last stage; `index` says which micro-batch this is."""
        loss, metrics = self.loss_fn(outputs, self.micro_batches[int(index)])
        if self.counted[int(index)]:
            self.sums.add(loss, metrics)
        return loss * self.scale

    def _begin(self, micro_batches, counted, scale: float):
        self.micro_batches, self.counted, self.sums, self.scale = micro_batches, counted, Sums(), scale
        shapes = [[(key, *value.shape) for key, value in batch["inputs"].items()] for batch in micro_batches]
        assert all(shape == shapes[0] for shape in shapes), "micro-batches of a pipeline must have one shape"
        # with positions, two tensors travel between stages: a stage that expects one would wait for ever
        if shapes[0] != self.shape:
            self.engine.reset_activation_shape()
            self.shape = shapes[0]
        if self.head:  # on the last stage the k-th forward of a step is its k-th micro-batch
            self.head.expect([batch["labels"] for batch in micro_batches])

        def feed():
            for index, batch in enumerate(micro_batches):
                inputs = batch["inputs"]
                assert set(inputs) <= {"input_ids", "position_ids"}, "a pipeline takes input_ids and position_ids"
                yield tuple(inputs[key] for key in ("input_ids", "position_ids") if key in inputs), torch.tensor(index)

        return feed()

    def _update(self, micro_batches, weight, lr):
        count = len(micro_batches)
        # DeepSpeed averages over micro-batches and data ranks.
        feed = self._begin(micro_batches, [True] * count, self.data_world * count / weight)
        if self.engine.micro_batches != count:
            self.engine.set_train_batch_size(self.engine.train_micro_batch_size_per_gpu() * count * self.data_world)
        total: dict[str, float] = {}

        # first asked on all processes at the same point: after the gradient norm was found finite, before the update
        def allow() -> bool:
            if not total:
                total.update(self._totals())
                if finite(total["loss"]):
                    self._admitted(total["loss"], float(self.engine.optimizer._global_grad_norm))
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
        return self._from_last(self.sums.read())

    def _results(self, results):
        last = (self.count - 1) * self.data_world + self.data_rank
        return distributed.gathered_object(results)[last]

    def _from_last(self, found: dict) -> dict:
        """The last stage knows the sums; the others learn their names."""
        keys = distributed.gathered_object(sorted(found, key=str))
        names = max(keys, key=len)
        return {key: found.get(key, 0.0) for key in names}

    def _totals(self) -> dict[str, float]:
        found = self._from_last(self.sums.read())
        return dict(zip(found, self._data_sum(list(found.values())), strict=True))

    def _data_sum(self, values):
        return distributed.all_reduce_sum(values if self.index == self.count - 1 else [0.0] * len(values))

    def consolidated(self):
        """Stage after stage, the first data rank sends its tensors to the main process over the CPU."""
        mine = {
            pipeline_split.global_name(key, self.part.offset): value.detach().to("cpu").contiguous()
            for key, value in self.part.model.state_dict().items()
        }
        whole = {key: value.clone() for key, value in mine.items()}
        for index in range(1, self.count):
            source = index * self.data_world
            if distributed.rank() == source:
                dist.send_object_list(
                    [[(key, value.shape, value.dtype) for key, value in mine.items()]],
                    dst=0,
                    device=torch.device("cpu"),
                )
                for value in mine.values():
                    dist.send(value, dst=0)
            elif distributed.is_main():
                box: list = [None]
                dist.recv_object_list(box, src=source, device=torch.device("cpu"))
                for key, shape, dtype in box[0]:
                    whole[key] = torch.empty(shape, dtype=dtype)
                    dist.recv(whole[key], src=source)
        return whole if distributed.is_main() else None

    def _held(self):
        buffers = [
            fragment._replace(name=pipeline_split.global_name(fragment.name, self.part.offset))
            for fragment in shards.buffers(self.part.model)
        ]
        return shards.split(self.named, self.engine.optimizer), buffers

    def _copies(self):
        return shards.split(self.copied, self.engine.optimizer)

    def _updates(self):
        return shards.updates_flat(self.engine.optimizer)

    def _begin_moments(self, saved):
        shards.begin_split(self.engine.optimizer, max(entry["updates"] for entry in saved.values()))

    def _loaded(self):
        self.engine.optimizer.update_lp_params()
