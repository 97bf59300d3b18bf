"""Text as token ids, and the packed tokens that stage `pack` publishes.

    ids = encode_text(tokenizer, ["raw text, in which <|im_end|> is eight ordinary characters"])
    store = TokenStore(folder)                 # split="heldout" for the other part
    store.read("wiki", 0, 512)                 # a view of the memory-mapped tokens

A packed folder:

    index.json                       vocabulary size, end-of-document id, dtype, and for each split and source its
                                     shards
    token_bytes.npy                  int32 [vocab_size]: bytes of text that each token stands for
    train/wiki-00000.tokens.npy      uint16 or uint32 [tokens]: the documents one after another, each closed by eos
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

from pipeline.core.errors import UserError
from pipeline.data.tokenizer.tokenizer_folder import CONFIG, check_config, read_backend, readable, recoverable


def load_tokenizer(folder: Path | str):
    """The fast tokenizer (transformers) of a folder, exactly as its tokenizer.json says. Every stage uses this loader.
    Raises UserError if there is none, or none that can be read.

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
                f" reader; remove what changes it from {CONFIG} (fix_mistral_regex), or save the tokenizer again"
            )
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in fast.added_tokens_decoder.values():
        if not token.special and token.content not in known:
            raise UserError(
                f"{folder}: {CONFIG} adds the token {token.content!r}, which tokenizer.json does not have, so that ids"
                " of ordinary text would depend on the reader; save the tokenizer again, with both files"
            )
    return fast


def use_known_padding(tokenizer, rows: int) -> None:
    """Let the tokenizer pad with a token that a model with `rows` embeddings knows: its own pad token, else its end of
    text, else token 0.

    Padding is masked by position, never by id, so any token will do. A pad token that was added without resizing the
    embedding has an id beyond it.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        end = tokenizer.eos_token_id
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end if end is not None and end < rows else 0)


def _state(part) -> bytes | None:
    return None if part is None else part.__getstate__()


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of raw text: documents, and what people say in a chat. No special token is ever made from text, and none is
    added.

    `tokenizer`: a fast transformers tokenizer or a `tokenizers.Tokenizer`.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    backend.no_padding()
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True  # "encode the characters of special tokens": do not recognise them
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    except BaseException as error:
        if not recoverable(error):
            raise
        raise UserError(
            f"the tokenizer cannot encode text ({type(error).__name__}: {str(error)[:200]}); its tokenizer.json is"
            " damaged or lacks a part, such as an unknown token; take it again from where it was published"
        ) from error
    finally:
        backend.encode_special_tokens = before


def token_bytes(tokenizer) -> np.ndarray:
    """int32 [vocab_size]: bytes of text that each token stands for; 0 for special tokens. From the tokenizer's own
    decoder.

    Exact where decoding is the identity, as for every tokenizer made here; pack checks it on each document.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    spec = json.loads(backend.to_str())
    decoder = spec["decoder"] or {}
    kinds = {part["type"] for part in decoder.get("decoders", [decoder]) if part}
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    vocabulary = backend.get_vocab()
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, index in vocabulary.items():
        if index in special:
            continue
        if "ByteLevel" in kinds:
            sizes[index] = len(token)  # one character stands for one byte
        elif "ByteFallback" in kinds and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            sizes[index] = 1
        else:
            sizes[index] = len(token.replace("\u2581", " ").encode())
    return sizes


class DamagedArray(Exception):
    """A file that is no numpy array, or one that is cut off."""


