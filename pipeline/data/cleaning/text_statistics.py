"""The statistics of the published quality rules, for a batch of texts at once: float32, one column per statistic.

Definitions follow datatrove 0.10.1 (FineWeb's code; Penedo et al., 2024), which decides the same on 99.7% of 2,187
English documents (docs/log.md). Only the statistics that FineWeb measures after C4 has removed lines depend on a
threshold, so that all rules can be evaluated on every document and other thresholds tried afterwards.
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.seeds import splitmix64
from pipeline.data.cleaning.word_split import WordBatch, word_hashes

if TYPE_CHECKING:
    from pipeline.data.cleaning.rules import Lines

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
NAMES = (
    "dup_paragraphs",
    "dup_paragraph_chars",
    "dup_lines",
    "dup_line_chars",
    *(f"top_{n}_gram" for n in TOP),
    *(f"dup_{n}_grams" for n in DUPLICATE),
    "words",
    "mean_word",
    "hashes",
    "ellipses",
    "bullet_lines",
    "ellipsis_lines",
    "alpha_words",
    "stop_words",
    "stop_share",
    "lorem_ipsum",
    "curly_brackets",
    "sentences",
    "line_punctuation",
    "short_lines",
    "dup_kept_chars",
    "newlines",
)
# Gopher's eight, and for Chinese the most common characters of modern and of classical texts; a text that has fewer
# than two of them is a list, a table or noise.
STOP_WORDS = "the be to of and that have with".split()
STOP_SIGNS = list("的是了在不有和我这就也为以之其而于者一人")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_POLICY_ZH = (
    "隐私政策",
    "隐私条款",
    "使用条款",
    "服务条款",
    "版权所有",
    "保留所有权利",
    "icp备",
    "使用cookie",
    "免责声明",
)


def measure(
    batch: WordBatch, chinese: np.ndarray, lines: "Lines | None", short_line: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All statistics, float32 [N, len(NAMES)], and which lines C4's line rules keep, bool [L].

    `chinese` [N]: which texts are measured as Chinese (other stop words and phrases); `lines`: which line rules are on
    (None: no line is removed, `lorem_ipsum` and `curly_brackets` are 0); `short_line` [N]: how long a short line is.
    Undefined values (the mean length of no words) are NaN, which no threshold rejects.
    """
    size = np.maximum(1, batch.ends - batch.begins)
    num_lines = np.diff(batch.lines)
    text_of_line = np.repeat(np.arange(len(size)), num_lines)
    kept, lorem_ipsum, curly_brackets = _c4_lines(batch, chinese[text_of_line], lines)
    statistics = {
        **_repeated_lines(batch, size, text_of_line),
        **_repeated_ngrams(batch, size),
        **_word_statistics(batch, chinese),
        "bullet_lines": per(batch.bullet, batch.lines) / num_lines,
        "ellipsis_lines": per(batch.ellipsis, batch.lines) / num_lines,
        "lorem_ipsum": per(lorem_ipsum, batch.lines),
        "curly_brackets": per(curly_brackets, batch.lines),
        "sentences": per(_sentences(batch) * kept, batch.lines),
        **_fineweb(batch, kept, short_line[text_of_line]),
    }
    return np.stack([statistics[name] for name in NAMES], axis=1).astype(np.float32), kept


