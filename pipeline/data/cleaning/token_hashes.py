"""Tokens of a batch of texts as 64-bit hashes, by one rule for English and Chinese alike.

A token here is a CJK character, or a run of other letters and digits (lower case). One rule needs no language label, so
a text that mixes languages is treated evenly, and a Chinese sentence is not one long "word". Whole batches of texts are
hashed with numpy.
"""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from pipeline.core.seeds import splitmix64
from pipeline.data.cleaning.characters import (
    CJK,
    DIGIT,
    LETTER,
    SPACE,
    SYMBOL,
    code_points,
    lower_and_classes,
    lower_case_classes,
    lower_specials,
)

SHINGLE = 5  # tokens; Broder's w, and FineWeb's choice for MinHash (Penedo et al., 2024, section 3.4)
LONG = 32  # characters; longer tokens are not hashed in numpy
_ODD = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64; the golden ratio, as in splitmix64
_INVERSE = pow(_ODD, -1, 1 << 64)
_LOW = np.array([(1 << 16 * i) - 1 for i in range(5)], np.uint64)  # masks of the first i of four characters

Shingles = tuple[np.ndarray, np.ndarray]  # hashes, uint64, and where those of each text begin, int64 [N + 1]


# ---- hashing ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(4)
def hash_powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """_ODD**i and its inverse modulo 2**64, for i below `length`."""
    both = []
    for base in (_ODD, _INVERSE):
        powers = np.full(length, base, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers))
    return both[0], both[1]


def _hash_runs(codes: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Hashes of runs of code points, uint64: four at a time, each 16 bits above the one before it, mixed after each
    four; runs of more than LONG by blake2b. The same for both dtypes of `codes`."""
    is_narrow = codes.dtype == np.uint16
    padded = np.concatenate((codes, np.zeros(4, codes.dtype)))
    # four narrow code points in a row are the bytes of one number
    quads = np.ndarray(len(codes) + 1, "<u8", padded, strides=(2,)) if is_narrow else None

    def up_to_four(at: np.ndarray, left: np.ndarray) -> np.ndarray:
        if is_narrow:
            return quads[at] & _LOW.take(left, mode="clip")
        number = np.zeros(len(at), np.uint64)
        for step in range(4):
            number += np.where(left > step, padded.take(at + step), 0).astype(np.uint64) << np.uint64(16 * step)
        return number

    hashes = up_to_four(first, length)
    runs = np.flatnonzero((length > 4) & (length <= LONG))
    at, left = first[runs] + 4, length[runs] - 4
    while len(runs):
        hashes[runs] = hashes[runs] * np.uint64(_ODD) + up_to_four(at, left)
        more = np.flatnonzero(left > 4)
        runs, at, left = runs[more], at[more] + 4, left[more] - 4
    hashes = splitmix64(hashes)
    for run in np.flatnonzero(length > LONG).tolist():
        raw = codes[first[run] : first[run] + length[run]].astype("<u4").tobytes()
        hashes[run] = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    return hashes


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Hashed tokens of a batch of N texts. Text i has tokens starts[i]:starts[i+1]; `counts` [N, 5] are its characters
    by class (SPACE ... SYMBOL)."""

    hashes: np.ndarray  # uint64 [tokens]
    starts: np.ndarray  # int64 [N + 1]
    counts: np.ndarray  # int64 [N, 5]
    words: np.ndarray  # int64 [N]: tokens that are not a CJK character
    cjk: np.ndarray  # bool [tokens]: the others


def tokens(texts: list[str], points: np.ndarray | None = None) -> Tokens:
    """Token hashes and character counts of normalised texts. `points` are their code_points, if already computed."""
    lowered = list(map(lower_specials, texts))
    codes = code_points(lowered) if points is None or lowered != texts else points
    ends = np.flatnonzero(codes == 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    lower, classes = lower_and_classes(codes)
    is_cjk = classes == CJK
    in_word = classes - np.uint8(LETTER) < 2  # LETTER or DIGIT
    in_token = is_cjk | in_word
    is_edge = np.empty(len(codes), bool)  # where a token, or what separates two, begins
    is_edge[0] = True
    np.not_equal(in_word[1:], in_word[:-1], out=is_edge[1:])
    is_edge |= is_cjk
    is_edge[1:] |= is_cjk[:-1]
    first = np.flatnonzero(is_edge & in_token)
    after = np.flatnonzero(is_edge[1:] & in_token[:-1]) + 1
    starts = np.concatenate((np.searchsorted(first, begins), [len(first)]))
    counts = np.zeros((len(texts), 5), np.int64)
    for kind in (DIGIT, CJK, SYMBOL):  # few, so that finding their places is faster than any sum over all characters
        places = np.flatnonzero(classes == kind)
        counts[:, kind] = np.searchsorted(places, ends) - np.searchsorted(places, begins)
    in_tokens = _sums(after - first, starts)
    counts[:, LETTER] = in_tokens - counts[:, CJK] - counts[:, DIGIT]
    counts[:, SPACE] = ends - begins - in_tokens - counts[:, SYMBOL]
    hashes = _hash_runs(lower, first, after - first)
    return Tokens(hashes, starts, counts, np.diff(starts) - counts[:, CJK], is_cjk.take(first))


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum of values[bounds[i] : bounds[i + 1]] of each i, exact for whole numbers."""
    sums = np.zeros(len(bounds) - 1, np.int64)
    filled = np.flatnonzero(np.diff(bounds))
    if len(filled):
        sums[filled] = np.add.reduceat(values, bounds[filled])
    return sums


def shingles(batch: Tokens, size: int = SHINGLE) -> Shingles:
    """Hashes of all runs of `size` tokens within a text. A shorter text is one shingle; one without tokens has none."""
    lengths = np.diff(batch.starts)
    padded = np.concatenate((batch.hashes, np.zeros(size, np.uint64)))
    rolled = np.zeros(len(batch.hashes), np.uint64)
    for step in range(size):
        rolled *= np.uint64(_ODD)
        rolled += padded[step : step + len(rolled)]
    is_start = np.ones(len(batch.hashes), bool)
    filled = np.flatnonzero(lengths)
    for step in range(1, size):  # the last tokens of a text have fewer than `size` after them
        is_start[np.maximum(batch.starts[filled + 1] - step, batch.starts[filled])] = False
    for text in np.flatnonzero((lengths > 0) & (lengths < size)):
        begin, end = batch.starts[text], batch.starts[text + 1]
        is_start[begin] = True
        odd_numbers = np.arange(1, 2 * (end - begin), 2, dtype=np.uint64)
        rolled[begin] = np.bitwise_xor.reduce(batch.hashes[begin:end] * odd_numbers)
    sizes = np.where(lengths >= size, lengths - size + 1, np.minimum(lengths, 1))
    return splitmix64(rolled[is_start]), np.concatenate(([0], np.cumsum(sizes)))


# ---- tokens with their places ----------------------------------------------------------------------------------------


def span_tokens(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, bounds, hash) of all tokens: offsets in characters within their own text, int64 [T] each; text i has
    tokens bounds[i]:bounds[i + 1]; hashes as those of `tokens`."""
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint64)
    batch = tokens(texts)
    classes = lower_case_classes().take(code_points(texts))
    is_cjk, in_word = classes == CJK, (classes == LETTER) | (classes == DIGIT)
    word_before = np.concatenate(([False], in_word[:-1]))
    word_after = np.concatenate((in_word[1:], [False]))
    first = np.flatnonzero(is_cjk | (in_word & ~word_before))
    after = np.flatnonzero(is_cjk | (in_word & ~word_after)) + 1
    text_begins = np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts])[:-1]))
    begins = np.repeat(text_begins, np.diff(batch.starts))
    return first - begins, after - begins, batch.starts, batch.hashes


