"""Room for sampling where the layout splits weights: each process gathers the complete policy once per iteration,
samples and measures its share of the prompts, and drops it.

Sampling with weights that are gathered layer by layer would send the whole model for every token: 13 GB per token of a
7B, ten times what reading it from the GPU's own memory takes. So the complete policy has to fit, and a stage for which
it does not is refused before it starts.
"""

import dataclasses

from pipeline.core.errors import UserError
from pipeline.core.terminal import byte_size
from pipeline.models import cost, sampling_cost
from pipeline.models.devices import RESERVED
from pipeline.train import distributed, layouts


def describe(config, model, others: dict[str, cost.Size]) -> tuple[str, ...]:
    """Lines of the header that say how the stage samples; none if every process has the complete policy anyway. others:
    further models in memory. Raises UserError if a GPU has no room for the policy."""
    if not config.parallel.splits_weights:
        return ()
    import torch

    size, world, device = cost.count(model), distributed.world(), distributed.device()
    layout = layouts.layout_of(config, model.config, size, world, device.type)
    shard = config.parallel.group_size(world, distributed.local_world())
    layout = dataclasses.replace(layout, shard=shard)
    gathered = sampling_cost.gathered_bytes(model.config, size, layout)
    if device.type == "cuda":
        kept = sampling_cost.kept_bytes(size, layout)
        kept += sum(sampling_cost.others_bytes(model.config, layout, others, online=True).values())
        require(config.kind, gathered, kept, torch.cuda.get_device_properties(device).total_memory)
    still = [name for name, other in others.items() if not other.trained]
    text = f"sampling   each process gathers the policy once per iteration ({byte_size(gathered)}) and drops it after"
    text += " sampling and measuring"
    if still:
        text += f"; {' and '.join(still)}: a part on each process, gathered one after the other"
    return (text,)


def require(kind: str, gathered: float, kept: float, memory: float) -> None:
    """Raise UserError if a device of `memory` bytes cannot hold the complete policy beside what it keeps."""
    room = memory - RESERVED - kept
    if gathered > room:
        raise UserError(
            f"stage {kind}: to sample, each process gathers the complete policy, {byte_size(gathered)}, and its GPU has"
            f" {byte_size(max(0.0, room))} left beside {byte_size(kept)} of weights, moments and other models; use GPUs"
            " with more memory, more processes, or a smaller model"
        )
