"""Train a tokenizer on the cleaned text, or adopt an existing one, publish it for transformers, and verify that it
keeps every byte.

    python pipeline/tokenizer.py recipes/quickstart.yaml

Reads the output of `clean`. Writes a Hugging Face folder (tokenizer.json, tokenizer_config.json, chat_template.jinja,
and tokenizer.model or tokenizer.tiktoken) and report.json. Measurements and choices: docs/tokenizer.md.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.config import Distinct, ExternalFiles, PlannedInput, StageConfig, check_source_names, refuse_unused
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.terminal import byte_size, plural, say
from pipeline.core.tracking import Progress
from pipeline.data.tokenizer.bpe_merges import LONGEST
from pipeline.data.tokenizer.special_tokens import BOS, END_OF_TURN, EOS, PAD, SPECIAL, TURN, UNKNOWN
from pipeline.data.tokenizer.tokenizer_folder import CHAT_TEMPLATE, publish

# 2: byte-bpe has its own trainer and its special tokens at the end; 3: byte-bpe's tokens have a maximum length, and so
# have the runs that unigram is trained on; 4: transformers 4.57 reads tokenizer_config.json as well, and adopting adds
# no pad token
VERSION = 4
INPUTS = {"data": ("clean",)}


class Config(StageConfig):
    """How the tokenizer is made."""

    KEPT = "a sample that was drawn is kept, training the vocabulary starts over"

    algorithm: Literal["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"] = "sentencepiece-bpe"
    """sentencepiece-bpe: characters, and bytes for rare ones; sentencepiece-unigram: the same alphabet, a language
    model over pieces, takes seventeen times as long to train; byte-bpe: bytes after GPT-4's word split, the fewest
    tokens."""
    vocab_size: int | None = Field(None, ge=300)
    """Tokens, including the special ones; required unless a tokenizer is adopted. An error if the text cannot fill
    it."""
    sample_bytes: int = Field(100_000_000, ge=1, le=2_000_000_000)
    """Bytes of text to train on, at most. 100 MB of text takes about 1.3 GB of memory with sentencepiece-bpe, 2.2 GB
    with unigram, 0.9 GB with byte-bpe."""
    weights: dict[str, float] | None = None
    """Share of each source in the sample, as far as it has text; by default `balance` and `temperature` decide."""
    balance: Annotated[list[Literal["source", "language"]], Distinct] = ["source"]
    """Whose shares of the sample are evened out: the sources', the languages' (detected), or both, languages first."""
    temperature: float | None = Field(None, gt=0)
    """The share of n bytes is proportional to n^(1/temperature): 1 keeps the proportions of the data, 3 or 5 even them
    out; by default all shares are equal."""
    split_digits: bool = True
    """Each digit is a token of its own; false: runs of digits may become tokens (byte-bpe: at most three digits)."""
    merge_whitespace: bool = True
    """Runs of white space may become tokens (indentation, blank lines); false: each space is a token of its own or the
    first character of a word (sentencepiece: newlines may still be merged)."""
    max_token_bytes: int = Field(LONGEST, ge=4, le=2**20)
    """byte-bpe and add_tokens: bytes of the longest token, so that a document of junk cannot fill the vocabulary with
    its long runs; measured in docs/tokenizer.md. sentencepiece's limit is 16 characters."""
    character_coverage: float | None = Field(None, ge=0.98, le=1)
    """sentencepiece: share of the text whose characters get a token each, the rest becomes bytes; by default the value
    that leaves 60% of the vocabulary for longer pieces."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """More special tokens, such as <|tool|>. Raw text never becomes one."""
    reserved_tokens: int = Field(0, ge=0, le=10_000)
    """Unused special tokens <|reserved_0|>, ... for later; part of vocab_size."""
    heldout_bytes: int = Field(20_000_000, ge=0)
    """Bytes of held-out text to measure on, at most."""
    adopt: str | None = None
    """Publish this tokenizer instead of training one: a Hugging Face folder, a sentencepiece model or a tiktoken file.
    The contents of its files are part of the stage's identity."""
    add_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """With adopt: learn this many further tokens on the text, after those that it has; all old ids stay. For byte-level
    BPE (GPT-2, Llama 3, Qwen, DeepSeek, ...)."""
    pattern: str | None = None
    """For a tiktoken file in adopt: the expression that splits text into words; by default cl100k's."""

    @model_validator(mode="after")
    def _train_or_adopt(self):
        if self.adopt is None and self.vocab_size is None:
            raise ValueError("vocab_size is required: how many tokens to learn")
        if self.adopt is not None and self.vocab_size is not None:
            raise ValueError("adopt uses a tokenizer as it is: remove vocab_size")
        if self.pattern and not self.adopt:
            raise ValueError(
                "pattern belongs to adopt; split_digits and merge_whitespace decide how a trained tokenizer splits text"
            )
        if self.add_tokens and not self.adopt:
            raise ValueError("add_tokens adds to an existing tokenizer: name it (adopt: FOLDER), or use vocab_size")
        if self.adopt:
            for key in ("algorithm", "split_digits", "merge_whitespace", "character_coverage"):
                refuse_unused(self, key, "has no effect with adopt, which splits text as that tokenizer does")
        if self.algorithm == "byte-bpe":
            refuse_unused(self, "character_coverage", "belongs to algorithm sentencepiece")
        elif not self.add_tokens:
            refuse_unused(self, "max_token_bytes", "belongs to algorithm byte-bpe and to add_tokens")
        names = self.extra_tokens()
        if len(set(names)) != len(names) or any(name.strip() != name for name in names):
            raise ValueError(
                "special_tokens must be different words without space at their ends, and not <|bos|> or the like;"
                f" found {self.special_tokens}"
            )
        if self.vocab_size is not None:
            self._check_room(names)
        return self

    def _check_room(self, extra: list[str]) -> None:
        """Raise ValueError for a vocabulary without room for bytes and special tokens."""
        special = len(SPECIAL) + len(extra) + (self.algorithm != "byte-bpe")  # sentencepiece has an unknown token
        least = 256 + special
        if self.vocab_size < least:
            raise ValueError(
                f"vocab_size: {self.vocab_size} is too small for 256 bytes and {special} special tokens; set it to"
                f" {least} or more"
            )

    def extra_tokens(self) -> list[str]:
        """Special tokens besides SPECIAL. One that SPECIAL has is listed twice, which the validator refuses."""
        duplicates = [name for name in self.special_tokens if name in (*SPECIAL, UNKNOWN)]
        reserved = [f"<|reserved_{number}|>" for number in range(self.reserved_tokens)]
        return [*self.special_tokens, *duplicates, *reserved]

    @classmethod
    def external(cls) -> list[ExternalFiles]:
        return [ExternalFiles("adopt", cls.adopted_files, entry="@outside")]

    def adopted_files(self) -> list[Path]:
        from pipeline.data.tokenizer import import_tokenizer

        return import_tokenizer.files(self.adopt) if self.adopt else []

    def check_inputs(self, inputs: dict[str, PlannedInput]) -> None:
        if not self.weights or "data" not in inputs:
            return
        data = inputs["data"]
        names = data.config and data.config.planned_sources(data.inputs)
        if names is not None:
            check_source_names({"weights": self.weights}, names)

    def planned_tokenizer(self, inputs: dict[str, PlannedInput]) -> Any:
        """The tokenizer that will be adopted, as it will be published."""
        from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer

        if not self.adopt or not Path(self.adopt).expanduser().exists():
            return None
        with tempfile.TemporaryDirectory() as folder:
            adopt(self, Path(folder))  # without `add_tokens`: the text may not be there yet
            tokenizer = load_tokenizer(Path(folder))
        tokenizer.name_or_path = self.adopt  # for messages
        return tokenizer

    def planned_vocabulary(self, inputs: dict[str, PlannedInput]) -> int | None:
        if self.vocab_size is not None:
            return self.vocab_size
        tokenizer = self.planned_tokenizer(inputs)
        return len(tokenizer) if tokenizer else None

    def check_records(self, inputs: dict[str, PlannedInput]) -> None:
        self.planned_tokenizer(inputs)


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
    from pipeline.data.tokenizer.sample import draw
    from pipeline.data.tokenizer.verify_tokenizer import verify

    began = time.time()
    work = output.path / "work"
    sample_file = work / "sample.jsonl"
    balancing = (config.weights, config.balance, config.temperature)
    sample = draw(inputs["data"], "train", config.sample_bytes, config.seed, sample_file, *balancing)
    sample_bytes = sum(sample["bytes"].values())
    if not sample_bytes:
        raise UserError(
            f"inputs.data: {inputs['data'].path} has no text in its split train; there is nothing to train a"
            " tokenizer on"
        )
    heldout = draw(inputs["data"], "heldout", config.heldout_bytes, config.seed, work / "heldout.jsonl")
    output.note_time()

    training_began = time.time()
    coverage = None
    before = None
    if config.adopt:
        algorithm, before = adopt(config, output.path, sample_file, sample_bytes)
    else:
        algorithm = config.algorithm
        say(
            f"tokenizer: {algorithm} of {config.vocab_size} tokens on {byte_size(sample_bytes)} from"
            f" {plural(len(sample['bytes']), 'source')}"
        )
        if algorithm == "byte-bpe":
            train_byte_bpe(config, sample_file, sample_bytes, output.path)
        else:
            coverage = train_sentencepiece(config, sample_file, sample_bytes, output.path)
    train_seconds = time.time() - training_began
    faults.point("work")

    measured = verify(output.path, work, trained_here=not config.adopt, before=before)
    num_changed = _report_differences(measured)
    size = len(load_tokenizer(output.path))
    report = {
        "algorithm": algorithm,
        "vocab_size": size,
        "character_coverage": coverage,
        "sample_bytes": sample["bytes"],
        "sample_bytes_by_language": sample.get("languages"),
    }
    report.update(measured)
    write_json(output.path / "report.json", report)
    faults.point("work")

    metrics = {key: value for key, value in report.items() if value is not None}
    metrics["heldout_bytes"] = heldout["bytes"]
    metrics["train_seconds"] = round(train_seconds, 3)
    metrics["seconds"] = round(time.time() - began, 3)
    rate = measured["bytes_per_token"]
    round_trip = f"{num_changed} texts changed" if num_changed else "round trip exact"
    available = byte_size(sum(sample["available"].values()))
    metrics["summary"] = {
        "input": f"{byte_size(sample_bytes)} of {available}, {plural(len(sample['bytes']), 'source')}",
        "output": f"{size} tokens, {algorithm}",
        "measure": f"{rate:.2f} bytes per token held out, {round_trip}" if rate else round_trip,
    }
    if before is not None:
        metrics["summary"]["measure"] = f"{_gain(measured)}, {round_trip}"
    return metrics


