"""A model as a GGUF file, which llama.cpp, Ollama and LM Studio run.

    refuse(config, tokenizer_folder)                     # UserError if the file would compute something else
    remarks = write(model, tokenizer_folder, path, "q8_0", ends=[2, 5])
    weights = read_weights(path, model.config)           # what the file has, by transformers' names

Names of tensors and metadata are those of the package gguf, which llama.cpp publishes. What is written is what its own
converter writes for these families (tests/models/test_gguf_write.py compares the two); what has no exact counterpart is
refused, where the converter would drop it: a sliding window, other rotary scalings, biases.
"""

import os
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.models import gguf_q4_k, gguf_tokenizer

# transformers' model_type -> llama.cpp's architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Types of matrices; vectors stay fp32. Values: the name in gguf's enumerations, for a tensor and for a file.
TYPES = {
    "f32": ("F32", "ALL_F32"),
    "f16": ("F16", "MOSTLY_F16"),
    "bf16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
    "q4_k": ("Q4_K", "MOSTLY_Q4_K_S"),
}
# Instead of a type, for rows that its blocks do not divide: llama.cpp's choice for q4_k, then f16.
INSTEAD = {"Q4_K": "Q5_0"}
LARGEST_HALF = 65504.0


def refuse(config, tokenizer_folder: Path | None = None) -> None:
    """Raise UserError, with a sentence about "the model", if a model of this configuration, with this tokenizer if it
    is known, cannot be written so that llama.cpp computes the same."""
    reason = _reason(config)
    if reason:
        raise UserError(f"the model cannot be written as GGUF: {reason}")
    if tokenizer_folder is not None:
        try:
            gguf_tokenizer.metadata_of(tokenizer_folder, config.vocab_size)
        except UserError as error:
            raise UserError(f"the model cannot be written as GGUF: {error}") from None


def refuse_types(config, types: list[str]) -> None:
    """Raise UserError for a type that no matrix of the model's layers could have, so that the file would be another
    than its name says."""
    if "q4_k" not in types:
        return
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = {config.hidden_size, config.intermediate_size, config.num_attention_heads * head_dim}
    if all(row % gguf_q4_k.BLOCK for row in rows):
        raise UserError(
            f"q4_k has blocks of {gguf_q4_k.BLOCK} weights, and no matrix of the model has rows of a multiple of that"
            f" ({', '.join(map(str, sorted(rows)))}); use q4_0 or q8_0"
        )


def _reason(config) -> str | None:
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return f"{kind} is not among the families whose files were compared with llama.cpp ({', '.join(ARCHITECTURES)})"
    if config.hidden_act not in ("silu", "swish"):
        return f"hidden_act is {config.hidden_act}, and llama.cpp computes silu"
    if getattr(config, "mlp_bias", False):
        return "it has biases in its feed-forward layers (mlp_bias)"
    if kind == "qwen3" and config.attention_bias:
        return "it has biases in its attention (attention_bias), which llama.cpp's qwen3 has not"
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and window < config.max_position_embeddings:
        return f"tokens see a window of {window:,} tokens (sliding_window), and in llama.cpp's {kind} all"
    parameters = config.rope_parameters or {}
    scaling = parameters.get("rope_type", "default")
    known = ("default", "linear", "llama3") if ARCHITECTURES[kind] == "llama" else ("default", "linear")
    if scaling not in known:
        return f"its rotary positions are scaled by {scaling}; known for {kind} are {', '.join(known)}"
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return "it rotates a part of each head (partial_rotary_factor)"
    return None


