"""An exported model with quantised weights, as a folder for transformers and vLLM.

    refuse(config, ["w4a16"])                      # UserError if this model cannot have the form
    write(folder, "w4a16", target, torch.float32)  # reads the exported folder, writes the quantised one

nf4 is bitsandbytes' (Dettmers et al., 2023), which GPUs and CPUs read. w4a16, w8a16 and fp8 are compressed-tensors',
vLLM's own format, rounded to the nearest without calibration data. The matrix that gives the logits, embeddings and
norms keep their type.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline.core import optional_packages
from pipeline.core.errors import UserError


@dataclass(frozen=True)
class Form:
    """A way of storing weights."""

    package: str
    """Importable name of the library that writes and reads it."""
    preset: str = ""
    """compressed-tensors' name."""
    block: int = 1
    """Weights of a row that share a scale: rows must be a multiple of it."""
    about: str = ""
    """For the card."""


FORMS = {
    "nf4": Form("bitsandbytes", block=64, about="4-bit normal floats by bitsandbytes"),
    "w4a16": Form("compressed_tensors", "W4A16", 128, "4-bit integers in groups of 128 by compressed-tensors"),
    "w8a16": Form("compressed_tensors", "W8A16", 128, "8-bit integers in groups of 128 by compressed-tensors"),
    "fp8": Form("compressed_tensors", "FP8_DYNAMIC", 1, "8-bit floats, also of activations, by compressed-tensors"),
}


# Beside a model's weights and its tokenizer. Other files of an export are records of this machine.
BESIDE = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json")


def require_libraries(forms: list[str]) -> None:
    """Raise UserError if a library that writes one of these is missing."""
    for form in forms:
        optional_packages.require(FORMS[form].package, f"export.quantized: {form}", f"remove {form}")


def refuse(config, forms: list[str]) -> None:
    """Raise UserError, with a reason, for a form that a model of this transformers configuration cannot have."""
    if _has_experts(config) and forms:
        raise UserError(
            f"a {config.model_type} model keeps its experts in one array of a layer, which these libraries do not"
            " quantise, so that most weights would stay as they are; write gguf, or no quantised form"
        )
    rows = {config.hidden_size, getattr(config, "intermediate_size", None) or config.hidden_size}
    for form in forms:
        block = FORMS[form].block
        odd = sorted(row for row in rows if row % block)
        if odd:
            raise UserError(
                f"{form} has groups of {block} weights, and rows of the model have {odd[0]}, no multiple of it; use"
                " fp8, or gguf"
            )


def _has_experts(config) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def write(source: Path, form: str, target: Path, dtype) -> None:
    """Write the model of a folder, quantised, with tokenizer and generation settings. dtype: of what is not
    quantised."""
    target.mkdir(parents=True)
    if FORMS[form].package == "bitsandbytes":
        _write_nf4(source, target, dtype)
    else:
        _write_compressed(source, FORMS[form].preset, target, dtype)
    for path in source.iterdir():
        is_tokenizer = path.name.startswith("tokenizer") or path.suffix == ".model"
        if path.is_file() and (is_tokenizer or path.name in BESIDE):
            shutil.copyfile(path, target / path.name)


def _write_nf4(source: Path, target: Path, dtype) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=options, dtype=dtype, device_map={"": "cpu"}, local_files_only=True
    )
    model.save_pretrained(target)


def _write_compressed(source: Path, preset: str, target: Path, dtype) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import is_module_quantized
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True).eval()
    scheme = preset_name_to_scheme(preset, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if is_module_quantized(module):
            _set_scales(module, scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    compressor.update_config(str(target))


def _set_scales(module, arguments) -> None:
    """The scales of a linear layer, by the largest weight of each group."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = module.weight.data
    size = arguments.group_size or weight.shape[1]
    groups = weight.reshape(weight.shape[0], -1, size)
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero_point.reshape(module.weight_zero_point.shape))