def mapped_array(path: Path) -> np.ndarray:
    """A .npy file, memory-mapped and read-only. Raises DamagedArray or FileNotFoundError."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # its header is a literal of Python: SyntaxError, TokenError, OverflowError, ...
        raise DamagedArray(f"{type(error).__name__}: {error}"[:200]) from None


SCAN = 2**26  # tokens looked at together


class Piece(NamedTuple):
    """A stretch of tokens that belongs to one document."""

    id: str
    """The document's id, as stage clean gave it."""
    start: int
    """Where the stretch begins, counted from the first token that was asked for."""
    length: int
    offset: int
    """Tokens of the document before the stretch."""


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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:  # no JSON, or another tree
            why = f"damaged ({type(error).__name__}: {error})"[:200]
            raise UserError(f"{self.folder / 'index.json'}: {why}; run stage pack again with --restart") from None

    def _open_index(self) -> None:
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        shards = index["splits"][self.split]
        self.vocab_size, self.eos_id, self.dtype = index["vocab_size"], index["eos_id"], np.dtype(index["dtype"])
        if not 0 <= self.eos_id < self.vocab_size:
            raise UserError(
                f"{self.folder / 'index.json'}: eos_id {self.eos_id} is beyond the vocabulary of {self.vocab_size};"
                " pack the text again"
            )
        self.sources = sorted(shards)
        self.token_bytes = self._open("token_bytes.npy", (self.vocab_size,), np.dtype(np.int32))
        self._shards, self._names, self._starts, self._num_bytes = {}, {}, {}, {}
        for source in self.sources:
            opened, names = [], []
            for shard in shards[source]:
                if "id_bytes" not in shard:
                    raise UserError(
                        f"{self.folder}: was packed by an older version, which did not keep the ids of documents; run"
                        " stage pack again"
                    )
                tokens = self._open(f"{shard['file']}.tokens.npy", (shard["tokens"],), self.dtype)
                documents = self._open(f"{shard['file']}.documents.npy", (shard["documents"], 2), np.dtype(np.int64))
                if len(documents) == 0 or documents[-1, 0] != len(tokens):
                    raise UserError(
                        f"{self.folder / shard['file']}.documents.npy: does not end where its {len(tokens)} tokens end;"
                        " run stage pack again with --restart"
                    )
                ids = self._open(f"{shard['file']}.ids.npy", (shard["id_bytes"],), np.dtype(np.uint8))
                id_ends = self._open(f"{shard['file']}.id_ends.npy", (shard["documents"],), np.dtype(np.int64))
                if id_ends[-1] != len(ids):
                    raise UserError(
                        f"{self.folder / shard['file']}.id_ends.npy: does not end where its {len(ids)} bytes of ids"
                        " end; run stage pack again with --restart"
                    )
                opened.append((tokens, documents))
                names.append((ids, id_ends))
            self._shards[source] = opened
            self._names[source] = names
            self._starts[source] = np.cumsum([0] + [len(tokens) for tokens, _ in opened]).tolist()
            self._num_bytes[source] = sum(shard["bytes"] for shard in shards[source])

    def _open(self, name: str, shape: tuple, dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        try:
            array = mapped_array(path)
        except FileNotFoundError:
            raise UserError(f"{path}: is missing; run stage pack again with --restart") from None
        except DamagedArray as error:
            raise UserError(f"{path}: damaged ({error}); run stage pack again with --restart") from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"{path}: holds {array.dtype} {list(array.shape)}, index.json says {dtype} {list(shape)}; run stage"
                " pack again with --restart"
            )
        return np.asarray(array)  # still the mapped file, without the cost of numpy's memmap class at each slice

    def misfit(self) -> str | None:
        """What tokens and index of documents do not have to do with each other, in words, or None: a token outside the
        vocabulary, documents that do not ascend or are not closed.

        Reads every token, 1-2 GB a second: for shards that stage pack did not write (it proves each id as it writes).
        """
        for source in self.sources:
            for (tokens, documents), start in zip(self._shards[source], self._starts[source][:-1], strict=True):
                for begin in range(0, len(tokens), SCAN):
                    part = tokens[begin : begin + SCAN]
                    if part.max(initial=0) >= self.vocab_size or part.min(initial=0) < 0:
                        place = begin + int(np.flatnonzero((part >= self.vocab_size) | (part < 0))[0])
                        return (
                            f"{self.folder}: token {start + place} of source {source} ({self.split}) is"
                            f" {tokens[place]}, beyond the vocabulary of {self.vocab_size}; pack the text with this"
                            " tokenizer"
                        )
                ends = documents[:, 0]
                wrong = np.diff(ends, prepend=0) <= 0
                wrong |= tokens[np.clip(ends - 1, 0, len(tokens) - 1)] != self.eos_id
                if wrong.any():
                    number = int(np.flatnonzero(wrong)[0])
                    return (
                        f"{self.folder}: document {number} of source {source} ({self.split}) ends at token"
                        f" {start + int(ends[number])}, which does not close a document that begins before it; run"
                        " stage pack again with --restart"
                    )
        return None

    def num_tokens(self, source: str) -> int:
        """Tokens of a source, the eos of each document included."""
        return int(self._starts[source][-1])

    def num_bytes(self, source: str) -> int:
        """Bytes of UTF-8 of the documents of a source."""
        return self._num_bytes[source]

    def num_documents(self, source: str) -> int:
        return sum(len(documents) for _, documents in self._shards[source])

    def read(self, source: str, start: int, length: int) -> np.ndarray:
        """Tokens start .. start+length of a source, as stored. Within one shard this is a view and costs no copy."""
        starts = self._starts[source]
        if not 0 <= start <= start + length <= starts[-1]:
            raise IndexError(f"{source}: tokens {start} to {start + length} asked of {starts[-1]}")
        first = bisect.bisect_right(starts, start, 1, len(starts) - 1) - 1 if len(starts) > 2 else 0
        offset = start - starts[first]
        tokens = self._shards[source][first][0]
        if offset + length <= len(tokens):
            return tokens[offset : offset + length]
        parts = [tokens[offset:]]
        while (left := length - sum(map(len, parts))) > 0:
            first += 1
            parts.append(self._shards[source][first][0][:left])
        return np.concatenate(parts)

    def documents(self, source: str) -> np.ndarray:
        """int64 [documents, 2]: where each document of the source ends (after its eos), and its bytes. Read into
        memory."""
        parts = [
            np.asarray(documents) + [start, 0]
            for (_, documents), start in zip(self._shards[source], self._starts[source][:-1], strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty((0, 2), np.int64)

    def pieces(self, source: str, start: int, length: int) -> list[Piece]:
        """Which documents the tokens start .. start+length of a source come from, in order."""
        found: list[Piece] = []
        shard = bisect.bisect_right(self._starts[source], start, 1, len(self._starts[source]) - 1) - 1
        at = start
        while at < start + length:
            first = int(self._starts[source][shard])
            (_, documents), (ids, id_ends) = self._shards[source][shard], self._names[source][shard]
            number = int(np.searchsorted(documents[:, 0], at - first, side="right"))
            while number < len(documents) and at < start + length:
                begin, end = first + (int(documents[number - 1, 0]) if number else 0), first + int(documents[number, 0])
                name = ids[int(id_ends[number - 1]) if number else 0 : int(id_ends[number])].tobytes()
                name = name.decode(errors="backslashreplace")  # made elsewhere, or damaged
                found.append(Piece(name, at - start, min(end, start + length) - at, at - begin))
                at, number = min(end, start + length), number + 1
            shard += 1
        return found


def misfit(folder: Path | str) -> str | None:
    """What does not fit in either split of a packed folder, in words, or None."""
    return next((found for split in ("train", "heldout") if (found := TokenStore(folder, split).misfit())), None)
