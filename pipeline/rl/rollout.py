"""Sampling from a causal language model in batches, with a key-value cache and one seed per row.

    completions = generate(model, prompts, max_new_tokens=16, temperature=1.0, stop_ids=[2, 5], pad_id=0, seeds=seeds)

Row i depends on (weights, prompts[i], seeds[i]) only, not on the other rows of its batch, nor on the number of
processes: its random numbers are a function of (seed, position). What remains is float noise (matrix products of other
shapes round differently), which changes a sampled token only if its random number is within that noise of the border
between two tokens.

The whole distribution is sampled, without top-k or top-p, because the log-probabilities of a truncated distribution are
not those that the trainer computes (the mean log ratio is off by the log of the kept mass).
"""

import inspect
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.core import accelerators
from pipeline.core.seeds import splitmix64
from pipeline.models.frozen import computing
from pipeline.rl.kv_cache import reserve

# Rows that have ended are dropped from the batch when this share of it is left: each drop copies the cache once.
DROP_AT = 0.75


@dataclass(frozen=True)
class Completion:
    """What was sampled after one prompt."""

    ids: list[int]
    """Token ids, the stop token included; never empty."""
    logprobs: list[float]
    """Log-probability of each at the sampling temperature (at temperature 1 for greedy)."""
    stopped: bool
    """Ended by a stop token, not by the limit of tokens."""


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    *,
    max_new_tokens: int | list[int],
    temperature: float,
    stop_ids: list[int],
    pad_id: int,
    seeds: list[int],
    batch: int = 64,
) -> list[Completion]:
    """Sample one completion for each prompt, in the order of `prompts`; temperature 0 takes the likeliest token.
    Without `stop_ids` each has `max_new_tokens`, of which a list has one for each prompt.

    `model` is a transformers causal LM; it is put into evaluation mode (no dropout) and back. `batch` rows are sampled
    at a time, prompts of similar length together, so that little is padded.
    """
    assert len(prompts) == len(seeds) and all(prompts), "each prompt needs a token and a seed"
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), row))
    completions: list[Completion | None] = [None] * len(prompts)
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            part = [prompts[row] for row in rows]
            own_limits = [limits[row] for row in rows]
            uniforms = uniform([seeds[row] for row in rows], max(own_limits))
            with computing(model):
                sampled = _sample_batch(part, model, own_limits, temperature, stop_ids, pad_id, uniforms)
            for row, completion in zip(rows, sampled, strict=True):
                completions[row] = completion
    finally:
        model.train(training)
    return completions