def _gain(measured: dict) -> str:
    """Bytes per token of held-out text before and after tokens were added, by language."""
    before, after = measured["before"]["bytes_per_token_by_language"], measured["bytes_per_token_by_language"]
    rates = [f"{language} {before[language]:.2f} -> {after[language]:.2f}" for language in after]
    return f"bytes per token held out: {', '.join(rates)}" if rates else "no held-out text"


def _report_differences(measured: dict) -> int:
    """Print where other forms give other ids and how many texts do not survive. Returns the number of these texts."""
    for name, count in measured["ids_equal"].items():
        if count["equal"] < count["texts"]:
            say(
                f"tokenizer: {name} gives other ids on {count['texts'] - count['equal']} of {count['texts']} texts;"
                f" every stage uses tokenizer.json, {name} is nearly the same"
            )
    round_trip = measured["round_trip"]
    num_changed = round_trip["texts"] - round_trip["exact"]
    if num_changed:
        say(
            f"tokenizer: WARNING: the adopted tokenizer changes {num_changed} of {round_trip['texts']} texts, such as"
            f" {round_trip['example'][:80]!r}"
        )
    return num_changed


# ---- training --------------------------------------------------------------------------------------------------------


def train_byte_bpe(config: Config, sample: Path, sample_bytes: int, folder: Path) -> None:
    """Train on the drawn sample of `sample_bytes` bytes and publish into `folder`."""
    from pipeline.data.tokenizer import byte_bpe, pretokenize, spm_trainer
    from pipeline.data.tokenizer.sample import texts

    extra = config.extra_tokens()
    special = [*SPECIAL, *extra]
    learned, pairs = byte_bpe.train(
        texts(sample),
        config.vocab_size - len(special),
        config.split_digits,
        config.merge_whitespace,
        sample_bytes,
        config.max_token_bytes,
    )
    if len(learned) + len(special) < config.vocab_size:
        raise spm_trainer.too_large(config.vocab_size, len(learned) + len(special))
    ranks = {token: index for index, token in enumerate(learned)}
    pattern = pretokenize.pattern(config.split_digits, config.merge_whitespace)
    publish(byte_bpe.build(ranks, pairs, pattern, special), folder, extra=extra)
    write_atomic(folder / "tokenizer.tiktoken", byte_bpe.dump(ranks))


