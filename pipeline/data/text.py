"""Text as every stage of the data side sees it: one normal form, and one rule of tokens for English and Chinese alike.

A token here is a CJK character, or a run of other letters and digits (lower case). One rule needs no language label, so a text that
mixes languages is treated evenly, and a Chinese sentence is not one long "word". Whole batches of texts are hashed with numpy.
"""

import functools
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

SPACE, LETTER, DIGIT, CJK, SYMBOL = range(5)
SHINGLE = 5  # tokens; Broder's w, and FineWeb's choice for MinHash (Penedo et al., 2024, section 3.4)

_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C0 and C1 controls but tab and newline, DEL, the byte order mark, noncharacters: nothing that a reader of text would miss.
# Zero-width joiners stay: emoji and Indic scripts are written with them.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]+")
_SPACES = re.compile("[ \t\u00a0\u3000]+\n")
_BLANK = re.compile("\n{3,}")
_RARE = re.compile("[\r\x0b\x0c\x85\u2028\u2029\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_ODD = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64; the golden ratio, as in splitmix64
_INVERSE = pow(_ODD, -1, 1 << 64)


# What a look at the characters of a whole batch tells of each text, so that few are searched one by one.
RARE, LOOSE, TRAILING, SUSPECT = 1, 2, 4, 8  # newlines or controls to change; perhaps not NFC; space before a newline; perhaps garbled (see filters.garbled)
_LEAD, _CONTINUATION, _BLANKS = 16, 32, 64


def normalise(text: str, look: int = RARE | LOOSE | TRAILING) -> str:
    """NFC, newlines as \\n, no control characters, no spaces at line ends, at most one blank line in a row, none at either end. Idempotent.

    NFC and not NFKC: full-width punctuation is how Chinese is written, and superscripts carry meaning. `look` is what `looks` says of the text.
    """
    if look & RARE and _RARE.search(text):
        text = _DROPPED.sub("", _NEWLINES.sub("\n", text))
    if look & (RARE | LOOSE) and not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if look & (RARE | LOOSE | TRAILING) and (" \n" in text or "\t\n" in text or "\u00a0\n" in text or "\u3000\n" in text):
        text = _SPACES.sub("\n", text)
    if "\n\n\n" in text:
        text = _BLANK.sub("\n\n", text)
    return text.strip(" \t\n\u00a0")


def looks(texts: list[str]) -> list[int]:
    """RARE, LOOSE, TRAILING and SUSPECT of each text, of which a clean one has none."""
    if not texts:
        return []
    marks = _marks().take(_codes(texts))
    ends = np.cumsum([len(text) + 1 for text in texts])
    marks[ends - 1] = 0
    found = marks.copy()
    found[:-1] |= np.where((marks[:-1] & _LEAD != 0) & (marks[1:] & _CONTINUATION != 0), SUSPECT, 0).astype(np.uint8)
    newline = np.flatnonzero(marks == _NEWLINE)
    found[newline] |= (marks[newline - 1] & _BLANKS) >> 4  # _BLANKS >> 4 == TRAILING; a newline that begins the batch sees the last separator
    begins = np.concatenate(([0], ends[:-1]))
    return (np.bitwise_or.reduceat(found, begins) & (RARE | LOOSE | TRAILING | SUSPECT)).tolist()


_NEWLINE = 128  # the mark of \n, which is nothing else


@functools.cache
def _marks() -> np.ndarray:
    """The bits above for each code point, uint8 [0x110000]."""
    from pipeline.data.filters import _CONTINUATION as CONTINUATION
    from pipeline.data.filters import _GARBAGE

    characters = [chr(point) for point in range(0x10000) if not 0xD800 <= point < 0xE000]
    every = "".join(characters)
    table = np.zeros(0x110000, np.uint8)
    for pattern, bit in ((_RARE, RARE), (_GARBAGE, SUSPECT), (re.compile("[锟烫屯]"), SUSPECT), (re.compile("[\u00c2-\u00f4]"), _LEAD), (re.compile(CONTINUATION), _CONTINUATION)):
        table[[ord(character) for character in pattern.findall(every)]] |= np.uint8(bit)
    table[[ord(character) for character in " \t\u00a0\u3000"]] |= np.uint8(_BLANKS)
    # NFC may change what decomposes, what combines with the character before it (a class of its own, or second in a composition), and jamo (UAX 15).
    second = [decomposed.split()[1] for decomposed in map(unicodedata.decomposition, characters) if decomposed and decomposed[0] != "<" and " " in decomposed]
    table[[int(point, 16) for point in second if int(point, 16) < 0x10000]] |= np.uint8(LOOSE)
    table[[ord(c) for c in characters if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", c)]] |= np.uint8(LOOSE)
    table[0x1100:0x1200] |= np.uint8(LOOSE)
    table[0x10000:] |= np.uint8(LOOSE)
    table[10] = _NEWLINE
    return table


@dataclass(frozen=True)
class Tokens:
    """Hashed tokens of a batch of N texts. Text i owns tokens starts[i]:starts[i+1]; `counts` [N, 5] are its characters by class (SPACE ... SYMBOL)."""

    hashes: np.ndarray  # uint64 [tokens]
    starts: np.ndarray  # int64 [N + 1]
    counts: np.ndarray  # int64 [N, 5]
    words: np.ndarray  # int64 [N]: tokens that are no CJK character
    cjk: np.ndarray  # bool [tokens]: the others


@functools.cache
def _classes() -> np.ndarray:
    """Class of each code point, uint8 [0x110000]."""
    table = np.full(0x110000, SYMBOL, np.uint8)
    points = np.concatenate((np.arange(0x20000), np.arange(0xE0100, 0xE01F0)))  # what lies between is Han (planes 2 and 3) or unassigned
    categories = np.array(list(map(unicodedata.category, map(chr, points.tolist()))))
    table[points[np.isin(categories, [c for c in set(categories.tolist()) if c[0] in "LM"])]] = LETTER
    table[points[np.isin(categories, ["Nd", "Nl", "No"])]] = DIGIT
    table[points[np.isin(categories, ["Zs", "Zl", "Zp"])]] = SPACE
    table[[9, 10]] = SPACE
    # Han with extensions and compatibility forms, kana, bopomofo. Hangul is written with spaces, so its words are runs.
    small = ((0x3005, 0x3008), (0x3041, 0x3100), (0x3105, 0x3130), (0x31A0, 0x31C0), (0x31F0, 0x3200))
    for low, high in (*small, (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)):
        table[low:high] = CJK
    table[0] = SPACE  # stands between two texts of a batch
    return table


@functools.lru_cache(4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """_ODD**i and its inverse modulo 2**64, for i below `length`."""
    both = []
    for base in (_ODD, _INVERSE):
        powers = np.full(length, base, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers))
    return both[0], both[1]


def mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood, 2014): every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def tokens(texts: list[str]) -> Tokens:
    """Token hashes and character counts of normalised texts.

    A token's hash is its polynomial in _ODD modulo 2**64, taken out of one running sum over the batch: (S[end] - S[start]) * _ODD**-start.
    """
    codes = _codes([_lowered(text) for text in texts])
    ends = np.flatnonzero(codes == 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    lower, classes = _tables()
    kinds = classes.take(codes)
    codes = lower.take(codes)
    counts = np.empty((len(texts), 5), np.int64)
    for text, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):  # counting booleans of a slice is ten times faster than add.reduceat
        part = kinds[begin:end]
        several = [np.count_nonzero(part == kind) for kind in range(SYMBOL)]
        counts[text] = (*several, end - begin - sum(several))
    cjk, word = kinds == CJK, (kinds == LETTER) | (kinds == DIGIT)
    starts, stops = word.copy(), word.copy()
    starts[1:] &= ~word[:-1]
    stops[:-1] &= ~word[1:]
    starts |= cjk
    stops |= cjk
    first, last = np.flatnonzero(starts), np.flatnonzero(stops) + 1
    powers, inverses = _powers(1 << max(16, (len(codes) + 1).bit_length()))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.multiply(codes, powers[: len(codes)], out=sums[1:])
    np.cumsum(sums, out=sums)
    hashes = mixed((sums.take(last) - sums.take(first)) * inverses.take(first))
    bounds = np.concatenate((np.searchsorted(first, begins), [len(first)]))
    character = cjk.take(first)
    single = np.concatenate(([0], np.cumsum(character)))
    return Tokens(hashes, bounds, counts, np.diff(bounds) - (single[bounds[1:]] - single[bounds[:-1]]), character)


def _codes(texts: list[str]) -> np.ndarray:
    """Code points of texts, each with a 0 behind it: uint16, or uint32 if some lie beyond the first plane."""
    joined = "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-16-le"), np.uint16)
    return codes if len(codes) == len(joined) else np.frombuffer(joined.encode("utf-32-le"), np.uint32)


