"""What follows from the recipe of a training stage, printed before its first step: parameters, tokens, FLOPs, time,
memory, and for pretraining disk."""

import dataclasses
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.core import distributed
from pipeline.core.terminal import byte_size, plural
from pipeline.models import cost, devices, sampling_cost
from pipeline.models.cost import Flops, Size
from pipeline.models.devices import Cluster
from pipeline.train import layouts

# of the peak; what well-tuned dense models of 1B and more reach on one node (torchtitan reports 0.38-0.50 on H100)
ASSUMED_MFU = 0.4
NOTABLE_BYTES = 1e9


# ---- pretraining -----------------------------------------------------------------------------------------------------


def pretraining_lines(config, model, size: Size, flops: Flops, peak: float | None, sampler, folder) -> list[str]:
    """The header of pretraining. config: with steps, unless its length is a time. peak: FLOP/s of all devices, if
    known. folder: where checkpoints are written."""
    model_config = model.config
    layout = layouts.layout_here(config, model_config, size)
    step_tokens = config.batch_size * config.sequence_length
    lines = [model_line(model_config, size)]
    lines += _data_lines(config, size, step_tokens, sampler)
    schedule = schedule_text(config.optimizer, config.schedule)
    lines.append(f"schedule   {schedule} ({config.schedule.warmup_steps * step_tokens:,} tokens)")
    lines.append(layout_line(config, layout))
    total = f"{flops.full * config.steps * step_tokens:.2e} FLOPs, " if config.steps else ""
    estimate = time_estimate(expected_seconds(config, flops, peak), peak)
    per_token = f"{flops.full:.2e} per token, {flops.causal:.2e} with causal attention halved"
    lines.append(f"compute    {total}{per_token}{estimate}")
    parts = cost.memory(model_config, size, config.sequence_length, layout)
    lines += _memory_lines(parts, functools.partial(layouts.advice, config, model))
    lines.append(_disk_line(config, size, folder))
    if config.steps:
        lines += sampler.warnings(config.steps * config.batch_size)
    return lines


def _data_lines(config, size: Size, step_tokens: int, sampler) -> list[str]:
    """Tokens and sources, changes of the mixture, packing."""
    lines = []
    if config.steps is None:
        lines.append(
            f"data       {step_tokens:,} tokens per step ({config.batch_size} rows x {config.sequence_length}); how"
            " many"
            f" steps fit into {config.time} is reported when the first ones have been timed"
        )
    else:
        tokens = config.steps * step_tokens
        lines.append(
            f"data       {tokens:,} tokens = {plural(config.steps, 'step', ',')} x {config.batch_size} rows x"
            f" {config.sequence_length}; {tokens / size.total:.1f} tokens per parameter (Chinchilla's optimum is"
            " about 20)"
        )
        lines.append(f"sources    {_sources_text(config.steps * config.batch_size, sampler)}")
    for number, (first, _) in enumerate(sampler.changes, 1):
        weights = sampler.mixture.weights(number)
        text = ", ".join(f"{source} {100 * weight:.3g}%" for source, weight in weights.items())
        lines.append(f"mixture    from row {first:,} ({first * config.sequence_length:,} tokens) on: {text}")
    if sampler.packing == "best_fit":
        padding, num_cut = sampler.padding(), sampler.cut_documents()
        parts = []
        for source, rows in sampler.rows_per_epoch.items():
            parts.append(
                f"{source} {rows:,} rows per epoch, {100 * padding[source]:.2g}% of them padding,"
                f" {num_cut[source]:,} of {sampler.store.num_documents(source):,} documents cut"
            )
        lines.append(f"packing    best fit: {'; '.join(parts)}")
    return lines


def _sources_text(num_rows: int, sampler) -> str:
    """Share and epochs of each source in a run of `num_rows` rows."""
    shares = sampler.weights
    if sampler.changes:
        shares = {source: rows / num_rows for source, rows in sampler.rows_by_source(num_rows).items()}
    epochs = sampler.epochs(num_rows)
    parts = []
    for source in sampler.sources:
        share, tokens = 100 * shares[source], sampler.store.num_tokens(source)
        parts.append(f"{source} {share:.3g}% of the rows, {epochs[source]:.2f} epochs of {tokens:,} tokens")
    return "; ".join(parts)


def _memory_lines(parts: dict[str, float], advice: Callable[[Cluster], str | None] | None = None) -> list[str]:
    """advice: what to change if it does not fit the devices of this run."""
    total = sum(parts.values())
    text = ", ".join(f"{name} {byte_size(value)}" for name, value in parts.items())
    lines = [f"memory     about {byte_size(total)} per process: {text}"]
    cluster = _own_cluster()
    if cluster is not None and total > cluster.device.usable:
        words = advice(cluster) if advice else None
        if words is None:
            words = f"this GPU has {byte_size(cluster.device.memory)}: a smaller micro_batch, activation_checkpointing,"
            words += " or more ranks with zero or shard need less"
        lines.append(f"           {words}")
    return lines


def _own_cluster() -> Cluster | None:
    """The GPUs of this run; None without."""
    device = distributed.device()
    if device.type != "cuda":
        return None
    import torch

    properties = torch.cuda.get_device_properties(device)
    return devices.like(properties.name, properties.total_memory, distributed.world(), distributed.local_world())


