"""Llama's norm on a CPU in bf16, as online RL trains with it: the same numbers with fewer passes over memory.

transformers' RMSNorm is six operations, whose backward pass takes four times as long as that of torch's layer_norm, and
gives fp32, which autocast rounds again for each of the linear layers behind it. Here it is one operation that rounds
once. The gradients of those layers are added in bf16.

    install(model)       # True if the model can have it
"""

import torch
from torch import nn

# Families of which each norm below is read by linear layers alone.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
NAMES = ("input_layernorm", "post_attention_layernorm", "norm")


class _Norm(torch.autograd.Function):
    """weight * hidden / rms(hidden), [..., D] in fp32 -> in `dtype`."""

    @staticmethod
    def forward(ctx, hidden, weight_D, epsilon: float, dtype: torch.dtype):
        scale = (torch.linalg.vecdot(hidden, hidden) / hidden.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(hidden, weight_D, scale)
        return (hidden * scale).mul_(weight_D).to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight_D, scale = ctx.saved_tensors
        normal = hidden * scale
        grad = grad.float()
        grad_weight = (grad * normal).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight_D
        along = torch.linalg.vecdot(grad, normal).div_(-hidden.shape[-1]).unsqueeze(-1)
        return grad.addcmul_(normal, along).mul_(scale), grad_weight, None, None


class FusedNorm(nn.Module):
    """What a norm's class is replaced by; its weight and epsilon stay where they are."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden):
        device = hidden.device.type
        if device != "cpu" or hidden.dtype != torch.float32 or not torch.is_autocast_enabled(device):
            scale = hidden.float().square().mean(-1, keepdim=True).add(self.variance_epsilon).rsqrt()
            return self.weight * (hidden.float() * scale).to(hidden.dtype)
        with torch.autocast(device, enabled=False):
            return _Norm.apply(hidden, self.weight, self.variance_epsilon, torch.get_autocast_dtype(device))


def install(model) -> bool:
    """Give a model's norms this forward and backward pass, and say whether it can have them."""
    if model.config.model_type not in FAMILIES:
        return False
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in NAMES and type(module).__name__.endswith("RMSNorm"):
            module.__class__ = FusedNorm
    return True
