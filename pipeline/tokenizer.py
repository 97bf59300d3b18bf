"""Train a tokenizer on the cleaned text, or take one over, publish it for transformers, and prove that it keeps every
byte.

    python pipeline/tokenizer.py recipes/quickstart.yaml

Reads the output of `clean`. Writes a Hugging Face folder (tokenizer.json, tokenizer_config.json, chat_template.jinja,
and beside it tokenizer.model or tokenizer.tiktoken) that AutoTokenizer loads, and report.json. Measurements and
choices: docs/tokenizer.md.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.chain import say
from pipeline.core.errors import UserError
from pipeline.core.files import write_atomic, write_json
from pipeline.core.output import Output
from pipeline.core.plural import many
from pipeline.core.recipe import StageConfig
from pipeline.core.tracking import Progress
from pipeline.data.tokenizer.bpe_merges import LONGEST

# 2: byte-bpe has its own trainer and its special tokens at the end; 3: its tokens are bounded, and so are the runs that
# unigram is trained on; 4: tokenizer_config.json is one that transformers 4.57 reads as well, and adopting adds no pad
# token
VERSION = 4
INPUTS = {"data": ("clean",)}
KEPT = "a sample that was drawn is kept, training the vocabulary starts over"  # of the work of a run that was stopped

# ChatML. What the model is taught to say stands between the generation marks: the answer and the end of its turn, not
# the newline after it.
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


class Config(StageConfig):
    """How the tokenizer is made."""

    algorithm: Literal["sentencepiece-bpe", "sentencepiece-unigram", "byte-bpe"] = "sentencepiece-bpe"
    """sentencepiece-bpe: characters, bytes for rare ones; sentencepiece-unigram: the same alphabet, a language model
    over pieces, trains seventeen times as long; byte-bpe: bytes over GPT-4's word split, fewest tokens."""
    vocab_size: int | None = Field(None, ge=300)
    """Tokens, the special ones included; required unless a tokenizer is adopted. Text that cannot fill it is
    refused."""
    sample_bytes: int = Field(100_000_000, ge=1, le=2_000_000_000)
    """Bytes of text to train on, at most. 100 MB of text takes about 1.3 GB of memory with sentencepiece-bpe, 2.2 GB
    with unigram, 0.9 GB with byte-bpe."""
    weights: dict[str, float] | None = None
    """Share of each source in the sample, as far as it has text; by default as `balance` and `temperature` say."""
    balance: list[Literal["source", "language"]] = ["source"]
    """Whose shares in the sample are evened out: the sources', the languages' (detected), or both, languages first."""
    temperature: float | None = Field(None, gt=0)
    """Share of a part of n bytes is as n^(1/temperature): 1 leaves shares as the data has them, 3 or 5 even them
    out; by default all parts alike."""
    split_digits: bool = True
    """Each digit is a token of its own; false: runs of digits may be learned (byte-bpe: at most three)."""
    merge_whitespace: bool = True
    """Runs of white space may become tokens (indentation, blank lines); false: each space stands alone or at the
    beginning of a word (sentencepiece: newlines may still join)."""
    max_token_bytes: int = Field(LONGEST, ge=4, le=2**20)
    """byte-bpe: bytes of the longest token, so that a document of junk cannot take the vocabulary for its long runs;
    measured in docs/tokenizer.md. sentencepiece's bound is 16 characters."""
    character_coverage: float | None = Field(None, ge=0.98, le=1)
    """sentencepiece: share of the text whose characters get a token each, the rest is bytes; by default what leaves
    60% of the vocabulary for longer pieces."""
    special_tokens: list[Annotated[str, Field(min_length=1)]] = []
    """More special tokens, such as <|tool|>. Raw text never becomes one."""
    reserved_tokens: int = Field(0, ge=0, le=10_000)
    """Unused special tokens <|reserved_0|>, ... for later, part of vocab_size."""
    heldout_bytes: int = Field(20_000_000, ge=0)
    """Bytes of held-out text to measure on, at most."""
    adopt: str | None = None
    """Take this tokenizer over and train none: a Hugging Face folder, a sentencepiece model or a tiktoken file. It
    counts by what its files hold."""
    pattern: str | None = None
    """adopt of a tiktoken file: the expression that splits text into words; by default cl100k's."""

    @model_validator(mode="after")
    def _one_way(self):
        if (self.vocab_size is None) == (self.adopt is None):
            raise ValueError(
                "vocab_size is required: how many tokens to learn"
                if self.adopt is None
                else "adopt takes a tokenizer as it is: leave vocab_size out"
            )
        if self.pattern and not self.adopt:
            raise ValueError(
                "pattern belongs to adopt; what a trained tokenizer splits at is said by split_digits and"
                " merge_whitespace"
            )
        fields = type(self).model_fields
        for key in ("algorithm", "split_digits", "merge_whitespace", "character_coverage", "max_token_bytes"):
            of = {"character_coverage": "sentencepiece", "max_token_bytes": "byte-bpe"}.get(key, self.algorithm)
            if getattr(self, key) != fields[key].default and (self.adopt or not self.algorithm.startswith(of)):
                reason = "adopt takes a tokenizer as it is" if self.adopt else f"it belongs to algorithm {of}"
                raise ValueError(f"{key} would do nothing here: {reason}; leave it out")
        names = self.extra_tokens()
        if len(set(names)) != len(names) or any(name.strip() != name for name in names):
            raise ValueError(
                "special_tokens must be different words without space at their ends, and not <|bos|> or the like;"
                f" found {self.special_tokens}"
            )
        return self

    def extra_tokens(self) -> list[str]:
        from pipeline.data.tokenizer.spm_trainer import SPECIAL, UNKNOWN

        twice = [name for name in self.special_tokens if name in (*SPECIAL, UNKNOWN)]
        return [*self.special_tokens, *twice, *(f"<|reserved_{number}|>" for number in range(self.reserved_tokens))]

    def outside(self) -> list[Path]:
        """Files beside the inputs that decide the result."""
        from pipeline.data.tokenizer.import_tokenizer import files

        return files(self.adopt) if self.adopt else []


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.data.tokenizer.sample import draw
    from pipeline.data.tokenizer.verify_tokenizer import prove

    began = time.time()
    work = output.path / "work"
    sample = draw(
        inputs["data"],
        "train",
        config.sample_bytes,
        config.seed,
        work / "sample.jsonl",
        config.weights,
        config.balance,
        config.temperature,
    )
    if not sum(sample["bytes"].values()):
        raise UserError(
            f"inputs.data: {inputs['data'].path} has no text in its split train; there is nothing to train a"
            " tokenizer on"
        )
    heldout = draw(inputs["data"], "heldout", config.heldout_bytes, config.seed, work / "heldout.jsonl")
    output.note_time()

    begun = time.time()
    if config.adopt:
        algorithm, coverage = adopt(config, output.path), None
    else:
        algorithm = config.algorithm
        say(
            f"tokenizer: {algorithm} of {config.vocab_size} tokens on {_megabytes(sum(sample['bytes'].values()))} from"
            f" {many(len(sample['bytes']), 'source')}"
        )
        coverage = train(config, work / "sample.jsonl", sum(sample["bytes"].values()), output.path)
    seconds = time.time() - begun
    faults.point("work")

    measured = prove(output.path, work, ours=not config.adopt)
    for name, count in measured["ids_equal"].items():
        if count["equal"] < count["texts"]:
            say(
                f"tokenizer: {name} gives other ids on {count['texts'] - count['equal']} of {count['texts']} texts;"
                f" every stage uses tokenizer.json, {name} is a near twin"
            )
    lost = measured["round_trip"]["texts"] - measured["round_trip"]["exact"]
    if lost:
        say(
            f"tokenizer: WARNING: the adopted tokenizer changes {lost} of {measured['round_trip']['texts']} texts, such"
            f" as {measured['round_trip']['example'][:80]!r}"
        )
    size = vocabulary_size(output.path)
    report = {
        "algorithm": algorithm,
        "vocab_size": size,
        "character_coverage": coverage,
        "sample_bytes": sample["bytes"],
        "sample_bytes_by_language": sample.get("languages"),
        **measured,
    }
    write_json(output.path / "report.json", report)
    faults.point("work")
    rate = measured["bytes_per_token"]
    trip = "round trip exact" if not lost else f"{lost} texts changed"
    return {
        **{key: value for key, value in report.items() if value is not None},
        "heldout_bytes": heldout["bytes"],
        "train_seconds": round(seconds, 3),
        "seconds": round(time.time() - began, 3),
        "summary": {
            "input": (
                f"{_megabytes(sum(sample['bytes'].values()))} of {_megabytes(sum(sample['available'].values()))},"
                f" {many(len(sample['bytes']), 'source')}"
            ),
            "output": f"{size} tokens, {algorithm}",
            "measure": f"{rate:.2f} bytes per token held out, {trip}" if rate else trip,
        },
    }


