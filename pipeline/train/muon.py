"""Muon for the matrices inside the model, AdamW for embeddings, output layer, norms and biases (Jordan et al., 2024),
as one optimizer.

Muon orthogonalises a whole matrix's momentum, so it computes something else where a process holds a part of the matrix:
it is refused with ZeRO and pipelines (train/config.py). Its step is scaled to AdamW's size (`match_rms_adamw`, Liu et
al., 2025, section 2.2), so that both take the same learning rate. Experts of a mixture stand in one 3-D parameter,
which torch's Muon does not take: AdamW has them.
"""

import torch

from pipeline.core.errors import UserError
from pipeline.train.config import TrainConfig
from pipeline.train.engine import adamw, lr_scale


class Muon:
    """torch.optim.Muon and AdamW behind the names that the engine uses."""

    def __init__(self, model, config: TrainConfig, device: torch.device):
        tables = {
            id(layer.weight)
            for layer in (model.get_input_embeddings(), model.get_output_embeddings())
            if layer is not None
        }
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(lr_scale(parameter) != 1 for parameter in trained):
            raise UserError(
                "optimizer.kind: muon has a scaling of its own with the width; leave mup out of the model, or use adamw"
            )
        inner = [
            parameter
            for parameter in trained
            if parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in tables
        ]
        chosen = {id(parameter) for parameter in inner}
        options = config.optimizer
        self.parts = {
            "muon": torch.optim.Muon(
                inner,
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adamw": adamw([parameter for parameter in trained if id(parameter) not in chosen], config, device),
        }

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)