def _disk_line(config, size: Size, folder) -> str:
    save = config.save
    one = cost.checkpoint_bytes(size, config.optimizer.kind)
    most = save.keep + 1 + save.keep_best  # one of them is being written
    if save.keep_every and config.steps:
        most += config.steps // save.keep_every
    free = shutil.disk_usage(folder).free
    return (
        f"disk       {byte_size(one)} per checkpoint, at most {most} at a time: {byte_size(most * one)};"
        f" {byte_size(free)} are free"
    )


def expected_seconds(config, flops: Flops, peak: float | None) -> float | None:
    """Of the whole run at the assumed MFU; None if the peak or the number of steps is unknown."""
    if peak is None or config.steps is None:
        return None
    return flops.full * config.steps * config.batch_size * config.sequence_length / (peak * ASSUMED_MFU)


# ---- finetuning ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a finetuning stage is about to compute."""

    data: str
    """Its steps, rows and epochs, in words."""
    tokens: float | None = None
    """Tokens that the whole stage trains on; None if only the run can tell."""
    forward_tokens: float = 0.0
    """Tokens that it only runs forward, at a third of the cost of training."""
    notes: tuple[str, ...] = ()
    """Further lines."""
    others: dict[str, Size] = field(default_factory=dict)
    """Further models in memory, by name."""

    def flops(self, per_token: Flops) -> float | None:
        return None if self.tokens is None else per_token.full * (self.tokens + self.forward_tokens / 3)

    def seconds(self, per_token: Flops, peak: float | None) -> float | None:
        """Of the whole stage at the assumed MFU; None if the peak or the number of tokens is unknown."""
        total = self.flops(per_token)
        return None if peak is None or total is None else total / (peak * ASSUMED_MFU)


def tuning_lines(config, model, size: Size, flops: Flops, peak: float | None, work: Work) -> list[str]:
    """The header of a stage that learns from records. peak: FLOP/s of all devices, if known."""
    model_config, layout = model.config, layouts.layout_here(config, model.config, size)
    lines = [
        model_line(model_config, size),
        f"data       {work.data}",
        f"schedule   {schedule_text(config.optimizer, config.schedule)}",
        layout_line(config, layout),
    ]
    if work.tokens is not None:
        estimate = time_estimate(work.seconds(flops, peak), peak)
        lines.append(f"compute    {work.flops(flops):.2e} FLOPs, {work.tokens:,.0f} tokens{estimate}")
    sequences = dataclasses.replace(layout, micro=layout.micro * config.sequences_per_row())
    length, sampling = config.sequence_length, config.sampling(distributed.world())
    parts = sampling_cost.stage_memory(model_config, size, length, sequences, work.others, sampling)
    lines += _memory_lines(parts, functools.partial(layouts.advice, config, model))
    saved = size.frozen_bytes - 2.0 * size.frozen
    if config.lora is not None and config.lora.base == "fp32" and config.precision == "bf16" and saved > NOTABLE_BYTES:
        lines.append(f"           lora.base: bf16 would keep the frozen weights in {byte_size(saved)} less")
    return [*lines, *work.notes]


# ---- both ------------------------------------------------------------------------------------------------------------


def model_line(model_config, size: Size) -> str:
    picked, experts = cost.routed(model_config)
    active = f"; {size.active:,} active per token ({picked} of {experts} experts)" if experts > 1 else ""
    adapted = ""
    if size.frozen:
        adapted = f"; {size.trained:,} trained ({size.trained / size.total:.2%}), {size.frozen:,} frozen"
    parts = f"{size.body:,} in layers, {size.embedding:,} in embeddings{active}{adapted}"
    return f"model      {size.total:,} parameters: {parts}"


def schedule_text(optimizer, schedule) -> str:
    """Optimizer, learning rate and warmup in words."""
    end = "" if schedule.kind == "constant" else f" to {schedule.min_ratio * optimizer.lr:.3g}"
    warmup = plural(schedule.warmup_steps, "step", ",")
    return f"{optimizer.kind}, {schedule.kind} from {optimizer.lr:.3g}{end}, warmup of {warmup}"


def layout_line(config, layout: cost.Layout) -> str:
    world = layout.ranks * layout.depth * layout.tensor * layout.context
    if layout.depth > 1:
        processes = f"pipeline {layout.depth} x {layout.ranks} data ranks"
    elif layout.zero is not None:
        processes = f"ZeRO-{layout.zero} over {world}"
    elif layout.shard is not None:
        processes = f"FSDP over {world}"
        if layout.tensor > 1:
            processes = f"FSDP over {layout.shard} x tensor {layout.tensor}"
        elif layout.context > 1:
            processes = f"FSDP over {layout.shard}, context {layout.context}"
        elif layout.shard < world:
            processes = f"FSDP over {layout.shard} x {world // layout.shard} copies"
    else:
        processes = f"data parallel over {world}" if world > 1 else "one process"
    micro_batches = plural(layout.accumulation, "micro-batch/micro-batches")
    unit = "step" if config.rows_of_update() == config.rows_of_step() else "update"
    return f"layout     {processes}; {micro_batches} of {layout.micro} rows per {unit} on each; {config.precision}"


def time_estimate(seconds: float | None, peak: float | None) -> str:
    """The end of a line: how long that will take, if it is known."""
    if seconds is None:
        return ""
    return f"; about {duration(seconds)} at {100 * ASSUMED_MFU:.0f}% of {peak / 1e12:,.4g} TFLOP/s (an assumption)"


def duration(seconds: float) -> str:
    """4.2 s, 12 min, 3.4 h, 21 days."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
