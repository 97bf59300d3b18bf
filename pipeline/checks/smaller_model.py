"""A model block with smaller sizes and the ratios of the given one: the same family, heads per key-value head, inner
sizes to width."""

import math

from pipeline.models.families import DEPTH_KEYS, EXPERT_KEYS, HEAD_KEYS, HEAD_SIZE_KEYS, INNER_KEYS, WIDTH_KEYS

KV_HEADS = "num_key_value_heads"
ROUTING = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}  # at most; groups of experts: DeepSeek-V3
PER_LAYER = ("layer_types", "mlp_layer_types")
SHOWN = (*DEPTH_KEYS, *WIDTH_KEYS, *HEAD_KEYS, KV_HEADS, *INNER_KEYS, *EXPERT_KEYS)


def smaller(block: dict, width: int, layers: int) -> dict:
    """A model block of at most `width` and `layers`."""
    return _Smaller(block, width, layers).result


class _Smaller:
    def __init__(self, block: dict, width: int, layers: int):
        from transformers import AutoConfig

        from pipeline.models.model_block import OWN_KEYS

        keys = {key: value for key, value in block.items() if key not in OWN_KEYS}
        config = AutoConfig.for_model(block["family"], **keys)
        self.block, self.result = block, dict(block)
        self.alias_of = {name: alias for alias, name in config.attribute_map.items()}  # n_embd -> hidden_size
        self.sizes = {key: value for key, value in config.to_dict().items() if value is not None}
        self.old_width = next(self.sizes[key] for key in WIDTH_KEYS if key in self.sizes)
        self.width = min(width, self.old_width)
        self.scale = self.width / self.old_width

        self._scale_widths()
        for key in DEPTH_KEYS:
            if key in self.sizes:
                self._set(key, min(layers, self.sizes[key]))
        self._reduce_heads()
        for key in EXPERT_KEYS:
            if self._is_int(key):
                self._set(key, min(self.sizes[key], 4))
        for key, most in ROUTING.items():
            if self._is_int(key):
                self._set(key, min(self.sizes[key], most))
        if block.get("mup"):
            base_width = self._scaled(block["mup"]["base_width"])
            self.result["mup"] = block["mup"] | {"base_width": base_width}
        for key in PER_LAYER:
            if key in block:
                self.result[key] = block[key][:layers]

    def _set(self, key: str, value: int) -> None:
        """Set a size, unless the block has it under its other name."""
        if key in self.block or self.alias_of.get(key) not in self.block:
            self.result[key] = value

    def _is_int(self, key: str) -> bool:
        return isinstance(self.sizes.get(key), int)

    def _scaled(self, size: int) -> int:
        """A multiple of 8."""
        return max(8, round(size * self.scale / 8) * 8)

    def _scale_widths(self) -> None:
        for key in WIDTH_KEYS:
            if key in self.sizes:
                self._set(key, self._scaled(self.sizes[key]))
        for key in INNER_KEYS:
            if self._is_int(key):
                self._set(key, self._scaled(self.sizes[key]))

    def _reduce_heads(self) -> None:
        present = [key for key in HEAD_KEYS if key in self.sizes]
        if not present or not self.sizes[present[0]]:
            return
        old_heads = self.sizes[present[0]]
        old_kv_heads = self.sizes.get(KV_HEADS, old_heads)
        ratio = max(1, old_heads // old_kv_heads)
        most = max(1, self.width // 8)
        kv_heads = min(old_kv_heads, 2)
        while kv_heads > 1 and ratio * kv_heads > self.width // 8:
            kv_heads -= 1
        heads = min(ratio * kv_heads, most)
        heads = 2 ** int(math.log2(heads))  # divides the width, which is a multiple of 8
        for key in present:
            self._set(key, heads)
        if KV_HEADS in self.sizes:
            self._set(KV_HEADS, max(1, heads // ratio))
        for key in HEAD_SIZE_KEYS:
            if self._is_int(key) and self.sizes[key] * old_heads != self.old_width:
                size = self.sizes[key] * old_heads * self.scale / heads
                self._set(key, max(4, round(size / 2) * 2))
            elif key in self.block:
                self._set(key, self.width // heads)
