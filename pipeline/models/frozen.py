"""How the frozen weights of a model with adapters (models/lora.py) are kept in memory: in fp32, in bf16, or in 4 bits.

    store(model, "nf4", "bf16", device, trained=("score",))     # before the adapters are attached
    with computing(model): ...                                  # calls of the model outside an engine
    matrix(layer)                                               # a linear layer's weight as it is multiplied

A frozen weight gets no update, so it needs no fp32 master. In bf16 it has the values to which autocast would cast it at
every use, so the matrix products of a run are the same, and autocast keeps no copies until the backward pass. The
output of an embedding in bf16 is cast back, so that the residual stream stays fp32.

nf4 is QLoRA (Dettmers et al., 2023) by bitsandbytes, as transformers and peft use it: normal floats of 4 bits in blocks
of 64 with one scale each, the scales themselves in 8 bits (double quantisation), and products in the type of autocast.
Linear layers except the output layer are quantised; the rest is as with bf16.
"""

import contextlib
import functools
import logging

import torch
from torch import nn

from pipeline.core import optional_packages

BLOCK = 64  # weights with one scale
# A weight of 4 bits, its part of a scale of 8 bits, and of that scale's own, one fp32 number for 256 of them.
NF4_BYTES = 0.5 + 1 / BLOCK + 4 / (BLOCK * 256)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def require(base: str, subject: str) -> None:
    """Raise UserError if weights cannot be kept as `base` says on this machine. subject: the key, for the message."""
    if base == "nf4":
        optional_packages.require("bitsandbytes", f"{subject}: nf4", "use base: bf16")


# ---- 4 bits ----------------------------------------------------------------------------------------------------------


@functools.cache
def _bitsandbytes():
    # On CPUs with bf16 instructions it warns that a kernel for inference cannot be downloaded; it is not used here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


class FourBit:
    """Mixed into the class of a linear layer whose weight is kept in 4 bits. bitsandbytes' own Linear4bit returns the
    type of its input, which is fp32 after a norm; this returns that of autocast, like every other linear layer."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _bitsandbytes().matmul_4bit(
            inputs.to(dtype), self.weight, quant_state=self.weight.quant_state, bias=bias
        )


@functools.cache
def _four_bit_class(base: type) -> type:
    return type(f"FourBit{base.__name__}", (FourBit, base), {})


def _quantise(weight: torch.Tensor, dtype: torch.dtype, device: torch.device):
    """A weight [out, in] in 4 bits, on the device. dtype: in which it will be multiplied."""
    library = _bitsandbytes()
    values = weight.detach().to(device, torch.float32).contiguous()
    packed, state = library.functional.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    return library.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, blocksize=BLOCK, quant_type="nf4", bnb_quantized=True
    )


def _dequantised(parameter: torch.Tensor) -> torch.Tensor:
    """[out, in], fp32, with the values that are multiplied."""
    return _bitsandbytes().functional.dequantize_4bit(parameter.data, parameter.quant_state).float()


# ---- any linear layer ------------------------------------------------------------------------------------------------


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as [in, out]: GPT-2's Conv1D, unless it is in 4 bits."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D) and not isinstance(layer, FourBit)


def widths(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if isinstance(layer, FourBit):
        num_outputs, num_inputs = layer.weight.quant_state.shape
    elif is_transposed(layer):
        num_inputs, num_outputs = layer.weight.shape
    else:
        num_outputs, num_inputs = layer.weight.shape
    return num_inputs, num_outputs


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, [out, in], fp32."""
    if isinstance(layer, FourBit):
        return _dequantised(layer.weight)
    weight = layer.weight.float()
    return weight.T if is_transposed(layer) else weight


def numel(parameter: torch.Tensor) -> int:
    """Weights in a parameter; one in 4 bits has two in each of its bytes."""
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes' parameters
    return parameter.numel() if state is None else state.shape.numel()


