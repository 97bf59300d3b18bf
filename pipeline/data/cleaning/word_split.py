"""Words and lines of a batch of texts as numpy arrays, for the statistics in text_statistics.py.

The published thresholds (Gopher, C4, FineWeb) were chosen for words that are separate from punctuation, as spaCy's
English tokeniser makes them: `(see "foo-bar", e.g.)` is ( see " foo - bar " , e.g. ). The same boundaries are found
here from the properties of neighbouring characters, for a batch at once. Of spaCy's lists of exceptions only the most
common are here; over 2,187 web pages, mails and manuals the number of words differs by less than 1.7% in 95 of 100
(docs/log.md). A CJK character is a word of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pipeline.core.seeds import splitmix64
from pipeline.data.cleaning.character_flags import (
    ALPHA,
    BEFORE_STOP,
    CJK,
    DIGIT,
    FULL_STOP,
    HYPHEN,
    INFIX,
    LEAD,
    LOWER,
    PUNCT,
    QUOTE,
    SPACE,
    SYMBOL,
    TERMINAL,
    TRAIL,
    UPPER,
    character_flags,
)
from pipeline.data.cleaning.token_hashes import hash_powers

SpanHash = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (first, after) -> hashes of spans of characters, uint64

# In Chinese and Japanese these end a sentence, too, before closing quotes and brackets: `他说：“好。”`, `「行こう」`,
# `（新华社记者 王五）`, `……`.
_STOPS_ZH, _ELLIPSES = "。！？｡．", "…⋯‥"
_QUOTES_ZH = "」』﹂﹄｣"
_CLOSED_ZH = _QUOTES_ZH + "）"  # full-width marks that end a line by themselves; in Japanese no stop precedes 」
_CLOSING = "\"'”’)]}）］｝】〕》〉」』﹂﹄｣"
_QUOTED = "\"'”’"
# A stop after one of these belongs to the word (spaCy, lang/en/tokenizer_exceptions.py) and does not end a sentence.
_ABBREVIATIONS = (
    "Mt Ak Ala Apr Ariz Ark Aug Calif Colo Conn Dec Del Feb Fla Ga Ia Id Ill Ind Jan Jul Jun Kan Kans Ky La Mar Mass"
    " Mich Minn Miss Neb Nebr Nev Nov Oct Okla Ore Pa Sep Sept Tenn Va Wash Wis Adm Bros co Co Corp Dr Gen Gov Inc Jr"
    " Ltd Md Messrs Mo Mont Mr Mrs Ms Prof Rep Rev Sen St vs a.m D.C e.g E.g E.G i.e I.e I.E p.m Ph.D v.s a b c d e f g"
    " h i j k l m n o p q r s t u v w x y z"
).split()


@dataclass(frozen=True)
class WordBatch:
    """Words and lines of N texts. Offsets count characters of all texts joined by one separator; bounds [N + 1] say
    which words or lines belong to which text."""

    joined: str
    begins: np.ndarray  # int64 [N]: where each text begins
    ends: np.ndarray  # int64 [N]: and ends
    first: np.ndarray  # int64 [W]: first character of each word
    length: np.ndarray  # int64 [W]
    hash: np.ndarray  # uint64 [W]
    symbol: np.ndarray  # bool [W]: consists of punctuation
    alpha: np.ndarray  # bool [W]: has a letter
    stop: np.ndarray  # bool [W]: ends a sentence
    punct: np.ndarray  # bool [W]: consists of Unicode's punctuation
    cjk: np.ndarray  # bool [W]: a CJK character
    words: np.ndarray  # int64 [N + 1]
    line_first: np.ndarray  # int64 [L]: first character of each line that is not white space
    line_last: np.ndarray  # int64 [L]: after the last that is not white space; equal in a blank line
    line_from: np.ndarray  # int64 [L]: where the line begins with its spaces
    line_hash: np.ndarray  # uint64 [L]: of the line without the spaces around it
    line_words: np.ndarray  # int64 [L + 1]: number of words before each line
    line_runs: np.ndarray  # int64 [L]: runs without spaces in it
    line_longest: np.ndarray  # int64 [L]: length of the longest of them
    # bool [L]: ends with a mark that ends sentences; in Chinese and Japanese quotes and brackets may close after it,
    # and an ellipsis counts
    terminal: np.ndarray
    quoted: np.ndarray  # bool [L]: ends with a closing quote
    ellipsis: np.ndarray  # bool [L]: ends with ..., … or a form of it
    bullet: np.ndarray  # bool [L]: begins with • or -
    lines: np.ndarray  # int64 [N + 1]
    span_hash: SpanHash


def split_words(texts: list[str]) -> WordBatch:
    """Words and lines of normalised texts (see normal_form.normalise)."""
    joined = "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    flags = character_flags()[codes]
    ends = np.flatnonzero(codes == 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    span_hash = _span_hasher(codes)

    is_space = (flags & SPACE) > 0
    space_before = np.concatenate(([True], is_space[:-1]))
    space_after = np.concatenate((is_space[1:], [True]))
    run_first, run_last = np.flatnonzero(~is_space & space_before), np.flatnonzero(~is_space & space_after)
    first, last = _word_borders(codes, flags, is_space, run_first, run_last)
    line_ends = np.flatnonzero((codes == 10) | (codes == 0))
    line_from = np.concatenate(([0], line_ends[:-1] + 1))
    return WordBatch(
        joined=joined,
        begins=begins,
        ends=ends,
        first=first,
        length=last - first + 1,
        hash=span_hash(first, last + 1),
        **_word_properties(flags, first, last),
        words=np.concatenate((np.searchsorted(first, begins), [len(first)])),
        line_from=line_from,
        line_words=np.concatenate((np.searchsorted(first, line_from), [len(first)])),
        **_line_properties(codes, flags, line_from, line_ends, run_first, run_last, span_hash),
        lines=np.concatenate(([0], np.searchsorted(line_ends, ends) + 1)),
        span_hash=span_hash,
    )


def _word_properties(flags: np.ndarray, first: np.ndarray, last: np.ndarray) -> dict[str, np.ndarray]:
    is_single = last == first
    head = flags[first]
    # Few words of several characters are symbols (..., --), so only those that begin as one are counted.
    symbol = (head & SYMBOL) > 0
    alpha = (head & ALPHA) > 0
    punct = (head & PUNCT) > 0
    for values, flag in ((symbol, SYMBOL), (punct, PUNCT)):
        doubtful = np.flatnonzero(values & ~is_single)
        if len(doubtful):
            others = np.concatenate(([0], np.cumsum((flags & flag) == 0)))
            values[doubtful] = others[last[doubtful] + 1] == others[first[doubtful]]
    doubtful = np.flatnonzero(~alpha & ~is_single)
    if len(doubtful):
        letters = np.concatenate(([0], np.cumsum((flags & ALPHA) > 0)))
        alpha[doubtful] = letters[last[doubtful] + 1] > letters[first[doubtful]]
    stop = is_single & ((head & FULL_STOP) > 0)
    return {"symbol": symbol, "alpha": alpha, "stop": stop, "punct": punct, "cjk": (head & CJK) > 0}


def _line_properties(
    codes: np.ndarray,
    flags: np.ndarray,
    line_from: np.ndarray,
    line_ends: np.ndarray,
    run_first: np.ndarray,
    run_last: np.ndarray,
    span_hash: SpanHash,
) -> dict[str, np.ndarray]:
    low, high = np.searchsorted(run_first, line_from), np.searchsorted(run_first, line_ends)
    filled = high > low
    line_first, line_last = line_ends.copy(), line_ends.copy()
    line_first[filled], line_last[filled] = run_first[low[filled]], run_last[high[filled] - 1] + 1
    longest = np.zeros(len(line_ends), np.int64)
    if filled.any():
        longest[filled] = np.maximum.reduceat(run_last - run_first + 1, low[filled])
    tail = np.maximum(line_last - 1, 0)
    three_dots = (
        (codes[tail] == 46)
        & (codes[np.maximum(tail - 1, 0)] == 46)
        & (codes[np.maximum(tail - 2, 0)] == 46)
        & (line_last - line_first >= 3)
    )
    is_terminal = ((flags[tail] & TERMINAL) > 0) | _ends_sentence_zh(codes, flags, line_first, tail)
    return {
        "line_first": line_first,
        "line_last": line_last,
        "line_hash": span_hash(line_first, line_last),
        "line_runs": high - low,
        "line_longest": longest,
        "terminal": filled & is_terminal,
        "quoted": filled & np.isin(codes[tail], _points(_QUOTED + _QUOTES_ZH)),
        "ellipsis": filled & (np.isin(codes[tail], _points(_ELLIPSES)) | three_dots),
        "bullet": filled & np.isin(codes[line_first], (0x2022, 45)),
    }


def _points(signs: str) -> np.ndarray:
    return np.array([ord(sign) for sign in signs], np.uint32)


def _ends_sentence_zh(codes: np.ndarray, flags: np.ndarray, first: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Whether lines end as Chinese and Japanese sentences do, bool [L]; `first` and `tail` are their first and last
    characters that are not white space. English quotes after an English stop do not count, as in FineWeb."""
    ends = np.isin(codes[tail], _points(_CLOSED_ZH)) & (tail > first)
    lines = np.flatnonzero(np.isin(codes[tail], _points(_CLOSING + _STOPS_ZH + _ELLIPSES)) & ~ends)
    is_quoted = np.isin(codes[tail[lines]], _points(_QUOTED))
    at = _before(codes, first[lines], tail[lines], _CLOSING)
    is_stop = np.isin(codes[at], _points(_STOPS_ZH))
    is_ellipsis = np.isin(codes[at], _points(_ELLIPSES))
    at = _before(codes, first[lines], at, _ELLIPSES)
    ends[lines] = is_stop | ((is_ellipsis | is_quoted) & ((flags[at] & CJK) > 0))
    return ends


