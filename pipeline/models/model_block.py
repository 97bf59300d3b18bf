"""The `model` block of a recipe: which keys it may have, and the transformers configuration that follows from it.

`changed_config` is the same for a model folder whose training continues with other keys (`model_changes`).
"""

import difflib
from pathlib import Path

from pipeline.core.errors import Problems, UserError
from pipeline.core.recipe_file import short_repr
from pipeline.models import families, mup
from pipeline.models.families import FAMILIES, UNKNOWN, balance_coefficient

# Keys of a configuration that a block must not have, and why.
DECIDED_ELSEWHERE = {
    "vocab_size": "the tokenizer decides it; `pad_vocab_to: 128` rounds it up",
    "max_position_embeddings": "it is the stage's sequence_length",
    "bos_token_id": "the tokenizer decides it",
    "eos_token_id": "the tokenizer decides it",
    "pad_token_id": "the tokenizer decides it",
    "model_type": "write `family`",
    "architectures": "`family` decides it",
    "dtype": "weights are fp32 and `precision` says how they are used",
    "torch_dtype": "weights are fp32 and `precision` says how they are used",
}
# Keys of a block that transformers' configurations do not have.
OWN_KEYS = ("family", "pad_vocab_to", "init", "mup")
# Keys that are sizes, so at least 1 and not larger than any model's.
SIZE_KEYS = {
    *families.DEPTH_KEYS,
    *families.WIDTH_KEYS,
    *families.INNER_KEYS,
    *families.HEAD_KEYS,
    "head_dim",
    "num_key_value_heads",
}
LARGEST_SIZE, MOST_LAYERS = 10_000_000, 10_000
EXAMPLE = "{family: llama, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4, intermediate_size: 688}"


# ---- checks ----------------------------------------------------------------------------------------------------------


def check(block: dict | None) -> None:
    """Raise UserError, with all mistakes, for a block of which no model can be built."""
    if not block:
        raise UserError(f"model: the recipe has no model block; write for example model: {EXAMPLE}")
    _check_family(block)
    _check_keys(block)
    config = block_config(block)
    balance_coefficient(config)
    mup.check(block, config)
    _check_heads(block, config)


def check_document_mask(family: str) -> None:
    """Raise UserError for a family whose tokens might see other documents of a row in spite of `document_mask`."""
    if not FAMILIES.get(family, UNKNOWN).document_mask:
        raise UserError(
            f"document_mask: attention was not verified to stay within a document for the family {family}, only for"
            f" {', '.join(families.supporting('document_mask'))}; remove document_mask"
        )


def _check_family(block: dict) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "family" not in block:
        near = difflib.get_close_matches("family", block, 1)
        if near:
            raise UserError(f"model.{near[0]}: unknown key; did you mean 'family'?")
        raise UserError(
            "model: the key family is missing; it is the model_type of a transformers causal LM, such as llama"
        )
    family = block["family"]
    if isinstance(family, str) and family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    near = difflib.get_close_matches(str(family), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, 1)
    hint = "it is the model_type of a transformers causal LM, such as llama, qwen3, mistral, gemma2, gpt2"
    if near:
        hint = f"did you mean {near[0]}?"
    raise UserError(f"model.family: {short_repr(family)} is unknown; {hint}")


def _check_keys(block: dict) -> None:
    family = block["family"]
    default = transformers_config(family, {})
    allowed = {*default.to_dict(), *default.attribute_map, *OWN_KEYS, *FAMILIES.get(family, UNKNOWN).unlisted_keys}
    # GPT's n_positions, RWKV's context_length
    length_key = default.attribute_map.get("max_position_embeddings")
    problems = Problems()
    for key, value in block.items():
        if key in DECIDED_ELSEWHERE:
            problems.add(f"model.{key}: remove it: {DECIDED_ELSEWHERE[key]}")
        elif key == length_key:
            problems.add(f"model.{key}: remove it: {DECIDED_ELSEWHERE['max_position_embeddings']}")
        elif key not in allowed:
            problems.add(f"model.{key}: {family} has no such key; {_nearest_key(key, allowed)}")
        elif key in SIZE_KEYS and value is not None and type(value) is not int:
            problems.add(f"model.{key} is {short_repr(value)}, expected a whole number")
        elif key in SIZE_KEYS and value is not None and not 0 < value <= LARGEST_SIZE:
            problems.add(f"model.{key} is {value}, expected 1 to {LARGEST_SIZE:,}")
        elif "layer" in key and type(value) is int and value > MOST_LAYERS:
            problems.add(f"model.{key} is {value}, expected at most {MOST_LAYERS:,}")
    problems.refuse()


def _nearest_key(key: str, allowed: set[str]) -> str:
    near = difflib.get_close_matches(key, allowed - set(DECIDED_ELSEWHERE), 1)
    if near:
        return f"did you mean {near[0]}?"
    return f"it has {', '.join(sorted(name for name in allowed if not name.startswith('_')))}"


