"""The tokenizer of an exported model: written for other programs, and how each of them reads it."""

import json
from pathlib import Path

from pipeline.data.tokenizer import spm_trainer
from pipeline.data.tokenizer.tokenizer_folder import adds_space, read_object, recoverable, save
from pipeline.data.tokens.store import load_tokenizer, use_known_padding

# sentencepiece's unigram models go under the name that T5 and ALBERT gave theirs: llama.cpp's converter takes every
# tokenizer.model for one of BPE and would give other ids without an error
MODEL, UNIGRAM_MODEL = "tokenizer.model", "spiece.model"
# families whose converter in llama.cpp reads tokenizer.model and not add_prefix_space
NO_PREFIX_KEY = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3")


def write(tokenizer, source: Path, folder: Path, rows: int) -> None:
    """Write `tokenizer`, loaded from `source`, into `folder`, with the sentencepiece model that belongs to it. `rows`:
    tokens that the model has an embedding for."""
    use_known_padding(tokenizer, rows)
    model = next((path.read_bytes() for name in (MODEL, UNIGRAM_MODEL) if (path := source / name).is_file()), None)
    if model is not None and not same_pieces(model, tokenizer.backend_tokenizer):
        model = None
    save(tokenizer, folder)
    if model is not None:
        (folder / (UNIGRAM_MODEL if spm_trainer.is_unigram(model) else MODEL)).write_bytes(model)


def same_pieces(model: bytes, backend) -> bool:
    """Has a sentencepiece model the tokens of this tokenizers.Tokenizer, with the same ids?"""
    if spm_trainer.damaged(model):
        return False
    return all(
        (there := backend.id_to_token(index)) is not None
        and piece.replace(spm_trainer.SPACE, " ") == there.replace(spm_trainer.SPACE, " ")
        for index, piece in enumerate(spm_trainer.pieces_of(model))
    )


def readers(folder: Path) -> tuple[str, list[str]]:
    """(the class of transformers that reads the ids of an exported folder, what is to be known of other readers)."""
    family = read_object(folder / "config.json").get("model_type")
    backend = load_tokenizer(folder).backend_tokenizer
    remarks = []
    loader, why = "AutoTokenizer", _other_auto_tokenizer(folder, backend)
    if why:
        loader = "PreTrainedTokenizerFast"
        remarks.append(
            "load the tokenizer with PreTrainedTokenizerFast.from_pretrained(FOLDER): AutoTokenizer of transformers 5"
            f" {why}, so that it gives other ids than the model was trained on. Programs that load it by AutoTokenizer"
            " (vLLM, lm-eval) must be given token ids; to avoid it, train another family, such as qwen3 or llama"
        )
    if (folder / UNIGRAM_MODEL).is_file():
        remarks.append(
            f"the vocabulary is a unigram model ({UNIGRAM_MODEL}), which llama.cpp has no reader for in this family:"
            " do not convert it to GGUF"
        )
    elif (folder / MODEL).is_file() and family in NO_PREFIX_KEY and not adds_space(backend):
        remarks.append(
            f"llama.cpp's converter puts a space in front of each text for {family}: run its programs with"
            " --override-kv tokenizer.ggml.add_space_prefix=bool:false"
        )
    return loader, remarks


def _other_auto_tokenizer(folder: Path, backend) -> str | None:
    """What AutoTokenizer changes of the tokenizer in a folder, in words, or None."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except BaseException as error:
        if not recoverable(error):
            raise
        return f"fails ({type(error).__name__})"
    ours, theirs = _parts(backend), _parts(found.backend_tokenizer)
    changed = [name for name in ours if ours[name] != theirs[name]]
    return f"reads it as a {type(found).__name__} with another {' and '.join(changed)}" if changed else None


def _parts(backend) -> dict:
    """What decides ids of a tokenizers.Tokenizer, without keys that say nothing (trim_offsets moves offsets alone)."""
    spec = json.loads(backend.to_str())
    model = {key: value for key, value in spec["model"].items() if value}
    pre_tokenizer = json.loads(json.dumps(spec["pre_tokenizer"]), object_hook=_without_offsets)
    tokens = {(token["id"], token["content"]) for token in spec["added_tokens"]}
    return {"normalizer": spec["normalizer"], "pre-tokenizer": pre_tokenizer, "model": model, "added tokens": tokens}


def _without_offsets(part: dict) -> dict:
    return {key: value for key, value in part.items() if key != "trim_offsets"}
