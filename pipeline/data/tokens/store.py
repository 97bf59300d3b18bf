"""The packed tokens that stage `pack` publishes.

    store = TokenStore(folder)                 # split="heldout" for the other split
    store.read("wiki", 0, 512)                 # a view of the memory-mapped tokens

A packed folder:

    index.json                       vocabulary size, end-of-document id, dtype, and for each split and source its
                                     shards
    token_bytes.npy                  int32 [vocab_size]: bytes of text that each token spells
    train/wiki-00000.tokens.npy      uint16 or uint32 [tokens]: the documents one after another, each ending with eos
    train/wiki-00000.documents.npy   int64 [documents, 2]: where each document ends in this shard (after its eos), and
                                     its bytes of UTF-8
    train/wiki-00000.ids.npy         uint8: the documents' ids one after another, UTF-8
    train/wiki-00000.id_ends.npy     int64 [documents]: where each id ends
"""

import bisect
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core.config import PlannedInput
from pipeline.core.errors import UserError


def planned_sources(tokens: PlannedInput) -> list[str] | None:
    """Names of the sources in packed tokens, before they are packed; None if they are not known."""
    if tokens.config is not None:
        return tokens.config.planned_sources(tokens.inputs)
    try:
        return list(json.loads((tokens.folder / "index.json").read_text())["splits"]["train"])
    except (OSError, ValueError, LookupError, TypeError):  # the stage that reads them reports what is wrong
        return None


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