def train(config: Config, sample: Path, total: int, folder: Path) -> float | None:
    """Train on the drawn sample of `total` bytes and publish into `folder`. Returns the character coverage, if that
    means anything."""
    from pipeline.data.tokenizer import byte_bpe, pretokenize, spm_trainer
    from pipeline.data.tokenizer.sample import texts

    extra = config.extra_tokens()
    if config.algorithm == "byte-bpe":
        special = [*spm_trainer.SPECIAL, *extra]
        if config.vocab_size < 256 + len(special):
            raise UserError(
                f"vocab_size: {config.vocab_size} has no room for 256 bytes and {len(special)} special tokens; set it"
                f" to {256 + len(special)} or more"
            )
        learned, pairs = byte_bpe.train(
            texts(sample),
            config.vocab_size - len(special),
            config.split_digits,
            config.merge_whitespace,
            total,
            config.max_token_bytes,
        )
        if len(learned) + len(special) < config.vocab_size:
            raise spm_trainer.too_large(config.vocab_size, len(learned) + len(special))
        tokens = {token: index for index, token in enumerate(learned)}
        publish(
            byte_bpe.build(tokens, pairs, pretokenize.pattern(config.split_digits, config.merge_whitespace), special),
            folder,
            extra=extra,
        )
        write_atomic(folder / "tokenizer.tiktoken", byte_bpe.dump(tokens))
        return None
    coverage = config.character_coverage or covering(texts(sample), config.vocab_size)
    log = folder / "logs" / "sentencepiece.log"
    kind = config.algorithm.removeprefix("sentencepiece-")
    with closing(_read(texts(sample), total)) as read:
        model = spm_trainer.train_sentencepiece(
            read, config.vocab_size, config.split_digits, coverage, log, kind, extra, config.merge_whitespace
        )
    names = {
        "bos_token": spm_trainer.BOS,
        "eos_token": spm_trainer.EOS,
        "pad_token": spm_trainer.PAD,
        "unk_token": spm_trainer.UNKNOWN,
    }
    publish(spm_trainer.from_sentencepiece(model), folder, names, extra, model=model)
    return coverage