def windows(hashes: np.ndarray, bounds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash of the `size` tokens from each one on, uint64 [T], and whether its text has that many left, bool [T]."""
    number = len(hashes)
    powers, inverses = hash_powers(1 << max(16, (number + size).bit_length()))
    sums = np.zeros(number + size + 1, np.uint64)
    np.cumsum(hashes * powers[:number], out=sums[1 : number + 1])
    sums[number + 1 :] = sums[number]
    left = np.repeat(bounds[1:], np.diff(bounds)) - np.arange(number)
    return splitmix64((sums[size : size + number] - sums[:number]) * inverses[:number]), left >= size


def line_tokens(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines that have tokens: (hash of its tokens, text, number of the line in it, number of tokens), [L] each."""
    starts, _, bounds, hashes = span_tokens(texts)
    owner = np.repeat(np.arange(len(texts)), np.diff(bounds))
    line = np.zeros(len(starts), np.int64)
    for index, text in enumerate(texts):
        if "\n" in text:
            newlines = np.flatnonzero(code_points([text]) == 10)
            mine = slice(bounds[index], bounds[index + 1])
            line[mine] = np.searchsorted(newlines, starts[mine])
    is_first = np.concatenate(([True], (np.diff(owner) != 0) | (np.diff(line) != 0)))[: len(starts)]
    first = np.flatnonzero(is_first)
    after = np.concatenate((first[1:], [len(starts)]))
    powers, inverses = hash_powers(1 << max(16, len(starts).bit_length() + 1))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashes * powers[: len(starts)])))
    return splitmix64((sums[after] - sums[first]) * inverses[first]), owner[first], line[first], after - first