def _before(codes: np.ndarray, first: np.ndarray, at: np.ndarray, signs: str) -> np.ndarray:
    """From each place the last one before it, not before `first`, that is none of `signs`; at most four are skipped."""
    for _ in range(4):
        at = np.where(np.isin(codes[at], _points(signs)) & (at > first), at - 1, at)
    return at


def _span_hasher(codes: np.ndarray) -> SpanHash:
    """Polynomial hashes of spans of characters, as differences of one running sum."""
    powers, inverses = hash_powers(1 << max(16, (len(codes) + 1).bit_length()))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])

    def span_hash(first: np.ndarray, after: np.ndarray) -> np.ndarray:
        return splitmix64((sums[after] - sums[first]) * inverses[first])

    return span_hash


# ---- borders of words ------------------------------------------------------------------------------------------------


def _word_borders(
    codes: np.ndarray, flags: np.ndarray, is_space: np.ndarray, run_first: np.ndarray, run_last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last character of each word. Of a run without spaces, signs are split off at both ends, one by one, and
    the rest is split at infixes (spaCy, tokenizer.pyx)."""
    splitter = _Splitter(codes, flags, is_space, run_first, run_last)
    trail, lead, ellipsis = splitter.signs()
    rest = splitter.strip_runs(trail, lead)
    splitter.split_contractions(rest)
    splitter.split_infixes()
    return splitter.borders(ellipsis)


class _Splitter:
    """Where words begin in an array of characters; each method adds one kind of border.

    alone: characters that are words of their own. opens: other places where a word begins.
    """

    def __init__(
        self, codes: np.ndarray, flags: np.ndarray, space: np.ndarray, run_first: np.ndarray, run_last: np.ndarray
    ):
        self.codes, self.flags, self.space = codes, flags, space
        self.run_first, self.run_last, self.size = run_first, run_last, len(codes)
        self.alone = (flags & CJK) > 0
        self.opens = np.zeros(self.size + 1, bool)

    def at(self, positions: np.ndarray) -> np.ndarray:
        # Before the first text there is a separator, as between two texts. (Clamping the index to 0 instead would make
        # two capitals of the A of "A." at the beginning of a batch.)
        return np.where(positions < 0, SPACE, self.flags[np.minimum(np.maximum(positions, 0), self.size - 1)])

    def signs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(whether a character may be split off at the end of a run, and at the beginning; places of dots in an
        ellipsis)."""
        codes, flags, size = self.codes, self.flags, self.size
        # Stops: two or more together are one sign that is split off everywhere; a single one is split off after small
        # letters, digits, signs, and two capitals.
        dots = np.flatnonzero(codes == 46)
        dot_before = (codes[np.maximum(dots - 1, 0)] == 46) & (dots > 0)
        dot_after = codes[np.minimum(dots + 1, size - 1)] == 46
        ellipsis = dots[dot_before | dot_after]
        stops = dots[~(dot_before | dot_after)]
        trail = flags & TRAIL > 0
        lead = flags & LEAD > 0
        back, two_back = self.at(stops - 1), self.at(stops - 2)
        after_capitals = ((back & UPPER) > 0) & ((two_back & UPPER) > 0)
        trail[stops[((back & BEFORE_STOP) > 0) | after_capitals]] = True
        lead[ellipsis] = trail[ellipsis] = True
        # + % $ € £ ¥ after a digit
        for sign in (43, 37, 36, 0x20AC, 0xA3, 0xA5):
            places = np.flatnonzero(codes == sign)
            trail[places[(self.at(places - 1) & DIGIT) > 0]] = True
            if sign == 43:  # +5 is one word
                lead[places[(self.at(places + 1) & DIGIT) > 0]] = False
        return trail, lead, ellipsis

    def strip_runs(self, trail: np.ndarray, lead: np.ndarray) -> np.ndarray:
        """Split signs off both ends of each run. Returns the last character of the rest of each."""
        codes, flags, space, alone, size = self.codes, self.flags, self.space, self.alone, self.size
        run_first, run_last = self.run_first, self.run_last
        # From the ends of runs inwards; after a step or two few runs are left.
        here = run_first[lead[run_first]]
        while len(here):
            alone[here] = True
            here = here[here + 1 < size] + 1
            here = here[lead[here] & ~space[here]]
        here = run_last
        stopped = [here[:0]]
        while len(here):
            inside = trail[here] & ~alone[here]
            stopped.append(here[~inside])
            here = here[inside]
            here = here[~((codes[here] == 46) & _abbreviated(codes, flags, space, here))]
            alone[here] = True
            here = here[here > 0] - 1
            here = here[~space[here]]
        return np.concatenate(stopped)

    def split_contractions(self, rest: np.ndarray) -> None:
        """don't -> do n't; it's, we'll -> it 's, we 'll: spaCy has them as suffixes and exceptions. `rest`: last
        characters of runs, as `strip_runs` returns them."""
        codes, alone, opens, size = self.codes, self.alone, self.opens, self.size
        quote = np.flatnonzero((codes == 39) | (codes == 0x2019))
        if not len(quote):
            return
        is_end = np.zeros(size + 3, bool)
        is_end[rest] = True
        # lower case; index -1 is the last separator
        one, two, back = codes[quote + 1] | 32, codes[np.minimum(quote + 2, size - 1)] | 32, codes[quote - 1] | 32
        after_letter = (self.at(quote - 1) & ALPHA) > 0
        is_s, is_d_or_m = one == ord("s"), (one == ord("d")) | (one == ord("m"))
        short = is_end[quote + 1] & (is_s | (is_d_or_m & after_letter))
        is_ll = (one == ord("l")) & (two == ord("l"))
        is_ve_or_re = ((one == ord("v")) | (one == ord("r"))) & (two == ord("e"))
        long = is_end[quote + 2] & (is_ll | is_ve_or_re)
        opens[quote[short | long]] = True
        negated = quote[is_end[quote + 1] & (one == ord("t")) & (back == ord("n"))]
        opens[negated - 1] = True
        alone[quote[(short | long) & alone[quote]]] = False

    def split_infixes(self) -> None:
        """Hyphens, slashes and the like between letters of a run; not in web addresses."""
        codes, flags, alone, opens = self.codes, self.flags, self.alone, self.opens
        inner = np.flatnonzero((flags & (HYPHEN | INFIX) > 0) | np.isin(codes, _points(":<>=/,.+*^")))
        inner = inner[~alone[inner] & ~self.space[inner]]
        if not len(inner):
            return
        code, own, back, ahead = codes[inner], flags[inner], self.at(inner - 1), self.at(inner + 1)
        next_code = codes[np.minimum(inner + 1, self.size - 1)]
        is_hyphen = (own & HYPHEN) > 0
        after_plain = (back & (ALPHA | DIGIT)) > 0
        before_letter = (ahead & ALPHA) > 0
        is_double = is_hyphen & ((back & HYPHEN) > 0)
        double_after_plain = is_double & ((self.at(inner - 2) & (ALPHA | DIGIT)) > 0)
        split = (own & INFIX) > 0
        split |= is_hyphen & (after_plain | double_after_plain) & before_letter
        split |= np.isin(code, _points(":<>=/")) & after_plain & before_letter
        split |= (code == ord(",")) & ((back & ALPHA) > 0) & before_letter
        split |= (code == ord(".")) & ((back & (LOWER | QUOTE)) > 0) & ((ahead & (UPPER | QUOTE)) > 0)
        before_number = ((ahead & DIGIT) > 0) | (next_code == ord("-"))
        split |= np.isin(code, _points("+-*^")) & ((back & DIGIT) > 0) & before_number
        split &= ~self._in_web_address(inner, next_code)
        alone[inner[split]] = True
        second = inner[split & is_double]  # a--b is a -- b; the second hyphen was matched
        alone[second - 1] = alone[second] = False
        opens[second - 1] = opens[second + 1] = True

    def _in_web_address(self, inner: np.ndarray, next_code: np.ndarray) -> np.ndarray:
        """Which of these places are in a run with ://, bool."""
        after_next = self.codes[np.minimum(inner + 2, self.size - 1)]
        slash = ord("/")
        colons = inner[(self.codes[inner] == ord(":")) & (next_code == slash) & (after_next == slash)]
        is_address = np.zeros(len(self.run_first) + 1, bool)
        is_address[np.searchsorted(self.run_first, colons, "right")] = True
        return is_address[np.searchsorted(self.run_first, inner, "right")]

    def borders(self, ellipsis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last character of each word."""
        codes, space, alone, opens = self.codes, self.space, self.alone, self.opens
        run_first = self.run_first
        alone[ellipsis] = True

        opens[:-1] |= alone
        opens[1:] |= alone
        opens[run_first] = True
        opens[:-1] &= ~space
        opens[-1] = False
        joined = ellipsis[(codes[np.maximum(ellipsis - 1, 0)] == 46) & (ellipsis > 0)]
        opens[joined] = False
        first = np.flatnonzero(opens)
        closes = ~space & np.concatenate((space[1:] | opens[1:-1], [True]))
        return first, np.flatnonzero(closes)


def _abbreviated(codes: np.ndarray, flags: np.ndarray, space: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Whether each stop belongs to an abbreviation, bool."""
    is_abbreviation = np.zeros(len(stops), bool)
    for length, keys in _abbreviation_keys().items():
        # The run (or the rest of it) must be exactly `length` characters long.
        begin = stops - length
        fits = (begin >= 0) & ~is_abbreviation
        edge = np.maximum(begin - 1, 0)
        fits &= space[edge] | (begin == 0) | ((flags[edge] & LEAD) > 0)
        candidates = np.flatnonzero(fits)
        if len(candidates):
            key = np.zeros(len(candidates), np.uint64)
            for step in range(length):
                key = key * np.uint64(_KEY_FACTOR) + codes[begin[candidates] + step]
            is_abbreviation[candidates] = np.isin(key, keys)
    return is_abbreviation


_KEY_FACTOR = 0x9E3779B97F4A7C15


@functools.cache
def _abbreviation_keys() -> dict[int, np.ndarray]:
    """Keys of the abbreviations of each length, uint64."""
    keys: dict[int, list[int]] = {}
    for word in _ABBREVIATIONS:
        key = 0
        for sign in word:
            key = (key * _KEY_FACTOR + ord(sign)) % 2**64
        keys.setdefault(len(word), []).append(key)
    return {length: np.array(keys[length], np.uint64) for length in sorted(keys)}


def word_hashes(words: list[str]) -> np.ndarray:
    """Hashes of single words, as in `WordBatch.hash`."""
    hashes = []
    for word in words:
        codes = np.frombuffer(word.encode("utf-32-le"), np.uint32)
        hashes.append(_span_hasher(codes)(np.array([0]), np.array([len(codes)]))[0])
    return np.array(hashes, np.uint64)
