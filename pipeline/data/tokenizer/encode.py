"""Text to ids, fast, with exactly the ids of tokenizer.json.

    encode = encoder(folder)                  # load once in each process
    ids = encode(["raw text", ...])           # one int32 array a text; no special token is made from text, and none is
                                              # added

What tokenizer.json says is the reference, and `tokenizers` is its slowest reader (docs/tokenizer.md, "Encoding"). Two
kinds are handed to faster programs that provably give the same ids:

* byte-level BPE without a normaliser to tiktoken. It joins any two neighbours that spell a token, tokenizer.json only
  pairs that it lists. The two agree if merges stand in the order of their results' ranks and the list by itself joins
  each token's bytes to that token: let them part for the first time where tiktoken joins (a, b) to t by a pair that is
  not listed. Until then nothing has crossed the ends of this stretch of text, so that t alone would have been led to
  (a, b) as well, and stayed there. `_listed` checks both for every token.
* BPE models of sentencepiece to sentencepiece, word by word and with a memory for words: no piece goes on after a space
  behind something else. Ranks are unique there, so the same argument holds.

Everything else, and texts with U+2581, which sentencepiece takes for a space, go through `tokenizers` itself. What
reads classes of characters differs by Unicode version between libraries; in the versions of constraints.txt tiktoken's
and tokenizers' agree on every code point (tests/data/tokenizer/test_encode.py).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.tokenizer_folder import read_backend
from pipeline.data.tokens.store import encode_text

# the split of ByteLevel(use_regex=True)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = re.compile(" *[^ ]+| +")
REMEMBERED = 32  # characters of the longest word that is kept, and below how many of them
MOST_WORDS = 1_000_000
# of white space: tiktoken 0.14 panics at a million spaces (its expression engine's stack), so the rare long run goes
# the slow way
LONG_RUN = 50_000
LONG_SPACE = re.compile(r"\s{50000}")

Encoder = Callable[[list[str]], list[np.ndarray]]


def encoder(folder: Path | str) -> Encoder:
    """The fastest exact encoder for the tokenizer.json of a folder; `.kind` says which: tiktoken, sentencepiece or
    tokenizers.

    It raises UserError for a text that is not Unicode (a lone surrogate), with its place. It keeps to one thread:
    processes are the parallelism here.
    """
    folder = Path(folder)
    backend = read_backend(folder)
    spec = json.loads(backend.to_str())
    fast = _tiktoken(backend, spec) or _sentencepiece(backend, spec, folder) or _tokenizers(backend)

    def encode(texts: list[str]) -> list[np.ndarray]:
        for number, text in enumerate(texts):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"text {number} of a batch holds a lone surrogate (U+{ord(text[error.start]):04X}) at character"
                    f" {error.start}, which is no character and has no UTF-8; repair it first"
                ) from None
        return fast(texts)

    encode.kind = fast.__name__
    return encode


def _tokenizers(backend) -> Encoder:
    def tokenizers(texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in encode_text(backend, texts)]

    return tokenizers


# ---- byte-level BPE --------------------------------------------------------------------------------------------------


def alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level tokenizers (GPT-2, encoder.py: bytes_to_unicode) -> the
    byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(sorted(set(range(256)) - set(printable)))
    }


def ranks(spec: dict) -> dict[bytes, int] | None:
    """Bytes of each token -> its id, of a byte-level tokenizer.json, added tokens left out; None if it is no such
    tokenizer or does not know all bytes."""
    if spec["model"]["type"] != "BPE" or pattern(spec) is None:
        return None
    bytes_of = alphabet()
    added = {token["content"] for token in spec["added_tokens"]}
    known = {token: index for token, index in spec["model"]["vocab"].items() if token not in added}
    if not set(bytes_of) <= set(known) or any(char not in bytes_of for token in known for char in token):
        return None
    return {bytes(map(bytes_of.__getitem__, token)): index for token, index in known.items()}


def pattern(spec: dict) -> str | None:
    """The expression by which a byte-level tokenizer.json splits text into words, or None if it is not one
    expression alone."""
    model, split = spec["model"], spec["pre_tokenizer"] or {}
    if (
        spec["normalizer"]
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or model.get("byte_fallback")
    ):
        return None
    parts = split.get("pretokenizers", [split]) if split.get("type") == "Sequence" else [split]
    if (
        [part.get("type") for part in parts] == ["ByteLevel"]
        and parts[0]["use_regex"]
        and not parts[0]["add_prefix_space"]
    ):
        return GPT2
    if (
        [part.get("type") for part in parts] != ["Split", "ByteLevel"]
        or parts[1]["use_regex"]
        or parts[1]["add_prefix_space"]
    ):
        return None
    return parts[0]["pattern"].get("Regex") if parts[0]["behavior"] == "Isolated" and not parts[0]["invert"] else None


def _tiktoken(backend, spec: dict) -> Encoder | None:
    # an added token that is not special is looked for in text, too
    if ranks(spec) is None or not all(token["special"] for token in spec["added_tokens"]):
        return None
    order = _listed(backend, spec)
    if order is None:
        return None
    import tiktoken

    bytes_of = alphabet()
    by_rank = {bytes(map(bytes_of.__getitem__, token)): rank for rank, token in enumerate(order)}
    ids = np.array([spec["model"]["vocab"][token] for token in order], np.int32)
    in_order = bool((ids == np.arange(len(ids))).all())
    try:
        encode_one = tiktoken.Encoding(
            "alma", pat_str=pattern(spec), mergeable_ranks=by_rank, special_tokens={}
        ).encode_ordinary
    except ValueError:  # an expression that its engine does not read
        return None
    slow = _tokenizers(backend)

    def one(text: str) -> np.ndarray:
        if len(text) > LONG_RUN and LONG_SPACE.search(text):
            return slow([text])[0]
        found = np.array(encode_one(text), np.int32)
        return found if in_order else ids[found]

    def tiktoken(texts: list[str]) -> list[np.ndarray]:
        return [one(text) for text in texts]

    return tiktoken


def _listed(backend, spec: dict) -> list[str] | None:
    """Tokens in the order in which merging prefers them (bytes first), if the list of merges alone joins each of
    them out of its bytes; else None."""
    model = spec["model"]
    added = {token["content"] for token in spec["added_tokens"]}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged = ["".join(pair) for pair in pairs]
    single = [token for token in model["vocab"] if len(token) == 1]
    order = sorted(single, key=model["vocab"].__getitem__) + merged
    if len(set(order)) != len(order) or set(order) != set(model["vocab"]) - added:
        return None
    if model.get("ignore_merges"):  # asked with this on, every token would answer for itself
        from tokenizers import models

        bare = models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in pairs])
    else:
        bare = backend.model
    for token in merged:
        if [part.id for part in bare.tokenize(token)] != [model["vocab"][token]]:
            return None
    return order


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(backend, spec: dict, folder: Path) -> Encoder | None:
    """For folders whose tokenizer.model stage tokenizer has turned into tokenizer.json."""
    if not (folder / "tokenizer.model").is_file() or spec["model"]["type"] != "BPE":
        return None
    import sentencepiece

    from pipeline.data.tokenizer import spm_trainer

    model = (folder / "tokenizer.model").read_bytes()
    if spm_trainer.damaged(model) or spm_trainer.inexact(model):
        return None
    made = json.loads(spm_trainer.from_sentencepiece(model).to_str())
    if any(made[part] != spec[part] for part in ("model", "normalizer", "pre_tokenizer")):
        return None
    if not all(token["special"] for token in spec["added_tokens"]):  # looked for in text, too
        return None
    prefix = " " if spm_trainer.adds_prefix(model) else ""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spm_trainer.for_words(model))
    slow = _tokenizers(backend)
    known: dict[str, list[int]] = {}

    def one(text: str) -> np.ndarray:
        if spm_trainer.SPACE in text:
            return slow([text])[0]
        found: list[int] = []
        for word in WORDS.findall(prefix + text if text else ""):
            ids = known.get(word)
            if ids is None:
                ids = pieces.encode(word)
                if len(word) <= REMEMBERED and len(known) < MOST_WORDS:
                    known[word] = ids
            found += ids
        return np.array(found, np.int32)

    def sentencepiece(texts: list[str]) -> list[np.ndarray]:
        return [one(text) for text in texts]

    return sentencepiece
