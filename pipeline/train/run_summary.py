"""What follows from the recipe of a stage that trains, printed before its first step: parameters, tokens, FLOPs, time,
and for pretraining memory and disk."""

import shutil
from dataclasses import dataclass

from pipeline.core.terminal import byte_size, many
from pipeline.models import cost
from pipeline.models.cost import Flops, Size
from pipeline.models.families import family_of
from pipeline.train import chunked_loss, distributed

# of the peak; what well-tuned dense models of 1B and more reach on one node (torchtitan reports 0.38-0.50 on H100)
ASSUMED_MFU = 0.4


def layout_of(config, model_config) -> cost.Layout:
    depth = config.parallel.pipeline
    ranks = distributed.world() // depth
    micro = config.micro_batch or config.batch_size // ranks
    chunk = config.loss_chunk if family_of(model_config).chunked_loss else None
    return cost.Layout(
        ranks=ranks,
        depth=depth,
        zero=config.parallel.zero,
        micro=micro,
        accumulation=config.batch_size // ranks // micro,
        precision=config.precision,
        optimizer=config.optimizer.kind,
        checkpointing=config.activation_checkpointing,
        attention=config.attention,
        head_rows=chunked_loss.chunk_of(model_config.vocab_size, distributed.device().type)
        if chunk == "auto"
        else chunk,
        offload=config.parallel.offload,
    )


def expected_seconds(config, flops: Flops, peak: float | None) -> float | None:
    """Of the whole run at the assumed MFU; None where no peak or no number of steps is known."""
    if peak is None or config.steps is None:
        return None
    return flops.full * config.steps * config.batch_size * config.sequence_length / (peak * ASSUMED_MFU)


@dataclass(frozen=True)
class Work:
    """What a tuning stage is about to compute."""

    data: str
    """Its steps, rows and epochs, in words."""
    tokens: float | None = None
    """Tokens that the whole stage trains on; None where only the run can tell."""
    forward_tokens: float = 0.0
    """Tokens that it only runs forward, at a third of the cost of training."""
    updates: int = 1
    """Updates that the rows of a step are shared out to."""
    notes: tuple[str, ...] = ()
    """Further lines."""

    def flops(self, of_a_token: Flops) -> float | None:
        return None if self.tokens is None else of_a_token.full * (self.tokens + self.forward_tokens / 3)

    def seconds(self, of_a_token: Flops, peak: float | None) -> float | None:
        """Of the whole stage at the assumed MFU; None where no peak or no number of tokens is known."""
        total = self.flops(of_a_token)
        return None if peak is None or total is None else total / (peak * ASSUMED_MFU)


