"""Text to ids, fast, with exactly the ids of tokenizer.json.

    encode = encoder(folder)                  # load once per process
    ids = encode(["raw text", ...])           # one int32 array per text; text never becomes a special token, and none
                                              # is added

tokenizer.json is the reference, and `tokenizers` is its slowest reader (docs/tokenizer.md, "Encoding"). Two kinds of
tokenizers go to faster programs that provably give the same ids:

* Byte-level BPE without a normalizer goes to tiktoken. tiktoken merges any two neighbours that spell a token,
  tokenizer.json only the pairs in its list. The two agree if the merges are in the order of their results' ranks and
  the list alone merges each token's bytes into that token. Proof: take the first merge at which they differ, where
  tiktoken merges (a, b) into t by a pair that is not in the list. Up to then no merge has crossed the ends of this
  stretch of text, so the bytes of t alone would also have led to (a, b), and stopped there. `_merge_order` checks both
  conditions for every token.
* BPE models of sentencepiece go to sentencepiece, word by word, with a cache of words: in no piece does a space follow
  another character. Ranks are unique there, so the same argument holds.

All other tokenizers go through `tokenizers`, and so do texts with U+2581, which sentencepiece reads as a space. Which
characters are letters, digits or spaces depends on a library's Unicode version; in the versions of constraints.txt,
tiktoken and tokenizers agree on every code point (tests/data/tokenizer/test_encode.py).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.fast_tokenizer import encode_text
from pipeline.data.tokenizer.tokenizer_folder import read_backend

# the split of ByteLevel(use_regex=True)
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = re.compile(" *[^ ]+| +")
LONGEST_CACHED = 32  # characters of the longest word in the cache
CACHED_WORDS = 1_000_000
# White-space characters. tiktoken 0.14 panics at a million spaces (the stack of its expression engine), so the rare
# text with a long run goes through `tokenizers`.
LONG_RUN = 50_000
LONG_SPACE = re.compile(r"\s{50000}")

Encoder = Callable[[list[str]], list[np.ndarray]]


def encoder(folder: Path | str) -> Encoder:
    """The fastest exact encoder for the tokenizer.json of a folder. Its attribute `kind` says which one it is:
    tiktoken, sentencepiece or tokenizers.

    It raises UserError for a text that is not Unicode (a lone surrogate), with its place. It uses one thread, because
    stages encode in several processes.
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
                    f"text {number} of a batch has a lone surrogate (U+{ord(text[error.start]):04X}) at character"
                    f" {error.start}, which is not a character and has no UTF-8; repair it first"
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
    """The character by which byte-level tokenizers write each byte (GPT-2, encoder.py: bytes_to_unicode) -> the
    byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(byte): byte for byte in printable}
    for number, byte in enumerate(others):
        table[chr(256 + number)] = byte
    return table


def ranks(spec: dict) -> dict[bytes, int] | None:
    """Bytes of each token -> its id, of a byte-level tokenizer.json without its added tokens; None if it is another
    kind of tokenizer or lacks a byte."""
    if spec["model"]["type"] != "BPE" or pattern(spec) is None:
        return None
    byte_of = alphabet()
    added = {token["content"] for token in spec["added_tokens"]}
    vocabulary = {token: index for token, index in spec["model"]["vocab"].items() if token not in added}
    if not set(byte_of) <= set(vocabulary):
        return None
    if any(char not in byte_of for token in vocabulary for char in token):
        return None
    return {bytes(map(byte_of.__getitem__, token)): index for token, index in vocabulary.items()}


def pattern(spec: dict) -> str | None:
    """The expression by which a byte-level tokenizer.json splits text into words; None if it is another kind of
    tokenizer, or splits in more than one step."""
    model = spec["model"]
    other_options = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if spec["normalizer"] or any(model.get(option) for option in other_options):
        return None
    pre_tokenizer = spec["pre_tokenizer"] or {}
    steps = [pre_tokenizer]
    if pre_tokenizer.get("type") == "Sequence":
        steps = pre_tokenizer.get("pretokenizers", steps)
    types = [step.get("type") for step in steps]
    if types == ["ByteLevel"]:
        [byte_level] = steps
        return GPT2 if byte_level["use_regex"] and not byte_level["add_prefix_space"] else None
    if types != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    if byte_level["use_regex"] or byte_level["add_prefix_space"] or split["behavior"] != "Isolated" or split["invert"]:
        return None
    return split["pattern"].get("Regex")


def _tiktoken(backend, spec: dict) -> Encoder | None:
    # an added token that is not special is looked for in text, which tiktoken does not do
    if ranks(spec) is None or not all(token["special"] for token in spec["added_tokens"]):
        return None
    order = _merge_order(backend, spec)
    if order is None:
        return None
    import tiktoken

    byte_of = alphabet()
    rank_of = {bytes(map(byte_of.__getitem__, token)): rank for rank, token in enumerate(order)}
    id_of_rank = np.array([spec["model"]["vocab"][token] for token in order], np.int32)
    ids_are_ranks = bool((id_of_rank == np.arange(len(id_of_rank))).all())
    try:
        engine = tiktoken.Encoding("alma", pat_str=pattern(spec), mergeable_ranks=rank_of, special_tokens={})
    except ValueError:  # an expression that its engine does not support
        return None
    slow = _tokenizers(backend)

    def encode_one(text: str) -> np.ndarray:
        if len(text) > LONG_RUN and LONG_SPACE.search(text):
            return slow([text])[0]
        text_ranks = np.array(engine.encode_ordinary(text), np.int32)
        return text_ranks if ids_are_ranks else id_of_rank[text_ranks]

    def tiktoken(texts: list[str]) -> list[np.ndarray]:
        return [encode_one(text) for text in texts]

    return tiktoken


def _merge_order(backend, spec: dict) -> list[str] | None:
    """Tokens in the order in which merging prefers them (bytes first), if the list of merges alone merges the bytes of
    each token into it; else None."""
    model = spec["model"]
    vocabulary = model["vocab"]
    added = {token["content"] for token in spec["added_tokens"]}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    merged = ["".join(pair) for pair in pairs]
    single = [token for token in vocabulary if len(token) == 1]
    order = sorted(single, key=vocabulary.__getitem__) + merged
    if len(set(order)) != len(order) or set(order) != set(vocabulary) - added:
        return None
    bare = backend.model
    if model.get("ignore_merges"):  # with this on, a token would be encoded as itself without merging
        from tokenizers import models

        bare = models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in pairs])
    for token in merged:
        ids = [part.id for part in bare.tokenize(token)]
        if ids != [vocabulary[token]]:
            return None
    return order


# ---- sentencepiece ---------------------------------------------------------------------------------------------------


def _sentencepiece(backend, spec: dict, folder: Path) -> Encoder | None:
    """For folders whose tokenizer.json stage tokenizer made from their tokenizer.model."""
    if not (folder / "tokenizer.model").is_file() or spec["model"]["type"] != "BPE":
        return None
    import sentencepiece

    from pipeline.data.tokenizer import spm_model

    model = (folder / "tokenizer.model").read_bytes()
    if spm_model.damage(model) or spm_model.inexactness(model):
        return None
    converted = json.loads(spm_model.to_fast_tokenizer(model).to_str())
    if any(converted[part] != spec[part] for part in ("model", "normalizer", "pre_tokenizer")):
        return None
    if not all(token["special"] for token in spec["added_tokens"]):  # an added token that is looked for in text
        return None
    prefix = " " if spm_model.adds_prefix(model) else ""
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm_model.for_words(model))
    slow = _tokenizers(backend)
    cache: dict[str, list[int]] = {}

    def encode_one(text: str) -> np.ndarray:
        if spm_model.SPACE in text:
            return slow([text])[0]
        ids: list[int] = []
        for word in WORDS.findall(prefix + text if text else ""):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = processor.encode(word)
                if len(word) <= LONGEST_CACHED and len(cache) < CACHED_WORDS:
                    cache[word] = word_ids
            ids += word_ids
        return np.array(ids, np.int32)

    def sentencepiece(texts: list[str]) -> list[np.ndarray]:
        return [encode_one(text) for text in texts]

    return sentencepiece
