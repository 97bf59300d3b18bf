"""A tokenizer that exists already: a Hugging Face folder, a sentencepiece model, or a tiktoken file, checked and
brought into the form of our own."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.data import bpe, bytelevel, encode
from pipeline.data.tokens import load_tokenizer
from pipeline.errors import Absent, UserError

MOST_UNUSED = 10_000  # ids without a token that are filled; more are a damaged file


class Adopted(NamedTuple):
    backend: object
    """tokenizers.Tokenizer, in which each id has a token."""
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
    if not place.exists():
        raise Absent(f"adopt: {path} does not exist (in {Path.cwd() if not place.is_absolute() else place.parent})")
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
    if place.suffix == ".json":
        raise UserError(f"adopt: {path} is one file of a tokenizer; give the folder that it stands in, {place.parent}")
    return _tiktoken(place, pattern) if place.suffix == ".tiktoken" else _sentencepiece(place)


def _folder(folder: Path) -> Adopted:
    wrong = disagreement(folder)
    if wrong:
        raise UserError(f"adopt: {wrong}; take the folder again from where it was published, whole")
    fast = load_tokenizer(folder)
    declared = _declared(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    backend, remarks = filled(fast.backend_tokenizer, declared, folder)
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
        remarks,
    )


def _sentencepiece(file: Path) -> Adopted:
    from sentencepiece import sentencepiece_model_pb2

    model = file.read_bytes()
    if wrong := bpe.damaged(model):
        raise UserError(
            f"adopt: {file} {wrong}; take it again from where it was published, or give a folder with tokenizer.json or"
            " a .tiktoken file"
        )
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
    backend, remarks = filled(backend, {}, file)
    if not pattern:
        remarks += (
            "a tiktoken file does not say how it splits text into words: cl100k's split is taken; another one is given"
            " as `pattern`",
        )
    return Adopted(backend, {}, None, tokens, None, "adopted tiktoken", remarks)


def filled(backend, declared: dict[str, int], place: Path):
    """(tokenizer, remarks): the tokenizer with the same ids, in which a special token <|unused ID|> stands for each id
    below the largest that had no token, and `declared` tokens have the ids that they are declared with.

    cl100k has no 100256, p50k no 50256. `tokenizers` numbers an added token by how many there are, so that it would
    take the id of another one, and reads the ids of added tokens in a tokenizer.json without following them; and a
    vocabulary in which each id has a token has as many tokens as a model needs rows. The space in the name keeps text
    from spelling one in a model that looks whole words up. Raises UserError for more than MOST_UNUSED such ids.
    """
    from tokenizers import Tokenizer

    wanted = backend.get_vocab() | declared
    ids = set(wanted.values())
    most = max(ids)
    if most + 1 == len(ids) and backend.get_vocab() == wanted:
        return backend, ()
    if len(ids) < len(wanted):
        first: dict[int, str] = {}
        one, other, index = next(
            (first[index], token, index) for token, index in wanted.items() if first.setdefault(index, token) != token
        )
        raise UserError(
            f"adopt: {place} gives id {index} to {one!r} and to {other!r}; take it again from where it was published,"
            " whole"
        )
    if most + 1 - len(ids) > MOST_UNUSED:
        raise UserError(
            f"adopt: {place} has no token for {most + 1 - len(ids):,} of the ids below its largest, {most:,}; a model"
            f" would need a row for each, and at most {MOST_UNUSED:,} are filled. Number its tokens from 0 on, one"
            " after another"
        )
    unused = {f"<|unused {index}|>": index for index in sorted(set(range(most)) - ids)}
    spec = json.loads(backend.to_str())
    names = {token["content"] for token in spec["added_tokens"]}
    model = spec["model"]["vocab"]
    if not isinstance(model, dict):  # unigram: a list, whose places are the ids
        raise UserError(
            f"adopt: {place} has no token with id {min(unused.values(), default=most)}, and in a unigram vocabulary"
            " none can be put there; give each id a token"
        )
    model |= {token: index for token, index in wanted.items() if token in names} | unused
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"] += [{"id": index, "content": token, **plain} for token, index in unused.items()]
    for token in spec["added_tokens"]:
        token["id"] = model[token["content"]]
    spec["added_tokens"].sort(key=lambda token: token["id"])
    made = Tokenizer.from_str(json.dumps(spec))
    assert made.get_vocab() == wanted | unused
    some = ", ".join(map(str, list(unused.values())[:3]))
    said = f"{len(unused)} ids below {most} have no token ({some}{', ...' if len(unused) > 3 else ''}) and are filled"
    return made, (f"{said} with special tokens <|unused ID|>",) if unused else ()


def _declared(spec: dict) -> dict[str, int]:
    return {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}


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
    named = {index: name for name, index in vocabulary.items()}
    for token in spec.get("added_tokens") or ():
        name, index = token["content"], token["id"]
        if named.get(index, name) != name:
            return (
                f"{folder / 'tokenizer.json'}: id {index} is {named[index]!r} in its vocabulary and {name!r} among its"
                " added tokens"
            )
        if vocabulary.get(name, index) != index:  # `tokenizers` takes the first, a reader of the file the second
            return (
                f"{folder / 'tokenizer.json'}: {name!r} has id {vocabulary[name]} in its vocabulary and {index} among"
                " its added tokens"
            )
    backend, _ = filled(backend, _declared(spec), folder)

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
        and len(vocabulary) > len(known) + len(spec.get("added_tokens") or ())
    ):
        return f"{folder}: vocab.json and tokenizer.json number tokens differently"
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = (folder / "tokenizer.model").read_bytes()
        if wrong := bpe.damaged(model):
            return f"{folder / 'tokenizer.model'} {wrong}"
        pieces = SentencePieceProcessor(model_proto=model)
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
