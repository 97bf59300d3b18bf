"""Contradictions between the files of a Hugging Face tokenizer folder.

A round trip does not find them: text survives in either reading, but the model was trained on one of the two, and
nobody can tell which. So such a folder is refused.
"""

from pathlib import Path

from pipeline.data.tokenizer import byte_bpe, encode, spm_model
from pipeline.data.tokenizer.file_forms import form_of
from pipeline.data.tokenizer.id_gaps import fill_gaps
from pipeline.data.tokenizer.tokenizer_folder import (
    CONFIG,
    NAMED,
    SPECIAL_TOKENS_MAP,
    added_tokens,
    check_config,
    content_of,
    read_backend,
    read_object,
)


def contradiction(folder: Path) -> str | None:
    """The first contradiction between two files of the folder, in words, or None. Raises UserError for a file that
    cannot be read."""
    backend = read_backend(folder)
    check_config(folder)
    spec = read_object(folder / "tokenizer.json")
    vocabulary = spec["model"].get("vocab") or {}
    if not isinstance(vocabulary, dict):  # unigram: pairs of a piece and its score
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    reason = _within_tokenizer_json(spec, vocabulary)
    if reason:
        return f"{folder / 'tokenizer.json'}: {reason}"
    backend, _ = fill_gaps(backend, declared_tokens(spec), folder)
    return (
        _with_config(folder, backend)
        or _with_vocab_json(folder, spec, vocabulary)
        or _with_tokenizer_model(folder, backend)
        or _with_tiktoken_files(folder, spec)
        or _with_model_config(folder, backend)
    )


def declared_tokens(spec: dict) -> dict[str, int]:
    """The added tokens of a tokenizer.json and the ids that it declares for them."""
    return {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}


def _within_tokenizer_json(spec: dict, vocabulary: dict[str, int]) -> str | None:
    if len(set(vocabulary.values())) != len(vocabulary):
        return "two tokens have the same id"
    token_of = {index: token for token, index in vocabulary.items()}
    for token in spec.get("added_tokens") or ():
        name, index = token["content"], token["id"]
        if not name:
            return f"the added token with id {index} is empty"
        if token_of.get(index, name) != name:
            return f"id {index} is {token_of[index]!r} in its vocabulary and {name!r} among its added tokens"
        if vocabulary.get(name, index) != index:  # `tokenizers` reads the first, another program may read the second
            return f"{name!r} has id {vocabulary[name]} in its vocabulary and {index} among its added tokens"
    return None


def _with_config(folder: Path, backend) -> str | None:
    """Tokens of tokenizer_config.json and special_tokens_map.json that tokenizer.json lacks, or has at another id."""
    for index, token in added_tokens(folder).items():
        other = backend.id_to_token(index) if index < 2**32 else None
        if other != token:
            return f"{folder}: id {index} is {token!r} in {CONFIG} and {other!r} in tokenizer.json"
    for name in (CONFIG, SPECIAL_TOKENS_MAP):
        block = read_object(folder / name)
        for key in NAMED:
            token = content_of(block.get(key))
            if token and backend.token_to_id(token) is None:
                return f"{folder}: {name} has {key} {token!r}, which is not a token of tokenizer.json"
    return None


def _with_vocab_json(folder: Path, spec: dict, vocabulary: dict[str, int]) -> str | None:
    other = read_object(folder / "vocab.json")
    if not other:
        return None
    common = {token: index for token, index in vocabulary.items() if token in other}
    num_added = len(spec.get("added_tokens") or ())
    if other != common or len(vocabulary) > len(other) + num_added:
        return f"{folder}: vocab.json and tokenizer.json have different ids"
    return None


def _with_tokenizer_model(folder: Path, backend) -> str | None:
    file = folder / "tokenizer.model"
    if not file.is_file() or form_of(file) == "tiktoken":
        return None
    model = file.read_bytes()
    reason = spm_model.damage(model)
    if reason:
        return f"{file} {reason}"
    difference = spm_model.different_piece(model, backend)
    if difference:
        index, piece, token = difference
        return f"{folder}: id {index} is {piece!r} in tokenizer.model and {token!r} in tokenizer.json"
    return None


def _with_tiktoken_files(folder: Path, spec: dict) -> str | None:
    for file in sorted(folder.glob("*.tiktoken")):
        if byte_bpe.load(file) != encode.ranks(spec):
            return f"{folder}: {file.name} and tokenizer.json do not have the same tokens with the same ids"
    return None


def _with_model_config(folder: Path, backend) -> str | None:
    size = read_object(folder / "config.json").get("vocab_size")
    if isinstance(size, int) and size < backend.get_vocab_size():
        return (
            f"{folder}: config.json says that the model has {size} tokens, tokenizer.json has"
            f" {backend.get_vocab_size()}"
        )
    return None