def write(model, tokenizer_folder: Path, path: Path, weight_type: str, ends: list[int]) -> list[str]:
    """Write the file, complete or not at all, and return remarks for its users. model: fp32, on the CPU; ends: ids at
    which generation ends, the end of text first or last. Raises UserError."""
    import gguf

    config = model.config
    refuse(config)
    tokenizer, remarks = gguf_tokenizer.metadata_of(tokenizer_folder, config.vocab_size)
    _add_ends(tokenizer, ends, remarks)
    architecture = ARCHITECTURES[config.model_type]
    scratch = path.with_name(f".{path.name}.tmp")
    writer = gguf.GGUFWriter(scratch, architecture)
    for key, value in _hyperparameters(config).items():
        _add(writer, f"{architecture}.{key}", value)
    tensor_name, file_name = TYPES[weight_type]
    writer.add_file_type(gguf.LlamaFileType[file_name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in tokenizer.items():
        _add(writer, f"tokenizer.{key}", value)
    plan = _plan(model, gguf.GGMLQuantizationType[tensor_name])
    remarks += _other_types(plan, weight_type)
    try:
        for name, value, kind in plan:
            shape, size = _layout(value.shape, kind)
            writer.add_tensor_info(name, shape, _numpy_type(kind), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value, kind in plan:  # one after the other, so that no second copy of the model is in memory
            writer.write_tensor_data(_packed(name, _arranged(name, value, config), kind))
        writer.close()
        with open(scratch, "rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    return remarks


def read_weights(path: Path, config) -> dict:
    """The weights in a file, unpacked to fp32, by transformers' names."""
    import gguf
    import torch

    names = {ours: theirs for theirs, ours in _names(config).items()}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name not in names:  # rope_freqs
            continue
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        weights[names[tensor.name]] = _arranged(tensor.name, value.reshape(*map(int, tensor.shape[::-1])), config, True)
    return weights


def adds_bos(path: Path) -> bool:
    """Whether llama.cpp writes the beginning of text in front of a prompt for this file."""
    import gguf

    return bool(gguf.GGUFReader(path).fields["tokenizer.ggml.add_bos_token"].contents())


# ---- metadata --------------------------------------------------------------------------------------------------------


def _hyperparameters(config) -> dict:
    """Keys after the name of the architecture, as llama.cpp's converter writes them."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if ARCHITECTURES[config.model_type] == "llama":
        values["rope.dimension_count"] = head_dim
    if config.rope_parameters.get("rope_type") == "linear":
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(config.rope_parameters["factor"])
    if getattr(config, "head_dim", None):
        values["attention.key_length"] = values["attention.value_length"] = head_dim
    return values


def _add(writer, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _add_ends(tokenizer: dict, ends: list[int], remarks: list[str]) -> None:
    """llama.cpp ends at three named tokens: the end of text, of a turn, and of a message."""
    text_end = tokenizer.get("ggml.eos_token_id")
    if text_end not in ends and ends:
        text_end = tokenizer["ggml.eos_token_id"] = ends[0]
    others = [index for index in ends if index != text_end]
    for key, index in zip(("eot", "eom"), others):
        tokenizer[f"ggml.{key}_token_id"] = index
    if len(others) > 2:
        remarks.append(f"llama.cpp has no name for more than three ends of generation; it lacks {others[2:]}")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _names(config) -> dict[str, str]:
    """transformers' names -> those of the file, for every parameter that is stored."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    architecture = ARCHITECTURES[config.model_type]
    members = {name: member for member, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(members[architecture], config.num_hidden_layers)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).state_dict()
    found = {}
    for name in parameters:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        is_bias = name.endswith(".bias")
        if (
            target is None
            or is_bias
            and not name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias"))
        ):
            raise UserError(f"the model cannot be written as GGUF: llama.cpp's {architecture} has no {name}")
        found[name] = target
    return found


def _plan(model, kind) -> list[tuple]:
    """(name in the file, value, type) of each tensor."""
    import gguf

    output = "token_embd.weight" if model.config.tie_word_embeddings else "output.weight"
    state, plan = model.state_dict(), []
    for name, target in _names(model.config).items():
        value = state[name]
        wanted = kind
        if kind.name == "Q4_K" and target == output:
            # Errors of this matrix reach the answer as they are. llama.cpp gives it q6_k, which gguf cannot make.
            wanted = gguf.GGMLQuantizationType.Q8_0
        stored = gguf.GGMLQuantizationType.F32 if value.dim() == 1 else _fitting(value.shape[-1], wanted)
        plan.append((target, value, stored))
    factors = _frequency_factors(model)
    if factors is not None:
        plan.append(("rope_freqs.weight", factors, gguf.GGMLQuantizationType.F32))
    return plan


def _fitting(row: int, kind):
    """The type that a matrix with rows of this length gets."""
    import gguf

    for name in (kind.name, INSTEAD.get(kind.name)):
        if name and row % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] == 0:
            return gguf.GGMLQuantizationType[name]
    return gguf.GGMLQuantizationType.F16


def _other_types(plan: list[tuple], weight_type: str) -> list[str]:
    """Remarks on matrices that a file has in another type than its name says, because blocks do not divide their
    rows."""
    if weight_type in ("f32", "f16", "bf16"):
        return []
    stored = [kind.name for _, value, kind in plan if value.dim() > 1]
    remarks = []
    if "Q5_0" in stored:
        remarks.append(
            f"{stored.count('Q5_0')} matrices are q5_0 in the {weight_type} file: their rows are no multiple of 256"
        )
    if "F16" in stored:
        remarks.append(
            f"{stored.count('F16')} matrices are f16 in the {weight_type} file: their rows are no multiple of 32"
        )
    return remarks


def _frequency_factors(model):
    """By what llama.cpp divides the frequencies of rotary positions [head_dim / 2]; None if by nothing, or by a number
    in the metadata."""
    import torch

    rotary, config = model.model.rotary_emb, model.config
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    head_dim = 2 * len(rotary.inv_freq)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    unscaled = config.rope_parameters["rope_theta"] ** -exponents
    return (unscaled / rotary.inv_freq.double()).float()


def _arranged(name: str, value, config, back: bool = False):
    """Rows of queries and keys in the order of the file, or `back`: llama.cpp's llama rotates neighbouring numbers of
    a head, transformers the first half with the second."""
    part = name.rsplit(".", 2)[-2]
    if ARCHITECTURES[config.model_type] != "llama" or part not in ("attn_q", "attn_k"):
        return value
    heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
    half = value.shape[0] // heads // 2
    sizes = (heads, half, 2) if back else (heads, 2, half)
    return value.reshape(*sizes, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _layout(shape, kind) -> tuple[tuple[int, ...], int]:
    """(shape as the writer wants it, bytes) of a tensor of this type."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * size
    rows = 1
    for number in shape[:-1]:
        rows *= number
    is_packed = _numpy_type(kind) == "uint8"
    return (*shape[:-1], row) if is_packed else tuple(shape), rows * row


def _numpy_type(kind):
    import numpy as np

    return {"F32": np.dtype("float32"), "F16": np.dtype("float16")}.get(kind.name, np.dtype("uint8"))


def _packed(name: str, value, kind):
    import gguf

    array = value.detach().float().contiguous().numpy()
    if kind.name == "F16" and abs(array).max() > LARGEST_HALF:
        raise UserError(f"{name} has weights beyond {LARGEST_HALF:,.0f}, the largest of f16; write bf16 or f32")
    if kind.name == "Q4_K":
        return gguf_q4_k.quantize(array)
    return gguf.quantize(array, kind)
