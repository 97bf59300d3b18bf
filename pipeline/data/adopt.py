"""A tokenizer that exists already: a Hugging Face folder, a sentencepiece model, or a tiktoken file, checked and
brought into the form of our own."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.data import bpe, bytelevel, encode
from pipeline.data.tokens import load_tokenizer
from pipeline.errors import UserError


class Adopted(NamedTuple):
    backend: object
    """tokenizers.Tokenizer."""
    names: dict[str, str]
    """bos_token, eos_token, pad_token, unk_token, as far as there are any."""
    model: bytes | None = None
    """The sentencepiece model, if that is what it was."""
    tokens: dict[bytes, int] | None = None
    """Bytes of tokens and their ids, if it is byte-level."""
    template: str | None = None
    """Its chat template."""
    algorithm: str = ""
    remarks: tuple[str, ...] = ()


def files(path: str) -> list[Path]:
    """What decides an adopted tokenizer's identity. Raises UserError if there is nothing."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    found = (
        sorted(
            entry
            for entry in place.glob("*")
            if entry.is_file()
            and (entry.suffix in (".json", ".model", ".tiktoken", ".txt") or entry.name.startswith("chat_template"))
        )
        if place.is_dir()
        else []
    )
    if not found:
        raise UserError(
            f"adopt: {path} is no tokenizer; give a folder with tokenizer.json, a sentencepiece model (.model) or a"
            " tiktoken file (.tiktoken)"
        )
    return [entry for entry in found if entry.name not in ("manifest.json", "report.json")]


def load(path: str, pattern: str | None) -> Adopted:
    """Read it. `pattern` is the split of a tiktoken file. Raises UserError where its files disagree, or where it
    could not keep text whole by construction."""
    place = Path(path).expanduser()
    files(path)
    if place.is_dir():
        if (place / "tokenizer.json").is_file():
            return _folder(place)
        models = sorted(place.glob("*.model")) + sorted(place.glob("*.tiktoken"))
        if len(models) != 1:
            raise UserError(
                f"adopt: {path} has no tokenizer.json and {len(models) or 'no'} .model or .tiktoken files; give the"
                " file itself"
            )
        place = models[0]
    return _tiktoken(place, pattern) if place.suffix == ".tiktoken" else _sentencepiece(place)


def _folder(folder: Path) -> Adopted:
    wrong = disagreement(folder)
    if wrong:
        raise UserError(f"adopt: {wrong}; take the folder again from where it was published, whole")
    fast = load_tokenizer(folder)
    backend = fast.backend_tokenizer
    spec = json.loads(backend.to_str())
    names = {
        key: str(getattr(fast, key))
        for key in ("bos_token", "eos_token", "pad_token", "unk_token")
        if getattr(fast, key)
    }
    model = folder / "tokenizer.model"
    return Adopted(
        backend,
        names,
        model.read_bytes() if model.is_file() else None,
        encode.ranks(spec),
        fast.chat_template,
        f"adopted {spec['model']['type']}",
    )


def _sentencepiece(file: Path) -> Adopted:
    from sentencepiece import sentencepiece_model_pb2

    model = file.read_bytes()
    wrong = bpe.inexact(model)
    if wrong:
        raise UserError(f"adopt: {file} {wrong}, so that text would be lost; adopt another tokenizer, or train one")
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    spec, control = proto.trainer_spec, {piece.piece for piece in proto.pieces if piece.type == piece.CONTROL}
    names = {
        f"{key}_token": getattr(spec, f"{key}_piece")
        for key in ("bos", "eos", "pad")
        if getattr(spec, f"{key}_id") >= 0 and getattr(spec, f"{key}_piece") in control
    }
    names["unk_token"] = spec.unk_piece
    remarks = (
        (
            (
                "the space that sentencepiece puts in front of a text (add_dummy_prefix) is left out, so the first word"
                " of a text may have other ids than there"
            ),
        )
        if proto.normalizer_spec.add_dummy_prefix
        else ()
    )
    return Adopted(bpe.from_sentencepiece(model), names, model, None, None, "adopted sentencepiece", remarks)


