"""The memory of a stage that samples from the model it trains and reads the samples with further models: online RL.
Arithmetic, like cost.py.

    parts = stage_memory(config, size, sequence_length, layout, others, Sampling(rows=8, new_tokens=512))

A process is in one of three phases at a time: it samples, it measures the samples (log-probabilities, values, scores),
or it updates. What it needs is the states of all models and what the largest phase adds.
"""

import dataclasses
from dataclasses import dataclass

from pipeline.models import cost
from pipeline.models.cost import Layout, Size


@dataclass(frozen=True)
class Sampling:
    """What a process samples and measures at a time."""

    rows: int
    """Prompts with their responses."""
    new_tokens: int
    """Most tokens of a response; a row has sequence_length tokens at most."""
    on_demand: bool = False
    """Models that are only read are in memory one at a time, and only while they measure."""
    key: str = "rollout.batch"
    """Of the stage, that gives `rows`."""


def only_read(size: Size) -> Size:
    """Of a model that gets no gradients, as a stage keeps it for reading (rl/frozen_models.py)."""
    return dataclasses.replace(size, frozen=size.total, frozen_bytes=4.0 * size.total)


def stage_memory(
    config, size: Size, length: int, layout: Layout, others: dict[str, Size], sampling: Sampling | None
) -> dict[str, float]:
    """Bytes at the peak of a step on one process, by part. others: further models in memory, by name; those that are
    trained have the layout of the first. sampling: None for a stage that does not sample."""
    updating = cost.memory(config, size, length, layout)
    kept = {name: updating.pop(name) for name in ("weights", "gradients", "optimizer")}
    if _frees_gradients(layout):  # those of a model exist while it is updated
        updating["gradients"] = kept.pop("gradients")
    phases = [updating]
    if sampling is not None:
        phases += [sampling_bytes(config, size, length, layout, sampling)]
        phases += [measuring_bytes(config, size, length, layout, sampling)]
    in_memory, waiting = split_on_demand(others, sampling)
    if waiting:
        phases += [read_on_demand_bytes(config, size, length, layout, waiting, sampling)]
    kept |= others_bytes(config, layout, in_memory, sampling is not None)
    return kept | max(phases, key=lambda parts: sum(parts.values()))


def split_on_demand(others: dict[str, Size], sampling: Sampling | None) -> tuple[dict[str, Size], dict[str, Size]]:
    """(further models that stay in memory, those that are read when they are needed)."""
    if sampling is None or not sampling.on_demand:
        return others, {}
    trained = {name: other for name, other in others.items() if other.trained}
    return trained, {name: other for name, other in others.items() if not other.trained}


def read_on_demand_bytes(
    config, size: Size, length: int, layout: Layout, waiting: dict[str, Size], sampling: Sampling
) -> dict[str, float]:
    """While the largest of the models that wait in their files measures: it is complete, and the policy is not
    gathered. Without split weights it is read in fp32 before its matrices become bf16."""
    largest = max(waiting.values(), key=lambda other: other.total)
    parts = measuring_bytes(config, size, length, layout, sampling) | {"gathered": 0.0}
    complete = complete_bytes(config, largest, layout)
    if layout.splits_weights:
        return parts | {"read on demand": complete + complete / _readers(layout)}
    return parts | {"read on demand": max(complete, largest.weight_bytes)}


def others_bytes(config, layout: Layout, others: dict[str, Size], online: bool) -> dict[str, float]:
    """What a process keeps of further models in all phases. online: those that are only read are kept as online RL
    keeps them, and not as a teacher is."""
    parts = {}
    for name, other in others.items():
        if other.trained:
            parts[name] = kept_bytes(other, layout)
        elif online:
            parts[name] = complete_bytes(config, other, layout) / _readers(layout)
        else:
            parts[name] = teacher_bytes(config, other, layout)
    return parts


def teacher_bytes(config, size: Size, layout: Layout) -> float:
    """Of a model that reads each micro-batch as the one that is trained does (train/distillation.py). Where it is
    split, a layer and the next one are gathered. config: of the trained model, which has about as many layers."""
    item = 2.0 if layout.precision == "bf16" else 4.0
    if not layout.splits_weights:
        return item * size.total
    return item * (size.total / (layout.shard or layout.ranks) + 2 * size.body / config.num_hidden_layers)


