"""The words that byte-level BPE is trained on, counted: cl100k's split, computed for millions of characters at once.

A regular expression engine finds these words at 4 MB per CPU-second. Here the boundaries follow from the classes of
neighbouring characters, in numpy, and pyarrow counts the words (docs/tokenizer.md, "Measured"). test_bpe_merges.py
compares the boundaries with the expression itself on arbitrary text.
"""

import functools
from collections.abc import Iterable, Iterator

import numpy as np

# cl100k_base's split (tiktoken) in the form that Llama 3 and Qwen 2 publish; only the number of digits in a word is
# configurable.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Classes of characters. SYMBOL: anything but letters, numbers and white space. BLANK: white space that is neither a
# newline nor the space. END: between two documents.
SYMBOL, LETTER, NUMBER, NEWLINE, SPACE, BLANK, END = range(7)
WHITE = (NEWLINE, SPACE, BLANK)
# What two neighbours say about boundaries, as bits: a word begins at the right one; a word begins at the left one; the
# right one is a letter after a symbol; the right one is in a run of symbols and cannot begin a word of letters.
BEGINS_RIGHT, BEGINS_LEFT, LETTER_AFTER_SYMBOL, IN_SYMBOLS = 1, 2, 4, 8
CHUNK = 2_000_000  # characters processed together
MERGE_AT = 4_000_000  # counted words in memory before equal ones are merged


