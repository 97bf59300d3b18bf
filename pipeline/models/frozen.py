"""How the frozen weights of a model with adapters (models/lora.py) are kept in memory: in fp32, in bf16, or in 4 bits.

    store(model, "nf4", "bf16", device, trained=("score",))     # before the adapters are attached
    quantise(part, device)                                      # a part of a model that was on the meta device then
    with computing(model): ...                                  # calls of the model outside an engine
    matrix(layer)                                               # a linear layer's weight as it is multiplied

A frozen weight gets no update, so it needs no fp32 master. In bf16 it has the values to which autocast would cast it at
every use, so the matrix products of a run are the same, and autocast keeps no copies until the backward pass. The
output of an embedding in bf16 is cast back, so that the residual stream stays fp32.

nf4 is QLoRA (Dettmers et al., 2023) by bitsandbytes, as transformers and peft use it: normal floats of 4 bits in blocks
of 64 with one scale each, the scales themselves in 8 bits (double quantisation), and products in the type of autocast.
Linear layers except the output layer are quantised; the rest is as with bf16. The packed numbers are an ordinary
parameter, which engines may split over processes and gather like any other; the scales, 3% of the bytes, are beside it
on every process, because those of a layer are quantised together.
"""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
from torch import nn

from pipeline.core import optional_packages

BLOCK = 64  # weights with one scale
# A weight's part of a scale of 8 bits, and of that scale's own, one fp32 number for 256 of them.
NF4_SCALE_BYTES = 1 / BLOCK + 4 / (BLOCK * 256)
NF4_BYTES = 0.5 + NF4_SCALE_BYTES
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


class Scales:
    """What turns the packed numbers of a weight into the weight. Copies of a model share it."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        """In which the weight is multiplied."""
        self.state = None
        """bitsandbytes' QuantState; None before the weight is quantised."""

    def __deepcopy__(self, memo) -> "Scales":
        return self


class FourBit:
    """Mixed into the class of a linear layer whose weight is kept in 4 bits. bitsandbytes' own Linear4bit returns the
    type of its input, which is fp32 after a norm; this returns that of autocast, like every other linear layer."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        device = inputs.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(inputs.to(dtype), self.weight, self.scales.state, bias)


class _Product(torch.autograd.Function):
    """inputs @ weight.T + bias, of a packed weight and a bias that are frozen. bitsandbytes' own function keeps a view
    of the packed weight until the backward pass. ZeRO-3 drops what it has gathered by giving the parameter other
    memory, and views would keep that of all layers; autograd finds a saved parameter's memory of the moment."""

    @staticmethod
    def forward(context, inputs, weight, state, bias):
        context.save_for_backward(weight)
        context.state = state
        return _bitsandbytes().matmul_4bit(inputs, weight, quant_state=state, bias=bias)

    @staticmethod
    def backward(context, gradient):
        (weight,) = context.saved_tensors
        matrix = _bitsandbytes().functional.dequantize_4bit(weight, context.state)
        return gradient @ matrix.to(gradient.dtype), None, None, None


@functools.cache
def _four_bit_class(base: type) -> type:
    return type(f"FourBit{base.__name__}", (FourBit, base), {})


def _quantised(weight: torch.Tensor, dtype: torch.dtype, device: torch.device):
    """(a weight [out, in] in 4 bits as bytes, bitsandbytes' QuantState), on the device. dtype: in which it will be
    multiplied."""
    library = _bitsandbytes()
    values = weight.detach().to(device, torch.float32).contiguous()
    packed, state = library.functional.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    return packed, state


def _dequantised(packed: torch.Tensor, state) -> torch.Tensor:
    """[out, in], fp32, with the values that are multiplied."""
    return _bitsandbytes().functional.dequantize_4bit(packed.detach(), state).float()


def _is_packed(layer: nn.Module) -> bool:
    """Whether a layer's weight is in 4 bits already."""
    return isinstance(layer, FourBit) and layer.scales.state is not None


@torch.no_grad()
def quantise(part: nn.Module, device: torch.device) -> None:
    """Move a part of a model, which has values now, to the device, and quantise the weights that `store` has chosen:
    layer by layer, so that a GPU never holds them in fp32."""
    for layer in part.modules():
        if isinstance(layer, FourBit) and not _is_packed(layer):
            require("nf4", "lora.base")
            weight = layer.weight.T if is_transposed(layer) else layer.weight
            packed, layer.scales.state = _quantised(weight, layer.scales.dtype, device)
            layer.weight = nn.Parameter(packed, requires_grad=False)
    part.to(device)


