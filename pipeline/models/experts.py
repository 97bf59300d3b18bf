"""Mixtures of experts with autocast: the matrix products of experts run in its type, like those of all other layers.

transformers multiplies all experts in one grouped product. torch's autocast does not know that product, so with fp32
weights it ran in fp32 despite `precision: bf16`: 54% (qwen3_moe) to 87% (mixtral) of a model's multiplications, several
times slower on a GPU, whose fast kernel takes only bf16. Here the weights are cast first, like those of a linear layer.
Without autocast nothing changes.
"""

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

NAME = "autocast_grouped_mm"
MATRICES = ("gate_up_proj", "up_proj", "down_proj")


class _Cast:
    """A module of experts whose matrices are read in another type. Gradients reach the module's weights."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype

    def __getattr__(self, name: str):
        value = getattr(self.module, name)
        return value.to(self.dtype) if name in MATRICES else value


def forward(module, hidden_states, top_k_index, top_k_weights):
    """The experts of a layer, as transformers calls them: tokens [N, H], their experts [N, K] and weights [N, K] ->
    [N, H] in the type of the tokens."""
    device = hidden_states.device.type
    if torch.is_autocast_enabled(device):
        module = _Cast(module, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)


def install(model) -> None:
    """Use this function for the experts of a transformers model. A model without experts stays as it is."""
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation(NAME)


ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