def pattern(split_digits: bool, merge_whitespace: bool = True) -> str:
    """The expression for a recipe's keys. Without `merge_whitespace`, each character of white space is a word or begins
    one."""
    expression = PATTERN.replace("DIGITS", "" if split_digits else "{1,3}")
    if not merge_whitespace:
        expression = expression.replace(r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", r"|\s")
    return expression


@functools.cache
def classes() -> np.ndarray:
    """Class of each code point, uint8 [0x110000]. They come from the engine that encodes, because its Unicode version
    counts, not Python's."""
    import tiktoken

    table = np.full(0x110000, SYMBOL, np.uint8)
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    for expression, kind in ((r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", BLANK)):
        engine = tiktoken.Encoding(
            "classes",
            pat_str=expression,
            mergeable_ranks={bytes([byte]): byte for byte in range(256)},
            special_tokens={},
        )
        matching = bytes(engine.encode_ordinary(text)).decode()  # text that does not match is dropped
        table[np.frombuffer(matching.encode("utf-32-le"), np.uint32)] = kind
    table[ord(" ")] = SPACE
    table[[10, 13]] = NEWLINE
    return table


@functools.cache
def _flags_of_pairs() -> np.ndarray:
    """The flags of each pair of neighbouring classes, uint8 [64], index 8 * left + right."""
    table = np.zeros(64, np.uint8)
    for left in range(7):
        for right in range(7):
            table[8 * left + right] = _flags(left, right)
    return table


def _flags(left: int, right: int) -> int:
    flags = 0
    if END in (left, right):
        flags |= BEGINS_RIGHT
    elif right == LETTER:  # [^\r\n\p{L}\p{N}]?\p{L}+
        if left in (NEWLINE, NUMBER):
            flags |= BEGINS_RIGHT
        elif left == SYMBOL:
            flags |= LETTER_AFTER_SYMBOL
    elif right == SYMBOL:  # " ?[^\s\p{L}\p{N}]+"
        if left not in (SYMBOL, SPACE):
            flags |= BEGINS_RIGHT
    elif right == NUMBER:
        if left != NUMBER:
            flags |= BEGINS_RIGHT
    elif left not in WHITE and (left, right) != (SYMBOL, NEWLINE):  # symbols take the newlines after them
        flags |= BEGINS_RIGHT
    if left in (SPACE, BLANK) and right in (LETTER, SYMBOL, NUMBER):
        flags |= BEGINS_LEFT  # \s+(?!\S) leaves the last one
    if right == SYMBOL and left in (SYMBOL, SPACE):
        flags |= IN_SYMBOLS
    return flags


def word_begins(kinds: np.ndarray, codes: np.ndarray, split_digits: bool, merge_whitespace: bool) -> np.ndarray:
    """Where words begin, bool [characters], from the classes `kinds` and the code points `codes`. The text begins with
    an END, and each document ends with one."""
    flags = _flags_of_pairs().take((kinds[:-1] << 3) | kinds[1:])  # of characters i and i + 1
    letter_after_symbol = (flags & LETTER_AFTER_SYMBOL) != 0
    in_symbols = (flags & IN_SYMBOLS) != 0
    begins = np.empty(len(kinds), bool)
    begins[0] = True
    begins[1:] = flags & BEGINS_RIGHT
    begins[:-1] |= (flags & BEGINS_LEFT) != 0
    begins[2:] |= letter_after_symbol[1:] & in_symbols[:-1]
    if split_digits:
        begins |= kinds == NUMBER
    else:
        _begin_at_every_third_digit(begins, np.flatnonzero(kinds == NUMBER))
    if merge_whitespace:
        _begin_after_newlines(begins, kinds)
    else:
        begins |= (kinds >= NEWLINE) & (kinds <= BLANK)
    _begin_after_contractions(begins, kinds, codes, letter_after_symbol, in_symbols)
    return begins


def _place_in_run(positions: np.ndarray) -> np.ndarray:
    """For ascending positions: how many positions directly before it are in the same run."""
    order = np.arange(len(positions))
    return order - _first_of_run(positions)


def _first_of_run(positions: np.ndarray) -> np.ndarray:
    """For ascending positions: the index of the first position of its run of consecutive numbers."""
    order = np.arange(len(positions))
    is_first = np.concatenate(([True], np.diff(positions) != 1))
    return np.maximum.accumulate(np.where(is_first, order, 0))


def _begin_at_every_third_digit(begins: np.ndarray, digits: np.ndarray) -> None:
    if len(digits):
        begins[digits[_place_in_run(digits) % 3 == 0]] = True


def _begin_after_newlines(begins: np.ndarray, kinds: np.ndarray) -> None:
    """White space after newlines begins a word if no other newline follows in the same run (\\s*[\\r\\n]+ takes all up
    to the last one), or if symbols before took the newlines."""
    newlines = np.flatnonzero(kinds == NEWLINE)
    if not len(newlines):
        return
    # newlines before other white space; the text ends with END
    last = newlines[(kinds[newlines + 1] == SPACE) | (kinds[newlines + 1] == BLANK)]
    if not len(last):
        return
    index = np.searchsorted(newlines, last)
    first_newline = newlines[_first_of_run(newlines)[index]]
    after_symbols = kinds[first_newline - 1] == SYMBOL  # the text begins with END
    is_white = (kinds >= NEWLINE) & (kinds <= BLANK)
    white_ends = np.flatnonzero(is_white[:-1] & ~is_white[1:])
    end_of_run = white_ends[np.searchsorted(white_ends, last)]
    next_newline = np.append(newlines, len(kinds))[index + 1]
    begins[last[after_symbols | (next_newline > end_of_run)] + 1] = True


def _begin_after_contractions(
    begins: np.ndarray, kinds: np.ndarray, codes: np.ndarray, letter_after_symbol: np.ndarray, in_symbols: np.ndarray
) -> None:
    """A word begins after 's, 'll and the like if a letter follows: "'sample" is 's and ample. The apostrophe must not
    be in a run of symbols."""
    apostrophes = np.flatnonzero(codes == ord("'"))
    # the text begins and ends with END
    apostrophes = apostrophes[(apostrophes > 0) & (apostrophes < len(kinds) - 3)]
    if not len(apostrophes):
        return
    apostrophes = apostrophes[letter_after_symbol[apostrophes] & ~in_symbols[apostrophes - 1]]
    first, second = codes[apostrophes + 1], codes[apostrophes + 2]
    first = np.where(first < 128, first | 32, first)  # lower case
    second = np.where(second < 128, second | 32, second)
    one_letter = np.isin(first, [ord(letter) for letter in "stmd"] + [0x17F])  # U+017F is an s to (?i:)
    re_or_ve = ((first == ord("r")) | (first == ord("v"))) & (second == ord("e"))
    two_letters = re_or_ve | (first == ord("l")) & (second == ord("l"))
    after = np.concatenate([apostrophes[one_letter] + 2, apostrophes[two_letters] + 3])
    begins[after[kinds[after] == LETTER]] = True


def count(texts: Iterable[str], split_digits: bool, merge_whitespace: bool = True, advance=lambda size: None):
    """(words, counts): a pyarrow BinaryArray of all distinct words, and int64 how often each is in the texts. `advance`
    is called with the number of bytes after each chunk."""
    import pyarrow

    tables, num_words = [], 0
    for data, offsets, num_ends in _words(texts, split_digits, merge_whitespace):
        advance(len(data) - num_ends)
        table = _counted(data, offsets, num_ends)
        tables.append(table)
        num_words += len(table)
        if num_words > MERGE_AT:
            tables = [_merged(tables)]
            num_words = 0
    if not tables:
        return pyarrow.array([], pyarrow.binary()), np.zeros(0, np.int64)
    table = _merged(tables).combine_chunks()
    return table["word"].combine_chunks(), table["count"].to_numpy().astype(np.int64)


def _counted(data: bytes, offsets: np.ndarray, num_ends: int):
    """A pyarrow table of the distinct words of a chunk and their counts."""
    import pyarrow
    import pyarrow.compute

    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(data)]
    words = pyarrow.BinaryArray.from_buffers(pyarrow.binary(), len(offsets) - 1, buffers)
    counts = pyarrow.compute.value_counts(words)
    table = pyarrow.table({"word": counts.field("values"), "count": counts.field("counts")})
    # each END is a word "\0" of its own, and the text may have such words as well
    is_end = pyarrow.compute.equal(table["word"], b"\0")
    without_ends = pyarrow.compute.subtract(table["count"], pyarrow.compute.if_else(is_end, num_ends, 0))
    return table.set_column(1, "count", without_ends).filter(pyarrow.compute.greater(without_ends, 0))


def _merged(tables: list):
    """One table with each word once."""
    import pyarrow

    table = pyarrow.concat_tables(tables)
    return table.group_by("word", use_threads=False).aggregate([("count", "sum")]).rename_columns(["word", "count"])


def _words(texts: Iterable[str], *policy: bool) -> Iterator[tuple[bytes, np.ndarray, int]]:
    """(UTF-8 of several documents, int32 where each word begins and where the last one ends, how many of the words are
    ENDs)."""
    batch, num_characters = [], 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= CHUNK:
            yield _split(batch, *policy)
            batch, num_characters = [], 0
    if batch:
        yield _split(batch, *policy)


def _split(texts: list[str], *policy: bool) -> tuple[bytes, np.ndarray, int]:
    joined = "\0" + "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    kinds = classes().take(codes)
    lengths = [len(text) + 1 for text in texts]
    kinds[np.cumsum([0, *lengths])] = END
    begins = np.flatnonzero(word_begins(kinds, codes, *policy))
    data = joined.encode()
    if len(data) != len(codes):  # from characters to bytes
        first_bytes = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
        begins = first_bytes[begins]
    return data, np.append(begins, len(data)).astype(np.int32), len(texts) + 1
