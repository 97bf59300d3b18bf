"""Which implementation computes a model's attention."""

from pipeline.core import distributed
from pipeline.core.errors import UserError


def choose(model, name: str, precision: str, packed_rows: int = 1) -> str:
    """Set the attention of a transformers model and return its name. name: that of an implementation, which is refused
    if this process cannot have it, or "auto". packed_rows: rows of a micro-batch in which documents are kept apart by
    their positions, 1 if none are.

    FlashAttention-2 gets the documents of a row as lengths, which transformers reads off the positions of one row only;
    the other implementations get a matrix, for any number of rows.
    """
    obstacle = flash_obstacle(model, precision)
    if name == "auto":
        name = "sdpa" if model._supports_sdpa else "eager"
        if obstacle is None and packed_rows == 1:
            name = "flash_attention_2"
    if name == "flash_attention_2":
        if obstacle:
            raise UserError(f"attention: flash_attention_2 needs {obstacle}; use attention: sdpa, or auto")
        check_packed(name, packed_rows, "attention: flash_attention_2")
    if name == "sdpa" and not model._supports_sdpa:
        raise UserError(
            f"attention: the family {model.config.model_type} has no sdpa in transformers; use attention: eager, or"
            " auto"
        )
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    return name


def check_packed(name: str, rows: int, subject: str) -> None:
    """Raise UserError for an attention that would let documents of a row see each other: transformers 5.23 calls the
    flash kernels with lengths for a micro-batch of one row, and with plain causal attention for more. `subject` begins
    the message."""
    if "flash" in name and rows > 1:
        raise UserError(
            f"{subject} keeps the documents or conversations of a row apart in a micro-batch of one row only, and a"
            f" micro-batch here has {rows}; use micro_batch: 1, or attention: sdpa"
        )


def flash_obstacle(model, precision: str) -> str | None:
    """What FlashAttention-2 needs and does not have here, in words; None if it can be used."""
    from transformers.utils import is_flash_attn_2_available

    if distributed.device().type != "cuda":
        return "a GPU, and this process has none"
    if precision != "bf16":
        return f"precision: bf16, and the recipe says {precision}"
    if not getattr(model, "_supports_flash_attn", False):
        return f"a family that supports it, and {model.config.model_type} does not"
    if not is_flash_attn_2_available():
        return "the package flash-attn, which is not installed"
    return None
