"""Keys of low-rank adapters in a recipe. The adapters themselves are in models/lora.py."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.core.config import Distinct, Strict


class Lora(Strict):
    """Low-rank adapters (LoRA: Hu et al., 2022): the model is frozen, and each linear layer learns the product of two
    small matrices that is added to its weight."""

    rank: int = Field(16, ge=1)
    """Rank of the product; 8 to 64 is usual."""
    alpha: float | None = Field(None, gt=0)
    """The product is scaled by alpha / rank; none: 2 * rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout of an adapter's input."""
    targets: Annotated[list[str], Distinct] | None = None
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; none: all that are in the decoder
    layers, which QLoRA (Dettmers et al., 2023, figure 2) found necessary to match full finetuning."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank), so that large ranks learn as fast as small ones (rsLoRA: Kalajdzievski, 2023)."""
    dora: bool = False
    """Also learn the length of each row of the weight (DoRA: Liu et al., 2024). Slower: each step computes the merged
    weight's lengths."""
    base: Literal["fp32", "bf16", "nf4"] = "fp32"
    """How the frozen weights are kept in memory. bf16: matrices in bf16, half the memory; with precision: bf16 they are
    multiplied in bf16 anyway. nf4: linear layers in 4 bits (QLoRA: Dettmers et al., 2023), an eighth of the memory;
    needs the package bitsandbytes."""
    publish: Literal["merged", "adapter"] = "merged"
    """merged: a complete model. adapter: the adapter only, in peft's format; the parent's folder must stay."""

    @field_validator("targets")
    @classmethod
    def _some_layer(cls, value: list[str] | None) -> list[str] | None:
        if value == []:
            raise ValueError(
                "an empty list names no layer, so that nothing would be trained; remove the key for all linear layers"
            )
        return value

    @property
    def numerator(self) -> float:
        """alpha, or its default."""
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.numerator / (self.rank**0.5 if self.rank_stabilised else self.rank)