def nbytes(parameter: torch.Tensor) -> float:
    """Bytes of a parameter, scales included."""
    if getattr(parameter, "quant_state", None) is None:
        return parameter.nbytes
    return NF4_BYTES * numel(parameter)


# ---- a model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def store(model, base: str, precision: str, device: torch.device, trained: tuple[str, ...] = ()) -> None:
    """Keep the weights of a model as `base` says, all but those of the modules `trained`; vectors stay in fp32.
    precision: in which the model computes. With nf4 the model is moved to the device, layer by layer, so that a GPU
    never holds it in fp32."""
    if base == "fp32":
        return
    modules = {name: module for name, module in model.named_modules() if not _inside(name, trained)}
    if base == "nf4":
        require(base, "lora.base")
        for layer in linear_layers(model, modules):
            _to_four_bits(layer, DTYPES[precision], device)
    if precision == "bf16":
        _to_bf16(model, modules)
    if base == "nf4":
        model.to(device)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def linear_layers(model, modules: dict[str, nn.Module] | None = None) -> list[nn.Module]:
    """The layers that nf4 quantises: all linear layers but the output layer, whose weight may be the embedding's too.
    modules: among these only, by name."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    candidates = model.modules() if modules is None else modules.values()
    return [layer for layer in candidates if isinstance(layer, (nn.Linear, Conv1D)) and layer is not output]


def _to_four_bits(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    weight = layer.weight.T if is_transposed(layer) else layer.weight
    layer.weight = _quantise(weight, dtype, device)
    layer.__class__ = _four_bit_class(type(layer))


def _to_bf16(model, modules: dict[str, nn.Module]) -> None:
    """Matrices of linear layers, plain embeddings and routed experts in bf16. Other modules may compute with their
    weights in their own way, so those stay, and with them what they share."""
    from transformers.pytorch_utils import Conv1D

    from pipeline.models.experts import MATRICES

    cast: dict[int, nn.Parameter] = {}
    kept: set[int] = set()
    for name, module in model.named_modules():
        is_plain = isinstance(module, (nn.Linear, Conv1D)) or type(module) is nn.Embedding
        for key, parameter in module.named_parameters(recurse=False):
            is_expert = parameter.dim() == 3 and key in MATRICES
            if name in modules and parameter.is_floating_point() and (is_plain and parameter.dim() == 2 or is_expert):
                cast[id(parameter)] = parameter
            else:
                kept.add(id(parameter))
    for identity, parameter in cast.items():
        if identity not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in modules.values():
        if type(module) is nn.Embedding and module.weight.dtype == torch.bfloat16:
            module.register_forward_hook(_as_fp32)


def _as_fp32(module, inputs, output: torch.Tensor) -> torch.Tensor:
    return output.float()


def computing(model):
    """A context in which a model can be called outside an engine: bf16 autocast if it keeps weights in bf16."""
    device = next(model.parameters()).device.type
    in_bf16 = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    return torch.autocast(device, torch.bfloat16) if in_bf16 else contextlib.nullcontext()


@torch.no_grad()
def copy_dequantised(source, target) -> None:
    """Give the layers of `target`, a model in fp32, the weights that those of `source` are multiplied with, where these
    are in 4 bits."""
    for name, layer in source.named_modules():
        if isinstance(layer, FourBit):
            weight, other = matrix(layer), target.get_submodule(name)
            other.weight.copy_(weight.T if is_transposed(other) else weight)


@torch.no_grad()
def round_as(model, base: str, precision: str) -> None:
    """Change the weights of a model in fp32 to what they are multiplied with if they are kept as `base` says."""
    if base != "nf4":
        return
    require(base, "an adapter that was trained with lora.base")
    for layer in linear_layers(model):
        weight = layer.weight.T if is_transposed(layer) else layer.weight
        rounded = _dequantised(_quantise(weight, DTYPES[precision], weight.device))
        layer.weight.copy_(rounded.T if is_transposed(layer) else rounded)
