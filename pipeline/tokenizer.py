"""Train a tokenizer on the cleaned text, publish it for transformers, and prove that it keeps every byte.

    python pipeline/tokenizer.py recipes/quickstart.yaml

Reads the output of `clean`. Writes a Hugging Face folder (tokenizer.json, tokenizer_config.json, chat_template.jinja, and
tokenizer.model for sentencepiece) that AutoTokenizer loads, and report.json. Measurements and choices: docs/tokenizer.md.
"""

import json
import time
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field

from pipeline import faults
from pipeline.artifact import Artifact, Output
from pipeline.chain import say
from pipeline.errors import UserError
from pipeline.files import sha256_file, write_atomic, write_json
from pipeline.recipe import StageConfig
from pipeline.seeds import derive

VERSION = 1
INPUTS = {"data": ("clean",)}

# ChatML. What the model is taught to say stands between the generation marks: the answer and the end of its turn, not the newline after it.
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

# What breaks tokenizers that are not lossless: joined emoji, hanzi outside the basic plane, NUL, line ends, wide forms, right-to-left,
# long runs, a byte order mark, and text that spells special tokens, byte tokens and sentencepiece's own marks.
HARD_TEXTS = (
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 e\u0301 \u00e9 \ufb01 \U00020000\U0002a6d6",
    "a\0b\r\nc\rd\n\n\n  e\t\tf \n",
    "\uff26\uff35\uff2c\uff2c\u3000\uff37\uff29\uff24\uff34\uff28 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\ufeff   leading,   runs    of     spaces, trailing   ",
    "<|bos|><|eos|><|pad|><|im_start|>user\n<|im_end|><unk><s></s><0x0A>",
    "x" * 5000 + " " * 5000 + "\u554a" * 5000 + "=" * 5000 + "abaab" * 1000,
    "0123456789 12,345.67 \u0661\u0662\u0663 \u2167 \u00bd",
    "",
    " ",
    "\n",
)
LOSSY_IN_SENTENCEPIECE = "a\u2581b \u2585 c"  # checked for the round trip alone: sentencepiece reads U+2581 as a space


class Config(StageConfig):
    """How the tokenizer is trained."""

    algorithm: Literal["sentencepiece-bpe", "byte-bpe"] = "sentencepiece-bpe"
    """sentencepiece-bpe: characters, bytes for rare ones, trains in seconds; byte-bpe: bytes over GPT-4's word split, trains ten times as long, 2-3% fewer tokens."""
    vocab_size: int = Field(ge=300)
    """Tokens, the special ones included. Text that cannot fill it is refused."""
    sample_bytes: int = Field(100_000_000, ge=1, le=2_000_000_000)
    """Bytes of text to train on, at most; drawn evenly from the sources. 100 MB of text takes about 1.3 GB of memory (byte-bpe: 2.7 GB)."""
    weights: dict[str, float] | None = None
    """Share of each source in the sample, as far as it has text; by default all alike."""
    split_digits: bool = True
    """Each digit is a token of its own; false: runs of digits may be learned (byte-bpe: at most three)."""
    character_coverage: float | None = Field(None, ge=0.98, le=1)
    """sentencepiece-bpe: share of the text whose characters get a token each, the rest is bytes; by default what leaves 60% of the vocabulary for longer pieces."""
    heldout_bytes: int = Field(20_000_000, ge=0)
    """Bytes of held-out text to measure on, at most."""


