"""Text as token ids, and the packed tokens that stage `pack` publishes.

    ids = encode_text(tokenizer, ["raw text, in which <|im_end|> is ordinary characters"])
    store = TokenStore(folder)                 # split="heldout" for the other split
    store.read("wiki", 0, 512)                 # a view of the memory-mapped tokens

A packed folder:

    index.json                       vocabulary size, end-of-document id, dtype, and for each split and source its
                                     shards
    token_bytes.npy                  int32 [vocab_size]: bytes of text that each token stands for
    train/wiki-00000.tokens.npy      uint16 or uint32 [tokens]: the documents one after another, each ending with eos
    train/wiki-00000.documents.npy   int64 [documents, 2]: where each document ends in this shard (after its eos), and
                                     its bytes of UTF-8
    train/wiki-00000.ids.npy         uint8: the documents' ids one after another, UTF-8
    train/wiki-00000.id_ends.npy     int64 [documents]: where each id ends
"""

import bisect
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.tokenizer_folder import CONFIG, check_config, read_backend, readable, recoverable


def load_tokenizer(folder: Path | str):
    """The fast tokenizer (transformers) of a folder, exactly as its tokenizer.json says. Every stage uses this loader.
    Raises UserError if there is none, or if it cannot be read.

    AutoTokenizer does the same unless a config.json in the folder names a family whose tokenizer class transformers
    forces (qwen2 in 5.23): that class rebuilds the pre-tokenizer and adds a normalizer, and the ids change.
    """
    from transformers import PreTrainedTokenizerFast

    folder = Path(folder)
    backend = read_backend(folder)
    check_config(folder)
    fast = readable(folder, lambda: PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
    for part in ("normalizer", "pre_tokenizer"):
        if _state(getattr(fast.backend_tokenizer, part)) != _state(getattr(backend, part)):
            raise UserError(
                f"{folder}: transformers loads another {part} than tokenizer.json has, so that ids would depend on the"
                f" program; remove the key of {CONFIG} that changes it (fix_mistral_regex), or save the tokenizer again"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in fast.added_tokens_decoder.values():
        if not token.special and token.content not in added:
            raise UserError(
                f"{folder}: {CONFIG} adds the token {token.content!r}, which tokenizer.json does not have, so that ids"
                " of ordinary text would depend on the program; save the tokenizer again, with both files"
            )
    return fast


def use_known_padding(tokenizer, rows: int) -> None:
    """Let the tokenizer pad with a token that a model with `rows` embeddings has: its own pad token, else its end of
    text, else token 0.

    Padding is masked by position, never by id, so any token will do. A pad token that was added without resizing the
    embedding has an id beyond the embedding.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        end = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if end is not None and end < rows else 0)


def _state(part) -> bytes | None:
    return None if part is None else part.__getstate__()


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of raw text: documents, and the contents of chat messages. Text never becomes a special token, and none is
    added.

    `tokenizer`: a fast transformers tokenizer or a `tokenizers.Tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    backend.no_padding()
    previous = backend.encode_special_tokens
    backend.encode_special_tokens = True  # "encode the characters of special tokens": do not recognize them
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except BaseException as error:
        if not recoverable(error):
            raise
        raise UserError(
            f"the tokenizer cannot encode text ({type(error).__name__}: {str(error)[:200]}); its tokenizer.json is"
            " damaged or lacks a part, such as an unknown token; copy it again from where it was published"
        ) from error
    finally:
        backend.encode_special_tokens = previous


def token_bytes(tokenizer) -> np.ndarray:
    """int32 [vocab_size]: bytes of text that each token spells; 0 for special tokens. From the tokenizer's own decoder.

    Exact where decoding is the identity, as for every tokenizer trained here; pack checks it on each document.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {}
    decoder_types = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    vocabulary = backend.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if "ByteLevel" in decoder_types:
            sizes[index] = len(token)  # one character per byte
        elif "ByteFallback" in decoder_types and re.fullmatch("<0x..>", token, re.DOTALL):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    return sizes


class DamagedArray(Exception):
    """A file that is not a numpy array, or one that is truncated."""


def mapped_array(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped and read-only. Raises DamagedArray or FileNotFoundError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # its header is a Python literal: SyntaxError, TokenError, OverflowError, ...
        raise DamagedArray(f"{type(error).__name__}: {error}"[:200]) from None


CHUNK = 2**26  # tokens checked together
PACK_AGAIN = "run stage pack again with --restart"


class DocumentSpan(NamedTuple):
    """Consecutive tokens of one document."""

    id: str
    """The document's id, as stage clean gave it."""
    start: int
    """The first of these tokens, counted from the first token of the request."""
    length: int
    offset: int
    """Tokens of the document before the span."""


class _Shard(NamedTuple):
    """The arrays of one shard of a source, memory-mapped."""

    start: int
    """Tokens of the source before the shard."""
    tokens: np.ndarray
    documents: np.ndarray
    ids: np.ndarray
    id_ends: np.ndarray

    def id_of(self, number: int) -> str:
        begin = int(self.id_ends[number - 1]) if number else 0
        raw = self.ids[begin : int(self.id_ends[number])].tobytes()
        return raw.decode(errors="backslashreplace")  # ids of imported shards may be any bytes


class TokenStore:
    """Packed tokens of one split, memory-mapped and read-only. Opening it checks that every index fits its data
    (UserError)."""

    def __init__(self, folder: Path | str, split: str = "train"):
        self.folder, self.split = Path(folder), split
        try:
            self._open_index()
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{self.folder}: has no index.json, so it is not the output of stage pack") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # not JSON, or other keys
            reason = f"damaged ({type(error).__name__}: {error})"[:200]
            raise UserError(f"{self.folder / 'index.json'}: {reason}; {PACK_AGAIN}") from None

    def _open_index(self) -> None:
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        entries = index["splits"][self.split]
        self.vocab_size, self.eos_id, self.dtype = index["vocab_size"], index["eos_id"], np.dtype(index["dtype"])
        if not 0 <= self.eos_id < self.vocab_size:
            raise UserError(
                f"{self.folder / 'index.json'}: eos_id {self.eos_id} is beyond the vocabulary of {self.vocab_size};"
                f" {PACK_AGAIN}"
            )
        self.sources = sorted(entries)
        self.token_bytes = self._open("token_bytes.npy", (self.vocab_size,), np.dtype(np.int32))
        self._shards: dict[str, list[_Shard]] = {}
        self._starts: dict[str, list[int]] = {}  # of the shards of each source, and where the last one ends
        self._num_bytes: dict[str, int] = {}
        for source in self.sources:
            shards, start = [], 0
            for entry in entries[source]:
                shard = self._open_shard(entry, start)
                shards.append(shard)
                start += len(shard.tokens)
            self._shards[source] = shards
            self._starts[source] = [*(shard.start for shard in shards), start]
            self._num_bytes[source] = sum(entry["bytes"] for entry in entries[source])

    def _open_shard(self, entry: dict, start: int) -> _Shard:
        file = entry["file"]
        if "id_bytes" not in entry:
            raise UserError(
                f"{self.folder}: was packed by an older version, which did not keep the ids of documents; {PACK_AGAIN}"
            )
        tokens = self._open(f"{file}.tokens.npy", (entry["tokens"],), self.dtype)
        documents = self._open(f"{file}.documents.npy", (entry["documents"], 2), np.dtype(np.int64))
        if len(documents) == 0 or documents[-1, 0] != len(tokens):
            raise UserError(
                f"{self.folder / file}.documents.npy: does not end where its {len(tokens)} tokens end; {PACK_AGAIN}"
            )
        ids = self._open(f"{file}.ids.npy", (entry["id_bytes"],), np.dtype(np.uint8))
        id_ends = self._open(f"{file}.id_ends.npy", (entry["documents"],), np.dtype(np.int64))
        if id_ends[-1] != len(ids):
            raise UserError(
                f"{self.folder / file}.id_ends.npy: does not end where its {len(ids)} bytes of ids end; {PACK_AGAIN}"
            )
        return _Shard(start, tokens, documents, ids, id_ends)

    def _open(self, name: str, shape: tuple, dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        try:
            array = mapped_array(path)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; {PACK_AGAIN}") from None
        except DamagedArray as error:
            raise UserError(f"{path}: damaged ({error}); {PACK_AGAIN}") from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path}: has type {array.dtype} and shape {list(array.shape)}, index.json says {dtype} and"
                f" {list(shape)}; {PACK_AGAIN}"
            )
        return np.asarray(array)  # still the mapped file, without the cost of numpy's memmap class at each slice

    def misfit(self) -> str | None:
        """Why tokens and index of documents do not fit together, in words, or None: a token outside the vocabulary,
        documents that do not ascend or do not end with eos.

        Reads every token, at 1-2 GB/s: for folders that stage pack did not write (it checks each id as it writes).
        """
        for source in self.sources:
            for shard in self._shards[source]:
                reason = self._unknown_token(source, shard) or self._wrong_document_end(source, shard)
                if reason:
                    return f"{self.folder}: {reason}"
        return None

    def _unknown_token(self, source: str, shard: _Shard) -> str | None:
        for begin in range(0, len(shard.tokens), CHUNK):
            chunk = shard.tokens[begin : begin + CHUNK]
            if chunk.max(initial=0) >= self.vocab_size or chunk.min(initial=0) < 0:
                place = begin + int(np.flatnonzero((chunk >= self.vocab_size) | (chunk < 0))[0])
                return (
                    f"token {shard.start + place} of source {source} ({self.split}) is {shard.tokens[place]}, beyond"
                    f" the vocabulary of {self.vocab_size}; pack the text with this tokenizer"
                )
        return None

    def _wrong_document_end(self, source: str, shard: _Shard) -> str | None:
        ends = shard.documents[:, 0]
        last_tokens = shard.tokens[np.clip(ends - 1, 0, len(shard.tokens) - 1)]
        wrong = (np.diff(ends, prepend=0) <= 0) | (last_tokens != self.eos_id)
        if not wrong.any():
            return None
        number = int(np.flatnonzero(wrong)[0])
        return (
            f"document {number} of source {source} ({self.split}) ends at token {shard.start + int(ends[number])},"
            f" which is not an end of document after its beginning; {PACK_AGAIN}"
        )

    def num_tokens(self, source: str) -> int:
        """Tokens of a source, including the eos of each document."""
        return self._starts[source][-1]

    def num_bytes(self, source: str) -> int:
        """Bytes of UTF-8 of the documents of a source."""
        return self._num_bytes[source]

    def num_documents(self, source: str) -> int:
        return sum(len(shard.documents) for shard in self._shards[source])

    def read(self, source: str, start: int, length: int) -> np.ndarray:
        """Tokens start .. start+length of a source, as stored. Within one shard this is a view and costs no copy."""
        starts = self._starts[source]
        if not 0 <= start <= start + length <= starts[-1]:
            raise IndexError(f"{source}: tokens {start} to {start + length} of {starts[-1]}")
        number = self._shard_number(source, start)
        offset = start - starts[number]
        tokens = self._shards[source][number].tokens
        if offset + length <= len(tokens):
            return tokens[offset : offset + length]
        parts = [tokens[offset:]]
        missing = length - len(parts[0])
        while missing > 0:
            number += 1
            parts.append(self._shards[source][number].tokens[:missing])
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def _shard_number(self, source: str, token: int) -> int:
        """Which shard of a source has a token; the last one for the token after the end."""
        starts = self._starts[source]
        if len(starts) == 2:
            return 0
        return bisect.bisect_right(starts, token, 1, len(starts) - 1) - 1

    def documents(self, source: str) -> np.ndarray:
        """int64 [documents, 2]: where each document of the source ends (after its eos), and its bytes. Read into
        memory."""
        parts = [np.asarray(shard.documents) + [shard.start, 0] for shard in self._shards[source]]
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def document_spans(self, source: str, start: int, length: int) -> list[DocumentSpan]:
        """Which documents the tokens start .. start+length of a source come from, in order."""
        spans: list[DocumentSpan] = []
        shard_number = self._shard_number(source, start)
        place, end = start, start + length
        while place < end:
            shard = self._shards[source][shard_number]
            ends = shard.documents[:, 0]
            number = int(np.searchsorted(ends, place - shard.start, side="right"))
            while number < len(ends) and place < end:
                document_begin = shard.start + (int(ends[number - 1]) if number else 0)
                span_end = min(shard.start + int(ends[number]), end)
                spans.append(DocumentSpan(shard.id_of(number), place - start, span_end - place, place - document_begin))
                place, number = span_end, number + 1
            shard_number += 1
        return spans


def misfit(folder: Path | str) -> str | None:
    """Why a split of a packed folder does not fit together, in words, or None."""
    for split in ("train", "heldout"):
        reason = TokenStore(folder, split).misfit()
        if reason:
            return reason
    return None