def uniform(seeds: list[int], length: int) -> np.ndarray:
    """Numbers in [0, 1), [len(seeds), length] float64: entry (i, t) is a function of (seeds[i], t). SplitMix64
    (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        steps = np.uint64(0x9E3779B97F4A7C15) * np.arange(1, length + 1, dtype=np.uint64)
        state = splitmix64(np.array(seeds, dtype=np.uint64)[:, None] + steps)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def left_pad(rows: list[list[int]], pad_id: int, device=None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask, position_ids), each [B, longest]; a padded row has the positions that it has
    alone."""
    longest = max(len(row) for row in rows)
    input_ids = torch.tensor([[pad_id] * (longest - len(row)) + list(row) for row in rows], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return input_ids, attention_mask, (attention_mask.cumsum(1) - 1).clamp(min=0)


def _sample_batch(prompts, model, limits, temperature, stop_ids, pad_id, uniforms, once=True) -> list[Completion]:
    """limits: most new tokens of each. once: equal prompts, as algorithms over groups have them, are read once."""
    device = next(model.parameters()).device
    parameters = inspect.signature(model.forward).parameters
    places: dict[tuple, int] = {}
    for prompt in prompts:
        places.setdefault(tuple(prompt), len(places))
    source = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)
    distinct = list(places) if once else prompts
    input_ids, mask, positions = left_pad(distinct, pad_id, device)
    width, max_new_tokens = input_ids.shape[1], max(limits)
    mask = torch.cat([mask, mask.new_ones(len(distinct), max_new_tokens)], 1)
    stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
    draws = torch.from_numpy(uniforms).to("cpu" if device.type == "mps" else device)  # no fp64 on mps
    tokens_BT = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    logprobs_BT = torch.zeros((len(prompts), max_new_tokens), device=device)
    limits_B = torch.tensor(limits, device=device)
    lengths = limits_B.clone()
    # Rows that are still in the batch, and which of those have not stopped
    active = torch.arange(len(prompts), device=device)
    live = torch.ones(len(prompts), dtype=torch.bool, device=device)
    cache, step_ids, step_positions = None, input_ids, positions
    for t in range(max_new_tokens):
        extra = {}
        if "position_ids" in parameters:  # families that have only relative positions (bloom) use the mask
            extra["position_ids"] = step_positions
        if "logits_to_keep" in parameters:
            extra["logits_to_keep"] = 1
        outputs = model(
            input_ids=step_ids, attention_mask=mask[:, : width + t], past_key_values=cache, use_cache=True, **extra
        )
        if t == 0 and len(distinct) < len(prompts) and not hasattr(outputs.past_key_values, "batch_select_indices"):
            # Rows of this cache cannot be copied, so each prompt is read.
            return _sample_batch(prompts, model, limits, temperature, stop_ids, pad_id, uniforms, once=False)
        cache, logits = outputs.past_key_values, outputs.logits[:, -1]
        if t == 0 and len(distinct) < len(prompts):
            cache.batch_select_indices(source)
            logits, mask, step_positions = logits[source], mask[source], step_positions[source]
        if t == 0:
            reserve(cache, width + max_new_tokens - 1)  # the last token is not read
        chosen, logprobs = choose(logits, temperature, draws[active.to(draws.device), t])
        rows = active[live]
        tokens_BT[rows, t], logprobs_BT[rows, t] = chosen[live], logprobs[live]
        ended = live & (torch.isin(chosen, stops) | (limits_B[active] == t + 1))
        lengths[active[ended]] = t + 1
        live = live & ~ended
        remaining = int(live.sum())
        if remaining == 0 or t + 1 == max_new_tokens:
            break
        # Rows that have ended get no further positions: the model may have none.
        step_ids, step_positions = chosen[:, None], step_positions[:, -1:] + live[:, None].long()
        if remaining <= DROP_AT * len(active) and hasattr(cache, "batch_select_indices"):
            kept = live.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            active, live, mask = active[kept], live[kept], mask[kept]
            step_ids, step_positions = step_ids[kept], step_positions[kept]
    completions = []
    for ids, logprobs, length in zip(tokens_BT.tolist(), logprobs_BT.tolist(), lengths.tolist(), strict=True):
        completions.append(Completion(ids[:length], logprobs[:length], ids[length - 1] in stop_ids))
    return completions


def choose(logits_BV: torch.Tensor, temperature: float, draws_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(token [B], its log-probability [B] in fp32), by inverse transform of the uniform numbers `draws_B` (float64).
    Temperature 0: the likeliest token."""
    logits_BV = logits_BV.float()
    if temperature == 0:
        chosen = logits_BV.argmax(-1)
        return chosen, logits_BV.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    logprobs_BV = (logits_BV / temperature).log_softmax(-1)
    # In float64: over a vocabulary of 100,000, a sum in float32 loses the tokens of the tail.
    cumulative_BV = accelerators.double(logprobs_BV).exp().cumsum(-1)
    thresholds_B1 = (draws_B * cumulative_BV[:, -1])[:, None]
    chosen = torch.searchsorted(cumulative_BV, thresholds_B1, right=True)[:, 0]
    chosen = chosen.clamp(max=logits_BV.shape[-1] - 1).to(logits_BV.device)
    return chosen, logprobs_BV.gather(-1, chosen[:, None])[:, 0]
