"""The files of a tokenizer in the Hugging Face layout: reading them with errors for people, and writing them so that
other programs read the same ids.

    backend = read_backend(folder)             # tokenizers.Tokenizer, exactly as tokenizer.json says
    save(fast, folder)                         # for transformers 4.57 and 5, vLLM and llama.cpp's converter
"""

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json

CONFIG = "tokenizer_config.json"
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
MOST_GAPS = 1_000_000  # ids without a token, beyond which a vocabulary is damaged
AGAIN = "copy the folder again from where it was published"


def read_object(path: Path) -> dict:
    """The JSON object in a file, {} if there is no such file. Raises UserError if it holds anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({str(error)[:200]}); {AGAIN}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: cannot be read (expected a JSON object, found {str(value)[:60]}); {AGAIN}")
    return value


def readable(folder: Path, read: Callable):
    """What `read` makes of the folder of a fast tokenizer. Raises UserError with the file that is missing or that
    cannot be read."""
    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json; give the output of stage tokenizer, or the folder of a fast Hugging Face"
            " tokenizer (a folder with tokenizer.model alone is converted by a stage `tokenizer: {adopt: FOLDER}`)"
        )
    try:
        return read()
    except BaseException as error:
        if isinstance(error, UserError) or not recoverable(error):
            raise
        for name in ("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json"):
            read_object(folder / name)
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {str(error)[:200]}); {AGAIN}"
        ) from error


def recoverable(error: BaseException) -> bool:
    """Is it a failure of a library on its input? A panic of `tokenizers` (Rust) is no subclass of Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def read_backend(folder: Path | str):
    """The tokenizers.Tokenizer of a folder, exactly as its tokenizer.json says. Raises UserError if there is none, or
    none that can be read."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    backend = readable(folder, lambda: Tokenizer.from_file(str(folder / "tokenizer.json")))
    size, most = backend.get_vocab_size(), max(backend.get_vocab().values(), default=0)
    if most >= size + MOST_GAPS:  # `tokenizers` writes a vocabulary id by id: 30 s and gigabytes for an id of 2^31
        raise UserError(
            f"{folder / 'tokenizer.json'}: has {size:,} tokens and gives one of them the id {most:,}, up to which a"
            f" model would need rows. The file is damaged; {AGAIN}"
        )
    return backend


def check_config(folder: Path) -> None:
    """Raise UserError for a tokenizer_config.json or special_tokens_map.json whose values are of a kind that no reader
    knows."""
    config = read_object(folder / CONFIG)
    for name, block in ((CONFIG, config), ("special_tokens_map.json", read_object(folder / "special_tokens_map.json"))):
        for key in NAMED:
            if key in block and block[key] is not None and not isinstance(content_of(block[key]), str):
                raise UserError(
                    f"{folder / name}: {key} is {str(block[key])[:60]}, expected the text of a token; {AGAIN}"
                )
    template = config.get("chat_template")
    if template is not None and not isinstance(template, str | list):
        raise UserError(f"{folder / CONFIG}: chat_template is {str(template)[:60]}, expected a text; {AGAIN}")
    added_tokens(folder)


def content_of(token):
    """The text of a token of tokenizer_config.json, which is a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def added_tokens(folder: Path) -> dict[int, str]:
    """added_tokens_decoder of tokenizer_config.json: id -> text. Raises UserError for anything else than ids and
    tokens."""
    place = folder / CONFIG
    block = read_object(place).get("added_tokens_decoder") or {}
    if not isinstance(block, dict):
        raise UserError(f"{place}: added_tokens_decoder is {str(block)[:60]}, expected ids and tokens; {AGAIN}")
    found = {}
    for index, token in block.items():
        if (
            not (index.isascii() and index.isdigit())
            or not isinstance(token, dict)
            or not isinstance(token.get("content"), str)
        ):
            raise UserError(
                f"{place}: added_tokens_decoder has {index[:20]!r}: {str(token)[:60]}, expected an id and a token with"
                f" its content; {AGAIN}"
            )
        found[int(index)] = token["content"]
    return found


def adds_space(backend) -> bool:
    """Does this tokenizers.Tokenizer put a space in front of a text (sentencepiece's dummy prefix, ByteLevel's
    add_prefix_space)?"""
    spec = json.loads(backend.to_str())
    parts = [spec["normalizer"] or {}, spec["pre_tokenizer"] or {}]
    parts += parts[0].get("normalizers", []) + parts[1].get("pretokenizers", [])
    return any(
        part.get("type") == "Prepend"
        or part.get("type") == "ByteLevel"
        and part["add_prefix_space"]
        or part.get("type") == "Metaspace"
        and part["prepend_scheme"] != "never"
        for part in parts
    )


def save(fast, folder: Path, model: bytes | None = None) -> None:
    """Write a fast tokenizer (transformers) into `folder` in the form that transformers 4.57 and 5 and llama.cpp's
    converter read alike. `model`: the sentencepiece model with the same ids.

    transformers 5 writes `tokenizer_class: TokenizersBackend` and a list `extra_special_tokens`, which 4.57 refuses,
    and leaves `added_tokens_decoder` out, without which llama.cpp's converter has no names for tokens that
    tokenizer.model lacks. `add_prefix_space` is what 4.57 gives a byte-level tokenizer and what llama.cpp does to a
    text; without it they take False and True. tokenizer.json is the same in all versions.
    """
    fast.save_pretrained(folder)
    config = read_object(folder / CONFIG)
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    if (extra := config.pop("extra_special_tokens", None)) is not None:
        config["additional_special_tokens"] = extra
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["add_prefix_space"] = adds_space(fast.backend_tokenizer)
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in fast.added_tokens_decoder.items()
    }
    write_json(folder / CONFIG, config)
    if model is not None:
        write_atomic(folder / "tokenizer.model", model)
