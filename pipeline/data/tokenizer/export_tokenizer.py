"""The tokenizer of an exported model: written for other programs, and how each of them reads it."""

import json
from pathlib import Path

from pipeline.data.tokenizer import spm_model
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer, use_known_padding
from pipeline.data.tokenizer.tokenizer_folder import adds_space, read_object, recoverable, save

# sentencepiece's unigram models get the name that T5 and ALBERT gave theirs: llama.cpp's converter reads every
# tokenizer.model as BPE and would give other ids without an error
MODEL, UNIGRAM_MODEL = "tokenizer.model", "spiece.model"
# families whose converter in llama.cpp reads tokenizer.model and ignores add_prefix_space
NO_PREFIX_KEY = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")


def write(tokenizer, source: Path, folder: Path, rows: int) -> None:
    """Write `tokenizer`, loaded from `source`, into `folder`, with its sentencepiece model if it has one. `rows`:
    tokens for which the model has an embedding."""
    use_known_padding(tokenizer, rows)
    model = None
    for name in (MODEL, UNIGRAM_MODEL):
        if model is None and (source / name).is_file():
            model = (source / name).read_bytes()
    save(tokenizer, folder)
    if model is not None and same_pieces(model, tokenizer.backend_tokenizer):
        name = UNIGRAM_MODEL if spm_model.is_unigram(model) else MODEL
        (folder / name).write_bytes(model)


def same_pieces(model: bytes, backend) -> bool:
    """Does a sentencepiece model have the tokens of this tokenizers.Tokenizer, with the same ids?"""
    return spm_model.damage(model) is None and spm_model.different_piece(model, backend) is None


def readers(folder: Path) -> tuple[str, list[str]]:
    """(the class of transformers that reads an exported folder with the right ids, remarks on other programs)."""
    family = read_object(folder / "config.json").get("model_type")
    backend = load_tokenizer(folder).backend_tokenizer
    remarks = []
    loader = "AutoTokenizer"
    difference = _difference_of_auto_tokenizer(folder, backend)
    if difference:
        loader = "PreTrainedTokenizerFast"
        remarks.append(
            "load the tokenizer with PreTrainedTokenizerFast.from_pretrained(FOLDER): AutoTokenizer of transformers 5"
            f" {difference}, so that it gives other ids than the model was trained on. Programs that use AutoTokenizer"
            " (vLLM, lm-eval) must be given token ids; to avoid it, train another family, such as qwen3 or llama"
        )
    if (folder / UNIGRAM_MODEL).is_file():
        remarks.append(
            f"the vocabulary is a unigram model ({UNIGRAM_MODEL}), which llama.cpp cannot read in this family: do not"
            " convert it to GGUF"
        )
    elif (folder / MODEL).is_file() and family in NO_PREFIX_KEY and not adds_space(backend):
        remarks.append(
            f"llama.cpp's converter puts a space in front of each text for {family}: run its programs with"
            " --override-kv tokenizer.ggml.add_space_prefix=bool:false"
        )
    return loader, remarks


def _difference_of_auto_tokenizer(folder: Path, backend) -> str | None:
    """What AutoTokenizer changes in the tokenizer of a folder, in words, or None."""
    from transformers import AutoTokenizer

    try:
        auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except BaseException as error:
        if not recoverable(error):
            raise
        return f"fails ({type(error).__name__})"
    ours, theirs = _what_decides_ids(backend), _what_decides_ids(auto.backend_tokenizer)
    changed = [name for name in ours if ours[name] != theirs[name]]
    return f"reads it as a {type(auto).__name__} with another {' and '.join(changed)}" if changed else None


def _what_decides_ids(backend) -> dict:
    """The settings of a tokenizers.Tokenizer that decide ids (trim_offsets changes only offsets)."""
    spec = json.loads(backend.to_str())
    model = {key: value for key, value in spec["model"].items() if value}
    pre_tokenizer = json.loads(json.dumps(spec["pre_tokenizer"]), object_hook=_without_offsets)
    tokens = {(token["id"], token["content"]) for token in spec["added_tokens"]}
    return {"normalizer": spec["normalizer"], "pre-tokenizer": pre_tokenizer, "model": model, "added tokens": tokens}


def _without_offsets(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "trim_offsets"}