# ---- any linear layer ------------------------------------------------------------------------------------------------


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as [in, out]: GPT-2's Conv1D, unless it is in 4 bits."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(layer, Conv1D) and not _is_packed(layer)


def widths(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    if _is_packed(layer):
        num_outputs, num_inputs = layer.scales.state.shape
    elif is_transposed(layer):
        num_inputs, num_outputs = layer.weight.shape
    else:
        num_outputs, num_inputs = layer.weight.shape
    return num_inputs, num_outputs


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, [out, in], fp32."""
    if _is_packed(layer):
        return _dequantised(layer.weight, layer.scales.state)
    weight = layer.weight.float()
    return weight.T if is_transposed(layer) else weight


def in_four_bits(model: nn.Module) -> dict[int, int]:
    """The parameters that are, or will be, in 4 bits: id -> how many weights it has."""
    found = {}
    for module in model.modules():
        if isinstance(module, FourBit):
            num_inputs, num_outputs = widths(module)
            found[id(module.weight)] = num_inputs * num_outputs
    return found


# ---- a model ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def store(model, base: str, precision: str, device: torch.device, trained: tuple[str, ...] = ()) -> None:
    """Keep the weights of a model as `base` says, all but those of the modules `trained`; vectors stay in fp32.
    precision: in which the model computes. With nf4 the model is moved to the device, layer by layer. A model on the
    meta device has no values that could be quantised: `quantise` must be called for each part that was filled."""
    if base == "fp32":
        return
    modules = {name: module for name, module in model.named_modules() if not _inside(name, trained)}
    if base == "nf4":
        for layer in linear_layers(model, modules):
            layer.scales = Scales(DTYPES[precision])
            layer.__class__ = _four_bit_class(type(layer))
    if precision == "bf16":
        _to_bf16(model, modules)
    if base == "nf4" and model.device.type != "meta":
        quantise(model, device)


def _inside(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def linear_layers(model, modules: dict[str, nn.Module] | None = None) -> list[nn.Module]:
    """The layers that nf4 quantises: all linear layers but the output layer, whose weight may be the embedding's too.
    modules: among these only, by name."""
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    candidates = model.modules() if modules is None else modules.values()
    return [layer for layer in candidates if isinstance(layer, (nn.Linear, Conv1D)) and layer is not output]


def _to_bf16(model, modules: dict[str, nn.Module]) -> None:
    """Matrices of linear layers, plain embeddings and routed experts in bf16. Other modules may compute with their
    weights in their own way, so those stay, and with them what they share; weights that will be in 4 bits stay too,
    because they are quantised from fp32."""
    from transformers.pytorch_utils import Conv1D

    from pipeline.models.experts import MATRICES

    cast: dict[int, nn.Parameter] = {}
    kept: set[int] = set()
    for name, module in model.named_modules():
        is_linear = isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, FourBit)
        is_plain = is_linear or type(module) is nn.Embedding
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
def round_like(trained, part: nn.Module, device: torch.device, global_name: Callable[[str], str] = str) -> None:
    """Change the weights of a part of a model in fp32 to what those of the model `trained` are multiplied with, where
    these are in 4 bits. device: where they were quantised. global_name: name of a module in the part -> in the whole
    model."""
    scales = {name: layer.scales for name, layer in trained.named_modules() if isinstance(layer, FourBit)}
    for name, layer in part.named_modules():
        if global_name(name) in scales:
            _round(layer, scales[global_name(name)].dtype, device)


@torch.no_grad()
def round_as(model, base: str, precision: str) -> None:
    """Change the weights of a model in fp32 to what they are multiplied with if they are kept as `base` says."""
    if base != "nf4":
        return
    require(base, "an adapter that was trained with lora.base")
    for layer in linear_layers(model):
        _round(layer, DTYPES[precision], layer.weight.device)


def _round(layer: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    weight = layer.weight.T if is_transposed(layer) else layer.weight
    rounded = _dequantised(*_quantised(weight, dtype, device)).to(weight.device)
    layer.weight.copy_(rounded.T if is_transposed(layer) else rounded)