def _read(texts: Iterator[str], total: int) -> Iterator[str]:
    with Progress("tokenizer: text", total, unit="bytes") as bar:
        for text in texts:
            yield text
            bar.update(len(text.encode()))


def adopt(config: Config, folder: Path) -> str:
    """Publish an existing tokenizer into `folder`, with the special tokens and the chat template that it lacks.
    Returns what it is."""
    from tokenizers import AddedToken

    from pipeline.data.tokenizer import byte_bpe, import_tokenizer, spm_trainer

    found = import_tokenizer.load(config.adopt, config.pattern)
    names = dict(found.names)
    if "eos_token" not in names and found.algorithm != "adopted tiktoken":
        raise UserError(
            f"adopt: {config.adopt} has no eos token, and a document needs an end; set eos_token in its"
            " tokenizer_config.json"
        )
    names.setdefault("bos_token", names.get("eos_token", spm_trainer.BOS))
    names.setdefault("eos_token", spm_trainer.EOS)
    # Padding is masked by position, so the end of text may pad: a token of its own would need a row that the model of
    # this tokenizer does not have. A tiktoken file has no special tokens at all.
    names.setdefault("pad_token", spm_trainer.PAD if found.algorithm == "adopted tiktoken" else names["eos_token"])
    marks = [spm_trainer.TURN, spm_trainer.END_OF_TURN] if found.template is None else []
    wanted = [
        *dict.fromkeys(
            [*(names[key] for key in ("bos_token", "eos_token", "pad_token")), *marks, *config.extra_tokens()]
        )
    ]
    added = [name for name in wanted if found.backend.token_to_id(name) is None]
    found.backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in wanted])
    publish(found.backend, folder, names, config.extra_tokens(), found.template or CHAT_TEMPLATE, found.model)
    if found.model is None and found.tokens is not None:
        write_atomic(folder / "tokenizer.tiktoken", byte_bpe.dump(found.tokens))
    if added:
        say(
            f"tokenizer: special tokens that {config.adopt} lacks: {', '.join(added)} (ids"
            f" {', '.join(str(found.backend.token_to_id(name)) for name in added)})"
        )
    if found.template is None:
        say("tokenizer: it has no chat template; ChatML is taken")
    for remark in found.remarks:
        say(f"tokenizer: {remark}")
    return found.algorithm


