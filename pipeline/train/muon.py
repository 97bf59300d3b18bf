"""Muon for the matrices inside the model, AdamW for embeddings, output layer, norms and biases (Jordan et al., 2024),
as one optimizer.

Muon orthogonalises the momentum of a complete matrix, so it would compute something else if a process held a part of
the matrix: it is refused with ZeRO and pipelines (train/config.py). Its step is scaled to the size of AdamW's
(`match_rms_adamw`, Liu et al., 2025, section 2.2), so both use the same learning rate. The experts of a layer are one
3-D parameter, which torch's Muon does not take: AdamW trains them.
"""

import torch

from pipeline.core.errors import UserError
from pipeline.train.config import TrainConfig
from pipeline.train.engine import adamw, lr_scale


class Muon:
    """torch.optim.Muon and AdamW with the methods that the engine uses."""

    def __init__(self, model, config: TrainConfig, device: torch.device):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        tables = {id(layer.weight) for layer in ends if layer is not None}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(lr_scale(parameter) != 1 for parameter in trained):
            raise UserError(
                "optimizer.kind: muon scales its steps with the width itself; remove mup from the model block, or use"
                " adamw"
            )
        matrices, others = [], []
        for parameter in trained:
            is_matrix = parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in tables
            if is_matrix:
                matrices.append(parameter)
            else:
                others.append(parameter)
        options = config.optimizer
        self.parts = {
            "muon": torch.optim.Muon(
                matrices,
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            "adamw": adamw(others, config, device),
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
