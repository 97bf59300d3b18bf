"""A tokenizer as the metadata of a GGUF file, for llama.cpp to give the same ids, or a reason why it would not.

llama.cpp does not run tokenizer.json: it has two algorithms (byte-level BPE, and sentencepiece's BPE by scores) and a
list of ways to split text, by name. So what a tokenizer.json does is compared with what that name means, and what
differs is refused.
"""

import json
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer import spm_model
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.models.gguf_file import CONTROL, SPLITS, UNUSED, USER_DEFINED, tokenizer_of

NORMAL = 1  # tokenizer.ggml.token_type
SPM_MODEL = "tokenizer.model"
# Splits of these names take a word that is a token as it is, without merging (llama-vocab.cpp, ignore_merges).
WHOLE_WORDS = ("llama-bpe",)
NOT_A_PIECE = -1000.0  # score of a token that no merge makes


def metadata_of(folder: Path, num_rows: int) -> tuple[dict, list[str]]:
    """(keys after `tokenizer.`, remarks for users) of the tokenizer in a folder. num_rows: tokens that the model has an
    embedding for; those that the tokenizer does not name are unused. Raises UserError."""
    fast = load_tokenizer(folder)
    backend = fast.backend_tokenizer
    spec = json.loads(backend.to_str())
    largest = max(backend.get_vocab(with_added_tokens=True).values())
    if largest >= num_rows:
        raise UserError(f"the tokenizer has the token {largest}, and the model has embeddings for {num_rows:,}")
    model = (folder / SPM_MODEL).read_bytes() if (folder / SPM_MODEL).is_file() else None
    for token in spec["added_tokens"]:
        changed = [name for name in ("lstrip", "rstrip", "single_word") if token[name]]
        if changed:
            raise UserError(f"its token {token['content']!r} has {changed[0]}, which llama.cpp has not")
    if model is not None:
        metadata, remarks = _sentencepiece(model, backend, spec, num_rows), []
    elif spec["model"]["type"] == "BPE" and not spec["model"].get("byte_fallback"):
        metadata, remarks = _byte_level(backend, spec, num_rows)
    else:
        kind = spec["model"]["type"]
        raise UserError(f"its tokenizer ({kind}) is neither byte-level BPE nor a sentencepiece model ({SPM_MODEL})")
    metadata["ggml.add_bos_token"] = _adds_bos(fast)
    metadata["ggml.add_eos_token"] = False
    names = {"bos": fast.bos_token_id, "eos": fast.eos_token_id, "padding": fast.pad_token_id}
    names["unknown"] = fast.unk_token_id
    for name, index in names.items():
        if index is not None and index < num_rows:
            metadata[f"ggml.{name}_token_id"] = index
    if fast.chat_template:
        metadata["chat_template"] = fast.get_chat_template()
    return metadata, remarks


def _adds_bos(fast) -> bool:
    """Whether the tokenizer writes the beginning of text in front of a text. Raises UserError if it writes anything
    else."""
    plain = fast.backend_tokenizer.encode("a", add_special_tokens=False).ids
    ids = fast.backend_tokenizer.encode("a", add_special_tokens=True).ids
    if ids == plain:
        return False
    if ids == [fast.bos_token_id, *plain]:
        return True
    raise UserError(f"its tokenizer adds more to a text than its beginning ({ids} for {plain})")


def _tokens(backend, spec: dict, num_rows: int) -> tuple[list[str], list[int]]:
    """(tokens, types) by id."""
    tokens, types = [f"[PAD{index}]" for index in range(num_rows)], [UNUSED] * num_rows
    for token, index in backend.get_vocab(with_added_tokens=True).items():
        tokens[index], types[index] = token, NORMAL
    for token in spec["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return tokens, types


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def _byte_level(backend, spec: dict, num_rows: int) -> tuple[dict, list[str]]:
    remarks = []
    normalizer = (spec["normalizer"] or {}).get("type")
    if normalizer == "NFC":
        remarks.append("llama.cpp does not normalise text: what is not in Unicode's form NFC has other ids there")
    elif normalizer is not None:
        raise UserError(f"its tokenizer changes text before it is split ({normalizer}), and llama.cpp does not")
    tokens, types = _tokens(backend, spec, num_rows)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in spec["model"]["merges"]]
    metadata = {"ggml.model": "gpt2", "ggml.tokens": tokens, "ggml.token_type": types, "ggml.merges": merges}
    metadata["ggml.pre"] = _name_of_split(spec, metadata)
    takes_words, same = metadata["ggml.pre"] in WHOLE_WORDS, bool(spec["model"].get("ignore_merges"))
    if takes_words != same:
        _check_words(spec)
    return metadata, remarks


def _name_of_split(spec: dict, metadata: dict) -> str:
    """llama.cpp's name for how a tokenizer splits text. Raises UserError if it has none."""
    steps = _steps(spec["pre_tokenizer"])
    for name in SPLITS:
        full = {f"tokenizer.{key}": value for key, value in metadata.items()} | {"tokenizer.ggml.pre": name}
        if _steps(json.loads(tokenizer_of(full).to_str())["pre_tokenizer"]) == steps:
            return name
    known = ", ".join(SPLITS)
    raise UserError(f"its tokenizer splits text in a way that llama.cpp has no name for (compared with {known})")


def _steps(pre_tokenizer: dict | None) -> list[dict]:
    """Steps of a pre-tokenizer, without trim_offsets, which changes no ids."""
    pre_tokenizer = pre_tokenizer or {}
    inner = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in inner]


def _check_words(spec: dict) -> None:
    """Raise UserError if taking a word that is a token as it is would give other ids than merging it."""
    from tokenizers import Tokenizer, models

    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in spec["model"]["merges"]]
    bare = Tokenizer(models.BPE(spec["model"]["vocab"], merges))
    added = {token["content"] for token in spec["added_tokens"]}
    for token, index in spec["model"]["vocab"].items():
        if token not in added and bare.encode(token, add_special_tokens=False).ids != [index]:
            raise UserError(f"merging does not give its token {token!r}, and llama.cpp decides otherwise than it does")


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(model: bytes, backend, spec: dict, num_rows: int) -> dict:
    damage = spm_model.damage(model)
    if damage:
        raise UserError(f"{SPM_MODEL} {damage}")
    if spm_model.is_unigram(model):
        raise UserError("its vocabulary is a unigram model, which llama.cpp reads in no family that is written here")
    reason = spm_model.inexactness(model)
    if reason:
        raise UserError(f"{SPM_MODEL} {reason}, and llama.cpp does not")
    difference = spm_model.different_piece(model, backend)
    if difference:
        raise UserError(f"{SPM_MODEL} has the piece {difference[1]!r} where tokenizer.json has {difference[2]!r}")
    proto = spm_model.parsed(model)
    tokens, types = _tokens(backend, spec, num_rows)
    scores = [NOT_A_PIECE] * num_rows
    for index, piece in enumerate(proto.pieces):
        tokens[index] = piece.piece
        if types[index] == NORMAL:  # and not one of tokenizer.json's added tokens
            types[index], scores[index] = piece.type, piece.score  # types are numbered alike
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": scores,
        "ggml.token_type": types,
        "ggml.add_space_prefix": bool(proto.normalizer_spec.add_dummy_prefix),
    }
