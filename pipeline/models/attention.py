"""Which implementation computes a model's attention."""

from pipeline.core.errors import UserError


def choose(model, wanted: str, precision: str, compiled: bool = False, packed_rows: int = 1) -> str:
    """Set the attention of a transformers model and return its name. wanted: "auto", or a name; one that cannot be had
    here is refused. packed_rows: rows of a micro-batch whose documents are kept apart by their positions, 1 where none
    are.

    FlashAttention-2 is given the documents of a row as lengths, which transformers reads off the positions of a single
    row alone; the others are given a matrix, for any number of rows.
    """
    from pipeline.train import distributed

    lacking = _lacking_for_flash(model, precision, distributed.device().type)
    if wanted == "flash_attention_2" and lacking:
        raise UserError(f"attention: flash_attention_2 needs {lacking}; use attention: sdpa, or auto")
    if wanted == "flash_attention_2":
        check_packed(wanted, packed_rows, "attention: flash_attention_2")
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
        wanted = _best(model, flash=lacking is None and packed_rows == 1, blocks=blocks)
    if wanted == "blocks":
        from pipeline.models import cpu_attention  # noqa: F401 - tells transformers of it
    if model.config._attn_implementation != wanted:
        model.set_attn_implementation(wanted)
    return wanted


def check_packed(name: str, rows: int, where: str) -> None:
    """Raise UserError for an attention that would let documents of a row see each other: transformers 5.23 calls the
    flash kernels with lengths for a micro-batch of one row, and with plain causal attention for more."""
    if "flash" in name and rows > 1:
        raise UserError(
            f"{where} keeps documents apart in a micro-batch of one row only, and a micro-batch here has {rows}; use"
            " micro_batch: 1, or attention: sdpa"
        )


def _best(model, flash: bool, blocks: bool) -> str:
    if flash:
        return "flash_attention_2"
    if not model._supports_sdpa:
        return "eager"
    return "blocks" if blocks else "sdpa"


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
