"""Words and lines of a batch of texts as numpy arrays: what the rules of text_statistics.py count.

The published thresholds (Gopher, C4, FineWeb) were found with words that keep punctuation apart, as spaCy's English
tokeniser makes them: `(see "foo-bar", e.g.)` is ( see " foo - bar " , e.g. ). The same boundaries are found here from
the classes of neighbouring characters, for a whole batch at once. Left out are spaCy's lists of exceptions but the
commonest; over 2,187 web pages, mails and manuals the number of words differs by less than 1.7% in 95 of 100
(docs/log.md). A CJK character is a word of its own.
"""

import functools
import unicodedata
from dataclasses import dataclass

import numpy as np

from pipeline.data.cleaning.text_arrays import CJK as CJK_CLASS
from pipeline.data.cleaning.text_arrays import character_classes, hash_powers, mixed

(
    SPACE,
    ALPHA,
    UPPER,
    LOWER,
    DIGIT,
    CJK,
    LEAD,
    TRAIL,
    INFIX,
    BEFORE_STOP,
    SYMBOL,
    TERMINAL,
    FULL_STOP,
    PUNCT,
    QUOTE,
    HYPHEN,
) = (1 << bit for bit in range(16))
# spaCy 3.8, lang/char_classes.py: what is split off at either end of a run without spaces, quotes, and signs that are
# split off at its beginning only.
_PUNCT = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
_HYPHENS = "-–—~"
# datatrove 0.10.1, utils/text.py (FineWeb): a word of these alone is a symbol.
_SYMBOLS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
# Unicode's Sentence_Terminal, as both libraries list it (sentences end there), and marks that end a line though no
# sentence.
_ENDS = "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈｡。"  # noqa: E501
# Chinese and Japanese close a sentence with these, and with the marks above, before any quotes and brackets are closed:
# `他说：“好。”`, `「行こう」`, `（新华社记者 王五）`, `……`.
_STOPS_ZH, _ELLIPSES = "。！？｡．", "…⋯‥"
_CLOSED_ZH = (
    "」』﹂﹄｣）"  # full-width marks that end a line by themselves; 」 stands without a stop before it in Japanese
)
_CLOSING = "\"'”’)]}）］｝】〕》〉」』﹂﹄｣"
_QUOTED = "\"'”’"
# A stop after one of these belongs to the word (spaCy, lang/en/tokenizer_exceptions.py), so that it ends no sentence.
_ABBREVIATIONS = (
    "Mt Ak Ala Apr Ariz Ark Aug Calif Colo Conn Dec Del Feb Fla Ga Ia Id Ill Ind Jan Jul Jun Kan Kans Ky La Mar Mass"
    " Mich Minn Miss Neb Nebr Nev Nov Oct Okla Ore Pa Sep Sept Tenn Va Wash Wis Adm Bros co Co Corp Dr Gen Gov Inc Jr"
    " Ltd Md Messrs Mo Mont Mr Mrs Ms Prof Rep Rev Sen St vs a.m D.C e.g E.g E.G i.e I.e I.E p.m Ph.D v.s a b c d e f g"
    " h i j k l m n o p q r s t u v w x y z"
).split()


@functools.cache
def _flags() -> np.ndarray:
    """Properties of each code point, uint16 [0x110000]."""
    table = np.zeros(0x110000, np.uint16)
    for point in (*range(0x20000), *range(0xE0100, 0xE01F0)):
        sign = chr(point)
        category = unicodedata.category(sign)
        flag = 0
        if sign.isspace() or category == "Zs":
            flag = SPACE
        elif category[0] in "LM":
            flag = (ALPHA if category[0] == "L" else 0) | (UPPER if sign.isupper() else LOWER if sign.islower() else 0)
        elif category == "So":
            flag = LEAD | TRAIL | INFIX
        elif category[0] == "P":
            flag = PUNCT
        if sign.isascii() and sign.isdigit():
            flag |= DIGIT
        if category == "Cc" and not flag & SPACE:
            flag |= SYMBOL
        table[point] = flag
    table[character_classes() == CJK_CLASS] = ALPHA | CJK
    for signs, flag in (
        (_PUNCT, LEAD | TRAIL | BEFORE_STOP),
        (_QUOTES, LEAD | TRAIL | BEFORE_STOP | QUOTE),
        (_CURRENCY, LEAD),
        ("§%=—–+", LEAD),
        ("—–", TRAIL),
        ("%²-+", BEFORE_STOP),
        (_HYPHENS, HYPHEN),
        (_SYMBOLS, SYMBOL),
        (_ENDS, SYMBOL | TERMINAL | FULL_STOP),
        ("؞܁࠷࠹࠽࠾᭽᭾⹓⹔៖៕។៙៚︕", TERMINAL),
    ):
        for sign in signs:
            table[ord(sign)] |= flag
    table[(table & (LOWER | DIGIT)) > 0] |= BEFORE_STOP
    table[0] = SPACE  # stands between two texts of a batch
    return table


