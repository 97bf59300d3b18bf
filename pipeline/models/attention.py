"""Which implementation computes a model's attention."""

from pipeline.errors import UserError


def choose(model, wanted: str, precision: str, compiled: bool = False) -> str:
    """Set the attention of a transformers model and return its name. wanted: "auto", or a name; one that cannot be had
    here is refused.

    All are given the mask that keeps documents apart where position ids begin anew: FlashAttention-2 as lengths, the
    others as a matrix.
    """
    from pipeline.train import distributed

    lacking = _lacking_for_flash(model, precision, distributed.device().type)
    if wanted == "flash_attention_2" and lacking:
        raise UserError(f"attention: flash_attention_2 needs {lacking}; use attention: sdpa, or auto")
    if wanted in ("sdpa", "blocks") and not model._supports_sdpa:
        raise UserError(
            f"attention: the family {model.config.model_type} has no sdpa in transformers; use attention: eager, or"
            " auto"
        )
    blocks = distributed.device().type == "cpu" and precision == "bf16" and compiled
    if wanted == "blocks" and not blocks:
        raise UserError(
            "attention: blocks is for a CPU, with precision: bf16 and compile: true; use attention: sdpa, or auto"
        )
    if wanted == "auto":
        wanted = (
            "flash_attention_2"
            if lacking is None
            else "eager"
            if not model._supports_sdpa
            else "blocks"
            if blocks
            else "sdpa"
        )
    if wanted == "blocks":
        from pipeline.models import causal  # noqa: F401 - tells transformers of it
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
    return wanted


def _lacking_for_flash(model, precision: str, device: str) -> str | None:
    from transformers.utils import is_flash_attn_2_available

    if device != "cuda":
        return "a GPU, and this process has none"
    if precision != "bf16":
        return f"precision: bf16, and the recipe says {precision}"
    if not getattr(model, "_supports_flash_attn", False):
        return f"a family that has it, and {model.config.model_type} does not"
    if not is_flash_attn_2_available():
        return "the package flash-attn, which is not installed"
    return None
