"""The words that byte-level BPE is trained on, counted: cl100k's split, found for millions of characters at once.

A regular expression engine finds these words at 4 MB a CPU-second; here the boundaries follow from the classes of
neighbouring characters, in numpy, and pyarrow counts the words (docs/log.md). test_bpe_merges.py compares the
boundaries with the expression itself on arbitrary text.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

# cl100k_base's split (tiktoken) in the form that Llama 3 and Qwen 2 publish; only the number of digits in a word is
# ours to choose.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# BLANK: white space that is neither a newline nor the space; END: between two documents
OTHER, LETTER, NUMBER, NEWLINE, SPACE, BLANK, END = range(7)
STARTS, STARTS_BEFORE, AFTER_SIGN, TAKEN = 1, 2, 4, 8
CHUNK = 2_000_000  # characters looked at together
MERGE_AT = 4_000_000  # counted words held before equal ones are brought together


def pattern(split_digits: bool, merge_whitespace: bool = True) -> str:
    """The expression of a recipe's choices. Without `merge_whitespace` each character of white space is a word, or
    begins one."""
    whole = PATTERN.replace("DIGITS", "" if split_digits else "{1,3}")
    return whole if merge_whitespace else whole.replace(r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", r"|\s")


@functools.cache
def classes() -> np.ndarray:
    """Class of each code point, uint8 [0x110000], asked of the engine that encodes: its Unicode version counts, not
    Python's."""
    import tiktoken

    table = np.full(0x110000, OTHER, np.uint8)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    for expression, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", BLANK)):
        engine = tiktoken.Encoding(
            "classes",
            pat_str=expression,
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )
        matching = bytes(engine.encode_ordinary(text)).decode()  # what does not match is left out
        table[np.frombuffer(matching.encode("utf-32-le"), np.uint32)] = kind
    table[ord(" ")] = SPACE
    table[[10, 13]] = NEWLINE
    return table


@functools.cache
def _pairs() -> np.ndarray:
    """What two neighbours say about boundaries, uint8 [64], index 8 * left + right."""
    table = np.zeros(64, np.uint8)
    white = (NEWLINE, SPACE, BLANK)
    for left in range(7):
        for right in range(7):
            flag = 0
            if END in (left, right):
                flag |= STARTS
            elif right == LETTER:
                # [^\r\n\p{L}\p{N}]?\p{L}+
                flag |= STARTS if left in (NEWLINE, NUMBER) else AFTER_SIGN if left == OTHER else 0
            elif right == OTHER:
                flag |= STARTS if left not in (OTHER, SPACE) else 0  # " ?[^\s\p{L}\p{N}]+"
            elif right == NUMBER:
                flag |= STARTS if left != NUMBER else 0
            elif left not in white and not (left == OTHER and right == NEWLINE):  # signs take the newlines behind them
                flag |= STARTS
            if left in (SPACE, BLANK) and right in (LETTER, OTHER, NUMBER):
                flag |= STARTS_BEFORE  # \s+(?!\S) leaves the last one
            if right == OTHER and left in (OTHER, SPACE):
                flag |= TAKEN  # this sign stands in a run of signs and cannot begin a word of letters
            table[8 * left + right] = flag
    return table


def starts(kinds: np.ndarray, codes: np.ndarray, split_digits: bool, merge_whitespace: bool) -> np.ndarray:
    """Where words begin, bool [n], for classes `kinds` and code points `codes` of documents that each end with an
    END."""
    flags = _pairs().take((kinds[:-1] << 3) | kinds[1:])  # of (i, i + 1)
    found = np.empty(len(kinds), bool)
    found[0] = True
    found[1:] = flags & STARTS
    found[:-1] |= (flags & STARTS_BEFORE) != 0
    after_sign = (flags & AFTER_SIGN) != 0
    found[2:] |= after_sign[1:] & ((flags[:-1] & TAKEN) != 0)
    if split_digits:
        found |= kinds == NUMBER
    else:
        _threes(found, np.flatnonzero(kinds == NUMBER))
    if merge_whitespace:
        _newlines(found, kinds)
    else:
        found |= (kinds >= NEWLINE) & (kinds <= BLANK)
    # Contractions: an apostrophe that is not TAKEN, before letters. "'sample" is 's and ample.
    marks = np.flatnonzero(codes == 39)
    # the text ends with END, and begins with one
    marks = marks[(marks > 0) & (marks < len(kinds) - 3)] if len(marks) else marks
    if len(marks):
        marks = marks[after_sign[marks] & ((flags[marks - 1] & TAKEN) == 0)]
        first, second = (np.where(codes[marks + n] < 128, codes[marks + n] | 32, codes[marks + n]) for n in (1, 2))
        one = np.isin(first, [ord(letter) for letter in "stmd"] + [0x17F])  # U+017F is an s to (?i:)
        two = ((first == ord("r")) | (first == ord("v"))) & (second == ord("e")) | (first == ord("l")) & (
            second == ord("l")
        )
        behind = np.concatenate([marks[one] + 2, marks[two] + 3])
        found[behind[kinds[behind] == LETTER]] = True
    return found