@dataclass(frozen=True)
class Batch:
    """Words and lines of N texts. Offsets count characters of all texts joined by one separator; bounds [N + 1] say
    which words or lines belong to which text."""

    joined: str
    begins: np.ndarray  # int64 [N]: where each text begins
    ends: np.ndarray  # int64 [N]: and ends
    first: np.ndarray  # int64 [W]: first character of each word
    length: np.ndarray  # int64 [W]
    hash: np.ndarray  # uint64 [W]
    symbol: np.ndarray  # bool [W]: of punctuation alone
    alpha: np.ndarray  # bool [W]: has a letter
    stop: np.ndarray  # bool [W]: ends a sentence
    punct: np.ndarray  # bool [W]: of Unicode's punctuation alone
    cjk: np.ndarray  # bool [W]: a CJK character
    words: np.ndarray  # int64 [N + 1]
    line_first: np.ndarray  # int64 [L]: first character of each line that is not space
    line_last: np.ndarray  # int64 [L]: after the last that is not space; equal in a blank line
    line_from: np.ndarray  # int64 [L]: where the line begins with its spaces
    line_hash: np.ndarray  # uint64 [L]: of the line without the spaces around it
    line_words: np.ndarray  # int64 [L + 1]: number of words before each line
    line_runs: np.ndarray  # int64 [L]: runs without spaces in it
    line_longest: np.ndarray  # int64 [L]: length of the longest of them
    terminal: (
        np.ndarray
    )  # bool [L]: ends with a mark that ends sentences, in Chinese and Japanese also with what closes
    # quotes and brackets behind it, or an ellipsis
    quoted: np.ndarray  # bool [L]: ends with a closing quote
    ellipsis: np.ndarray  # bool [L]: ends with ..., … or a form of it
    bullet: np.ndarray  # bool [L]: begins with • or -
    lines: np.ndarray  # int64 [N + 1]
    span_hash: "object"  # (first, last) -> uint64: hashes of stretches of characters