def _lowered(text: str) -> str:
    """The text, in lower case where that is not one character for one by itself: dotted I, and sigma, which is another one at the end of a word."""
    return text.lower() if "\u0130" in text or "\u03a3" in text else text


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point: its lower case, uint32 [0x110000], and the class of that, uint8. Looking up is four times faster than str.lower."""
    lower = np.arange(0x110000, dtype=np.uint32)
    for point, character in enumerate(map(str.lower, map(chr, range(0x20000)))):
        if len(character) == 1:
            lower[point] = ord(character)
    return lower, _classes()[lower]


def shingles(batch: Tokens, size: int = SHINGLE) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs of `size` tokens within a text (uint64) and where each text's begin (int64 [N + 1]).

    A shorter text is one shingle; one without tokens has none.
    """
    lengths = np.diff(batch.starts)
    padded = np.concatenate((batch.hashes, np.zeros(size, np.uint64)))
    rolled = np.zeros(len(batch.hashes), np.uint64)
    for step in range(size):
        rolled *= np.uint64(_ODD)
        rolled += padded[step : step + len(rolled)]
    left = np.repeat(batch.starts[1:], lengths) - np.arange(len(batch.hashes))  # tokens from here to the end of the text
    keep = left >= size
    for text in np.flatnonzero((lengths > 0) & (lengths < size)):
        begin, end = batch.starts[text], batch.starts[text + 1]
        keep[begin] = True
        rolled[begin] = np.bitwise_xor.reduce(batch.hashes[begin:end] * np.arange(1, 2 * (end - begin), 2, dtype=np.uint64))
    sizes = np.where(lengths >= size, lengths - size + 1, np.minimum(lengths, 1))
    return mixed(rolled[keep]), np.concatenate(([0], np.cumsum(sizes)))