def _tiktoken(file: Path, pattern: str | None) -> Adopted:
    from pipeline.data import presplit

    tokens = bytelevel.load(file)
    try:
        backend = bytelevel.build(tokens, bytelevel.merges_of(tokens), pattern or presplit.pattern(False), [])
    except Exception as error:  # tokenizers raises a bare Exception for an expression that it cannot read
        raise UserError(f"pattern: {pattern!r} is no expression that tokenizers reads ({error})") from None
    return Adopted(
        backend,
        {},
        None,
        tokens,
        None,
        "adopted tiktoken",
        (
            ()
            if pattern
            else (
                (
                    "a tiktoken file does not say how it splits text into words: cl100k's split is taken; another one"
                    " is given as `pattern`"
                ),
            )
        ),
    )


def disagreement(folder: Path) -> str | None:
    """Where two files of a Hugging Face folder contradict each other, in words, or None."""
    from tokenizers import Tokenizer

    try:
        spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # a bare Exception for a file that tokenizers cannot read
        return f"{folder / 'tokenizer.json'} cannot be read ({str(error)[:200]})"
    vocabulary = spec["model"].get("vocab") or {}
    vocabulary = (
        vocabulary if isinstance(vocabulary, dict) else {entry[0]: index for index, entry in enumerate(vocabulary)}
    )
    if len(set(vocabulary.values())) != len(vocabulary):
        return f"{folder / 'tokenizer.json'}: two tokens have the same id"
    for token in spec["added_tokens"]:
        other = next((name for name, index in vocabulary.items() if index == token["id"]), token["content"])
        if other != token["content"]:
            return (
                f"{folder / 'tokenizer.json'}: id {token['id']} is {other!r} in its vocabulary and {token['content']!r}"
                " among its added tokens"
            )

    def read(name: str) -> dict:
        try:
            value = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
            if not isinstance(value, dict):
                raise ValueError(f"expected a JSON object, found {str(value)[:60]}")
            return value
        except ValueError as error:
            raise UserError(
                f"adopt: {folder / name} cannot be read ({error}); take the folder again from where it was published,"
                " whole"
            ) from None

    config = read("tokenizer_config.json")
    for index, token in (config.get("added_tokens_decoder") or {}).items():
        if backend.id_to_token(int(index)) != token["content"]:
            return (
                f"{folder}: id {index} is {token['content']!r} in tokenizer_config.json and"
                f" {backend.id_to_token(int(index))!r} in tokenizer.json"
            )
    for name, block in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", read("special_tokens_map.json")),
    ):
        for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = block.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if token and backend.token_to_id(token) is None:
                return f"{folder}: {name} says that {key} is {token!r}, which tokenizer.json does not know"
    known = read("vocab.json")
    if (
        known
        and known != {token: index for token, index in vocabulary.items() if token in known}
        or known
        and len(vocabulary) > len(known) + len(spec["added_tokens"])
    ):
        return f"{folder}: vocab.json and tokenizer.json number tokens differently"
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_proto=(folder / "tokenizer.model").read_bytes())
        for index in range(len(pieces)):
            here, there = pieces.id_to_piece(index), backend.id_to_token(index)
            if there is None or here.replace(bpe.SPACE, " ") != there.replace(bpe.SPACE, " "):
                return f"{folder}: id {index} is {here!r} in tokenizer.model and {there!r} in tokenizer.json"
    for file in sorted(folder.glob("*.tiktoken")):
        tokens, ranks = bytelevel.load(file), encode.ranks(spec)
        if tokens != ranks:
            return f"{folder}: {file.name} and tokenizer.json do not hold the same tokens with the same ids"
    size = read("config.json").get("vocab_size")
    if size is not None and size < backend.get_vocab_size():
        return f"{folder}: config.json gives its model {size} tokens, tokenizer.json has {backend.get_vocab_size()}"
    return None
