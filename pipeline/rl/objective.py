"""What an online algorithm is to an iteration (iteration.py): ppo_objective.py and group_objective.py each give one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.rl.responses import Sample

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Objective:
    """An algorithm's part in an iteration. `config` is the stage's, `state` that of the run, which is in checkpoints.
    B responses of at most T tokens."""

    scores: Callable[[object, list[Sample], dict], torch.Tensor]
    """(config, samples, state) -> what is maximised, [B], without the KL."""
    signal: Callable[[object, Tensors, torch.Tensor, float], Tensors]
    """(config, measurements [B, T], scores [B], KL coefficient) -> what the losses read, [B, T]."""
    row_weights: Callable[[object, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]
    """(config, lengths [N], whether each ended by itself [N], whether it is young enough [N]) -> weight of each of the
    responses of an update, [N]; None: 1. The engine divides by all their tokens."""
    after: Callable[[object, float | None, dict], None]
    """(config, KL in nats per response, state): called at the end of an iteration."""
