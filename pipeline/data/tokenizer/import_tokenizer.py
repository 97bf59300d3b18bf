"""A tokenizer that exists already: a Hugging Face folder, a sentencepiece model, or a tiktoken file, checked and
brought into the form of our own."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import Absent, UserError
from pipeline.data.tokenizer import byte_bpe, encode, spm_trainer
from pipeline.data.tokenizer.tokenizer_folder import (
    AGAIN,
    CONFIG,
    NAMED,
    added_tokens,
    check_config,
    content_of,
    read_backend,
    read_object,
)
from pipeline.data.tokens.store import load_tokenizer

TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* +\d+\r?(\n|$)")  # base64 of a token's bytes and its rank
SENTENCEPIECE_HEAD = re.compile(rb"\n[\x02-\x7f]\n", re.DOTALL)
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
    found = sorted(entry for entry in place.glob("*") if entry.is_file() and _belongs(entry)) if place.is_dir() else []
    if not place.exists():
        raise Absent(f"adopt: {path} does not exist (in {Path.cwd() if not place.is_absolute() else place.parent})")
    if not found:
        raise UserError(
            f"adopt: {path} is no tokenizer; give a folder with tokenizer.json, a sentencepiece model (.model) or a"
            " tiktoken file (.tiktoken)"
        )
    return found


def _belongs(entry: Path) -> bool:
    if entry.name in ("manifest.json", "report.json"):
        return False
    named = entry.suffix in (".json", ".model", ".tiktoken", ".txt") or entry.name.startswith("chat_template")
    # tokenizer.model.v3; the files of tiktoken's cache are named by a hash alone
    return named or ".model." in entry.name or not entry.suffix and form_of(entry) is not None


def form_of(file: Path) -> str | None:
    """What a file is by its content: "sentencepiece" or "tiktoken"; None for anything else. Llama 3's tokenizer.model
    is a tiktoken file, and tiktoken's own cache gives its files no suffix."""
    with open(file, "rb") as handle:
        head = handle.read(4096)
    if TIKTOKEN_LINE.match(head.lstrip()):
        return "tiktoken"
    # a model begins with its first piece: field 1, of a length, with field 1 of a length (the text)
    return "sentencepiece" if SENTENCEPIECE_HEAD.match(head) else None


def load(path: str, pattern: str | None) -> Adopted:
    """Read it. `pattern` is the split of a tiktoken file. Raises UserError where its files disagree, or where it
    could not keep text whole by construction."""
    place = Path(path).expanduser()
    found = files(path)
    if place.is_dir():
        if (place / "tokenizer.json").is_file():
            _no_pattern(path, pattern)
            return _folder(place)
        models = [entry for entry in found if entry.suffix in (".model", ".tiktoken") or form_of(entry)]
        if len(models) != 1:
            named = f" ({', '.join(entry.name for entry in models[:5])})" if models else ""
            raise UserError(
                f"adopt: {path} has no tokenizer.json and {len(models) or 'no'} sentencepiece or tiktoken files{named};"
                " give the file itself"
            )
        place = models[0]
    form = form_of(place)
    if form is None and place.suffix == ".json":
        if "tekken" in place.name:
            raise UserError(
                f"adopt: {path} is a tekken file, which is not read here; give the model's folder with tokenizer.json"
            )
        raise UserError(f"adopt: {path} is one file of a tokenizer; give the folder that holds it, {place.parent}")
    if form == "tiktoken" or form is None and place.suffix == ".tiktoken":
        return _tiktoken(place, pattern)
    _no_pattern(path, pattern)
    return _sentencepiece(place)


def _no_pattern(path: str, pattern: str | None) -> None:
    if pattern:
        raise UserError(f"pattern: {path} is no tiktoken file and says itself how it splits text; leave `pattern` out")


def _folder(folder: Path) -> Adopted:
    wrong = disagreement(folder)
    if wrong:
        raise UserError(f"adopt: {wrong}; {AGAIN}")
    fast = load_tokenizer(folder)
    declared = _declared(read_object(folder / "tokenizer.json"))
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
        model.read_bytes() if model.is_file() and form_of(model) != "tiktoken" else None,
        encode.ranks(spec),
        fast.chat_template,
        f"adopted {spec['model']['type']}",
        remarks,
    )


def _sentencepiece(file: Path) -> Adopted:
    from sentencepiece import sentencepiece_model_pb2

    model = file.read_bytes()
    if wrong := spm_trainer.damaged(model):
        raise UserError(
            f"adopt: {file} {wrong}; copy it again from where it was published, or give a folder with tokenizer.json or"
            " a tiktoken file"
        )
    wrong = spm_trainer.inexact(model)
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
    remarks = ()
    if proto.normalizer_spec.add_dummy_prefix:
        remarks += (
            "with this model sentencepiece puts a space in front of each text (add_dummy_prefix); so it is here, and"
            " decoding removes it",
        )
    marks = [
        piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED and spm_trainer.is_mark(piece.piece)
    ]
    if marks:
        remarks += (
            f"{len(marks)} user-defined pieces, such as {marks[0]}, are special tokens here: text that spells one stays"
            " text, which sentencepiece would read as the piece",
        )
    return Adopted(spm_trainer.from_sentencepiece(model), names, model, None, None, "adopted sentencepiece", remarks)