def train_sentencepiece(config: Config, sample: Path, sample_bytes: int, folder: Path) -> float:
    """Train on the drawn sample of `sample_bytes` bytes and publish into `folder`. Returns the character coverage."""
    from pipeline.data.tokenizer import spm_model, spm_trainer
    from pipeline.data.tokenizer.sample import texts

    extra = config.extra_tokens()
    coverage = config.character_coverage or spm_trainer.default_coverage(texts(sample), config.vocab_size)
    with closing(_with_progress(texts(sample), sample_bytes)) as sample_texts:
        model = spm_trainer.train_sentencepiece(
            sample_texts,
            config.vocab_size,
            config.split_digits,
            coverage,
            folder / "logs" / "sentencepiece.log",
            config.algorithm.removeprefix("sentencepiece-"),
            extra,
            config.merge_whitespace,
        )
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    publish(spm_model.to_fast_tokenizer(model), folder, names, extra, model=model)
    return coverage


def _with_progress(texts: Iterator[str], total: int) -> Iterator[str]:
    with Progress("tokenizer: text", total, unit="bytes") as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode()))


# ---- adopting --------------------------------------------------------------------------------------------------------


def adopt(config: Config, folder: Path, sample: Path | None = None, sample_bytes: int = 0) -> tuple[str, Any]:
    """Publish an existing tokenizer into `folder`, with the special tokens and the chat template that it lacks, and
    with `add_tokens` that are learned on the drawn sample of `sample_bytes` bytes. Returns (what it is, the
    tokenizers.Tokenizer to which tokens were added or None)."""
    from tokenizers import AddedToken

    from pipeline.data.tokenizer import byte_bpe, encode, import_tokenizer

    imported = import_tokenizer.load(config.adopt, config.pattern)
    backend, names, ranks, before = imported.backend, dict(imported.names), imported.ranks, None
    is_tiktoken = imported.algorithm == import_tokenizer.TIKTOKEN
    if "eos_token" not in names and not is_tiktoken:
        raise UserError(
            f"adopt: {config.adopt} has no eos token, and every document ends with one; set eos_token in its"
            " tokenizer_config.json"
        )
    if config.add_tokens:
        _check_extensible(config, backend)
        if sample is not None:
            before, backend = backend, _extended(config, backend, sample, sample_bytes)
            ranks = encode.ranks(json.loads(backend.to_str()))
    names.setdefault("bos_token", names.get("eos_token", BOS))
    names.setdefault("eos_token", EOS)
    # Padding is masked by position, so the end of text can be the padding. A new pad token would need a row that this
    # tokenizer's model does not have. A tiktoken file has no special tokens at all.
    names.setdefault("pad_token", PAD if is_tiktoken else names["eos_token"])
    turn_marks = [TURN, END_OF_TURN] if imported.template is None else []
    named = [names[key] for key in ("bos_token", "eos_token", "pad_token")]
    special = list(dict.fromkeys([*named, *turn_marks, *config.extra_tokens()]))
    missing = [name for name in special if backend.token_to_id(name) is None]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    template = imported.template or CHAT_TEMPLATE
    publish(backend, folder, names, config.extra_tokens(), template, imported.model)
    if imported.model is None and ranks is not None:
        write_atomic(folder / "tokenizer.tiktoken", byte_bpe.dump(ranks))
    if missing:
        ids = ", ".join(str(backend.token_to_id(name)) for name in missing)
        say(f"tokenizer: added special tokens that {config.adopt} lacks: {', '.join(missing)} (ids {ids})")
    if imported.template is None:
        say("tokenizer: it has no chat template; ChatML is used")
    for remark in imported.remarks:
        say(f"tokenizer: {remark}")
    return imported.algorithm, before


