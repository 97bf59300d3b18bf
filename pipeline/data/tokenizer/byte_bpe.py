"""Byte-level BPE in its two published forms, tokenizer.json and a tiktoken file, from a list of the tokens' bytes."""

import base64
import binascii
import heapq
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data.tokenizer import bpe_merges
from pipeline.data.tokenizer.encode import alphabet


def train(
    texts: Iterable[str],
    size: int,
    split_digits: bool,
    merge_whitespace: bool,
    total: int,
    longest: int = bpe_merges.LONGEST,
) -> tuple[list[bytes], list[tuple[bytes, bytes]]]:
    """At most `size` tokens of at most `longest` bytes, the 256 bytes first, and the pair that each other token is
    merged from, learned from texts of `total` bytes. Asserts that every byte was counted. Shows progress."""
    from pipeline.core.tracking import Progress
    from pipeline.data.tokenizer import pretokenize

    with Progress("tokenizer: words", total, unit="bytes") as bar:
        words, counts = pretokenize.count(texts, split_digits, merge_whitespace, bar.update)
    num_bytes = int(counts @ bpe_merges.byte_lengths(words))
    assert num_bytes == total, f"the trainer counted {num_bytes} of {total} bytes"
    with Progress("tokenizer: merges", size - 256, unit="merges") as bar:
        tokens, pairs = bpe_merges.train(words, counts, size, advance=bar.update, longest=longest)
    return tokens, [(tokens[left], tokens[right]) for left, right in pairs]


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged from, in the order of ranks: the two tokens that remain when
    all pairs of a better rank are merged.

    A token that cannot be reached in this way has no pair (published vocabularies have some: only a word equal to the
    token becomes it).
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        pair = _last_pair(token, rank, ranks)
        if pair:
            pairs.append(pair)
    return pairs


def _last_pair(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last two tokens before `token` is complete, or None if merging does not lead to two. A heap of neighbours,
    because vocabularies trained on junk have tokens of 50,000 equal letters."""
    size = len(token)
    # For the token that begins at i: where the next one begins (its own end), and where the previous one begins. A
    # place at which no token begins any more has the next place -1.
    next_begin = list(range(1, size + 1))
    previous_begin = list(range(-1, size - 1))
    heap = []  # (rank of the merged token, begin, end)
    for begin in range(size - 1):
        if token[begin : begin + 2] in ranks:
            heap.append((ranks[token[begin : begin + 2]], begin, begin + 2))
    heapq.heapify(heap)
    num_tokens = size
    while heap and num_tokens > 2:
        best, begin, end = heapq.heappop(heap)
        if best >= rank:
            break
        middle = next_begin[begin]
        if middle < 0 or middle >= size or next_begin[middle] != end:  # one of the two was merged since
            continue
        next_begin[begin], next_begin[middle] = end, -1
        num_tokens -= 1
        if end < size:
            previous_begin[end] = begin
            merged = ranks.get(token[begin : next_begin[end]])
            if merged is not None:
                heapq.heappush(heap, (merged, begin, next_begin[end]))
        if begin > 0:
            merged = ranks.get(token[previous_begin[begin] : end])
            if merged is not None:
                heapq.heappush(heap, (merged, previous_begin[begin], end))
    if num_tokens != 2:
        return None
    return token[: next_begin[0]], token[next_begin[0] :]


def build(ranks: dict[bytes, int], pairs: list[tuple[bytes, bytes]], pattern: str, special: list[str]):
    """A `tokenizers.Tokenizer` with these tokens and ids, merged from these pairs; the tokens of `special` get the next
    ids."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    char_of = {byte: char for char, byte in alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(map(char_of.__getitem__, token))

    vocabulary = {spelled(token): index for token, index in ranks.items()}
    merges = [(spelled(left), spelled(right)) for left, right in pairs]
    every_token_has_a_pair = len(pairs) == sum(len(token) > 1 for token in ranks)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=not every_token_has_a_pair))
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return tokenizer


def dump(ranks: dict[bytes, int]) -> bytes:
    """A tiktoken file: a line per token with base64 of its bytes and its rank."""
    lines = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        lines.append(base64.b64encode(token) + f" {rank}\n".encode())
    return b"".join(lines)


def load(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a tiktoken file. Raises UserError with the line that is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank_text = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number}: expected base64 and a rank, as in 'IQ== 0', found {line[:60]!r}; give a tiktoken"
                " file"
            ) from None
        if not token:
            raise UserError(f"{path}:{number}: the token is empty; the file is damaged")
        if token in ranks:
            raise UserError(f"{path}:{number}: duplicate token {token!r}; the file is damaged")
        ranks[token] = rank
    if not ranks:
        raise UserError(f"{path}: has no tokens ({path.stat().st_size} bytes); give a complete tiktoken file")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(
            f"{path}: has no token for byte 0x{missing[0]:02X} ({len(missing)} of 256 bytes are missing), so text would"
            " be lost; give a complete tiktoken file"
        )
    if len(set(ranks.values())) != len(ranks) or min(ranks.values()) < 0 or max(ranks.values()) >= 2**31:
        raise UserError(
            f"{path}: two tokens have the same rank, or a rank is negative or above 31 bits; the file is damaged"
        )
    return ranks