def _tiktoken(file: Path, pattern: str | None) -> Adopted:
    from pipeline.data.tokenizer import pretokenize

    tokens = byte_bpe.load(file)
    try:
        backend = byte_bpe.build(tokens, byte_bpe.merges_of(tokens), pattern or pretokenize.pattern(False), [])
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
            f"adopt: {place} gives id {index} to {one!r} and to {other!r}; copy it again from where it was published"
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
    if made.get_vocab() != wanted | unused:
        lost = sorted((wanted | unused).items() - made.get_vocab().items(), key=lambda item: item[1])
        raise UserError(
            f"adopt: {place} declares the token {lost[0][0]!r} with id {lost[0][1]}, which `tokenizers` does not read"
            " so; copy it again from where it was published"
        )
    some = ", ".join(map(str, list(unused.values())[:3]))
    said = f"{len(unused)} ids below {most} have no token ({some}{', ...' if len(unused) > 3 else ''}) and are filled"
    return made, (f"{said} with special tokens <|unused ID|>",) if unused else ()


def _declared(spec: dict) -> dict[str, int]:
    return {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}


def disagreement(folder: Path) -> str | None:
    """Where two files of a Hugging Face folder contradict each other, in words, or None. Raises UserError for a file
    that cannot be read."""
    backend = read_backend(folder)
    check_config(folder)
    spec = read_object(folder / "tokenizer.json")
    vocabulary = spec["model"].get("vocab") or {}
    if not isinstance(vocabulary, dict):  # unigram: pairs of a piece and its score
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    if wrong := _twice(spec, vocabulary):
        return f"{folder / 'tokenizer.json'}: {wrong}"
    backend, _ = filled(backend, _declared(spec), folder)
    if wrong := _config_disagrees(folder, backend):
        return wrong
    known = read_object(folder / "vocab.json")
    if known and (
        known != {token: index for token, index in vocabulary.items() if token in known}
        or len(vocabulary) > len(known) + len(spec.get("added_tokens") or ())
    ):
        return f"{folder}: vocab.json and tokenizer.json number tokens differently"
    if wrong := _other_forms_disagree(folder, spec, backend):
        return wrong
    size = read_object(folder / "config.json").get("vocab_size")
    if isinstance(size, int) and size < backend.get_vocab_size():
        return f"{folder}: config.json gives its model {size} tokens, tokenizer.json has {backend.get_vocab_size()}"
    return None


def _twice(spec: dict, vocabulary: dict[str, int]) -> str | None:
    """A token or an id that tokenizer.json gives twice."""
    if len(set(vocabulary.values())) != len(vocabulary):
        return "two tokens have the same id"
    named = {index: name for name, index in vocabulary.items()}
    for token in spec.get("added_tokens") or ():
        name, index = token["content"], token["id"]
        if not name:
            return f"the added token with id {index} is empty"
        if named.get(index, name) != name:
            return f"id {index} is {named[index]!r} in its vocabulary and {name!r} among its added tokens"
        if vocabulary.get(name, index) != index:  # `tokenizers` takes the first, a reader of the file the second
            return f"{name!r} has id {vocabulary[name]} in its vocabulary and {index} among its added tokens"
    return None


def _config_disagrees(folder: Path, backend) -> str | None:
    """Tokens of tokenizer_config.json and special_tokens_map.json that tokenizer.json does not have, or elsewhere."""
    for index, token in added_tokens(folder).items():
        there = backend.id_to_token(index) if index < 2**32 else None
        if there != token:
            return f"{folder}: id {index} is {token!r} in {CONFIG} and {there!r} in tokenizer.json"
    for name in (CONFIG, "special_tokens_map.json"):
        block = read_object(folder / name)
        for key in NAMED:
            token = content_of(block.get(key))
            if token and backend.token_to_id(token) is None:
                return f"{folder}: {name} says that {key} is {token!r}, which tokenizer.json does not know"
    return None


def _other_forms_disagree(folder: Path, spec: dict, backend) -> str | None:
    """tokenizer.model and tiktoken files that hold other tokens than tokenizer.json."""
    file = folder / "tokenizer.model"
    if file.is_file() and form_of(file) != "tiktoken":
        model = file.read_bytes()
        if wrong := spm_trainer.damaged(model):
            return f"{file} {wrong}"
        for index, here in enumerate(spm_trainer.pieces_of(model)):
            there = backend.id_to_token(index)
            if there is None or here.replace(spm_trainer.SPACE, " ") != there.replace(spm_trainer.SPACE, " "):
                return f"{folder}: id {index} is {here!r} in tokenizer.model and {there!r} in tokenizer.json"
    for other in sorted(folder.glob("*.tiktoken")):
        if byte_bpe.load(other) != encode.ranks(spec):
            return f"{folder}: {other.name} and tokenizer.json do not hold the same tokens with the same ids"
    return None