def run(config: Config, inputs: dict[str, Artifact], output: Output) -> dict:
    from pipeline.data import bpe

    began = time.time()
    work = output.path / "work"
    sample = draw(inputs["data"], "train", config.sample_bytes, config.weights, config.seed, work / "sample.jsonl")
    if not sum(sample["bytes"].values()):
        raise UserError(f"inputs.data: {inputs['data'].path} has no text in its split train; there is nothing to train a tokenizer on")
    heldout = draw(inputs["data"], "heldout", config.heldout_bytes, None, config.seed, work / "heldout.jsonl")
    output.note_time()
    say(f"tokenizer: {config.algorithm} of {config.vocab_size} tokens on {_megabytes(sum(sample['bytes'].values()))} from {len(sample['bytes'])} sources")

    begun = time.time()
    coverage, model = None, None
    if config.algorithm == "sentencepiece-bpe":
        coverage = config.character_coverage or covering(texts(work / "sample.jsonl"), config.vocab_size)
        model = bpe.train_sentencepiece(texts(work / "sample.jsonl"), config.vocab_size, config.split_digits, coverage, output.path / "logs" / "sentencepiece.log")
        backend = bpe.from_sentencepiece(model)
    else:
        backend = bpe.train_byte_level(texts(work / "sample.jsonl"), config.vocab_size, config.split_digits)
    train_seconds = time.time() - begun
    publish(backend, model, output.path)
    faults.point("work")

    measured = measure(output.path, model, work)
    report = {"algorithm": config.algorithm, "vocab_size": config.vocab_size, "character_coverage": coverage, "sample_bytes": sample["bytes"], **measured}
    write_json(output.path / "report.json", report)
    faults.point("work")
    rate = measured["bytes_per_token"]
    return {
        **{key: value for key, value in report.items() if value is not None},
        "heldout_bytes": heldout["bytes"],
        "train_seconds": round(train_seconds, 3),
        "seconds": round(time.time() - began, 3),
        "summary": {
            "input": f"{_megabytes(sum(sample['bytes'].values()))} of {_megabytes(sum(sample['available'].values()))}, {len(sample['bytes'])} sources",
            "output": f"{config.vocab_size} tokens, {config.algorithm}",
            "measure": f"{rate:.2f} bytes per token held out, round trip exact" if rate else "round trip exact",
        },
    }


