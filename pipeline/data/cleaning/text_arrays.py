"""Text as every stage of the data side sees it: one normal form, and one rule of tokens for English and Chinese alike.

A token here is a CJK character, or a run of other letters and digits (lower case). One rule needs no language label, so
a text that mixes languages is treated evenly, and a Chinese sentence is not one long "word". Whole batches of texts are
hashed with numpy.
"""

import functools
import hashlib
import re
import unicodedata
from dataclasses import dataclass

import numpy as np

SPACE, LETTER, DIGIT, CJK, SYMBOL = range(5)
SHINGLE = 5  # tokens; Broder's w, and FineWeb's choice for MinHash (Penedo et al., 2024, section 3.4)

_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C0 and C1 controls but tab and newline, DEL, the byte order mark, noncharacters: nothing that a reader of text would
# miss. Zero-width joiners stay: emoji and Indic scripts are written with them.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]+")
_SPACES = re.compile("[ \t\u00a0\u3000]+\n")
_BLANK = re.compile("\n{3,}")
_RARE = re.compile("[\r\x0b\x0c\x85\u2028\u2029\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_ODD = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64; the golden ratio, as in splitmix64
_INVERSE = pow(_ODD, -1, 1 << 64)
LONG = 32  # characters of a token that are hashed in numpy, four at a time
_LOW = np.array([(1 << 16 * i) - 1 for i in range(5)], np.uint64)  # the lowest characters of four


# What a look at the characters of a whole batch tells of each text, so that few are searched one by one.
# newlines or controls to change; perhaps not NFC; space before a newline; perhaps garbled (see filters.garbled); three
# newlines
RARE, LOOSE, TRAILING, SUSPECT, BLANK = 1, 2, 4, 8, 16
_LEAD, _CONTINUATION, _BLANKS = 16, 32, 64  # of characters


def normalise(text: str, look: int = RARE | LOOSE | TRAILING | BLANK) -> str:
    """NFC, newlines as \\n, no control characters, no spaces at line ends, at most one blank line in a row, none at
    either end. Idempotent.

    NFC and not NFKC: full-width punctuation is how Chinese is written, and superscripts carry meaning. `look` is what
    `looks` says of the text.
    """
    if look & RARE and _RARE.search(text):
        text = _DROPPED.sub("", _NEWLINES.sub("\n", text))
    if look & (RARE | LOOSE) and not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if look & (RARE | LOOSE | TRAILING) and (
        " \n" in text or "\t\n" in text or "\u00a0\n" in text or "\u3000\n" in text
    ):
        text = _SPACES.sub("\n", text)
    if look & (RARE | TRAILING | BLANK) and "\n\n\n" in text:
        text = _BLANK.sub("\n\n", text)
    return text.strip(" \t\n\u00a0")


def looks(texts: list[str], codes: np.ndarray) -> list[int]:
    """RARE, LOOSE, TRAILING, SUSPECT and BLANK of each text, of which a clean one has none. `codes` are their
    code_points."""
    if not texts:
        return []
    table = _marks()
    ends = np.cumsum([len(text) + 1 for text in texts])
    found = np.zeros(len(texts), np.uint8)
    # what lies between has no mark, so that most characters of most texts are passed over
    places = np.flatnonzero((codes < 32) | (codes > 126))
    marks = table.take(codes[places])
    marks[np.searchsorted(places, ends - 1)] = 0  # separators

    def note(places: np.ndarray, bits) -> None:
        np.bitwise_or.at(found, np.searchsorted(ends, places, side="right"), np.uint8(bits))

    for bit in (RARE, LOOSE, SUSPECT):
        note(places[marks & bit != 0], bit)
    lead = places[marks & _LEAD != 0]
    note(lead[table.take(codes[lead + 1]) & _CONTINUATION != 0], SUSPECT)  # behind each text is a separator
    newline = places[marks == _NEWLINE]
    # a newline that begins the batch sees the last separator
    note(newline[table.take(codes[newline - 1]) & _BLANKS != 0], TRAILING)
    note(newline[2:][newline[2:] - newline[:-2] == 2], BLANK)
    return found.tolist()


_NEWLINE = 128  # the mark of \n, which is nothing else


def _characters(points: np.ndarray) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def _marks() -> np.ndarray:
    """The bits above for each code point, uint8 [0x110000]."""
    from pipeline.data.cleaning.filters import CONTINUATION, GARBAGE

    # Han and Hangul syllables, two thirds of all, have no mark but the three below.
    every = _characters(np.concatenate((np.arange(0x3400), np.arange(0xA000, 0xAC00), np.arange(0xE000, 0x10000))))
    table = np.zeros(0x110000, np.uint8)
    for pattern, bit in (
        (_RARE, RARE),
        (GARBAGE, SUSPECT),
        (re.compile("[\u00c2-\u00f4]"), _LEAD),
        (re.compile(CONTINUATION), _CONTINUATION),
    ):
        table[[ord(character) for character in pattern.findall(every)]] |= np.uint8(bit)
    table[[ord(character) for character in "锟烫屯"]] |= np.uint8(SUSPECT)
    table[[ord(character) for character in " \t\u00a0\u3000"]] |= np.uint8(_BLANKS)
    # NFC may change what decomposes, what combines with the character before it (a class of its own, or second in a
    # composition), and jamo (UAX 15).
    second = [
        decomposed.split()[1]
        for decomposed in map(unicodedata.decomposition, every)
        if decomposed and decomposed[0] != "<" and " " in decomposed
    ]
    table[[int(point, 16) for point in second if int(point, 16) < 0x10000]] |= np.uint8(LOOSE)
    table[[ord(c) for c in every if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", c)]] |= np.uint8(
        LOOSE
    )
    table[0x1100:0x1200] |= np.uint8(LOOSE)
    table[0x10000:] |= np.uint8(LOOSE)
    table[10] = _NEWLINE
    return table


@dataclass(frozen=True)
class Tokens:
    """Hashed tokens of a batch of N texts. Text i owns tokens starts[i]:starts[i+1]; `counts` [N, 5] are its
    characters by class (SPACE ... SYMBOL)."""

    hashes: np.ndarray  # uint64 [tokens]
    starts: np.ndarray  # int64 [N + 1]
    counts: np.ndarray  # int64 [N, 5]
    words: np.ndarray  # int64 [N]: tokens that are no CJK character
    cjk: np.ndarray  # bool [tokens]: the others


@functools.cache
def character_classes() -> np.ndarray:
    """Class of each code point, uint8 [0x110000]."""
    table = np.full(0x110000, SYMBOL, np.uint8)
    # what lies between is Han (planes 2 and 3) or unassigned
    points = np.concatenate((np.arange(0x20000), np.arange(0xE0100, 0xE01F0)))
    # the first letter of Lu, Nd, Zs, ...
    category = np.frombuffer("".join(map(unicodedata.category, _characters(points))).encode(), np.uint8)[::2]
    kinds = np.full(256, SYMBOL, np.uint8)
    for letters, kind in ((b"LM", LETTER), (b"N", DIGIT), (b"Z", SPACE)):
        kinds[list(letters)] = kind
    table[points] = kinds.take(category)
    table[[9, 10]] = SPACE
    # Han with extensions and compatibility forms, kana, bopomofo. Hangul is written with spaces, so its words are runs.
    small = ((0x3005, 0x3008), (0x3041, 0x3100), (0x3105, 0x3130), (0x31A0, 0x31C0), (0x31F0, 0x3200))
    for low, high in (*small, (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)):
        table[low:high] = CJK
    table[0] = SPACE  # stands between two texts of a batch
    return table


@functools.lru_cache(4)
def hash_powers(length: int) -> tuple[np.ndarray, np.ndarray]:
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


def tokens(texts: list[str], points: np.ndarray | None = None) -> Tokens:
    """Token hashes and character counts of normalised texts. `points` are their code_points, if they are known."""
    lowered = list(map(_lowered, texts))
    codes = code_points(lowered) if points is None or lowered != texts else points
    ends = np.flatnonzero(codes == 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    lower, kinds = _lower_and_kinds(codes)
    cjk, word = kinds == CJK, kinds - np.uint8(LETTER) < 2  # LETTER and DIGIT
    token = cjk | word
    edge = np.empty(len(codes), bool)  # where a token, or what stands between two, begins
    edge[0] = True
    np.not_equal(word[1:], word[:-1], out=edge[1:])
    edge |= cjk
    edge[1:] |= cjk[:-1]
    first, last = np.flatnonzero(edge & token), np.flatnonzero(edge[1:] & token[:-1]) + 1
    bounds = np.concatenate((np.searchsorted(first, begins), [len(first)]))
    counts = np.zeros((len(texts), 5), np.int64)
    for kind in (DIGIT, CJK, SYMBOL):  # few, so that finding their places is faster than any sum over all characters
        places = np.flatnonzero(kinds == kind)
        counts[:, kind] = np.searchsorted(places, ends) - np.searchsorted(places, begins)
    inside = _sums(last - first, bounds)
    counts[:, LETTER] = inside - counts[:, CJK] - counts[:, DIGIT]
    counts[:, SPACE] = ends - begins - inside - counts[:, SYMBOL]
    character = cjk.take(first)
    return Tokens(_hashed(lower, first, last - first), bounds, counts, np.diff(bounds) - counts[:, CJK], character)


def _sums(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sum of values[bounds[i] : bounds[i + 1]] of each i, exact for whole numbers."""
    sums, filled = np.zeros(len(bounds) - 1, np.int64), np.flatnonzero(np.diff(bounds))
    if len(filled):
        sums[filled] = np.add.reduceat(values, bounds[filled])
    return sums


def _hashed(codes: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Hashes of runs of code points, uint64: four at a time, each 16 bits above the one before it, mixed after each
    four; runs of more than LONG by blake2b. The same for both widths of `codes`."""
    narrow = codes.dtype == np.uint16
    padded = np.concatenate((codes, np.zeros(4, codes.dtype)))
    # the four from each one on are one number already
    four = np.ndarray(len(codes) + 1, "<u8", padded, strides=(2,)) if narrow else None

    def upto_four(at: np.ndarray, left: np.ndarray) -> np.ndarray:
        if narrow:
            return four[at] & _LOW.take(left, mode="clip")
        part = np.zeros(len(at), np.uint64)
        for step in range(4):
            part += np.where(left > step, padded.take(at + step), 0).astype(np.uint64) << np.uint64(16 * step)
        return part

    hashes = upto_four(first, length)
    here = np.flatnonzero((length > 4) & (length <= LONG))
    at, left = first[here] + 4, length[here] - 4
    while len(here):
        hashes[here] = hashes[here] * np.uint64(_ODD) + upto_four(at, left)
        more = np.flatnonzero(left > 4)
        here, at, left = here[more], at[more] + 4, left[more] - 4
    hashes = mixed(hashes)
    for token in np.flatnonzero(length > LONG).tolist():
        raw = codes[first[token] : first[token] + length[token]].astype("<u4").tobytes()
        hashes[token] = int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
    return hashes


def code_points(texts: list[str]) -> np.ndarray:
    """Code points of texts, each with a 0 behind it: uint16, or uint32 if some lie beyond the first plane."""
    joined = "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-16-le"), np.uint16)
    return codes if len(codes) == len(joined) else np.frombuffer(joined.encode("utf-32-le"), np.uint32)


def _lower_and_kinds(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower case, of the same dtype, and class (uint8) of code points. Most are ASCII in most texts, and those cost
    a fourth of a look-up by index."""
    lower, classes = _tables()
    high = np.flatnonzero(codes > 127)
    if 4 * len(high) > len(codes):
        return lower.take(codes).astype(codes.dtype), classes.take(codes)
    found = codes + (((codes - codes.dtype.type(65)) < 26).astype(codes.dtype) << codes.dtype.type(5))
    kinds = np.frombuffer(bytearray(codes.astype(np.uint8)).translate(classes[:256].tobytes()), np.uint8)
    found[high], kinds[high] = lower.take(codes[high]), classes.take(codes[high])
    return found, kinds


def _lowered(text: str) -> str:
    """The text, in lower case where that is not one character for one by itself: dotted I, and sigma, which is
    another one at the end of a word."""
    return text.lower() if "\u0130" in text or "\u03a3" in text else text


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point: its lower case, uint32 [0x110000], and the class of that, uint8. Looking up is four times
    faster than str.lower."""
    lower = np.arange(0x110000, dtype=np.uint32)
    # U+0130 becomes two characters, surrogates are none
    points = np.concatenate((np.arange(0x130), np.arange(0x131, 0xD800), np.arange(0xE000, 0x20000)))
    lower[points] = np.frombuffer(_characters(points).lower().encode("utf-32-le"), np.uint32)
    return lower, character_classes()[lower]


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
    keep = np.ones(len(batch.hashes), bool)
    filled = np.flatnonzero(lengths)
    for step in range(1, size):  # fewer tokens than `size` are left from there
        keep[np.maximum(batch.starts[filled + 1] - step, batch.starts[filled])] = False
    for text in np.flatnonzero((lengths > 0) & (lengths < size)):
        begin, end = batch.starts[text], batch.starts[text + 1]
        keep[begin] = True
        rolled[begin] = np.bitwise_xor.reduce(
            batch.hashes[begin:end] * np.arange(1, 2 * (end - begin), 2, dtype=np.uint64)
        )
    sizes = np.where(lengths >= size, lengths - size + 1, np.minimum(lengths, 1))
    return mixed(rolled[keep]), np.concatenate(([0], np.cumsum(sizes)))


# ---- tokens with their places ----------------------------------------------------------------------------------------


def span_tokens(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(start, end, bounds, hash) of all tokens: characters within their own text, int64 [T] each; text i owns tokens
    bounds[i]:bounds[i + 1]; hashes as those of `tokens`."""
    if not texts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.uint64)
    batch = tokens(texts)
    kinds = _tables()[1].take(code_points(texts))
    cjk, word = kinds == CJK, (kinds == LETTER) | (kinds == DIGIT)
    first = np.flatnonzero(cjk | (word & ~np.concatenate(([False], word[:-1]))))
    last = np.flatnonzero(cjk | (word & ~np.concatenate((word[1:], [False])))) + 1
    begins = np.repeat(np.concatenate(([0], np.cumsum([len(text) + 1 for text in texts])[:-1])), np.diff(batch.starts))
    return first - begins, last - begins, batch.starts, batch.hashes


def windows(hashes: np.ndarray, bounds: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash of the `size` tokens from each one on, uint64 [T], and whether that many are left in its text, bool [T]."""
    number = len(hashes)
    powers, inverses = hash_powers(1 << max(16, (number + size).bit_length()))
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
        breaks = np.flatnonzero(code_points([text]) == 10) if "\n" in text else np.zeros(0, np.int64)
        line[bounds[at] : bounds[at + 1]] = np.searchsorted(breaks, starts[bounds[at] : bounds[at + 1]])
    fresh = np.flatnonzero(np.concatenate(([True], (np.diff(owner) != 0) | (np.diff(line) != 0)))[: len(starts)])
    ends = np.concatenate((fresh[1:], [len(starts)]))
    powers, inverses = hash_powers(1 << max(16, len(starts).bit_length() + 1))
    sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(hashes * powers[: len(starts)])))
    return mixed((sums[ends] - sums[fresh]) * inverses[fresh]), owner[fresh], line[fresh], ends - fresh