def covering(texts: Iterator[str], vocab_size: int) -> float:
    """The character coverage at which characters take 40% of the vocabulary, within sentencepiece's limits; measured in
    docs/tokenizer.md.

    At the usual 0.9995 the hanzi of 11 MB of Chinese and English need 5,000 tokens, more than a small vocabulary has.
    """
    import numpy as np

    counts = np.zeros(0x110000, dtype=np.int64)
    held, size = [], 0
    for text in chain(texts, (None,)):
        if text is not None:
            held.append(text)
            size += len(text)
        if text is None or size > 1_000_000:
            counts += np.bincount(
                np.frombuffer("".join(held).encode("utf-32-le"), dtype=np.uint32), minlength=len(counts)
            )
            held, size = [], 0
    ranked = np.sort(counts[counts > 0])[::-1]
    reached = ranked[: int(0.4 * vocab_size)].sum() / ranked.sum()
    return float(min(0.9995, max(0.98, np.floor(reached * 10_000) / 10_000)))


def publish(
    backend,
    folder: Path,
    names: dict[str, str] | None = None,
    extra: list[str] = (),
    template: str = CHAT_TEMPLATE,
    model: bytes | None = None,
) -> None:
    """Write the folder that transformers, vLLM and the later stages read. `names`: bos_token and the like, by
    default ours; `extra`: special tokens beside these and the marks of a turn; `model`: the sentencepiece model."""
    from transformers import PreTrainedTokenizerFast

    from pipeline.data.tokenizer import spm_trainer
    from pipeline.data.tokenizer.tokenizer_folder import save

    names = names or {"bos_token": spm_trainer.BOS, "eos_token": spm_trainer.EOS, "pad_token": spm_trainer.PAD}
    marks = [mark for mark in (spm_trainer.TURN, spm_trainer.END_OF_TURN) if backend.token_to_id(mark) is not None]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=[*marks, *extra], clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = template
    save(fast, folder, model)


def vocabulary_size(folder: Path) -> int:
    from pipeline.data.tokens.store import load_tokenizer

    return len(load_tokenizer(folder))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


if __name__ == "__main__":
    from pipeline.core.chain import main

    main("tokenizer")
