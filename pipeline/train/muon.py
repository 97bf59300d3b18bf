"""Muon for the matrices inside the model, AdamW for embeddings, output layer, norms and biases (Jordan et al., 2024),
as one optimizer.

Muon orthogonalises the momentum of a complete matrix, so it would compute something else if a process held a part of
the matrix: it is refused with ZeRO and pipelines (train/config.py). Its step is scaled to the size of AdamW's
(`match_rms_adamw`, Liu et al., 2025, section 2.2), so both use the same learning rate. The experts of a layer are one
3-D parameter, which torch's Muon does not take: AdamW trains them.

torch's Muon multiplies in bf16. A processor without instructions for it takes seven times longer than in fp32
(docs/log.md, 49), so there it multiplies in fp32, which is also more exact.
"""

import math

import torch

from pipeline.core.errors import UserError
from pipeline.train.config import TrainConfig
from pipeline.train.engine import adamw, lr_scale, multiplies_bf16


def product_dtype(device: torch.device) -> torch.dtype:
    """In which Newton-Schulz multiplies."""
    return torch.bfloat16 if multiplies_bf16(device) else torch.float32


class MatrixMuon(torch.optim.Muon):
    """torch.optim.Muon whose products have a dtype of choice."""

    def __init__(self, parameters, dtype: torch.dtype, **options):
        super().__init__(parameters, adjust_lr_fn="match_rms_adamw", **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        if self.dtype == torch.bfloat16:
            return super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: torch.Tensor, group: dict) -> None:
        """One step of a matrix [rows, columns], as torch computes it."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalised(update, self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = float(group["lr"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(max(parameter.shape)))


def orthogonalised(
    matrix: torch.Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The nearest matrix [rows, columns] whose singular values are near 1, by Newton-Schulz iterations (Jordan et al.,
    2024)."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.to(dtype, copy=True)
    found = found.T if is_tall else found
    found.div_(found.norm().clamp(min=eps))
    for _ in range(steps):
        gram = found @ found.T
        gram_update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.addmm(found, gram_update, found, beta=a)
    return found.T if is_tall else found


class Muon:
    """MatrixMuon and AdamW with the methods that the engine uses."""

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
            "muon": MatrixMuon(
                matrices,
                product_dtype(device),
                lr=options.lr,
                momentum=options.momentum,
                weight_decay=options.weight_decay,
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
