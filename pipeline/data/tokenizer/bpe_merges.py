"""Byte-level BPE merges from counted words, in numpy.

    words, counts = pretokenize.count(texts, split_digits)
    tokens, pairs = train(words, counts, 32_000)   # bytes of each token: the 256 bytes in GPT-2's order, then one token
                                                   # per pair of ids

The most frequent pair of neighbouring tokens is merged, among equally frequent ones the pair with the smaller ids,
until the vocabulary is full (Sennrich et al., 2016). `tokenizers` makes the same choices and is the oracle of
test_bpe_merges.py; it counts in 32 bits, this module in 64.

All distinct words are in one array of token ids with a separator between them. A token of several bytes has its id at
its first and at its last place, so that each neighbour is one lookup away (like the boundary tags of a memory
allocator); the places between them are marked as empty. A heap holds each pair with its count and its places. Later
merges take some of these places away. This is noticed when the pair is popped: its places are checked, and if some are
gone, the pair is pushed back with the remaining ones. A pair's count can only fall once both of its tokens exist, so an
outdated count is an upper bound. Pairs whose first count is below `floor` are not kept. If the heap is empty before the
vocabulary is full, all pairs are counted again with a lower floor.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from pipeline.data.tokenizer.encode import alphabet

# Bytes of the longest token, as in cl100k (a run of spaces). Without a bound, a repeated line of junk becomes a token
# of kilobytes. What the bound costs ordinary text: docs/tokenizer.md.
LONGEST = 128
ZERO = np.zeros(1, np.int64)
CHUNK = 1 << 20  # places sorted together
WORDS_AT_A_TIME = 1 << 18


class _Corpus(NamedTuple):
    """All distinct words as token ids. Merging changes `ids` and `lengths` in place."""

    ids: np.ndarray
    """uint16 or uint32 [places]: the words, with a separator before, between and after them."""
    weights: np.ndarray
    """int32 [places]: the count of the word that each place belongs to."""
    lengths: np.ndarray
    """int64 [vocabulary + 1]: bytes of each token; 1 for ids that do not exist yet."""
    empty: int
    """The id that marks places inside a token."""
    separator: int


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
    """Tokens in the order of their ids and the pair that each merged token consists of. At most `size` tokens, at least
    the 256 bytes; fewer than `size` if no pair is left.

    words: a pyarrow BinaryArray of distinct words; counts: int64, how often each is in the text. `floor` as above, for
    tests. `advance` is called every 256 merges with 256. A pair that would make a token of more than `longest` bytes is
    not merged (this is `tokenizers`' max_token_length - 1). Memory: about 10 bytes per byte of all distinct words.
    """
    tokens = byte_order()
    corpus = _corpus(words, counts, tokens, size)
    if floor is None:
        floor = _first_floor(words, counts, size)
    return tokens, _learn(corpus, tokens, set(), size, floor, advance, longest)


def go_on(
    words,
    counts: np.ndarray,
    known: list[bytes],
    encoded: Iterable[list[int]],
    number: int,
    floor: int | None = None,
    advance: Callable[[int], None] = lambda merges: None,
    longest: int = LONGEST,
) -> tuple[list[bytes], list[tuple[int, int]]]:
    """At most `number` tokens more than the `known` ones, and the pair of ids that each consists of; the first of them
    has the id len(known). Other arguments as in `train`.

    known: the bytes of each token by id, b"" for those that no text is encoded with. encoded: the ids of each word. No
    pair is merged to the bytes of a known token.
    """
    size = len(known) + number
    tokens = list(known)
    corpus = _encoded_corpus(words, counts, tokens, encoded, size)
    if floor is None:
        floor = _first_floor(words, counts, number)
    pairs = _learn(corpus, tokens, set(known), size, floor, advance, longest)
    return tokens[len(known) :], pairs


def _first_floor(words, counts: np.ndarray, merges: int) -> int:
    total = int(counts @ byte_lengths(words)) if len(words) else 0
    return max(1, total // (merges * 40))


def _learn(
    corpus: _Corpus,
    tokens: list[bytes],
    known: set[bytes],
    size: int,
    floor: int,
    advance: Callable[[int], None],
    longest: int,
) -> list[tuple[int, int]]:
    """Merge pairs until there are `size` tokens or no pair is left. Appends the new ones to `tokens` and returns their
    pairs. Pairs that spell a token of `known` are left alone."""
    pairs: list[tuple[int, int]] = []
    heap = _all_pairs(corpus, floor, len(tokens), longest)
    while len(tokens) < size:
        if not heap:
            if floor == 1:
                break
            floor = max(1, floor // 8)
            heap = _all_pairs(corpus, floor, len(tokens), longest)
            continue
        negative_count, left, right, place_lists = heapq.heappop(heap)
        if tokens[left] + tokens[right] in known:
            continue
        places = _valid_places(corpus, left, right, place_lists)
        count = int(corpus.weights.take(places).sum(dtype=np.int64))
        if count < -negative_count:  # outdated
            if count >= floor:
                heapq.heappush(heap, (-count, left, right, [places]))
            continue
        if left == right:
            places = _without_overlaps(places, corpus.lengths.item(left))
        new = len(tokens)
        tokens.append(tokens[left] + tokens[right])
        pairs.append((left, right))
        _merge(corpus, places, left, right, new)
        _push_new_pairs(heap, corpus, places, new, floor, longest)
        if len(pairs) % 256 == 0:
            advance(256)
    return pairs


def _valid_places(corpus: _Corpus, left: int, right: int, place_lists: list[np.ndarray]) -> np.ndarray:
    """The places at which the pair still is."""
    places = place_lists[0] if len(place_lists) == 1 else np.concatenate(place_lists)
    places = places[corpus.ids.take(places) == left]
    return places[corpus.ids.take(places + corpus.lengths.item(left)) == right]


def _without_overlaps(places: np.ndarray, length: int) -> np.ndarray:
    """Of equal tokens in a row, such as aaa, every second place: pairs are merged from the left and do not overlap."""
    order = np.arange(len(places))
    first_of_run = np.concatenate(([True], np.diff(places) != length))
    place_in_run = order - np.maximum.accumulate(np.where(first_of_run, order, 0))
    return places[place_in_run % 2 == 0]


def _merge(corpus: _Corpus, places: np.ndarray, left: int, right: int, new: int) -> None:
    """Write the token `new` over the pair at all places."""
    left_length, right_length = corpus.lengths.item(left), corpus.lengths.item(right)
    length = left_length + right_length
    corpus.lengths[new] = length
    if left_length > 1:
        corpus.ids[places + (left_length - 1)] = corpus.empty
    if right_length > 1:
        corpus.ids[places + left_length] = corpus.empty
    corpus.ids[places] = new
    corpus.ids[places + (length - 1)] = new


def _push_new_pairs(heap: list, corpus: _Corpus, places: np.ndarray, new: int, floor: int, longest: int) -> None:
    """Push the pairs of the token `new` at `places` with its neighbours on both sides."""
    length = corpus.lengths.item(new)
    room = longest - length
    if room < 1:
        return
    weights = corpus.weights.take(places)
    for neighbour, count, group in _by_neighbour(corpus.ids.take(places + length), weights, places, floor):
        if neighbour != corpus.separator and corpus.lengths.item(neighbour) <= room:
            heapq.heappush(heap, (-count, new, neighbour, [group]))
    for neighbour, count, group in _by_neighbour(corpus.ids.take(places - 1), weights, places, floor):
        # two tokens `new` in a row are already in the heap
        if neighbour not in (corpus.separator, new) and corpus.lengths.item(neighbour) <= room:
            heapq.heappush(heap, (-count, neighbour, new, [group - corpus.lengths.item(neighbour)]))


def _by_neighbour(
    neighbours: np.ndarray, weights: np.ndarray, places: np.ndarray, floor: int
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(neighbour, count, places) of each neighbour whose count is at least `floor`."""
    order = neighbours.argsort(kind="stable")  # a radix sort for 16 bits
    neighbours = neighbours.take(order)
    begins = np.concatenate((ZERO, (neighbours[1:] != neighbours[:-1]).nonzero()[0] + 1))
    ends = np.concatenate((begins[1:], [len(neighbours)]))
    counts = np.add.reduceat(weights.take(order), begins, dtype=np.int64)
    for group in (counts >= floor).nonzero()[0].tolist():
        begin, end = begins[group], ends[group]
        yield int(neighbours[begin]), int(counts[group]), places[order[begin:end]]


def byte_lengths(words) -> np.ndarray:
    """int64: bytes of each word of a pyarrow BinaryArray."""
    offsets = np.frombuffer(words.buffers()[1], np.int32)[words.offset : words.offset + len(words) + 1]
    return np.diff(offsets).astype(np.int64)


def _corpus(words, counts: np.ndarray, tokens: list[bytes], size: int) -> _Corpus:
    """Each byte of the words as its token."""
    corpus = _empty_corpus(words, size)
    id_of_byte = np.zeros(256, corpus.ids.dtype)
    id_of_byte[[token[0] for token in tokens]] = np.arange(256)
    for first, places, data, word_of_byte in _places_of_bytes(words):
        corpus.ids[places] = id_of_byte[data]
        corpus.weights[places] = counts[first:][word_of_byte]
    return corpus


def _encoded_corpus(words, counts: np.ndarray, tokens: list[bytes], encoded: Iterable[list[int]], size: int) -> _Corpus:
    """The words as the tokens that they are encoded with."""
    corpus = _empty_corpus(words, size)
    corpus.lengths[: len(tokens)] = [max(1, len(token)) for token in tokens]
    encoded = iter(encoded)
    for first, places, _, word_of_byte in _places_of_bytes(words):
        num_words = int(word_of_byte[-1]) + 1 if len(word_of_byte) else 0
        ids = np.fromiter(itertools.chain.from_iterable(itertools.islice(encoded, num_words)), np.int64)
        lengths = corpus.lengths[ids]
        assert lengths.sum() == len(places), "the tokens of some words do not spell them"
        begins = np.cumsum(lengths) - lengths
        corpus.ids[places] = corpus.empty
        corpus.ids[places[begins]] = ids
        corpus.ids[places[begins + lengths - 1]] = ids
        corpus.weights[places] = counts[first:][word_of_byte]
    return corpus


def _empty_corpus(words, size: int) -> _Corpus:
    dtype = np.uint16 if size < 2**16 - 2 else np.uint32
    empty = int(np.iinfo(dtype).max)
    separator = empty - 1
    num_bytes = int(byte_lengths(words).sum()) if len(words) else 0
    assert num_bytes + len(words) + 1 < 2**31
    ids = np.full(num_bytes + len(words) + 1, separator, dtype)
    weights = np.zeros(len(ids), np.int32)
    return _Corpus(ids, weights, np.ones(size + 1, np.int64), empty, separator)


def _places_of_bytes(words) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(the first word, the places of the bytes, the bytes, the word that each belongs to, counted from the first) of
    some words at a time, because index arrays are eight times as large as the text."""
    if not len(words):
        return
    sizes = byte_lengths(words)
    begin_of_data = np.frombuffer(words.buffers()[1], np.int32)[words.offset]
    data = np.frombuffer(words.buffers()[2], np.uint8)[begin_of_data : begin_of_data + int(sizes.sum())]
    word_ends = np.cumsum(sizes)
    for first in range(0, len(words), WORDS_AT_A_TIME):
        last = min(len(words), first + WORDS_AT_A_TIME)
        begin = int(word_ends[first - 1]) if first else 0
        chunk = data[begin : word_ends[last - 1]]
        word_of_byte = np.repeat(np.arange(last - first), sizes[first:last])
        yield first, np.arange(begin, begin + len(chunk)) + first + word_of_byte + 1, chunk, word_of_byte


def _all_pairs(corpus: _Corpus, floor: int, size: int, longest: int) -> list[tuple[int, int, int, list[np.ndarray]]]:
    """A heap of all pairs of neighbours with a count of at least `floor` and at most `longest` bytes: (-count, left,
    right, [places]). `size`: tokens so far."""
    starts = _token_starts(corpus)
    count_and_places: dict[int, list] = {}
    for begin in range(0, max(0, len(starts) - 1), CHUNK):
        for key, count, places in _chunk_pairs(corpus, starts[begin : begin + CHUNK + 1], size):
            entry = count_and_places.setdefault(key, [0, []])
            entry[0] += count
            entry[1].append(places)
    heap = []
    for key, (count, places) in count_and_places.items():
        left, right = divmod(key, size)
        if count >= floor and corpus.lengths.item(left) + corpus.lengths.item(right) <= longest:
            heap.append((-count, left, right, places))
    heapq.heapify(heap)
    return heap


def _chunk_pairs(corpus: _Corpus, starts: np.ndarray, size: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """(left * size + right, count, places) of each pair among the tokens that start at `starts`."""
    left = corpus.ids[starts[:-1]].astype(np.int64)
    right = corpus.ids[starts[1:]].astype(np.int64)
    inside = np.flatnonzero((left != corpus.separator) & (right != corpus.separator))
    if not len(inside):
        return
    keys = left[inside] * size + right[inside]
    if size == 256:
        keys = keys.astype(np.uint16)  # a radix sort
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], starts[inside][order]
    begins = np.concatenate(([0], np.flatnonzero(np.diff(keys)) + 1))
    ends = np.append(begins[1:], len(keys))
    counts = np.add.reduceat(corpus.weights[places], begins, dtype=np.int64)
    for key, begin, end, count in zip(
        keys[begins].tolist(), begins.tolist(), ends.tolist(), counts.tolist(), strict=True
    ):
        yield key, count, places[begin:end]


def _token_starts(corpus: _Corpus) -> np.ndarray:
    """int32: where tokens and separators begin. The id of a token of several bytes is there twice, at its first and
    its last place; the second of the two is dropped."""
    # the two markers are beyond `lengths` and are clipped to its last entry, which is 1
    of_several_bytes = np.flatnonzero((corpus.lengths > 1).take(corpus.ids, mode="clip"))
    begins = corpus.ids != corpus.empty
    begins[of_several_bytes[1::2]] = False
    return np.flatnonzero(begins).astype(np.int32)