def per(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sums of values[bounds[i]:bounds[i + 1]], int64."""
    sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return sums[bounds[1:]] - sums[bounds[:-1]]


def _occurrences(batch: WordBatch, phrase: str) -> np.ndarray:
    """How often each text has a phrase, int64 [N]."""
    number = len(batch.begins)
    if phrase not in batch.joined:
        return np.zeros(number, np.int64)
    texts = np.searchsorted(batch.begins, _places(batch.joined, phrase), "right") - 1
    return np.bincount(texts, minlength=number)


def _places(text: str, phrase: str) -> np.ndarray:
    """Offsets of `phrase` in `text`, without overlaps."""
    places, at = [], text.find(phrase)
    while at >= 0:
        places.append(at)
        at = text.find(phrase, at + len(phrase))
    return np.array(places, np.int64)


# ---- lines -----------------------------------------------------------------------------------------------------------


def _is_repeat(hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Which of these occurred earlier in the same text, bool."""
    keys = hashes ^ splitmix64(owner.astype(np.uint64) + np.uint64(1))
    order = np.argsort(keys, kind="stable")
    repeats = np.zeros(len(keys), bool)
    repeats[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return repeats


def _repeated_lines(batch: WordBatch, size: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Gopher: share of lines (paragraphs) that occurred earlier in the text, and of all characters in them."""
    statistics = {}
    filled = batch.line_last > batch.line_first
    lines = np.flatnonzero(filled)
    length = batch.line_last - batch.line_first
    repeats = np.zeros(len(filled), bool)
    repeats[lines] = _is_repeat(batch.line_hash[lines], owner[lines])
    statistics["dup_lines"] = per(repeats, batch.lines) / np.maximum(1, per(filled, batch.lines))
    statistics["dup_line_chars"] = per(repeats * length, batch.lines) / size
    # A paragraph is the lines from one after a blank line to the last one before the next blank line.
    new_text = np.zeros(len(filled), bool)
    new_text[batch.lines[:-1][batch.lines[:-1] < len(filled)]] = True
    blank_before = np.concatenate(([True], ~filled[:-1])) | new_text
    blank_after = np.concatenate((~filled[1:] | new_text[1:], [True]))
    first, last = np.flatnonzero(filled & blank_before), np.flatnonzero(filled & blank_after)
    begin, end = batch.line_first[first], batch.line_last[last]
    repeats = _is_repeat(batch.span_hash(begin, end), owner[first])
    bounds = np.searchsorted(first, batch.lines)
    statistics["dup_paragraphs"] = per(repeats, bounds) / np.maximum(1, np.diff(bounds))
    statistics["dup_paragraph_chars"] = per(repeats * (end - begin), bounds) / size
    return statistics


def _c4_lines(
    batch: WordBatch, chinese: np.ndarray, lines: "Lines | None"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C4 (Raffel et al., 2020) as FineWeb uses it, without the rule of terminal punctuation: lines kept, and lines
    with `lorem ipsum` and {, for which the text is rejected, in the order of its code. bool [L] each."""
    filled = batch.line_last > batch.line_first
    if lines is None:
        return filled, np.zeros(len(filled), bool), np.zeros(len(filled), bool)
    lower = batch.joined.lower()
    if len(lower) != len(batch.joined):  # a few letters become two characters; offsets must not move
        lower = "".join(sign if len(sign.lower()) != 1 else sign.lower() for sign in batch.joined)

    def with_any(*phrases: str) -> np.ndarray:
        marks = np.zeros(len(filled), bool)
        for phrase in phrases:
            if phrase in lower:
                marks[np.searchsorted(batch.line_from, _places(lower, phrase), "right") - 1] = True
        return marks

    num_words = np.where(chinese, np.diff(batch.line_words), batch.line_runs)
    kept = filled & (num_words >= np.where(chinese, lines.min_tokens_zh, lines.min_words))
    kept &= chinese | (batch.line_longest <= lines.max_word_length)  # Chinese has no spaces
    if lines.terminal_punctuation:
        kept &= (batch.terminal | batch.quoted) & ~batch.ellipsis
    lorem = kept & with_any("lorem ipsum")
    if lines.javascript:
        kept &= ~with_any("javascript")
    curly = kept & with_any("{")
    if lines.policy:
        kept &= ~(with_any(*_POLICY) | (chinese & with_any(*_POLICY_ZH)))
    return kept, lorem, curly


def _sentences(batch: WordBatch) -> np.ndarray:
    """Sentences of each line, int64 [L]: one, and one more wherever a word follows a stop (spaCy's sentencizer)."""
    count = np.diff(batch.line_words)
    word = np.flatnonzero(~batch.punct & ~batch.stop)
    stops = np.concatenate(([0], np.cumsum(batch.stop)))[word]
    line = np.repeat(np.arange(len(count)), count)[word]
    begins = (stops[1:] > stops[:-1]) & (line[1:] == line[:-1])
    # Before a line's first word there may be quotes and the like; stops there begin a sentence, too, as in `...! Well`.
    head = np.concatenate(([True], line[1:] != line[:-1]))[: len(line)]
    early = stops[head] > np.concatenate(([0], np.cumsum(batch.stop)))[batch.line_words[line[head]]]
    return (
        (count > 0)
        + np.bincount(line[1:][begins], minlength=len(count))
        + np.bincount(line[head][early], minlength=len(count))
    )


def _fineweb(batch: WordBatch, kept: np.ndarray, short: np.ndarray) -> dict[str, np.ndarray]:
    """FineWeb's own three rules, and the share of newlines, over the lines that are kept."""
    line = np.flatnonzero(kept)
    length = (batch.line_last - batch.line_first)[line]
    bounds = np.searchsorted(line, batch.lines)
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    num_lines, characters = np.diff(bounds), per(length, bounds)
    words = per(np.diff(batch.line_words) * kept, batch.lines)
    repeats = _is_repeat(batch.line_hash[line], owner)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "line_punctuation": per(batch.terminal[line], bounds) / num_lines,
            "short_lines": per(length <= short[line], bounds) / num_lines,
            "dup_kept_chars": per(repeats * length, bounds) / characters,
            "newlines": np.maximum(0, num_lines - 1) / words,
        }


# ---- words -----------------------------------------------------------------------------------------------------------


def _word_statistics(batch: WordBatch, chinese: np.ndarray) -> dict[str, np.ndarray]:
    """Gopher's rules about words and signs, and the share of stop words."""
    num_tokens = np.diff(batch.words)
    at_least_one = np.maximum(1, num_tokens)
    is_word = ~batch.symbol
    is_spaced_word = is_word & ~batch.cjk  # a CJK character says nothing about the length of words
    num_words = per(is_word, batch.words)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_word = per(batch.length * is_spaced_word, batch.words) / per(is_spaced_word, batch.words)
    # Chinese writes an ellipsis with two signs
    signs = sum(_occurrences(batch, sign) for sign in "…⋯‥")
    pairs = sum(_occurrences(batch, sign * 2) for sign in "…⋯‥")
    stop_words, stop_hits = _stop_words(batch, chinese)
    return {
        "words": num_words,
        "mean_word": mean_word,
        "hashes": _occurrences(batch, "#") / at_least_one,
        "ellipses": (_occurrences(batch, "...") + signs - pairs * chinese) / at_least_one,
        "alpha_words": np.where(num_tokens > 0, per(batch.alpha, batch.words) / at_least_one, np.nan),
        "stop_words": stop_words,
        "stop_share": stop_hits / np.maximum(1, num_words),
    }


def _stop_words(batch: WordBatch, chinese: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many different stop words of its language a text has, and how many in all, int64 [N]."""
    number = len(chinese)
    different, hits = np.zeros((2, number), np.int64), np.zeros((2, number), np.int64)
    for row, stop_words in enumerate((STOP_WORDS, STOP_SIGNS)):
        is_unused = chinese.all() if row == 0 else not chinese.any()
        if is_unused:
            continue
        stop_hashes = np.sort(word_hashes(stop_words))
        at = np.searchsorted(stop_hashes, batch.hash)
        hit = np.flatnonzero(stop_hashes[np.minimum(at, len(stop_hashes) - 1)] == batch.hash)
        owner = np.searchsorted(batch.words, hit, "right") - 1
        hits[row] = np.bincount(owner, minlength=number)
        pairs = np.unique(owner * len(stop_words) + at[hit])
        different[row] = np.bincount(pairs // len(stop_words), minlength=number)
    return np.where(chinese, different[1], different[0]), np.where(chinese, hits[1], hits[0])


# ---- n-grams ---------------------------------------------------------------------------------------------------------


def _repeated_ngrams(batch: WordBatch, size: np.ndarray) -> dict[str, np.ndarray]:
    """Gopher's repetition of n-grams: share of characters in the most frequent one (n = 2, 3, 4), and in those that
    occurred earlier (n = 5 to 10)."""
    number = len(size)
    owner = np.repeat(np.arange(number), np.diff(batch.words))
    lengths = np.concatenate(([0], np.cumsum(batch.length)))
    ends = batch.words[1:][owner] if len(owner) else owner
    salt = splitmix64(owner.astype(np.uint64) + np.uint64(1))
    statistics = {}
    rolled = batch.hash
    # An n-gram can only occur twice if both of its (n-1)-grams do, so each round sorts only the repeats of the one
    # before.
    position = np.arange(len(owner))
    for n in range(2, DUPLICATE[-1] + 1):
        position = position[position + n <= ends[position]]
        if len(rolled):
            rolled = rolled[:-1] * np.uint64(0x9E3779B97F4A7C15) + batch.hash[n - 1 :]
        keys = rolled[position] ^ salt[position] if len(position) else np.zeros(0, np.uint64)
        first, count, member, group = _groups(keys, position)
        if n in TOP:
            statistics[f"top_{n}_gram"] = _top(batch, n, first, count, owner, lengths) / size
        else:
            statistics[f"dup_{n}_grams"] = _duplicated(n, member, group, owner, lengths, number) / size
        inside = np.zeros(len(owner) + 1, bool)
        inside[member] = True
        position = member[inside[member + 1]]
    return statistics


def _groups(keys: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Equal keys: first position and size of each group of two or more, and the positions in groups with their group's
    number, in order of position.

    Key and place are sorted as one number, which is several times faster in numpy than an argsort; the hash keeps the
    64 bits minus those of the place (46 in a usual batch).
    """
    bits = np.uint64(max(1, len(keys)).bit_length())
    packed = np.sort((splitmix64(keys) >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    same = (packed[1:] >> bits) == (packed[:-1] >> bits)
    in_group = np.zeros(len(packed), bool)
    in_group[1:] |= same
    in_group[:-1] |= same
    packed = packed[in_group]
    place = (packed & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    starts = np.concatenate(([True], (packed[1:] >> bits) != (packed[:-1] >> bits)))[: len(packed)]
    group = np.cumsum(starts) - 1
    head = np.flatnonzero(starts)
    where = position[place]
    order = np.argsort(where)
    return where[head], np.diff(np.concatenate((head, [len(packed)]))), where[order], group[order]


def _top(
    batch: WordBatch, n: int, first: np.ndarray, count: np.ndarray, owner: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Characters, with the spaces between, of the most frequent n-gram; of several, of the one that comes first."""
    number = len(batch.words) - 1
    begin = batch.words[:-1]
    chosen = np.where(batch.words[1:] - begin >= n, begin, -1)  # where nothing is repeated, the first
    times = np.ones(number, np.int64)
    if len(first):
        order = np.lexsort((first, -count, owner[first]))
        texts = owner[first[order]]
        best = order[np.concatenate(([True], texts[1:] != texts[:-1]))]
        chosen[owner[first[best]]], times[owner[first[best]]] = first[best], count[best]
    at = np.minimum(np.maximum(chosen, 0), max(0, len(lengths) - 1 - n))
    after = np.minimum(at + n, len(lengths) - 1)
    return np.where(chosen >= 0, times * (lengths[after] - lengths[at] + n - 1), 0)


def _duplicated(
    n: int, member: np.ndarray, group: np.ndarray, owner: np.ndarray, lengths: np.ndarray, number: int
) -> np.ndarray:
    """Characters in n-grams that occurred earlier, read from left to right, continuing after each one, so that no
    character counts twice (Gopher's rule, datatrove's code).

    The loop is sequential, but only over n-grams that occur in the text more than once.
    """
    total = np.zeros(number, np.int64)
    free, seen, places = 0, set(), []  # `free`: first position after the last n-gram that was counted
    for place, gram in zip(member.tolist(), group.tolist(), strict=True):
        if place < free:
            continue
        if gram in seen:
            places.append(place)
            free = place + n
        else:
            seen.add(gram)
    if places:
        place = np.array(places)
        np.add.at(total, owner[place], lengths[place + n] - lengths[place])
    return total
