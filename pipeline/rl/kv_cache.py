"""Keys and values of rows that are sampled: one buffer per layer, as long as the rows may become, written in place.

transformers' cache is copied to append to it, for each token and layer; and under autocast it keeps keys and values in
fp32, which attention rounds again for each token. Here they are rounded once, to the same numbers, and take half the
memory.

    outputs = model(...)                                   # reads the prompts
    reserve(outputs.past_key_values, longest)              # what is appended from now on is written in place
"""

import torch
from transformers.cache_utils import DynamicLayer


class Reserved(DynamicLayer):
    """A layer's keys and values [B, H, T, D], views of buffers that have room for `longest` tokens."""

    def __init__(self, layer: DynamicLayer, longest: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        if torch.is_autocast_enabled(self.device.type):
            self.dtype = torch.get_autocast_dtype(self.device.type)
        length = layer.keys.shape[-2]
        self._buffers = [self._buffer(states, longest) for states in (layer.keys, layer.values)]
        self._show(length)

    def _buffer(self, states: torch.Tensor, longest: int) -> torch.Tensor:
        rows, heads, length, width = states.shape
        buffer = torch.empty((rows, heads, longest, width), dtype=self.dtype, device=self.device)
        buffer[:, :, :length] = states
        return buffer

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def update(self, key_states, value_states, *args, **kwargs):
        begin = self.keys.shape[-2]
        end = begin + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        self._show(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._buffers = [buffer[indices] for buffer in self._buffers]
        self._show(self.keys.shape[-2])


def reserve(cache, longest: int) -> None:
    """Give the layers of a cache that keep all tokens room for rows of `longest` tokens. Other layers (windows, states
    of linear attention) and other caches stay as they are."""
    layers = getattr(cache, "layers", [])
    for number, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.is_initialized and layer.keys.dim() == 4:
            layers[number] = Reserved(layer, longest)
