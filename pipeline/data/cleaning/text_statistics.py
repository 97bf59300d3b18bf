"""Every number that the published quality rules look at, for a batch of texts at once: float32, one column a statistic.

Definitions follow datatrove 0.10.1 (FineWeb's code; Penedo et al., 2024), which decides the same on 99.7% of 2,187
English documents (docs/log.md). No statistic depends on a threshold but those that FineWeb measures after C4 has taken
lines out, so that all rules can be evaluated on every document, and other thresholds be tried later.
"""

from typing import TYPE_CHECKING

import numpy as np

from pipeline.data.cleaning.text_arrays import mixed
from pipeline.data.cleaning.word_split import Batch, word_hashes

if TYPE_CHECKING:
    from pipeline.data.cleaning.rules import Lines

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
# In the order in which the rules are asked, which is FineWeb's.
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
# Gopher's eight, and for Chinese the commonest signs of modern and of classical texts; a text that has fewer than two
# kinds of them is a list, a table or noise.
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
    batch: Batch, chinese: np.ndarray, lines: "Lines | None", short_line: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All statistics, float32 [N, len(NAMES)], and which lines C4's line rules keep, bool [L].

    `chinese` [N] says which texts are judged as Chinese (other stop words and phrases), `lines` which line rules are on
    (None: no line goes, and C4's statistics are not taken), `short_line` [N] how long a short line is. Undefined values
    (the mean length of no word) are NaN, which no threshold rejects.
    """
    number = len(batch.begins)
    size = np.maximum(1, batch.ends - batch.begins)
    count = np.diff(batch.words)
    some = np.maximum(1, count)
    lines_of = np.diff(batch.lines)
    owner_of_line = np.repeat(np.arange(number), lines_of)
    found: dict[str, np.ndarray] = {}

    found.update(_repeated_lines(batch, size, owner_of_line))
    found.update(_grams(batch, size))

    words = ~batch.symbol
    found["words"] = per(words, batch.words)
    with np.errstate(invalid="ignore", divide="ignore"):
        spaced = words & ~batch.cjk  # a CJK character says nothing about the length of words; English has none of them
        found["mean_word"] = per(batch.length * spaced, batch.words) / per(spaced, batch.words)
    found["hashes"] = _occurrences(batch, "#", number) / some
    # Chinese writes an ellipsis with two signs
    signs = sum(_occurrences(batch, sign, number) for sign in "…⋯‥")
    pairs = sum(_occurrences(batch, sign * 2, number) for sign in "…⋯‥")
    found["ellipses"] = (_occurrences(batch, "...", number) + signs - pairs * chinese) / some
    found["bullet_lines"] = per(batch.bullet, batch.lines) / lines_of
    found["ellipsis_lines"] = per(batch.ellipsis, batch.lines) / lines_of
    found["alpha_words"] = np.where(count > 0, per(batch.alpha, batch.words) / some, np.nan)
    found["stop_words"], hits = _stop_words(batch, chinese)
    found["stop_share"] = hits / np.maximum(1, found["words"])

    kept, lorem, curly = _c4_lines(batch, chinese[owner_of_line], lines)
    found["lorem_ipsum"], found["curly_brackets"] = per(lorem, batch.lines), per(curly, batch.lines)
    found["sentences"] = per(_sentences(batch) * kept, batch.lines)
    found.update(_fineweb(batch, kept, short_line[owner_of_line]))
    return np.stack([found[name] for name in NAMES], axis=1).astype(np.float32), kept


def per(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Sums of values[bounds[i]:bounds[i + 1]], int64."""
    sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
    return sums[bounds[1:]] - sums[bounds[:-1]]


def _occurrences(batch: Batch, what: str, number: int) -> np.ndarray:
    if what not in batch.joined:
        return np.zeros(number, np.int64)
    return np.bincount(np.searchsorted(batch.begins, _places(batch.joined, what), "right") - 1, minlength=number)


def _places(text: str, what: str) -> np.ndarray:
    """Where `what` begins in `text`, without overlaps."""
    found, at = [], text.find(what)
    while at >= 0:
        found.append(at)
        at = text.find(what, at + len(what))
    return np.array(found, np.int64)


# ---- lines -----------------------------------------------------------------------------------------------------------


def _again(hashes: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Which of these stood in the same text before, bool."""
    keys = hashes ^ mixed(owner.astype(np.uint64) + np.uint64(1))
    order = np.argsort(keys, kind="stable")
    again = np.zeros(len(keys), bool)
    again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
    return again


def _repeated_lines(batch: Batch, size: np.ndarray, owner: np.ndarray) -> dict[str, np.ndarray]:
    """Gopher: share of lines (paragraphs) that stood in the text before, and of all characters in them."""
    found = {}
    filled = batch.line_last > batch.line_first
    which = np.flatnonzero(filled)
    length = batch.line_last - batch.line_first
    again = np.zeros(len(filled), bool)
    again[which] = _again(batch.line_hash[which], owner[which])
    lines = np.maximum(1, per(filled, batch.lines))
    found["dup_lines"] = per(again, batch.lines) / lines
    found["dup_line_chars"] = per(again * length, batch.lines) / size
    # A paragraph goes from a line after a blank one to the last before the next.
    new_text = np.zeros(len(filled), bool)
    new_text[batch.lines[:-1][batch.lines[:-1] < len(filled)]] = True
    blank_before = np.concatenate(([True], ~filled[:-1])) | new_text
    blank_after = np.concatenate((~filled[1:] | new_text[1:], [True]))
    first, last = np.flatnonzero(filled & blank_before), np.flatnonzero(filled & blank_after)
    begin, end = batch.line_first[first], batch.line_last[last]
    again = _again(batch.span_hash(begin, end), owner[first])
    bounds = np.searchsorted(first, batch.lines)
    found["dup_paragraphs"] = per(again, bounds) / np.maximum(1, np.diff(bounds))
    found["dup_paragraph_chars"] = per(again * (end - begin), bounds) / size
    return found


def _c4_lines(batch: Batch, chinese: np.ndarray, lines: "Lines | None") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """C4 (Raffel et al., 2020) as FineWeb uses it, without the rule of terminal punctuation: lines kept, and lines
    that condemn their text, in the order of its code. bool [L]."""
    filled = batch.line_last > batch.line_first
    if lines is None:
        return filled, np.zeros(len(filled), bool), np.zeros(len(filled), bool)
    lower = batch.joined.lower()
    if len(lower) != len(batch.joined):  # a few letters become two signs; offsets must not move
        lower = "".join(sign if len(sign.lower()) != 1 else sign.lower() for sign in batch.joined)

    def having(*phrases: str) -> np.ndarray:
        marked = np.zeros(len(filled), bool)
        for phrase in phrases:
            if phrase in lower:
                marked[np.searchsorted(batch.line_from, _places(lower, phrase), "right") - 1] = True
        return marked

    number = np.where(chinese, np.diff(batch.line_words), batch.line_runs)
    kept = filled & (number >= np.where(chinese, lines.min_tokens_zh, lines.min_words))
    kept &= chinese | (batch.line_longest <= lines.max_word_length)  # Chinese has no spaces
    if lines.terminal_punctuation:
        kept &= (batch.terminal | batch.quoted) & ~batch.ellipsis
    lorem = kept & having("lorem ipsum")
    if lines.javascript:
        kept &= ~having("javascript")
    curly = kept & having("{")
    if lines.policy:
        kept &= ~(having(*_POLICY) | (chinese & having(*_POLICY_ZH)))
    return kept, lorem, curly


def _sentences(batch: Batch) -> np.ndarray:
    """Sentences of each line, int64 [L]: one, and one more wherever a word follows a stop (spaCy's sentencizer)."""
    count = np.diff(batch.line_words)
    word = np.flatnonzero(~batch.punct & ~batch.stop)
    stops = np.concatenate(([0], np.cumsum(batch.stop)))[word]
    line = np.repeat(np.arange(len(count)), count)[word]
    begins = (stops[1:] > stops[:-1]) & (line[1:] == line[:-1])
    # What stands before a line's first word are quotes and the like; stops there begin a sentence too, as in `...!
    # Well`.
    head = np.concatenate(([True], line[1:] != line[:-1]))[: len(line)]
    early = stops[head] > np.concatenate(([0], np.cumsum(batch.stop)))[batch.line_words[line[head]]]
    return (
        (count > 0)
        + np.bincount(line[1:][begins], minlength=len(count))
        + np.bincount(line[head][early], minlength=len(count))
    )


def _fineweb(batch: Batch, kept: np.ndarray, short: np.ndarray) -> dict[str, np.ndarray]:
    """FineWeb's own three rules, and the share of newlines, over the lines that are left."""
    line = np.flatnonzero(kept)
    length = (batch.line_last - batch.line_first)[line]
    bounds = np.searchsorted(line, batch.lines)
    owner = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    number, characters = np.diff(bounds), per(length, bounds)
    words = per(np.diff(batch.line_words) * kept, batch.lines)
    again = _again(batch.line_hash[line], owner)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "line_punctuation": per(batch.terminal[line], bounds) / number,
            "short_lines": per(length <= short[line], bounds) / number,
            "dup_kept_chars": per(again * length, bounds) / characters,
            "newlines": np.maximum(0, number - 1) / words,
        }


# ---- words -----------------------------------------------------------------------------------------------------------


def _stop_words(batch: Batch, chinese: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many different stop words of its language a text has, and how many in all, int64 [N]."""
    found, hits = np.zeros((2, len(chinese)), np.int64), np.zeros((2, len(chinese)), np.int64)
    for row, listed in enumerate((STOP_WORDS, STOP_SIGNS)):
        if chinese.all() if row == 0 else not chinese.any():
            continue
        known = np.sort(word_hashes(listed))
        at = np.searchsorted(known, batch.hash)
        hit = np.flatnonzero(known[np.minimum(at, len(known) - 1)] == batch.hash)
        owner = np.searchsorted(batch.words, hit, "right") - 1
        hits[row] = np.bincount(owner, minlength=len(chinese))
        pairs = np.unique(owner * len(listed) + at[hit])
        found[row] = np.bincount(pairs // len(listed), minlength=len(chinese))
    return np.where(chinese, found[1], found[0]), np.where(chinese, hits[1], hits[0])


def _grams(batch: Batch, size: np.ndarray) -> dict[str, np.ndarray]:
    """Gopher's repetition of n-grams: share of characters in the most frequent one (n = 2, 3, 4), and in those that
    came before (n = 5 to 10)."""
    number = len(size)
    owner = np.repeat(np.arange(number), np.diff(batch.words))
    lengths = np.concatenate(([0], np.cumsum(batch.length)))
    ends = batch.words[1:][owner] if len(owner) else owner
    salt = mixed(owner.astype(np.uint64) + np.uint64(1))
    found = {}
    rolled = batch.hash
    # An n-gram can stand twice only where both of its (n-1)-grams do, so each round sorts only what the one before left
    # over.
    position = np.arange(len(owner))
    for n in range(2, DUPLICATE[-1] + 1):
        position = position[position + n <= ends[position]]
        rolled = (
            rolled[: len(rolled) - 1] * np.uint64(0x9E3779B97F4A7C15) + batch.hash[n - 1 :] if len(rolled) else rolled
        )
        first, count, member, group = _groups(
            rolled[position] ^ salt[position] if len(position) else np.zeros(0, np.uint64), position
        )
        if n in TOP:
            found[f"top_{n}_gram"] = _top(batch, n, first, count, owner, lengths) / size
        else:
            found[f"dup_{n}_grams"] = _duplicated(n, member, group, owner, lengths, number) / size
        inside = np.zeros(len(owner) + 1, bool)
        inside[member] = True
        position = member[inside[member + 1]]
    return found


def _groups(keys: np.ndarray, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Equal keys: first position and size of each group of two and more, and positions with their group's number, in
    order of position.

    Key and place are sorted as one number, which numpy does several times faster than an argsort; of the hash, 64 bits
    less those of the place remain (46 in a usual batch).
    """
    bits = np.uint64(max(1, len(keys)).bit_length())
    packed = np.sort((mixed(keys) >> bits << bits) | np.arange(len(keys), dtype=np.uint64))
    same = (packed[1:] >> bits) == (packed[:-1] >> bits)
    several = np.zeros(len(packed), bool)
    several[1:] |= same
    several[:-1] |= same
    packed = packed[several]
    place = (packed & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    starts = np.concatenate(([True], (packed[1:] >> bits) != (packed[:-1] >> bits)))[: len(packed)]
    group = np.cumsum(starts) - 1
    head = np.flatnonzero(starts)
    where = position[place]
    order = np.argsort(where)
    return where[head], np.diff(np.concatenate((head, [len(packed)]))), where[order], group[order]


def _top(
    batch: Batch, n: int, first: np.ndarray, count: np.ndarray, owner: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Characters, with the spaces between, of the most frequent n-gram; of several, of the one that comes first."""
    number = len(batch.words) - 1
    begin = batch.words[:-1]
    chosen = np.where(batch.words[1:] - begin >= n, begin, -1)  # where nothing stands twice, the first
    times = np.ones(number, np.int64)
    if len(first):
        order = np.lexsort((first, -count, owner[first]))
        texts = owner[first[order]]
        best = order[np.concatenate(([True], texts[1:] != texts[:-1]))]
        chosen[owner[first[best]]], times[owner[first[best]]] = first[best], count[best]
    at = np.maximum(chosen, 0)
    at = np.minimum(at, max(0, len(lengths) - 1 - n))
    return np.where(chosen >= 0, times * (lengths[np.minimum(at + n, len(lengths) - 1)] - lengths[at] + n - 1), 0)


def _duplicated(
    n: int, member: np.ndarray, group: np.ndarray, owner: np.ndarray, lengths: np.ndarray, number: int
) -> np.ndarray:
    """Characters in n-grams that came before, read from left to right and jumping over each that is found, so that no
    character counts twice (Gopher's rule, datatrove's code).

    The walk is sequential, and goes only over n-grams that stand in the text more than once.
    """
    total = np.zeros(number, np.int64)
    free, seen, places = 0, set(), []
    for place, kind in zip(member.tolist(), group.tolist(), strict=True):
        if place >= free:
            if kind in seen:
                places.append(place)
                free = place + n
            else:
                seen.add(kind)
    if places:
        place = np.array(places)
        np.add.at(total, owner[place], lengths[place + n] - lengths[place])
    return total
