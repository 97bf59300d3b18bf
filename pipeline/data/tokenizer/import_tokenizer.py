"""An existing tokenizer: a Hugging Face folder, a sentencepiece model or a tiktoken file, checked and brought into the
form of a tokenizer trained here."""

import json
from pathlib import Path
from typing import NamedTuple

from pipeline.core.errors import Absent, UserError
from pipeline.data.tokenizer import byte_bpe, encode, pretokenize, spm_model
from pipeline.data.tokenizer.contradictions import contradiction, declared_tokens
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokenizer.file_forms import form_of
from pipeline.data.tokenizer.id_gaps import fill_gaps
from pipeline.data.tokenizer.tokenizer_folder import AGAIN, NAMED, read_object

TIKTOKEN = "adopted tiktoken"  # a form without special tokens


class Imported(NamedTuple):
    backend: object
    """tokenizers.Tokenizer, in which each id has a token."""
    names: dict[str, str]
    """bos_token, eos_token, pad_token and unk_token, those of them that it has."""
    algorithm: str
    model: bytes | None = None
    """The sentencepiece model, if it was one."""
    ranks: dict[bytes, int] | None = None
    """Bytes of tokens and their ids, if it is byte-level."""
    template: str | None = None
    """Its chat template."""
    remarks: tuple[str, ...] = ()


def files(path: str) -> list[Path]:
    """The files that decide an adopted tokenizer's identity. Raises UserError if there are none."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if not place.exists():
        raise Absent(f"adopt: {path} does not exist (in {place.parent if place.is_absolute() else Path.cwd()})")
    belonging = sorted(entry for entry in place.glob("*") if entry.is_file() and _belongs(entry))
    if not belonging:
        raise UserError(
            f"adopt: {path} is not a tokenizer; give a folder with tokenizer.json, a sentencepiece model (.model) or a"
            " tiktoken file (.tiktoken)"
        )
    return belonging


def _belongs(entry: Path) -> bool:
    if entry.name in ("manifest.json", "report.json"):
        return False
    if entry.suffix in (".json", ".model", ".tiktoken", ".txt") or entry.name.startswith("chat_template"):
        return True
    if ".model." in entry.name:  # tokenizer.model.v3
        return True
    return not entry.suffix and form_of(entry) is not None


def load(path: str, pattern: str | None) -> Imported:
    """Read it. `pattern`: the expression by which a tiktoken file splits text. Raises UserError where its files
    contradict each other, or where it cannot keep every text."""
    place = Path(path).expanduser()
    belonging = files(path)
    if place.is_dir():
        if (place / "tokenizer.json").is_file():
            _refuse_pattern(path, pattern)
            return _folder(place)
        place = _only_model(path, belonging)
    form = form_of(place)
    if form is None and place.suffix == ".json":
        if "tekken" in place.name:
            raise _tekken(place)
        raise UserError(f"adopt: {path} is one file of a tokenizer; give the folder that contains it, {place.parent}")
    if form == "tiktoken" or form is None and place.suffix == ".tiktoken":
        return _tiktoken(place, pattern)
    _refuse_pattern(path, pattern)
    return _sentencepiece(place)


def _only_model(path: str, belonging: list[Path]) -> Path:
    models = [entry for entry in belonging if entry.suffix in (".model", ".tiktoken") or form_of(entry)]
    if len(models) == 1:
        return models[0]
    tekken = [entry for entry in belonging if entry.name.startswith("tekken")]
    if tekken and not models:
        raise _tekken(tekken[0])
    names = f" ({', '.join(entry.name for entry in models[:5])})" if models else ""
    raise UserError(
        f"adopt: {path} has no tokenizer.json and {len(models) or 'no'} sentencepiece or tiktoken files{names}; give"
        " the file itself"
    )


def _tekken(file: Path) -> UserError:
    return UserError(
        f"adopt: {file} is a tekken file, which is not supported; give a folder of the same model with tokenizer.json"
    )


def _refuse_pattern(path: str, pattern: str | None) -> None:
    if pattern:
        raise UserError(
            f"pattern: {path} is not a tiktoken file and defines itself how it splits text; remove `pattern`"
        )


def _folder(folder: Path) -> Imported:
    reason = contradiction(folder)
    if reason:
        raise UserError(f"adopt: {reason}; {AGAIN}")
    fast = load_tokenizer(folder)
    declared = declared_tokens(read_object(folder / "tokenizer.json"))
    backend, remarks = fill_gaps(fast.backend_tokenizer, declared, folder)
    spec = json.loads(backend.to_str())
    names = {key: str(getattr(fast, key)) for key in NAMED if getattr(fast, key)}
    file = folder / "tokenizer.model"
    model = file.read_bytes() if file.is_file() and form_of(file) != "tiktoken" else None
    algorithm = f"adopted {spec['model']['type']}"
    return Imported(backend, names, algorithm, model, encode.ranks(spec), fast.chat_template, remarks)


def _sentencepiece(file: Path) -> Imported:
    model = file.read_bytes()
    reason = spm_model.damage(model)
    if reason:
        raise UserError(
            f"adopt: {file} {reason}; copy it again from where it was published, or give a folder with tokenizer.json"
            " or a tiktoken file"
        )
    reason = spm_model.inexactness(model)
    if reason:
        raise UserError(f"adopt: {file} {reason}, so that text would be lost; adopt another tokenizer, or train one")
    proto = spm_model.parsed(model)
    trainer = proto.trainer_spec
    control = {piece.piece for piece in proto.pieces if piece.type == piece.CONTROL}
    names = {}
    for key in ("bos", "eos", "pad"):
        piece = getattr(trainer, f"{key}_piece")
        if getattr(trainer, f"{key}_id") >= 0 and piece in control:
            names[f"{key}_token"] = piece
    names["unk_token"] = trainer.unk_piece
    backend = spm_model.to_fast_tokenizer(model)
    return Imported(backend, names, "adopted sentencepiece", model, remarks=_remarks(proto))


def _remarks(proto) -> tuple[str, ...]:
    remarks = []
    if proto.normalizer_spec.add_dummy_prefix:
        remarks.append(
            "this sentencepiece model puts a space in front of each text (add_dummy_prefix); the same is done here, and"
            " decoding removes it"
        )
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    marks = [piece for piece in user_defined if spm_model.is_mark(piece)]
    if marks:
        remarks.append(
            f"{len(marks)} user-defined pieces, such as {marks[0]}, are special tokens here: text that spells one stays"
            " text, which sentencepiece would read as the piece"
        )
    return tuple(remarks)


def _tiktoken(file: Path, pattern: str | None) -> Imported:
    ranks = byte_bpe.load(file)
    merges = byte_bpe.merges_of(ranks)
    try:
        backend = byte_bpe.build(ranks, merges, pattern or pretokenize.pattern(False), [])
    except Exception as error:  # tokenizers raises a bare Exception for an expression that it cannot read
        raise UserError(
            f"pattern: {pattern!r} is not a regular expression that tokenizers supports ({error}); correct it"
        ) from None
    backend, remarks = fill_gaps(backend, {}, file)
    if not pattern:
        remarks += (
            "a tiktoken file does not say how it splits text into words: cl100k's expression is used; set `pattern` for"
            " another one",
        )
    return Imported(backend, {}, TIKTOKEN, None, ranks, None, remarks)
