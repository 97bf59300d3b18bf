"""The layouts that a training stage could have on a cluster: what each needs of memory, and how long its step takes.

    costs = costs_of(model, config)
    found, refused = search(config, costs, cluster)      # those that fit first, the fastest first

A layout is what changes speed and memory and not the result: `parallel`, `micro_batch`, `activation_checkpointing` and
`compile`. Everything here is arithmetic (models/cost.py, models/step_time.py); the model may be on the meta device.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.models import cost, pipeline_split, sampling_cost, step_time
from pipeline.models.devices import Cluster
from pipeline.models.families import family_of
from pipeline.train import chunked_loss, context_parallel, tensor_parallel
from pipeline.train.config import Parallel, TrainConfig, divisors

MOST_MICRO_ROWS = 64
CHECKPOINTING = ("none", "selective", "full")
EVEN = 1.05  # of a layer, what FSDP may gather more because its processes cannot share it evenly


@dataclass(frozen=True)
class Candidate:
    """One layout of a stage on a cluster."""

    keys: dict
    """Of the stage in the recipe, without those at their default: parallel, micro_batch, ..."""
    layout: cost.Layout
    memory: dict[str, float]
    """Bytes of the fullest device by part."""
    seconds: dict[str, float]
    """Of a step by part."""
    tokens: int
    """Of a step."""

    @property
    def peak(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    def fits(self, cluster: Cluster) -> bool:
        return self.peak <= cluster.device.usable

    def __str__(self) -> str:
        return ", ".join(_words(self.keys))


def _words(keys: dict) -> list[str]:
    parallel = keys.get("parallel", {})
    words = []
    if "pipeline" in parallel:
        words.append(f"pipeline {parallel['pipeline']}")
    elif "shard" in parallel:
        ranks = parallel.get("shard_ranks")
        words.append(f"FSDP {parallel['shard']}" + (f" of {ranks}" if ranks else ""))
        if "tensor" in parallel:
            words.append(f"tensor {parallel['tensor']}")
        if "context" in parallel:
            words.append(f"context {parallel['context']}")
    elif "zero" in parallel:
        words.append(f"ZeRO-{parallel['zero']}")
    else:
        words.append("data parallel")
    if parallel.get("offload"):
        words.append("offload")
    if "micro_batch" in keys:
        words.append(f"micro-batch {keys['micro_batch']}")
    checkpointing = keys.get("activation_checkpointing", "none")
    if checkpointing != "none":
        words.append(f"{checkpointing} checkpointing")
    if keys.get("compile"):
        words.append("compiled")
    words += [f"{key} {value}" for key, value in keys.items() if "." in key]
    return words


@dataclass(frozen=True)
class Costs:
    """What the model of a stage costs, whatever its layout."""

    config: object
    """transformers' configuration."""
    size: cost.Size
    shape: step_time.Shape


def costs_of(model, config: TrainConfig) -> Costs:
    return Costs(model.config, cost.count(model), step_time.shape_of(model, config.sequence_length))


# ---- one layout ------------------------------------------------------------------------------------------------------


def layout_here(config: TrainConfig, model_config, size: cost.Size) -> cost.Layout:
    """What a stage's keys mean in the processes of this run, however they were started."""
    world, device = distributed.world(), distributed.device().type
    run = config.run.model_copy(update={"processes": distributed.local_world()})
    return layout_of(config.model_copy(update={"run": run}), model_config, size, world, device)


