"""Room for sampling: the keys and values of the rows that are sampled at a time, and, where the layout splits weights,
the complete policy, which each process gathers once per iteration to sample and measure its share of the prompts.

Sampling with weights that are gathered layer by layer would send the whole model for every token: 13 GB per token of a
7B, ten times what reading it from the GPU's own memory takes. So the complete policy has to fit, with its cache at the
last token of the longest row, and a stage for which these do not fit is refused before it starts.
"""

import dataclasses

import torch

from pipeline.core import distributed
from pipeline.core.errors import UserError
from pipeline.core.terminal import byte_size
from pipeline.models import cost, sampling_cost
from pipeline.models.cost import Layout, Size
from pipeline.models.devices import RESERVED
from pipeline.models.sampling_cost import Sampling
from pipeline.train import layouts


def describe(config, model, others: dict[str, Size], longest: int) -> tuple[str, ...]:
    """Lines of the header that say how the stage samples; none if every process has the complete policy anyway. others:
    further models in memory. longest: tokens of the longest prompt. Raises UserError if a GPU has no room for the
    policy and its cache."""
    size, world, device = cost.count(model), distributed.world(), distributed.device()
    layout = layouts.layout_here(config, model.config, size)
    if device.type == "cuda":
        kept = sampling_cost.kept_bytes(size, layout)
        sampling = config.sampling(world)
        in_memory, _ = sampling_cost.split_on_demand(others, sampling)
        kept += sum(sampling_cost.others_bytes(model.config, layout, in_memory, online=True).values())
        memory = torch.cuda.get_device_properties(device).total_memory
        if config.rollout.engine == "vllm":  # the server has its own keys and values
            sampling = dataclasses.replace(sampling, rows=0)
        require(config.kind, model.config, size, layout, sampling, longest, kept, memory)
    if not config.parallel.splits_weights:
        return ()
    gathered = sampling_cost.gathered_bytes(model.config, size, layout)
    still = [name for name, other in others.items() if not other.trained]
    text = f"sampling   each process gathers the policy once per iteration ({byte_size(gathered)}) and drops it after"
    text += " sampling and measuring"
    if still:
        where = "read from their files" if config.on_demand else "a part on each process, gathered"
        text += f"; {' and '.join(still)}: {where} one after the other"
    return (text,)


def require(
    kind: str, model_config, size: Size, layout: Layout, sampling: Sampling, longest: int, kept: float, memory: float
) -> None:
    """Raise UserError if a device of `memory` bytes cannot sample beside the `kept` bytes that it has of weights,
    moments and other models: the complete policy, and the keys and values of `sampling.rows` rows of `longest` prompt
    tokens and as many new ones as a response may have."""
    room = max(0.0, memory - RESERVED - kept)
    length = longest + sampling.new_tokens

    def parts(rows: int) -> dict[str, float]:
        fewer = dataclasses.replace(sampling, rows=rows)
        return sampling_cost.sampling_bytes(model_config, size, length, layout, fewer)

    needed = parts(sampling.rows)
    if sum(needed.values()) <= room:
        return
    rows = sampling.rows
    while rows and sum(parts(rows).values()) > room:
        rows //= 2
    does = []
    if needed["gathered"]:
        does.append(f"gathers the complete policy, {byte_size(needed['gathered'])}")
    if sampling.rows:
        cache = f"keys and values of {sampling.rows} rows of {length:,} tokens, {byte_size(needed['keys and values'])}"
        does.append(f"keeps {cache}, with {byte_size(needed['temporary'])} to compute the next ones")
    advice = "use GPUs with more memory, more processes, or a smaller model"
    if rows:
        advice = f"use {sampling.key}: {rows}, which changes no result"
    raise UserError(
        f"stage {kind}: to sample, each process {' and '.join(does)}; its GPU has {byte_size(room)} left"
        f" beside {byte_size(kept)} of weights, moments and other models; {advice}"
    )
