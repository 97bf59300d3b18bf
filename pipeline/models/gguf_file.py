"""A GGUF file (llama.cpp's format) as a model's folder in the Hugging Face layout, which all stages read.

    folder = folder_of(path, sha256)        # in the cache, or None
    folder = converted(path, sha256)        # made once, in a process of its own

Weights that are quantised in the file are unpacked to fp32, exactly: what is trained is the model that llama.cpp runs.
transformers reads configuration and weights (`gguf_file`). The tokenizer is built here, because ids depend on how text
is split, and transformers takes GPT-2's way for a file whose way it does not know (`smollm` in 5.23: "in  12" has other
ids then). What is not certain to be read right is refused: another architecture, splitting or key of the metadata, and
tensors that transformers would leave out.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipeline.core.errors import EXIT_USER, UserError
from pipeline.core.files import sync_tree
from pipeline.data.sources.packages import cache_folder

VERSION = 1
"""Of the conversion: part of what identifies a model that was read from a GGUF file."""

# Keys of the metadata that decide what a model computes, after the name of the architecture. A file with others is
# refused: transformers ignores what it does not know, such as a scaling of rotary positions.
KEYS = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# tokenizer.ggml.pre -> how text is split into words, as llama.cpp does (llama-vocab.cpp). `digits`: first at each
# digit. expression: then by this one; none: GPT-2's.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")
SPLITS = {"gpt-2": (False, None), "llama-bpe": (False, _LLAMA_3), "qwen2": (False, _QWEN_2), "smollm": (True, None)}
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
NAMED = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def require_library() -> None:
    """Raise UserError if the package that reads the format is missing."""
    import importlib.util

    if importlib.util.find_spec("gguf") is None:
        raise UserError("a GGUF file needs the package gguf, which is not installed; run pip install 'alma[gguf]'")


# ---- the folder in the cache -----------------------------------------------------------------------------------------


def _place(sha256: str) -> Path:
    return cache_folder() / "gguf" / f"{sha256[:32]}-{VERSION}"


def folder_of(sha256: str) -> Path | None:
    """The folder that was made of the file with this sha256, if it was."""
    place = _place(sha256)
    return place if place.is_dir() else None


def converted(path: Path, sha256: str) -> Path:
    """The folder of a GGUF file; if it is not there, a process makes it and ends, so that its memory is free again.
    Raises UserError for a file that cannot be read."""
    place = folder_of(sha256)
    if place:
        return place
    require_library()
    place = _place(sha256)
    place.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pipeline.models.gguf_file", str(path), str(place)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode == EXIT_USER:
        raise UserError(answer.stderr.strip())
    if answer.returncode or not place.is_dir():
        raise RuntimeError(f"reading {path} ended with {answer.returncode}:\n{answer.stderr}")
    return place


def convert(path: Path, folder: Path) -> None:
    """Write the folder, complete or not at all."""
    metadata = read_metadata(path)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        tokenizer, model = Path(scratch) / "tokenizer", Path(scratch) / "model"
        write_tokenizer(metadata, tokenizer)
        write_model(path, metadata, tokenizer, model)
        sync_tree(model)
        try:
            os.rename(model, folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


# ---- metadata --------------------------------------------------------------------------------------------------------


def read_metadata(path: Path) -> dict:
    """Keys and values of the file, and under `tensors` the number of values of each tensor. Raises UserError for a file
    that is damaged, or of a model that may not be read right."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        architecture = metadata["general.architecture"]
    except Exception as error:  # the reader raises whatever numpy does
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: is not a GGUF file ({reason}); copy it again") from None
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{path}: is a model of the architecture {architecture!r}; {', '.join(ARCHITECTURES)} are read, for others"
            " give a folder in the Hugging Face layout"
        )
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    unknown = sorted(own.keys() - KEYS)
    if unknown:
        raise UserError(
            f"{path}: its metadata has {prefix}{unknown[0]}, which transformers does not read from a GGUF file; give a"
            " folder in the Hugging Face layout"
        )
    if int(metadata.get("split.count", 1)) > 1:
        raise UserError(
            f"{path}: is one of {metadata['split.count']} parts; join them first (llama-gguf-split --merge)"
        )
    metadata["tensors"] = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    return metadata


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def write_tokenizer(metadata: dict, folder: Path) -> None:
    """The files of the tokenizer that the metadata describes, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.tokenizer.tokenizer_folder import save

    tokens = metadata["tokenizer.ggml.tokens"]
    names = {}
    for key, name in NAMED.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            names[name] = tokens[index]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(metadata), clean_up_tokenization_spaces=False, **names)
    fast.chat_template = metadata.get("tokenizer.chat_template")
    save(fast, folder)


def tokenizer_of(metadata: dict):
    """The tokenizers.Tokenizer. Raises UserError for a kind, or a way of splitting text, that is not known here."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    kind, way = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or way not in SPLITS:
        raise UserError(
            f"its tokenizer is of the kind {kind!r} and splits text like {way!r}; read are gpt2 (byte-level BPE) with"
            f" {', '.join(SPLITS)}, for others give a folder in the Hugging Face layout"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {}
    for index, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type != UNUSED:
            vocabulary[token] = index
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    at_digits, expression = SPLITS[way]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if at_digits else []
    if expression:
        steps.append(pre_tokenizers.Split(Regex(expression), behavior="isolated"))
    add_prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", False))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=expression is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    added = {}
    for token, index in vocabulary.items():
        if types[index] in (CONTROL, USER_DEFINED):
            added[index] = AddedToken(token, special=types[index] == CONTROL, normalized=False)
    backend.add_tokens(list(added.values()))
    if metadata.get("tokenizer.ggml.add_bos_token"):
        index = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[index]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, index)]
        )
    return backend


# ---- weights ---------------------------------------------------------------------------------------------------------


def write_model(path: Path, metadata: dict, tokenizer_folder: Path, folder: Path) -> None:
    """The model's folder, with fp32 weights and the tokenizer's files. Raises UserError if a tensor of the file is in
    no parameter, or a parameter in no tensor."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.models.build import quiet
    from pipeline.models.publish import publish

    with quiet():
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        head_dim = metadata.get(f"{metadata['general.architecture']}.attention.key_length")
        if head_dim:  # transformers 5.23 takes the default of Qwen 3's configuration, 128
            config.head_dim = head_dim
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    in_file = sum(metadata["tensors"].values())
    in_model = sum(parameter.numel() for parameter in model.parameters())
    if info["missing_keys"] or in_file != in_model:
        odd = sorted(info["missing_keys"]) or [name for name in metadata["tensors"] if name.startswith("rope")]
        raise UserError(
            f"{path}: has {in_file:,} weights, and the model that transformers builds of it {in_model:,}"
            f" ({', '.join(odd[:3]) or 'others'}); give a folder in the Hugging Face layout"
        )
    config.architectures = [type(model).__name__]
    vars(config).pop("_model_name_or_path", None)  # a title, which transformers takes from the metadata
    config.rms_norm_eps = _shortest(config.rms_norm_eps)
    for key, name in NAMED.items():
        if name != "unk_token":
            setattr(config, f"{name}_id", metadata.get(f"tokenizer.ggml.{key}_token_id"))
    publish(model.state_dict(), config, tokenizer_folder, folder)


def _shortest(value: float) -> float:
    """The decimal number that was meant by an fp32 one: 1e-05 for 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


if __name__ == "__main__":
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        message = str(error)
        print(message if message.startswith(sys.argv[1]) else f"{sys.argv[1]}: {message}", file=sys.stderr)
        sys.exit(EXIT_USER)