def _check_extensible(config: Config, backend) -> None:
    """Raise UserError unless tokens can be added."""
    from pipeline.data.tokenizer import extension

    reason = extension.unsupported(backend)
    if reason:
        raise UserError(
            f"add_tokens: {config.adopt} {reason}; tokens can be added to byte-level BPE (GPT-2, Llama 3, Qwen,"
            " DeepSeek). Train a tokenizer of its own for the text, or adopt this one without add_tokens"
        )


def _extended(config: Config, backend, sample: Path, sample_bytes: int):
    """The tokenizer with `add_tokens` learned on the drawn sample. Raises UserError if the text cannot fill them."""
    from pipeline.data.tokenizer import extension
    from pipeline.data.tokenizer.fast_tokenizer import encode_text
    from pipeline.data.tokenizer.sample import texts

    num_before = backend.get_vocab_size()
    say(
        f"tokenizer: {config.add_tokens} tokens more than the {num_before} of {config.adopt}, learned on"
        f" {byte_size(sample_bytes)}"
    )
    extended, number = extension.extend(backend, texts(sample), config.add_tokens, sample_bytes, config.max_token_bytes)
    if number < config.add_tokens:
        raise UserError(
            f"add_tokens: the text has only {number} pairs of tokens left to merge; use add_tokens: {number} or less,"
            " or more text (sample_bytes)"
        )
    for token in extended.get_added_tokens_decoder().values():
        [ids] = encode_text(extended, [token.content])
        if token.special and extended.token_to_id(token.content) in ids:
            raise UserError(
                f"add_tokens: text that spells {token.content!r} would become this special token of {config.adopt},"
                " because its model looks up whole words; rename the token there"
            )
    return extended


if __name__ == "__main__":
    from pipeline.core.stage import main

    main("tokenizer")