def _threes(found: np.ndarray, at: np.ndarray) -> None:
    """Every third digit of a run begins a word."""
    if len(at):
        order = np.arange(len(at))
        first = np.concatenate(([True], np.diff(at) != 1))
        found[at[(order - np.maximum.accumulate(np.where(first, order, 0))) % 3 == 0]] = True


def _newlines(found: np.ndarray, kinds: np.ndarray) -> None:
    """White space behind newlines begins a word if no newline follows in the same run (\\s*[\\r\\n]+ goes to the
    last), or if signs before took the newlines."""
    at = np.flatnonzero(kinds == NEWLINE)
    if not len(at):
        return
    last = at[(kinds[at + 1] == SPACE) | (kinds[at + 1] == BLANK)]  # the text ends with END
    if not len(last):
        return
    order = np.arange(len(at))
    first = np.concatenate(([True], np.diff(at) != 1))
    where = np.searchsorted(at, last)
    begin = at[np.maximum.accumulate(np.where(first, order, 0))[where]]
    absorbed = kinds[begin - 1] == OTHER  # the text begins with END
    white = (kinds >= NEWLINE) & (kinds <= BLANK)
    ends = np.flatnonzero(white[:-1] & ~white[1:])
    run_end = ends[np.searchsorted(ends, last)]
    following = np.append(at, len(kinds))[where + 1]
    found[last[absorbed | (following > run_end)] + 1] = True


def count(texts: Iterable[str], split_digits: bool, merge_whitespace: bool = True, advance=lambda size: None):
    """(words, counts): a pyarrow BinaryArray of all different words, and int64 how often each stands in the texts.
    `advance` is told of bytes that were read."""
    import pyarrow
    import pyarrow.compute

    held, size = [], 0

    def together(tables):
        table = pyarrow.concat_tables(tables)
        return table.group_by("word", use_threads=False).aggregate([("count", "sum")]).rename_columns(["word", "count"])

    for data, offsets, ends in _words(texts, split_digits, merge_whitespace):
        advance(len(data) - ends)
        words = pyarrow.BinaryArray.from_buffers(
            pyarrow.binary(), len(offsets) - 1, [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
        )
        found = pyarrow.compute.value_counts(words)
        table = pyarrow.table({"word": found.field("values"), "count": found.field("counts")})
        if ends:  # each END is a word "\0" of its own, with which the text's own are counted
            real = pyarrow.compute.subtract(
                table["count"], pyarrow.compute.if_else(pyarrow.compute.equal(table["word"], b"\0"), ends, 0)
            )
            table = table.set_column(1, "count", real).filter(pyarrow.compute.greater(real, 0))
        held.append(table)
        size += len(table)
        if size > MERGE_AT:
            held = [together(held)]
            size = 0
    if not held:
        return pyarrow.array([], pyarrow.binary()), np.zeros(0, np.int64)
    table = together(held).combine_chunks()
    return table["word"].combine_chunks(), table["count"].to_numpy().astype(np.int64)


def _words(texts: Iterable[str], *policy: bool) -> Iterator[tuple[bytes, np.ndarray, int]]:
    """(UTF-8 of several documents, int32 where each word begins and where the last ends, how many ENDs are among the
    words)."""
    held, size = [], 0
    for text in texts:
        held.append(text)
        size += len(text)
        if size >= CHUNK:
            yield _chunk(held, *policy)
            held, size = [], 0
    if held:
        yield _chunk(held, *policy)


def _chunk(texts: list[str], *policy: bool) -> tuple[bytes, np.ndarray, int]:
    joined = "\0" + "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    kinds = classes().take(codes)
    kinds[np.cumsum([0] + [len(text) + 1 for text in texts])] = END
    at = np.flatnonzero(starts(kinds, codes, *policy))
    data = joined.encode()
    if len(data) != len(codes):
        at = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)[at]
    return data, np.append(at, len(data)).astype(np.int32), len(texts) + 1