def kept_bytes(size: Size, layout: Layout) -> float:
    """Of a model that is trained, while it is not updated."""
    parts = cost.state_bytes(size, layout)
    return sum(parts.values()) - (parts["gradients"] if _frees_gradients(layout) else 0.0)


def _frees_gradients(layout: Layout) -> bool:
    """Whether gradients exist only while a model is updated: those of DDP and DeepSpeed have buffers."""
    return layout.shard is not None or (layout.zero is None and layout.ranks == 1)


def _readers(layout: Layout) -> int:
    """Processes over which a model that is only read is split."""
    return layout.ranks if layout.splits_weights else 1


def complete_bytes(config, size: Size, layout: Layout) -> float:
    """Bytes of a complete model whose matrices are in bf16 where that changes no result: all but tables that are looked
    up, and an output layer that computes in chunks."""
    if layout.precision != "bf16":
        return size.weight_bytes
    multiplied = size.cast  # without tables that are only looked up
    if config.tie_word_embeddings:
        multiplied -= size.embedding
    elif layout.head_rows:
        multiplied -= size.embedding - size.lookup
    return size.weight_bytes - 2.0 * max(0, multiplied)


def gathered_bytes(config, size: Size, layout: Layout) -> float:
    """What a process gathers for sampling and measuring, in addition to its part of the weights."""
    if layout.shard:
        return complete_bytes(config, size, layout)
    return size.weight_bytes if layout.zero == 3 else 0.0


def sampling_bytes(config, size: Size, length: int, layout: Layout, sampling: Sampling) -> dict[str, float]:
    """While a batch is sampled: at its last token, when the cache is longest, or while the prompts are read."""
    rows, prompt = sampling.rows, length - sampling.new_tokens
    in_bf16 = layout.precision == "bf16"
    has_casts = in_bf16 and layout.shard is None and size.frozen_bytes == 4.0 * size.frozen
    keys, values, repeated = _cache_widths(config)
    layers, item = config.num_hidden_layers, 2.0 if in_bf16 else 4.0
    casts = 2.0 * size.cast if has_casts else 0.0  # autocast keeps one of each weight until the batch is sampled
    # While prompts are read, transformers' cache has keys and values as rotary positions leave them, in fp32; then they
    # are kept in the type of the arithmetic (rl/kv_cache.py).
    first, per_token = 4.0 * (keys + values), item * (keys + values)
    # A layer's cache while rows are dropped, and its keys and values for attention: repeated for each head.
    decoding = rows * length * (per_token + 2 * item * repeated) + 40.0 * rows * config.vocab_size
    reading = _forward_bytes(config, size, rows, prompt, item) + rows * prompt * 2 * item * repeated
    cache, temporary = rows * length * per_token * layers, decoding
    if rows * prompt * first * layers + reading > cache + temporary:
        cache, temporary = rows * prompt * first * layers, reading
    gathered = gathered_bytes(config, size, layout)
    return {"gathered": gathered, "keys and values": cache, "temporary": temporary + casts}


def measuring_bytes(config, size: Size, length: int, layout: Layout, sampling: Sampling) -> dict[str, float]:
    """While log-probabilities of a batch are computed, without gradients."""
    rows, item = sampling.rows, 2.0 if layout.precision == "bf16" else 4.0
    # per logit itself, its fp32 log-softmax and for the entropy that one's exponential; with chunks the weight's copy
    positions = rows * sampling.new_tokens
    logits = (item + 8.0) * min(positions, layout.head_rows or positions) * config.vocab_size
    logits += item * (size.embedding - size.lookup) if layout.head_rows else 0.0
    forward = _forward_bytes(config, size, rows, length, item)
    return {"gathered": gathered_bytes(config, size, layout), "logits": logits, "temporary": forward}


def _forward_bytes(config, size: Size, rows: int, length: int, item: float) -> float:
    """Of one layer that keeps nothing, while its feed-forward part computes: the fp32 residual and its norm, and three
    of the widest results; and the mask of rows of unequal length."""
    inner = cost.inner_width(config) * (cost.routed(config)[0] if size.experts else 1)
    return rows * length * (12.0 * config.hidden_size + 3 * item * inner) + 3.0 * rows * length**2


def _cache_widths(config) -> tuple[float, float, float]:
    """Widths of a layer's keys and values in the cache, and of values that are repeated for each head."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0.0, 0.0, 0.0
    queries, keys, values = cost.attention_widths(config, heads)
    share = keys / queries
    return keys, values * share, values