def analyse(texts: list[str]) -> Batch:
    """Words and lines of normalised texts (see text.normalise)."""
    joined = "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    flags = _flags()[codes]
    ends = np.flatnonzero(codes == 0)
    begins = np.concatenate(([0], ends[:-1] + 1))
    span_hash = _hasher(codes)

    space = (flags & SPACE) > 0
    before = np.concatenate(([True], space[:-1]))
    after = np.concatenate((space[1:], [True]))
    run_first, run_last = np.flatnonzero(~space & before), np.flatnonzero(~space & after)
    first, last = _words(codes, flags, space, run_first, run_last)
    length = last - first + 1
    single = length == 1
    head = flags[first]
    # Few words of several characters are symbols alone (..., --), so counting pays for those only that begin as one.
    symbol = (head & SYMBOL) > 0
    alpha = (head & ALPHA) > 0
    punct = (head & PUNCT) > 0
    for found, flag in ((symbol, SYMBOL), (punct, PUNCT)):
        doubt = np.flatnonzero(found & ~single)
        if len(doubt):
            other = np.concatenate(([0], np.cumsum((flags & flag) == 0)))
            found[doubt] = other[last[doubt] + 1] == other[first[doubt]]
    doubt = np.flatnonzero(~alpha & ~single)
    if len(doubt):
        letters = np.concatenate(([0], np.cumsum((flags & ALPHA) > 0)))
        alpha[doubt] = letters[last[doubt] + 1] > letters[first[doubt]]

    line_ends = np.flatnonzero((codes == 10) | (codes == 0))
    line_from = np.concatenate(([0], line_ends[:-1] + 1))
    lines = np.concatenate(([0], np.searchsorted(line_ends, ends) + 1))
    low, high = np.searchsorted(run_first, line_from), np.searchsorted(run_first, line_ends)
    filled = high > low
    line_first, line_last = line_ends.copy(), line_ends.copy()
    line_first[filled], line_last[filled] = run_first[low[filled]], run_last[high[filled] - 1] + 1
    longest = np.zeros(len(line_ends), np.int64)
    if filled.any():
        longest[filled] = np.maximum.reduceat(run_last - run_first + 1, low[filled])
    tail = np.maximum(line_last - 1, 0)
    dots = np.isin(codes[tail], _points(_ELLIPSES)) | (
        (codes[tail] == 46)
        & (codes[np.maximum(tail - 1, 0)] == 46)
        & (codes[np.maximum(tail - 2, 0)] == 46)
        & (line_last - line_first >= 3)
    )
    return Batch(
        joined,
        begins,
        ends,
        first,
        length,
        span_hash(first, last + 1),
        symbol,
        alpha,
        single & ((head & FULL_STOP) > 0),
        punct,
        (head & CJK) > 0,
        np.concatenate((np.searchsorted(first, begins), [len(first)])),
        line_first,
        line_last,
        line_from,
        span_hash(line_first, line_last),
        np.concatenate((np.searchsorted(first, line_from), [len(first)])),
        high - low,
        longest,
        filled & (((flags[tail] & TERMINAL) > 0) | _ended_zh(codes, flags, line_first, tail)),
        filled & np.isin(codes[tail], _points(_QUOTED + "」』﹂﹄｣")),
        filled & dots,
        filled & np.isin(codes[line_first], (0x2022, 45)),
        lines,
        span_hash,
    )


def _points(signs: str) -> np.ndarray:
    return np.array([ord(sign) for sign in signs], np.uint32)


def _ended_zh(codes: np.ndarray, flags: np.ndarray, first: np.ndarray, tail: np.ndarray) -> np.ndarray:
    """Whether lines end as Chinese and Japanese sentences do, bool [L]; `first` and `tail` are their first and last
    characters that are no space. English quotes behind an English stop do not count, as FineWeb has it."""
    found = np.isin(codes[tail], _points(_CLOSED_ZH)) & (tail > first)
    look = np.flatnonzero(np.isin(codes[tail], _points(_CLOSING + _STOPS_ZH + _ELLIPSES)) & ~found)
    quoted = np.isin(codes[tail[look]], _points(_QUOTED))
    at = _before(codes, first[look], tail[look], _CLOSING)
    stop = np.isin(codes[at], _points(_STOPS_ZH))
    omission = np.isin(codes[at], _points(_ELLIPSES))
    at = _before(codes, first[look], at, _ELLIPSES)
    found[look] = stop | ((omission | quoted) & ((flags[at] & CJK) > 0))
    return found


def _before(codes: np.ndarray, first: np.ndarray, at: np.ndarray, signs: str) -> np.ndarray:
    """From each place the last one before it, not before `first`, that has none of `signs`; at most four are passed."""
    for _ in range(4):
        at = np.where(np.isin(codes[at], _points(signs)) & (at > first), at - 1, at)
    return at


def _hasher(codes: np.ndarray):
    """Polynomial hashes of stretches of characters, taken out of one running sum (as in text.tokens)."""
    powers, inverses = hash_powers(1 << max(16, (len(codes) + 1).bit_length()))
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    return lambda first, last: mixed((sums[last] - sums[first]) * inverses[first])


