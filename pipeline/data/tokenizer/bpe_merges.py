"""Byte-level BPE merges from counted words, in numpy.

    words, counts = presplit.count(texts, split_digits)
    tokens, pairs = train(words, counts, 32_000)   # bytes of each token: 256 bytes in GPT-2's order, then one for each
                                                   # pair of ids

The most frequent pair of neighbours is joined, of equally frequent ones that with the smaller ids, until the vocabulary
is full (Sennrich et al., 2016; the same choices as `tokenizers`, which is the oracle in test_bpe_merges.py). Counts
are 64 bits wide.

All different words stand in one array of token ids, a SEPARATOR between them. A token of several bytes has its id in
its first and its last place, so that both neighbours are one look away (as the ends of blocks in a memory allocator),
and GONE between. For each pair a list of places is kept. Lists go stale, which is noticed when a pair comes up: its
places are looked at, and if some are taken the pair goes back with what is left. A pair's count can only fall after
both of its tokens exist, so a stale count is a bound, and pairs that begin below `floor` are not kept at all; if the
vocabulary is not full when the rest is used up, everything is counted anew with a lower floor.
"""

import heapq
from collections.abc import Callable

import numpy as np

from pipeline.data.tokenizer.encode import alphabet

# Bytes of the longest token, as in cl100k (a run of spaces): without a bound a line of junk that is repeated becomes a
# token of kilobytes. What it costs ordinary text: docs/tokenizer.md.
LONGEST = 128
ZERO = np.zeros(1, np.int64)
CHUNK = 1 << 20  # places sorted together


def byte_order() -> list[bytes]:
    """The 256 bytes as GPT-2 and its successors number them: printable ones first."""
    return [bytes([byte]) for _, byte in sorted(alphabet().items())]