def _check_heads(block: dict, config) -> None:
    # mamba and rwkv have no heads
    heads = getattr(config, "num_attention_heads", None) or 1
    width = config.hidden_size
    if "head_dim" not in block and width % heads:
        raise UserError(f"model: hidden_size {width} is not divisible by num_attention_heads {heads}")
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise UserError(f"model: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")


# ---- configurations --------------------------------------------------------------------------------------------------


def block_config(block: dict):
    """The transformers configuration of a block, without what the tokenizer and the stage decide."""
    return transformers_config(block["family"], _family_keys(block))


def full_config(block: dict, tokenizer, sequence_length: int):
    """The transformers configuration of a block, with the tokenizer's vocabulary and special ids. Raises UserError as
    `check` does."""
    check(block)
    multiple = block.get("pad_vocab_to", 1)
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    keys = _family_keys(block)
    keys.update(mup.config_keys(block))
    keys["vocab_size"] = -(-len(tokenizer) // multiple) * multiple
    keys["bos_token_id"] = tokenizer.bos_token_id
    keys["eos_token_id"] = tokenizer.eos_token_id
    # transformers keeps the embedding of the padding token at zero, which must not happen to a token of the text.
    keys["pad_token_id"] = None if tokenizer.pad_token_id in used else tokenizer.pad_token_id
    keys["max_position_embeddings"] = sequence_length
    keys["use_cache"] = True
    return transformers_config(block["family"], keys)


def changed_config(folder: Path | str, changes: dict, sequence_length: int):
    """The configuration of a model folder with `changes`, and with positions for rows of `sequence_length` tokens.

    Raises UserError if a change alters the shape of a parameter, and for rows that are longer than the model's
    positions unless `changes` say how positions are scaled.
    """
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: contains no model (no config.json); expected a folder in the Hugging Face layout")
    before = AutoConfig.from_pretrained(folder, local_files_only=True)
    length_key = before.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    longest = getattr(before, length_key, None)
    is_longer = bool(longest) and sequence_length > longest
    if is_longer:
        _check_longer_rows(before, longest, changes, sequence_length, folder)
    _check_changes(before, changes, length_key)
    keys = before.to_dict()
    del keys["model_type"]
    keys.update(changes)
    if is_longer:
        keys[length_key] = sequence_length
    after = transformers_config(before.model_type, keys)
    after.architectures = before.architectures
    _check_same_shapes(before, after, changes)
    return after


def _check_longer_rows(config, longest: int, changes: dict, sequence_length: int, folder) -> None:
    rotary = hasattr(config, "rope_parameters")
    if families.family_of(config).unlimited_positions or (rotary and "rope_parameters" in changes):
        return
    advice = ", since its positions are learned"
    if rotary:
        factor = sequence_length / longest
        advice = (
            "; or say how positions are scaled, such as"
            f" model_changes: {{rope_parameters: {{rope_type: yarn, factor: {factor:g}, ...}}}}"
        )
    raise UserError(
        f"sequence_length: {sequence_length} is more than the {longest} positions of the model in {folder}; use"
        f" {longest} or fewer{advice}"
    )


def _check_changes(config, changes: dict, length_key: str) -> None:
    allowed = {*config.to_dict(), *families.family_of(config).unlisted_keys}
    for key in changes:
        if key in DECIDED_ELSEWHERE:
            raise UserError(f"model_changes.{key}: remove it: {DECIDED_ELSEWHERE[key]}")
        if key == length_key:
            raise UserError(f"model_changes.{key}: remove it: {DECIDED_ELSEWHERE['max_position_embeddings']}")
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed - set(DECIDED_ELSEWHERE), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"model_changes.{key}: {config.model_type} has no such key{hint}")


def _check_same_shapes(before, after, changes: dict) -> None:
    shapes_before, shapes_after = _shapes(before), _shapes(after)
    names = sorted(shapes_before.keys() | shapes_after.keys())
    different = [name for name in names if shapes_before.get(name) != shapes_after.get(name)]
    if different:
        raise UserError(
            f"model_changes: {', '.join(changes)} would change the shape of {different[0]}; training continues with"
            " the parameters that the model has"
        )


def _shapes(config) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    return {name: value.shape for name, value in state.items()}


def transformers_config(family: str, keys: dict):
    """transformers' configuration of a family. Raises UserError for values that it refuses."""
    from transformers import AutoConfig

    try:
        if keys:
            # YAML's 0 is an integer, which transformers refuses where it expects a float.
            default = AutoConfig.for_model(family)
            keys = {key: _as_float(value, getattr(default, key, None)) for key, value in keys.items()}
        return AutoConfig.for_model(family, **keys)
    except Exception as error:  # transformers checks some values, and divides by others or looks them up
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        if not isinstance(error, (ValueError, TypeError)):
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"model: {family} cannot be built from these values: {reason[:300]}") from None


def _as_float(value, default):
    return float(value) if type(value) is int and isinstance(default, float) else value


def _family_keys(block: dict) -> dict:
    return {key: value for key, value in block.items() if key not in OWN_KEYS}