def _words(
    codes: np.ndarray, flags: np.ndarray, space: np.ndarray, run_first: np.ndarray, run_last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """First and last character of each word. A run without spaces loses signs at both ends, one by one, and is then
    split at infixes (spaCy, tokenizer.pyx)."""
    splitter = _Splitter(codes, flags, space, run_first, run_last)
    trail, lead, ellipsis = splitter.signs()
    rest = splitter.strip_runs(trail, lead)
    splitter.split_contractions(rest)
    splitter.split_infixes()
    return splitter.borders(ellipsis)


class _Splitter:
    """Where words begin in an array of characters; each method adds one kind of border.

    alone: characters that are words of their own. opens: places where a word begins besides those.
    """

    def __init__(
        self, codes: np.ndarray, flags: np.ndarray, space: np.ndarray, run_first: np.ndarray, run_last: np.ndarray
    ):
        self.codes, self.flags, self.space = codes, flags, space
        self.run_first, self.run_last, self.size = run_first, run_last, len(codes)
        self.alone = (flags & CJK) > 0
        self.opens = np.zeros(self.size + 1, bool)

    def at(self, positions: np.ndarray) -> np.ndarray:
        # Before the first text stands what stands between two: clamping to its first sign made the A of "A." two
        # capitals, there and nowhere else.
        return np.where(positions < 0, SPACE, self.flags[np.minimum(np.maximum(positions, 0), self.size - 1)])

    def signs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(may be split off behind a run, may be split off before one, places of dots in an ellipsis)."""
        codes, flags, size = self.codes, self.flags, self.size
        # Stops: two and more together are one sign that is split off everywhere; a single one is split off behind small
        # letters, digits, signs, and two capitals.
        dots = np.flatnonzero(codes == 46)
        left, right = (codes[np.maximum(dots - 1, 0)] == 46) & (dots > 0), codes[np.minimum(dots + 1, size - 1)] == 46
        ellipsis = dots[left | right]
        stops = dots[~(left | right)]
        trail = flags & TRAIL > 0
        lead = flags & LEAD > 0
        back, two_back = self.at(stops - 1), self.at(stops - 2)
        behind_capitals = ((back & UPPER) > 0) & ((two_back & UPPER) > 0)
        trail[stops[((back & BEFORE_STOP) > 0) | behind_capitals]] = True
        lead[ellipsis] = trail[ellipsis] = True
        # + % $ € £ ¥ behind a digit
        for sign, ahead in ((43, False), (37, True), (36, True), (0x20AC, True), (0xA3, True), (0xA5, True)):
            found = np.flatnonzero(codes == sign)
            trail[found[(self.at(found - 1) & DIGIT) > 0]] = True
            if not ahead:
                lead[found[(self.at(found + 1) & DIGIT) > 0]] = False
        return trail, lead, ellipsis

    def strip_runs(self, trail: np.ndarray, lead: np.ndarray) -> np.ndarray:
        """Split signs off both ends of each run. Returns the last character of what is left of each."""
        codes, flags, space, alone, size = self.codes, self.flags, self.space, self.alone, self.size
        run_first, run_last = self.run_first, self.run_last
        # Ends of runs, walking inwards; the runs that are still in it get few at once.
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
        """rest: last characters of runs, as `strip_runs` returns them."""
        codes, alone, opens, size = self.codes, self.alone, self.opens, self.size
        # don't -> do n't; it's, we'll -> it 's, we 'll: spaCy has them as suffixes and exceptions.
        quote = np.flatnonzero((codes == 39) | (codes == 0x2019))
        if len(quote):
            is_end = np.zeros(size + 3, bool)
            is_end[rest] = True
            # before the first stands the last: a separator
            one, two, back = codes[quote + 1] | 32, codes[np.minimum(quote + 2, size - 1)] | 32, codes[quote - 1] | 32
            short = is_end[quote + 1] & (
                (one == 115) | (((one == 100) | (one == 109)) & ((self.at(quote - 1) & ALPHA) > 0))
            )
            long = is_end[quote + 2] & (
                ((one == 108) & (two == 108)) | ((one == 118) & (two == 101)) | ((one == 114) & (two == 101))
            )
            opens[quote[short | long]] = True
            negated = quote[is_end[quote + 1] & (one == 116) & (back == 110)]
            opens[negated - 1] = True
            alone[quote[(short | long) & alone[quote]]] = False

    def split_infixes(self) -> None:
        codes, flags, space, alone, opens, size = self.codes, self.flags, self.space, self.alone, self.opens, self.size
        run_first = self.run_first
        # Inside a run: hyphens, slashes and the like between letters; not in addresses of the web.
        inner = np.flatnonzero(
            (flags & (HYPHEN | INFIX) > 0) | np.isin(codes, np.frombuffer(":<>=/,.+*^".encode("utf-32-le"), np.uint32))
        )
        inner = inner[~alone[inner] & ~space[inner]]
        if len(inner):
            code, mine, back, ahead = codes[inner], flags[inner], self.at(inner - 1), self.at(inner + 1)
            plain = (back & (ALPHA | DIGIT)) > 0
            split = (mine & INFIX) > 0
            double = ((mine & HYPHEN) > 0) & ((back & HYPHEN) > 0)
            split |= (
                ((mine & HYPHEN) > 0)
                & (plain | (double & ((self.at(inner - 2) & (ALPHA | DIGIT)) > 0)))
                & ((ahead & ALPHA) > 0)
            )
            split |= np.isin(code, (58, 60, 62, 61, 47)) & plain & ((ahead & ALPHA) > 0)
            split |= (code == 44) & ((back & ALPHA) > 0) & ((ahead & ALPHA) > 0)
            split |= (code == 46) & ((back & (LOWER | QUOTE)) > 0) & ((ahead & (UPPER | QUOTE)) > 0)
            split |= (
                np.isin(code, (43, 45, 42, 94))
                & ((back & DIGIT) > 0)
                & (((ahead & DIGIT) > 0) | (codes[np.minimum(inner + 1, size - 1)] == 45))
            )
            web = np.flatnonzero(
                (code == 58)
                & (codes[np.minimum(inner + 1, size - 1)] == 47)
                & (codes[np.minimum(inner + 2, size - 1)] == 47)
            )
            if len(web):
                address = np.zeros(len(run_first) + 1, bool)
                address[np.searchsorted(run_first, inner[web], "right")] = True
                split &= ~address[np.searchsorted(run_first, inner, "right")]
            alone[inner[split]] = True
            step = inner[split & double]  # a--b is a -- b; the second hyphen found it
            alone[step - 1] = alone[step] = False
            opens[step - 1] = opens[step + 1] = True

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
    """Whether the stop belongs to an abbreviation. bool, like `stops`."""
    known, longest = _known()
    found = np.zeros(len(stops), bool)
    for number in range(1, longest + 1):
        # The run (or what is left of it) must be exactly `number` characters long.
        begin = stops - number
        fits = (begin >= 0) & ~found
        edge = np.maximum(begin - 1, 0)
        fits &= space[edge] | (begin == 0) | ((flags[edge] & LEAD) > 0)
        which = np.flatnonzero(fits)
        if len(which):
            key = np.zeros(len(which), np.uint64)
            for step in range(number):
                key = key * np.uint64(0x9E3779B97F4A7C15) + codes[begin[which] + step]
            found[which] = np.isin(key, known[number])
    return found


@functools.cache
def _known() -> tuple[dict[int, np.ndarray], int]:
    keys: dict[int, list[int]] = {}
    for word in _ABBREVIATIONS:
        key = 0
        for sign in word:
            key = (key * 0x9E3779B97F4A7C15 + ord(sign)) % 2**64
        keys.setdefault(len(word), []).append(key)
    longest = max(keys)
    return {number: np.array(keys.get(number, []), np.uint64) for number in range(1, longest + 1)}, longest


def word_hashes(words: list[str]) -> np.ndarray:
    """Hashes of single words, as `Batch.hash` has them."""
    found = []
    for word in words:
        codes = np.frombuffer(word.encode("utf-32-le"), np.uint32)
        found.append(_hasher(codes)(np.array([0]), np.array([len(codes)]))[0])
    return np.array(found, np.uint64)
