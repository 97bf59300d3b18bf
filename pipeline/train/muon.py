"""Muon for the matrices inside the model, AdamW for embeddings, output layer, norms and biases (Jordan et al., 2024),
as one optimizer.

Muon orthogonalises the momentum of a complete matrix. Under FSDP, where a process holds some rows of each, they are put
together for it (train/muon_sharded.py); with ZeRO and pipelines it is refused (train/config.py). Its step is scaled to
the size of AdamW's
(`match_rms_adamw`, Liu et al., 2025, section 2.2), so both use the same learning rate. The experts of a layer are one
3-D parameter, which torch's Muon does not take: AdamW trains them.

torch's Muon multiplies in bf16. A processor without instructions for it takes seven times longer than in fp32
(docs/log.md, 49), so there it multiplies in fp32, which is also more exact; `optimizer.products` decides it for all.
"""

import math

import torch

from pipeline.core.errors import UserError
from pipeline.train.config import TrainConfig
from pipeline.train.engine import adamw, lr_scale, multiplies_bf16


def product_dtype(device: torch.device, products: str = "auto") -> torch.dtype:
    """In which Newton-Schulz multiplies. products: `optimizer.products` of the recipe."""
    if products == "auto":
        products = "bf16" if multiplies_bf16(device) else "fp32"
    return torch.bfloat16 if products == "bf16" else torch.float32


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
        update = self._direction(parameter, group)
        update = orthogonalised(update, self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"])
        self._apply(parameter, update, max(parameter.shape), group)

    def _direction(self, parameter: torch.Tensor, group: dict) -> torch.Tensor:
        """What is orthogonalised: the momentum with this gradient, and with Nesterov's once more. Element by element,
        so that a process computes it of the elements that it holds."""
        state, gradient = self.state[parameter], parameter.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum

    def _apply(self, parameter: torch.Tensor, update: torch.Tensor, longest: int, group: dict) -> None:
        """longest: the larger dimension of the complete matrix."""
        rate = float(group["lr"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.add_(update, alpha=-rate * 0.2 * math.sqrt(longest))


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


def orthogonalised_batch(
    matrices: torch.Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """The same of several matrices of one shape [count, rows, columns], in batched products."""
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.to(dtype, copy=True)
    found = found.mT if is_tall else found
    found.div_(torch.linalg.vector_norm(found, dim=(1, 2), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = found @ found.mT
        gram_update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, gram_update, found, beta=a)
    return found.mT if is_tall else found


def matrix_names(model) -> set[str]:
    """The parameters that Muon trains: matrices, but for the input and output tables. Raises UserError with mu-P."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(layer.weight) for layer in ends if layer is not None}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(lr_scale(parameter) != 1 for parameter in trained.values()):
        raise UserError(
            "optimizer.kind: muon scales its steps with the width itself; remove mup from the model block, or use adamw"
        )
    names = set()
    for name, parameter in trained.items():
        if parameter.ndim == 2 and min(parameter.shape) > 1 and id(parameter) not in tables:
            names.add(name)
    return names


def options_of(config: TrainConfig) -> dict:
    """What torch's Muon calls the recipe's keys."""
    options = config.optimizer
    return {"lr": options.lr, "momentum": options.momentum, "weight_decay": options.weight_decay}


def of_model(model, config: TrainConfig, device: torch.device) -> "Muon":
    """The optimizer of a model whose parameters are complete on this process."""
    names = matrix_names(model)
    parameters = dict(model.named_parameters())
    matrices = [parameter for name, parameter in parameters.items() if name in names]
    others = [parameter for name, parameter in parameters.items() if name not in names]
    dtype = product_dtype(device, config.optimizer.products)
    return Muon([MatrixMuon(matrices, dtype, **options_of(config))] if matrices else [], others, config, device)


class Muon:
    """Optimizers of matrices, and AdamW for the others, with the methods that the engine uses."""

    def __init__(self, matrices: list[MatrixMuon], others: list, config: TrainConfig, device: torch.device):
        self.parts: list[torch.optim.Optimizer] = list(matrices)
        if any(parameter.requires_grad for parameter in others):
            self.parts.append(adamw(others, config, device))

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)
