"""`precision: fp8`: linear layers whose products are computed in 8-bit floats (Micikevicius et al., 2022), by torchao's
`convert_to_float8_training`; everything else as under `precision: bf16`.

Inputs and weights are rounded to e4m3 and gradients of outputs to e5m2, each tensor with a scale of its own that is
found before each product (dynamic, per tensor). A converted layer has the same parameters under the same names, in
fp32, so checkpoints and published models are those of other precisions.

Converted are the linear layers inside the decoder layers whose two widths are divisible by 16, which the kernels need.
Not converted: embeddings, the output layer, routers, and the experts of a mixture, which are no linear layers and stay
in bf16. Under FSDP weights are gathered in bf16 as before, and rounded to fp8 on each process.

Nothing here has been run on a GPU: tests emulate the products, rounded as the kernels do it, on a CPU.
"""

import torch
from torch import nn

from pipeline.core import distributed, optional_packages
from pipeline.core.errors import UserError
from pipeline.models.model_parts import decoder_layers

CAPABILITY = (8, 9)  # of NVIDIA's GPUs that multiply fp8: Ada and Hopper, and later ones
DIVISOR = 16  # of widths and of the tokens of a micro-batch


def check_package(subject: str) -> None:
    optional_packages.require("torchao", f"{subject}: precision: fp8", "use precision: bf16")


def check_device(subject: str) -> None:
    """Raise UserError unless this machine's GPU multiplies fp8."""
    found = _obstacle()
    if found:
        raise UserError(
            f"{subject}: precision: fp8 needs a GPU of compute capability 8.9 or higher (L40S, H100 and later), and"
            f" {found}; use precision: bf16"
        )


def _obstacle() -> str | None:
    device = distributed.device()
    if device.type != "cuda":
        return "this process computes on the CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    return None


def is_converted(module: nn.Module) -> bool:
    """Whether a module of a decoder layer is converted."""
    if not isinstance(module, nn.Linear):
        return False
    return module.in_features % DIVISOR == 0 and module.out_features % DIVISOR == 0


def convert(model, subject: str, *, emulate: bool = False) -> int:
    """Convert the layers of a model, in place; returns how many. emulate: without the hardware, by rounding numbers and
    multiplying in their own type. Raises UserError if there is nothing to convert."""
    if not emulate:
        check_package(subject)
        check_device(subject)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    options = Float8LinearConfig(emulate=emulate)  # gathers in fp8 are off by default
    count = 0
    for layer in decoder_layers(model):
        count += sum(map(is_converted, layer.modules()))
        convert_to_float8_training(layer, module_filter_fn=lambda module, _: is_converted(module), config=options)
    if not count:
        raise UserError(
            f"{subject}: precision: fp8 converts linear layers whose widths are divisible by {DIVISOR}, and the family"
            f" {model.config.model_type} at this size has none; use precision: bf16"
        )
    return count