def train(
    words,
    counts: np.ndarray,
    size: int,
    floor: int | None = None,
    advance: Callable[[int], None] = lambda merges: None,
    longest: int = LONGEST,
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """Tokens in the order of their ids, at most `size`, at least the 256 bytes; fewer than `size` if no pair is left.

    words: a pyarrow BinaryArray without repetitions; counts: int64, how often each stands in the text. `floor` as
    above, for tests. `advance` is called every 256 merges with 256. A pair that would make a token of more than
    `longest` bytes is not joined (`tokenizers`' max_token_length is this + 1). Memory: about 10 bytes for each byte of
    all different words.
    """
    tokens, pairs = byte_order(), []
    text, weight = _layout(words, counts, tokens, size)
    gone, separator = (np.iinfo(text.dtype).max - n for n in (0, 1))
    lengths = np.ones(size + 1, np.int64)
    if floor is None:
        floor = max(1, int(counts @ sizes(words)) // (size * 40) if len(words) else 1)
    heap: list[tuple[int, int, int, list[np.ndarray]]] = _pairs(
        text, weight, lengths, gone, separator, floor, len(tokens), longest
    )
    while len(tokens) < size:
        if not heap:
            if floor == 1:
                break
            floor = max(1, floor // 8)
            heap = _pairs(text, weight, lengths, gone, separator, floor, len(tokens), longest)
            continue
        bound, left, right, parts = heapq.heappop(heap)
        places = parts[0] if len(parts) == 1 else np.concatenate(parts)
        width = int(lengths[left])
        places = places[text.take(places) == left]
        places = places[text.take(places + width) == right]
        count = int(weight.take(places).sum(dtype=np.int64))
        if count < -bound:
            if count >= floor:
                heapq.heappush(heap, (-count, left, right, [places]))
            continue
        if left == right:
            places = _apart(places, width)
        new, whole = len(tokens), width + int(lengths[right])
        tokens.append(tokens[left] + tokens[right])
        pairs.append((left, right))
        lengths[new] = whole
        if width > 1:
            text[places + (width - 1)] = gone
        if whole - width > 1:
            text[places + width] = gone
        text[places] = new
        text[places + (whole - 1)] = new
        near, room = weight.take(places), longest - whole
        after, before = text.take(places + whole), text.take(places - 1)
        _found(heap, after, near, places, floor, lambda other: (new, other), (separator,), lengths, room, False)
        _found(heap, before, near, places, floor, lambda other: (other, new), (separator, new), lengths, room, True)
        if new % 256 == 0:
            advance(256)
    return tokens, pairs


def _found(
    heap,
    others: np.ndarray,
    weights: np.ndarray,
    places: np.ndarray,
    floor: int,
    pair,
    without: tuple,
    lengths: np.ndarray,
    room: int,
    left: bool,
) -> None:
    """Push the new pairs of the token at `places` with its neighbours `others` of at most `room` bytes; where these
    stand to its `left` the pair begins where they begin."""
    if room < 1 or not len(others):
        return
    order = others.argsort(kind="stable")  # by radix: 16 bits
    others = others.take(order)
    begins = np.concatenate((ZERO, (others[1:] != others[:-1]).nonzero()[0] + 1))
    sums = np.add.reduceat(weights.take(order), begins, dtype=np.int64)
    ends = np.concatenate((begins[1:], [len(others)]))
    for number in (sums >= floor).nonzero()[0].tolist():
        other = int(others[begins[number]])
        if other in without or lengths.item(other) > room:
            continue
        at = places[order[begins[number] : ends[number]]]
        heapq.heappush(heap, (-int(sums[number]), *pair(other), [at - lengths.item(other) if left else at]))


def _apart(places: np.ndarray, width: int) -> np.ndarray:
    """Of equal tokens in a row, aaa, every second place: pairs are joined from the left and do not overlap."""
    order = np.arange(len(places))
    first = np.concatenate(([True], np.diff(places) != width))
    return places[(order - np.maximum.accumulate(np.where(first, order, 0))) % 2 == 0]


def sizes(words) -> np.ndarray:
    """int64: bytes of each word."""
    return np.diff(np.frombuffer(words.buffers()[1], np.int32)[words.offset : words.offset + len(words) + 1]).astype(
        np.int64
    )


def _layout(words, counts: np.ndarray, tokens: list[bytes], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The words as token ids with a separator before, between and behind, and the count of the word that each place
    belongs to."""
    dtype = np.uint16 if size < 2**16 - 2 else np.uint32
    separator = np.iinfo(dtype).max - 1
    lengths = sizes(words)
    ids = np.zeros(256, dtype)
    ids[[token[0] for token in tokens]] = np.arange(256)
    begin = np.frombuffer(words.buffers()[1], np.int32)[words.offset] if len(words) else 0
    data = (
        np.frombuffer(words.buffers()[2], np.uint8)[begin : begin + int(lengths.sum())]
        if len(words)
        else np.zeros(0, np.uint8)
    )
    assert len(data) + len(words) + 1 < 2**31
    word_ends = np.cumsum(lengths)
    text = np.full(len(data) + len(words) + 1, separator, dtype)
    weight = np.zeros(len(text), np.int32)
    # some words at a time: index arrays are eight times as large as the text
    for first in range(0, len(words), 1 << 18):
        last = min(len(words), first + (1 << 18))
        low = int(word_ends[first - 1]) if first else 0
        part, spread = data[low : word_ends[last - 1]], np.repeat(np.arange(first, last), lengths[first:last])
        at = np.arange(low, low + len(part)) + spread + 1
        text[at] = ids[part]
        weight[at] = counts[spread]
    return text, weight


def _pairs(
    text: np.ndarray,
    weight: np.ndarray,
    lengths: np.ndarray,
    gone: int,
    separator: int,
    floor: int,
    size: int,
    longest: int,
) -> list:
    """A heap of all pairs of neighbours in the text whose count is at least `floor` and which have at most `longest`
    bytes: (-count, left, right, [places])."""
    at = _tokens(text, lengths, gone)
    found: dict[int, list] = {}
    for begin in range(0, max(0, len(at) - 1), CHUNK):
        here = at[begin : begin + CHUNK + 1]
        left, right = text[here[:-1]].astype(np.int64), text[here[1:]].astype(np.int64)
        inside = np.flatnonzero((left != separator) & (right != separator))
        keys = left[inside] * size + right[inside]
        keys = keys.astype(np.uint16) if size == 256 else keys  # sorted by radix
        places = here[inside]
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if not len(keys):
            continue
        begins = np.concatenate(([0], np.flatnonzero(np.diff(keys)) + 1))
        sums = np.add.reduceat(weight[places[order]], begins, dtype=np.int64)
        ends = np.append(begins[1:], len(keys))
        places = places[order]
        for key, low, high, count in zip(
            keys[begins].tolist(), begins.tolist(), ends.tolist(), sums.tolist(), strict=True
        ):
            entry = found.setdefault(key, [0, []])
            entry[0] += count
            entry[1].append(places[low:high])
    heap = [
        (-count, key // size, key % size, parts)
        for key, (count, parts) in found.items()
        if count >= floor and lengths.item(key // size) + lengths.item(key % size) <= longest
    ]
    heapq.heapify(heap)
    return heap


def _tokens(text: np.ndarray, lengths: np.ndarray, gone: int) -> np.ndarray:
    """int32: where tokens and separators begin. Tokens of several bytes stand twice, at their first and last place,
    one after another."""
    # the two marks are clipped to the last length, which is 1
    several = np.flatnonzero((lengths > 1).take(text, mode="clip"))
    begins = text != gone
    begins[several[1::2]] = False
    return np.flatnonzero(begins).astype(np.int32)