def tuning_lines(config, model_config, size: Size, flops: Flops, peak: float | None, work: Work) -> list[str]:
    """The header of a stage that learns from records. peak: FLOP/s of all devices, if known."""
    ranks = distributed.world()
    rows = config.batch_size // work.updates // ranks
    micro = config.micro_batch or rows
    layout = cost.Layout(ranks=ranks, zero=config.parallel.zero, micro=micro, accumulation=rows // micro)
    found = [
        model_line(model_config, size),
        f"data       {work.data}",
        f"schedule   {schedule_text(config.optimizer, config.schedule)}",
        layout_line(config, layout),
    ]
    if work.tokens is not None:
        estimate = guessed(work.seconds(flops, peak), peak)
        found.append(f"compute    {work.flops(flops):.2e} FLOPs, {work.tokens:,.0f} tokens{estimate}")
    return [*found, *work.notes]


def model_line(model_config, size: Size) -> str:
    picked, experts = cost.routed(model_config)
    active = f"; {size.active:,} active for a token ({picked} of {experts} experts)" if experts > 1 else ""
    trained = size.total - size.frozen
    adapted = f"; {trained:,} trained ({trained / size.total:.2%})" if size.frozen else ""
    parts = f"{size.body:,} in layers, {size.embedding:,} in embeddings{active}{adapted}"
    return f"model      {size.total:,} parameters: {parts}"


def schedule_text(optimizer, schedule) -> str:
    """Optimizer, learning rate and warmup in words."""
    end = "" if schedule.kind == "constant" else f" to {schedule.min_ratio * optimizer.lr:.3g}"
    warmup = many(schedule.warmup_steps, "step", ",")
    return f"{optimizer.kind}, {schedule.kind} from {optimizer.lr:.3g}{end}, warmup of {warmup}"


def layout_line(config, layout: cost.Layout) -> str:
    world = layout.ranks * layout.depth
    if layout.depth > 1:
        where = f"pipeline {layout.depth} x {layout.ranks} data ranks"
    elif layout.zero is not None:
        where = f"ZeRO-{layout.zero} over {world}"
    else:
        where = f"data parallel over {world}" if world > 1 else "one process"
    return (
        f"layout     {where}; {layout.accumulation} micro-batch{'es' * (layout.accumulation > 1)} of {layout.micro}"
        f" rows a step on each; {config.precision}"
    )


def guessed(seconds: float | None, peak: float | None) -> str:
    """The end of a line: how long that will take, where it can be told."""
    if seconds is None:
        return ""
    return f"; about {duration(seconds)} at {100 * ASSUMED_MFU:.0f}% of {peak / 1e12:,.4g} TFLOP/s (an assumption)"


def lines(config, model_config, size: Size, flops: Flops, peak: float | None, sampler, folder) -> list[str]:
    """config: with steps, unless its horizon is a time. peak: FLOP/s of all devices, if known. folder: where
    checkpoints go."""
    layout = layout_of(config, model_config)
    step = config.batch_size * config.sequence_length
    found = [model_line(model_config, size)]
    if config.steps is None:
        found.append(
            f"data       {step:,} tokens a step ({config.batch_size} rows x {config.sequence_length}); how many steps"
            f" fit into {config.time} is said once the first ones have been timed"
        )
    else:
        tokens = config.steps * step
        found.append(
            f"data       {tokens:,} tokens = {config.steps:,} steps x {config.batch_size} rows x"
            f" {config.sequence_length}; {tokens / size.total:.1f} tokens a parameter (Chinchilla's optimum is"
            " about 20)"
        )
        rows = config.steps * config.batch_size
        epochs, given = sampler.epochs(rows), sampler.rows_by_source(rows)
        shares = sampler.weights if not sampler.changes else {source: count / rows for source, count in given.items()}
        told = [
            f"{source} {100 * shares[source]:.3g}% of the rows, {epochs[source]:.2f} epochs of"
            f" {sampler.store.num_tokens(source):,} tokens"
            for source in sampler.sources
        ]
        found.append("sources    " + "; ".join(told))
    for number, (first, _) in enumerate(sampler.changes, 1):
        weights = ", ".join(
            f"{source} {100 * weight:.3g}%" for source, weight in sampler.mixture.weights(number).items()
        )
        found.append(f"mixture    from row {first:,} ({first * config.sequence_length:,} tokens) on: {weights}")
    if sampler.packing == "best_fit":
        empty, cut = sampler.padding(), sampler.cut_documents()
        told = [
            f"{source} {rows:,} rows an epoch, {100 * empty[source]:.2g}% of them padding, {cut[source]:,} of"
            f" {sampler.store.num_documents(source):,} documents cut"
            for source, rows in sampler.rows_per_epoch.items()
        ]
        found.append("packing    best fit: " + "; ".join(told))
    found.append(
        f"schedule   {schedule_text(config.optimizer, config.schedule)}"
        f" ({config.schedule.warmup_steps * step:,} tokens)"
    )
    found.append(layout_line(config, layout))
    total = f"{flops.full * config.steps * step:.2e} FLOPs, " if config.steps else ""
    guess = guessed(expected_seconds(config, flops, peak), peak)
    found.append(f"compute    {total}{flops.full:.2e} a token, {flops.causal:.2e} with causal attention halved{guess}")
    parts = cost.memory(model_config, size, config.sequence_length, layout)
    found.append(
        f"memory     about {byte_size(sum(parts.values()))} a process: "
        + ", ".join(f"{name} {byte_size(value)}" for name, value in parts.items())
    )
    if distributed.device().type == "cuda":
        import torch

        there = torch.cuda.get_device_properties(distributed.device()).total_memory
        if sum(parts.values()) > there:
            found.append(
                f"           this GPU has {byte_size(there)}: a smaller micro_batch, activation_checkpointing, or more"
                " ranks under zero take less"
            )
    each = cost.checkpoint_bytes(size, config.optimizer.kind)
    save = config.save
    # and one being written
    kept = save.keep + 1 + save.keep_best + (config.steps // save.keep_every if save.keep_every and config.steps else 0)
    free = shutil.disk_usage(folder).free
    found.append(
        f"disk       {byte_size(each)} a checkpoint, at most {kept} at a time: {byte_size(kept * each)};"
        f" {byte_size(free)} are free"
    )
    return found + (sampler.warnings(config.steps * config.batch_size) if config.steps else [])


def duration(seconds: float) -> str:
    """4.2 s, 12 min, 3.4 h, 21 days."""
    for size, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"
