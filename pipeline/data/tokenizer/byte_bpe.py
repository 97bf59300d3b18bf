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
    """At most `size` tokens of at most `longest` bytes, the 256 bytes first, and the pairs that the others are joined
    from, learned from texts of `total` bytes. Asserts that every byte was counted. Shows progress."""
    from pipeline.core.tracking import Progress
    from pipeline.data.tokenizer import pretokenize

    with Progress("tokenizer: words", total, unit="bytes") as bar:
        words, counts = pretokenize.count(texts, split_digits, merge_whitespace, bar.update)
    read = int(counts @ bpe_merges.sizes(words))
    assert read == total, f"the trainer counted {read} of {total} bytes"
    with Progress("tokenizer: merges", size - 256, unit="merges") as bar:
        tokens, pairs = bpe_merges.train(words, counts, size, advance=bar.update, longest=longest)
    return tokens, [(tokens[left], tokens[right]) for left, right in pairs]


def merges_of(tokens: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is joined from, in the order of ranks: what is left of its bytes when
    all better ranked pairs are joined.

    A token that cannot be reached so has no pair (published vocabularies have some: only a word that is the token gives
    it). A heap of neighbours, because vocabularies trained on junk have tokens of 50,000 equal letters.
    """
    pairs = []
    for token, rank in sorted(tokens.items(), key=lambda item: item[1]):
        size = len(token)
        # of the part that begins here: where the next begins (its own end), where the one before begins
        after, before = list(range(1, size + 1)), list(range(-1, size - 1))
        waiting = [(tokens[token[i : i + 2]], i, i + 2) for i in range(size - 1) if token[i : i + 2] in tokens]
        heapq.heapify(waiting)
        parts = size
        while waiting and parts > 2:
            best, at, end = heapq.heappop(waiting)
            if best >= rank:
                break
            middle = after[at]
            if middle < 0 or middle >= size or after[middle] != end:  # one of the two has been joined since
                continue
            after[at], after[middle] = end, -1
            parts -= 1
            if end < size:
                before[end] = at
                if (joined := tokens.get(token[at : after[end]])) is not None:
                    heapq.heappush(waiting, (joined, at, after[end]))
            if at > 0 and (joined := tokens.get(token[before[at] : end])) is not None:
                heapq.heappush(waiting, (joined, before[at], end))
        if parts == 2:
            pairs.append((token[: after[0]], token[after[0] :]))
    return pairs


def build(tokens: dict[bytes, int], pairs: list[tuple[bytes, bytes]], pattern: str, special: list[str]):
    """A `tokenizers.Tokenizer` with these tokens and ids, joined from these pairs; `special` get the ids behind
    them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    char_of = {byte: char for char, byte in alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(map(char_of.__getitem__, token))

    reached = len(pairs) == sum(len(token) > 1 for token in tokens)
    tokenizer = Tokenizer(
        models.BPE(
            {spelled(token): index for token, index in tokens.items()},
            [(spelled(a), spelled(b)) for a, b in pairs],
            ignore_merges=not reached,
        )
    )
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in special])
    return tokenizer


def dump(tokens: dict[bytes, int]) -> bytes:
    """A tiktoken file: base64 of a token's bytes, its rank."""
    return b"".join(
        base64.b64encode(token) + f" {rank}\n".encode()
        for token, rank in sorted(tokens.items(), key=lambda item: item[1])
    )


def load(path: Path) -> dict[bytes, int]:
    """Tokens and ranks of a tiktoken file. Raises UserError with the line that is wrong."""
    tokens: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            word, rank = line.split()
            token, index = base64.b64decode(word, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise UserError(
                f"{path}:{number}: expected base64 and a rank, as in 'IQ== 0', found {line[:60]!r}; give a tiktoken"
                " file"
            ) from None
        if token in tokens or not token:
            raise UserError(
                f"{path}:{number}: the token {token!r} {'stands here for the second time' if token else 'is empty'};"
                " the file is damaged"
            )
        tokens[token] = index
    if not tokens:
        raise UserError(f"{path}: holds no tokens ({path.stat().st_size} bytes); give a complete tiktoken file")
    missing = [byte for byte in range(256) if bytes([byte]) not in tokens]
    if missing:
        raise UserError(
            f"{path}: has no token for byte 0x{missing[0]:02X} ({len(missing)} of 256 bytes are missing), so text would"
            " be lost; give a complete tiktoken file"
        )
    if len(set(tokens.values())) != len(tokens) or min(tokens.values()) < 0 or max(tokens.values()) >= 2**31:
        raise UserError(f"{path}: gives a rank to two tokens, or one below 0 or beyond 31 bits; the file is damaged")
    return tokens