def layout_of(config: TrainConfig, model_config, size: cost.Size, world: int, device: str) -> cost.Layout:
    """What a stage's keys mean in `world` processes on a device (`cuda` or `cpu`). A micro-batch is of an update, of
    which a step of online RL has several."""
    parallel = config.parallel
    ranks = parallel.data_ranks(world)
    micro = config.micro_rows(world)
    head_rows = config.head_chunk() if config.sampling(world) is None else "auto"  # rl/responses.py: predict_at_labels
    if not family_of(model_config).chunked_loss:
        head_rows = None
    if head_rows == "auto":
        head_rows = chunked_loss.chunk_of(-(-model_config.vocab_size // parallel.tensor), device)
    return cost.Layout(
        ranks=ranks,
        depth=parallel.pipeline,
        zero=parallel.zero,
        micro=micro,
        accumulation=-(-(config.rows_of_update() // ranks) // micro),
        precision=config.wide_precision,
        optimizer=config.optimizer.kind,
        checkpointing=config.activation_checkpointing,
        attention=config.attention,
        head_rows=head_rows,
        offload=parallel.offload,
        stage_layers=_stage_layers(config, model_config, size),
        shard=parallel.group_size(world, config.run.processes),
        tensor=parallel.tensor,
        context=parallel.context,
        compiled=config.compile,
        loss_tokens=config.loss_tokens(),
    )


def _stage_layers(config: TrainConfig, model_config, size: cost.Size) -> tuple[int, ...]:
    """Layers of each pipeline stage, as pipeline_split.split distributes them if all layers cost the same."""
    parallel, layers = config.parallel, model_config.num_hidden_layers
    if parallel.pipeline == 1:
        return ()
    if parallel.layers:
        return tuple(parallel.layers)
    attention = cost.attention_width(model_config) / layers * config.sequence_length
    one = 2.0 * (size.active - size.embedding) / layers + attention
    output = 2.0 * model_config.vocab_size * model_config.hidden_size if parallel.partition == "estimated" else 0.0
    return tuple(len(part) for part in pipeline_split.partition([one] * layers, output, parallel.pipeline))


def candidate(config: TrainConfig, costs: Costs, cluster: Cluster) -> Candidate:
    """The layout that the stage has. Raises UserError if this number of devices cannot have it."""
    config = _on(config, cluster)
    config.check_layout(cluster.count)
    tensor_parallel.check(costs.config, config.parallel.tensor)
    context_parallel.check(costs.config, config.parallel.context)
    layout = layout_of(config, costs.config, costs.size, cluster.count, cluster.device.kind)
    return _measured(config, layout, config.parallel.model_dump(exclude_defaults=True), costs, cluster)


def _on(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """With a process per device of the cluster."""
    run = config.run.model_copy(update={"processes": cluster.local, "nodes": cluster.nodes})
    return config.model_copy(update={"run": run})


def _measured(config: TrainConfig, layout: cost.Layout, parallel: dict, costs: Costs, cluster: Cluster) -> Candidate:
    keys: dict = {"parallel": parallel, "micro_batch": layout.micro}
    if layout.checkpointing != "none":
        keys["activation_checkpointing"] = layout.checkpointing
    if layout.compiled:
        keys["compile"] = True
    sampling = config.sampling(cluster.count)
    if sampling is not None:
        keys[sampling.key] = sampling.rows
    sequences = dataclasses.replace(layout, micro=layout.micro * config.sequences_per_row())
    others = {}
    for name, is_trained in config.other_models().items():
        others[name] = costs.size if is_trained else sampling_cost.only_read(costs.size)
    memory = sampling_cost.stage_memory(costs.config, costs.size, config.sequence_length, sequences, others, sampling)
    setup = step_time.setup_of(sequences, config.sequence_length)
    seconds = step_time.step_seconds(costs.shape, setup, cluster)
    return Candidate(keys, layout, memory, seconds, setup.step_tokens)


# ---- all layouts -----------------------------------------------------------------------------------------------------


def search(config: TrainConfig, costs: Costs, cluster: Cluster) -> tuple[list[Candidate], dict[str, list[str]]]:
    """(layouts, why others cannot be had -> which). Those that fit come first, in the order of their speed; then those
    that do not, in the order of their memory."""
    found: list[Candidate] = []
    refused: dict[str, list[str]] = {}
    for keys in _possible_keys(config, costs, cluster):
        try:
            changed = _with_keys(_on(config, cluster), keys)
            found += _with_micro_batches(changed, keys, costs, cluster)
        except (ValidationError, UserError) as error:
            names = refused.setdefault(_reason(error), [])
            name = ", ".join(_words(keys))
            if name not in names:
                names.append(name)
    found.sort(key=lambda one: (0, one.step_seconds) if one.fits(cluster) else (1, one.peak))
    return found, refused


def _possible_keys(config: TrainConfig, costs: Costs, cluster: Cluster) -> Iterator[dict]:
    """Layouts that are worth a look, without the micro-batch."""
    compiles = (False, True) if type(config).supports_pipeline() else (False,)
    for parallel, checkpointing, compiled in itertools.product(
        _parallels(config, costs, cluster), CHECKPOINTING, compiles
    ):
        keys: dict = {"parallel": parallel}
        if checkpointing != "none":
            keys["activation_checkpointing"] = checkpointing
        if compiled:
            keys["compile"] = True
        yield keys


def _parallels(config: TrainConfig, costs: Costs, cluster: Cluster) -> list[dict]:
    """Values of `parallel` that are worth a look."""
    model_config = costs.config
    found: list[dict] = [{}]
    if cluster.count > 1:
        found += [{"zero": 1}, {"zero": 2}, {"zero": 3}]
        found += [{"shard": "full"}, {"shard": "hybrid"}] if cluster.nodes > 1 else [{"shard": "full"}]
        group = _even_group(costs.size, cluster)
        found += [{"shard": "hybrid", "shard_ranks": group}] if group else []
    if type(config).supports_row_groups():
        sizes = [size for size in divisors(cluster.local) if size > 1 and cluster.count % size == 0]
        possible = [size for size in sizes if tensor_parallel.obstacle(model_config, size) is None]
        found += [{"shard": "full", "tensor": size} for size in possible]
        possible = [size for size in sizes if context_parallel.obstacle(model_config, size) is None]
        found += [{"shard": "full", "context": size} for size in possible if not config.sequence_length % size]
    if type(config).supports_pipeline() and family_of(model_config).pipeline:
        depths = [depth for depth in divisors(cluster.count) if 1 < depth <= model_config.num_hidden_layers]
        found += [{"zero": 1, "pipeline": depth} for depth in depths]
    return found


def _even_group(size: cost.Size, cluster: Cluster) -> int | None:
    """Where all processes cannot share a layer evenly, such as 256 experts over 2,048 of them: the largest group, of
    more than a node, that can."""
    if size.padding(cluster.count) < EVEN:
        return None
    groups = [ranks for ranks in divisors(cluster.count) if cluster.local < ranks < cluster.count]
    return max((ranks for ranks in groups if size.padding(ranks) < EVEN), default=None)


def _with_keys(config: TrainConfig, keys: dict) -> TrainConfig:
    values = dict(config) | {"micro_batch": 1, "activation_checkpointing": "none"}
    if "compile" in values:
        values["compile"] = False
    values |= keys
    values["parallel"] = Parallel.model_validate(keys["parallel"])
    return type(config).model_validate(values)


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error)


def _with_micro_batches(config: TrainConfig, keys: dict, costs: Costs, cluster: Cluster) -> list[Candidate]:
    """A layout with every micro-batch that it can have. Raises UserError if it can have none."""
    config.check_layout(cluster.count)
    base = layout_of(config, costs.config, costs.size, cluster.count, cluster.device.kind)
    rows = base.micro * base.accumulation
    found = []
    for micro in divisors(rows):
        if micro > MOST_MICRO_ROWS:
            break
        try:
            config.model_copy(update={"micro_batch": micro}).check_layout(cluster.count)
        except UserError:  # rows of documents that attention cannot keep apart in larger micro-batches
            break
        layout = dataclasses.replace(base, micro=micro, accumulation=rows // micro)
        options = [
            _measured(changed, layout, keys["parallel"], costs, cluster) for changed in config.with_fewer_samples()
        ]
        found.append(next((one for one in options if one.fits(cluster)), options[-1]))
    return found


def cheapest_change(current: Candidate, found: list[Candidate], cluster: Cluster) -> Candidate | None:
    """Of the layouts that fit, the fastest of those that change the fewest keys of the current one."""
    fitting = [one for one in found if one.fits(cluster)]
    return min(fitting, key=lambda one: (_changed(current.keys, one.keys), one.step_seconds), default=None)


def _changed(before: dict, after: dict) -> int:
    return sum(before.get(key) != after.get(key) for key in before.keys() | after.keys())


def advice(config: TrainConfig, model, cluster: Cluster) -> str | None:
    """In words, the smallest change of a layout that does not fit a cluster; None if it fits."""
    costs = costs_of(model, config)
    current = candidate(config, costs, cluster)
    if current.fits(cluster):
        return None
    found, _ = search(config, costs, cluster)
    change = cheapest_change(current, found, cluster)
    gibibytes = f"{cluster.device.usable / 2**30:.1f} of {cluster.device.memory / 2**30:.1f} GiB can be used"
    if change is None:
        return f"does not fit: {gibibytes}, and no other layout of {cluster.count} devices fits"
    return f"does not fit: {gibibytes}; {change} would, with {change.peak / 2**30:.1f} GiB (alma plan lists others)"


def starts_in_parts(config: TrainConfig) -> bool:
    """Whether a model is on the meta device until its engine creates one part after another: where a process keeps only
    a part of it, and on GPUs, so that the CPU's memory never has all of it."""
    return config.parallel.keeps_parts or distributed.device().type != "cpu"
