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
from pipeline.data.tokenizer.special_tokens import BOS, END_OF_TURN, EOS, PAD, TURN

CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
MOST_GAPS = 1_000_000  # ids without a token; a vocabulary with more of them is damaged
AGAIN = "copy the folder again from where it was published"

# ChatML. The model is trained on what is between the generation marks: the answer and the end of its turn, but not the
# newline after it.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{- message['content'] + '<|im_end|>' -}}{% endgeneration %}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def read_object(path: Path) -> dict:
    """The JSON object in a file, {} if there is no such file. Raises UserError if it contains anything else."""
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
    """The result of `read`, which loads the fast tokenizer of a folder. Raises UserError with the file that is missing
    or that cannot be read."""
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
        for name in ("tokenizer.json", CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json"):
            read_object(folder / name)
        raise UserError(
            f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {str(error)[:200]}); {AGAIN}"
        ) from error


def recoverable(error: BaseException) -> bool:
    """Is it a library's failure on its input? A panic of `tokenizers` (Rust) is not a subclass of Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def read_backend(folder: Path | str):
    """The tokenizers.Tokenizer of a folder, exactly as its tokenizer.json says. Raises UserError if there is none, or
    if it cannot be read."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    backend = readable(folder, lambda: Tokenizer.from_file(str(folder / "tokenizer.json")))
    num_tokens = backend.get_vocab_size()
    largest_id = max(backend.get_vocab().values(), default=0)
    if largest_id >= num_tokens + MOST_GAPS:  # `tokenizers` writes it id by id: 30 s and gigabytes for an id of 2^31
        raise UserError(
            f"{folder / 'tokenizer.json'}: has {num_tokens:,} tokens, and one of them has the id {largest_id:,}; a"
            f" model would need a row for each id up to it. The file is damaged; {AGAIN}"
        )
    dropout = getattr(backend.model, "dropout", None)  # of BPE
    if dropout:
        raise UserError(
            f"{folder / 'tokenizer.json'}: its model has dropout: {dropout:g}, so that a text gets other ids each time"
            " it is encoded; set it to null"
        )
    return backend


def check_config(folder: Path) -> None:
    """Raise UserError for values of tokenizer_config.json or special_tokens_map.json that have a type which no program
    reads."""
    for name in (CONFIG, SPECIAL_TOKENS_MAP):
        block = read_object(folder / name)
        for key in NAMED:
            if block.get(key) is not None and not isinstance(content_of(block[key]), str):
                raise UserError(
                    f"{folder / name}: {key} is {str(block[key])[:60]}, expected the text of a token; {AGAIN}"
                )
    template = read_object(folder / CONFIG).get("chat_template")
    if template is not None and not isinstance(template, str | list):
        raise UserError(f"{folder / CONFIG}: chat_template is {str(template)[:60]}, expected a text; {AGAIN}")
    added_tokens(folder)


def content_of(token):
    """The text of a token of tokenizer_config.json, which is a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def added_tokens(folder: Path) -> dict[int, str]:
    """added_tokens_decoder of tokenizer_config.json: id -> text. Raises UserError for anything but ids and tokens."""
    path = folder / CONFIG
    block = read_object(path).get("added_tokens_decoder") or {}
    if not isinstance(block, dict):
        raise UserError(f"{path}: added_tokens_decoder is {str(block)[:60]}, expected ids and tokens; {AGAIN}")
    tokens = {}
    for index, token in block.items():
        is_id = index.isascii() and index.isdigit()
        if not is_id or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise UserError(
                f"{path}: added_tokens_decoder has {index[:20]!r}: {str(token)[:60]}, expected an id and a token with"
                f" its content; {AGAIN}"
            )
        tokens[int(index)] = token["content"]
    return tokens


def adds_space(backend) -> bool:
    """Does this tokenizers.Tokenizer put a space in front of a text (sentencepiece's dummy prefix, ByteLevel's
    add_prefix_space)?"""
    spec = json.loads(backend.to_str())
    normalizer, pre_tokenizer = spec["normalizer"] or {}, spec["pre_tokenizer"] or {}
    steps = [normalizer, *normalizer.get("normalizers", []), pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    return any(_step_adds_space(step) for step in steps)


def _step_adds_space(step: dict) -> bool:
    kind = step.get("type")
    if kind == "ByteLevel":
        return step["add_prefix_space"]
    if kind == "Metaspace":
        return step["prepend_scheme"] != "never"
    return kind == "Prepend"


def publish(
    backend,
    folder: Path,
    names: dict[str, str] | None = None,
    extra: list[str] = (),
    template: str = CHAT_TEMPLATE,
    model: bytes | None = None,
) -> None:
    """Write the folder that transformers, vLLM and the later stages read. `names`: bos_token and the like, by default
    ours; `extra`: special tokens besides these and the marks of a turn; `model`: the sentencepiece model."""
    from transformers import PreTrainedTokenizerFast

    names = names or {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    turn_marks = [mark for mark in (TURN, END_OF_TURN) if backend.token_to_id(mark) is not None]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=[*turn_marks, *extra],
        clean_up_tokenization_spaces=False,
        **names,
    )
    fast.chat_template = template
    save(fast, folder, model)


def save(fast, folder: Path, model: bytes | None = None) -> None:
    """Write a fast tokenizer (transformers) into `folder` in a form that transformers 4.57 and 5 and llama.cpp's
    converter read alike. `model`: the sentencepiece model with the same ids.

    transformers 5 writes `tokenizer_class: TokenizersBackend` and a list `extra_special_tokens`, which 4.57 refuses,
    and omits `added_tokens_decoder`, without which llama.cpp's converter has no names for tokens that tokenizer.model
    lacks. `add_prefix_space` is what 4.57 sets for a byte-level tokenizer and what llama.cpp does to a text; without
    it they assume False and True. tokenizer.json is the same in all versions.
    """
    fast.save_pretrained(folder)
    config = read_object(folder / CONFIG)
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    extra = config.pop("extra_special_tokens", None)
    if extra is not None:
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