def draw(data: Artifact, split: str, limit: int, weights: dict[str, float] | None, seed: int, path: Path) -> dict:
    """Write a sample of at most `limit` bytes as JSON lines {source, text}: documents in the order of a hash of their id, until a source's share is full.

    Kept for a resumed run. The last document of a share is cut at a whole character.
    """
    import numpy as np

    from pipeline.data.documents import documents

    marker = path.with_suffix(".json")
    if marker.exists():
        known = json.loads(marker.read_text())
        if path.is_file() and sha256_file(path) == known["sha256"]:
            return known
    found: dict[str, tuple[array, array]] = {}
    for text, source, identifier in documents(data, split):
        keys, sizes = found.setdefault(source, (array("Q"), array("Q")))
        keys.append(derive(seed, "sample", identifier))
        sizes.append(len(text.encode()))
    if weights is not None and split == "train" and set(weights) - set(found):
        raise UserError(f"weights: the data has no source {sorted(set(weights) - set(found))[0]!r}; it has {', '.join(sorted(found)) or 'none'}")
    available = {source: sum(sizes) for source, (_, sizes) in sorted(found.items())}
    share = shares(available, limit, weights)
    allowed = {}
    for source, (keys, sizes) in found.items():
        order = np.argsort(np.array(keys, dtype=np.uint64), kind="stable")
        sorted_sizes = np.array(sizes, dtype=np.int64)[order]
        allowed[source] = np.empty_like(sorted_sizes)
        allowed[source][order] = np.clip(share[source] - (np.cumsum(sorted_sizes) - sorted_sizes), 0, sorted_sizes)
    allowed = {source: iter(sizes.tolist()) for source, sizes in allowed.items()}
    taken = dict.fromkeys(available, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        for text, source, _ in documents(data, split):
            size = next(allowed[source])
            if size:
                cut = text.encode()[:size].decode(errors="ignore")
                taken[source] += len(cut.encode())
                handle.write(json.dumps({"source": source, "text": cut}, ensure_ascii=False).encode() + b"\n")
    faults.point("save")
    known = {"sha256": sha256_file(path), "bytes": {source: size for source, size in taken.items() if size}, "available": available}
    write_json(marker, known)
    return known


def shares(available: dict[str, int], limit: int, weights: dict[str, float] | None) -> dict[str, int]:
    """Bytes to take of each source: `limit` divided by weight, and what a source cannot fill divided again among the others."""
    weight = {source: 1.0 if weights is None else weights.get(source, 0.0) for source in available}
    if weights is not None and any(value < 0 for value in weights.values()):
        raise UserError(f"weights: must not be negative, found {weights}")
    share = dict.fromkeys(available, 0)
    open_ones = [source for source in sorted(available) if weight[source] > 0]
    left = limit
    while open_ones:
        total = sum(weight[source] for source in open_ones)
        full = [source for source in open_ones if available[source] <= left * weight[source] / total]
        if not full:
            return share | {source: int(left * weight[source] / total) for source in open_ones}
        for source in full:
            share[source] = available[source]
            left -= available[source]
        open_ones = [source for source in open_ones if source not in full]
    return share


def texts(path: Path) -> Iterator[str]:
    """The texts of a drawn sample."""
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            yield json.loads(line)["text"]


def covering(texts: Iterator[str], vocab_size: int) -> float:
    """The character coverage at which characters take 40% of the vocabulary, within sentencepiece's limits; measured in docs/tokenizer.md.

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
            counts += np.bincount(np.frombuffer("".join(held).encode("utf-32-le"), dtype=np.uint32), minlength=len(counts))
            held, size = [], 0
    ranked = np.sort(counts[counts > 0])[::-1]
    reached = ranked[: int(0.4 * vocab_size)].sum() / ranked.sum()
    return float(min(0.9995, max(0.98, np.floor(reached * 10_000) / 10_000)))


def publish(backend, model: bytes | None, folder: Path) -> None:
    """Write the folder that transformers, vLLM and the later stages read."""
    from transformers import PreTrainedTokenizerFast

    from pipeline.data import bpe

    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bpe.BOS,
        eos_token=bpe.EOS,
        pad_token=bpe.PAD,
        extra_special_tokens=[bpe.TURN, bpe.END_OF_TURN],
        clean_up_tokenization_spaces=False,
        **({"unk_token": bpe.UNKNOWN} if model else {}),
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    if model:
        write_atomic(folder / "tokenizer.model", model)


def measure(folder: Path, model: bytes | None, work: Path) -> dict:
    """Encode and decode held-out text, two megabytes of the training sample and hard texts with the published folder.

    Bytes per token come from the held-out text. `ids_equal`: texts on which sentencepiece itself gives the same ids, of all compared.
    Texts with U+2581 are not compared, because sentencepiece cannot tell it from a space.
    """
    from pipeline.data.tokens import encode_text, load_tokenizer

    tokenizer = load_tokenizer(folder)
    pieces = None
    if model:
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    size: dict[str, int] = {}
    tokens: dict[str, int] = {}
    checked = compared = equal = 0

    def check(source: str | None, batch: list[str]) -> None:
        nonlocal checked, compared, equal
        for text, ids in zip(batch, encode_text(tokenizer, batch), strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=False) == text, f"round trip changed {text[:80]!r}"
            assert not set(ids) & special, f"text became a special token: {text[:80]!r}"
            checked += 1
            if pieces and "\u2581" not in text:
                compared += 1
                equal += pieces.encode(text) == ids
            if source is not None:
                size[source] = size.get(source, 0) + len(text.encode())
                tokens[source] = tokens.get(source, 0) + len(ids)

    special = set(tokenizer.all_special_ids)
    check(None, [*HARD_TEXTS, LOSSY_IN_SENTENCEPIECE])
    for source, batch in batches(work / "heldout.jsonl", None):
        check(source, batch)
    for _, batch in batches(work / "sample.jsonl", 2_000_000):
        check(None, batch)
    rates = {source: round(size[source] / tokens[source], 4) for source in sorted(size)}
    found = {
        "bytes_per_token": round(sum(size.values()) / sum(tokens.values()), 4) if tokens else None,
        "bytes_per_token_by_source": rates,
        "round_trip": {"texts": checked, "exact": checked},
    }
    if pieces:
        found["ids_equal"] = {"texts": compared, "equal": equal}
        if equal < compared:
            say(f"tokenizer: sentencepiece gives other ids on {compared - equal} of {compared} texts; every stage uses tokenizer.json, tokenizer.model is a near twin")
    return found


def batches(path: Path, limit: int | None, count: int = 256) -> Iterator[tuple[str, list[str]]]:
    """(source, texts) of one source each, of the first `limit` characters of a drawn sample."""
    held: dict[str, list[str]] = {}
    read = 0
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            record = json.loads(line)
            batch = held.setdefault(record["source"], [])
            batch.append(record["text"])
            read += len(record["text"])
            if len(batch) == count:
                yield record["source"], held.pop(record["source"])
            if limit is not None and read >= limit:
                break
    yield from sorted(held.items())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


if __name__ == "__main__":
    from pipeline.chain import main

    main("tokenizer")