# ---- tokens with their places ------------------------------------------------------------------------------------------------


def span_tokens(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, bounds, hash) of all tokens: characters within their own text, int64 [T] each; text i owns tokens bounds[i]:bounds[i + 1]; hashes as those of `tokens`."""
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint64)
    batch = tokens(texts)
    kinds = _tables()[1].take(_codes(texts))
    cjk, word = kinds == CJK, (kinds == LETTER) | (kinds == DIGIT)
    first = np.flatnonzero(cjk | (word & ~np.concatenate(([False], word[:-1]))))
    last = np.flatnonzero(cjk | (word & ~np.concatenate((word[1:], [False])))) + 1
    begins = np.repeat(np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts])[:-1])), np.diff(batch.starts))
    return first - begins, last - begins, batch.starts, batch.hashes


def windows(hashes: np.ndarray, bounds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash of the `size` tokens from each one on, uint64 [T], and whether that many are left in its text, bool [T]."""
    number = len(hashes)
    powers, inverses = _powers(1 << max(16, (number + size).bit_length()))
    sums = np.zeros(number + size + 1, np.uint64)
    np.cumsum(hashes * powers[:number], out=sums[1 : number + 1])
    sums[number + 1 :] = sums[number]
    left = np.repeat(bounds[1:], np.diff(bounds)) - np.arange(number)
    return mixed((sums[size : size + number] - sums[:number]) * inverses[:number]), left >= size


def line_tokens(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lines that have tokens: (hash of its tokens, text, number of the line in it, number of tokens), [L] each."""
    starts, _, bounds, hashes = span_tokens(texts)
    owner = np.repeat(np.arange(len(texts)), np.diff(bounds))
    line = np.zeros(len(starts), np.int64)
    for at, text in enumerate(texts):
        breaks = np.flatnonzero(_codes([text]) == 10) if "\n" in text else np.zeros(0, np.int64)
        line[bounds[at] : bounds[at + 1]] = np.searchsorted(breaks, starts[bounds[at] : bounds[at + 1]])
    fresh = np.flatnonzero(np.concatenate(([True], (np.diff(owner) != 0) | (np.diff(line) != 0)))[: len(starts)])
    ends = np.concatenate((fresh[1:], [len(starts)]))
    powers, inverses = _powers(1 << max(16, len(starts).bit_length() + 1))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashes * powers[: len(starts)])))
    return mixed((sums[ends] - sums[fresh]) * inverses[fresh]), owner[fresh], line[fresh], ends - fresh
