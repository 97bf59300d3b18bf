"""The one normal form of text on the data side, and a scan of a batch that says which texts may not be in it."""

import functools
import re
import unicodedata

import numpy as np

from pipeline.data.cleaning.characters import CODE_POINTS, as_text
from pipeline.data.cleaning.garbled_text import CONTINUATION, GARBAGE

_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# C1 controls that are Windows-1252 decoded as Latin-1, as browsers read them (HTML, numeric character references): the
# apostrophe of "it\x92s". U+0085 is a newline.
_WINDOWS = {point: bytes([point]).decode("cp1252", "ignore") for point in range(0x80, 0xA0) if point != 0x85}
# The other controls except tab and newline, DEL, the byte order mark, noncharacters: nothing that a reader would miss.
# Zero-width joiners stay: emoji and Indic scripts need them.
_DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]+")
_SPACES = re.compile("[ \t\u00a0\u3000]+\n")
_BLANK_LINES = re.compile("\n{3,}")
_RARE_CHARACTERS = re.compile("[\r\x0b\x0c\x85\u2028\u2029\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")

# Flags of a text, which `scan` finds for a batch at once, so that few texts are searched one by one: newlines or
# controls to change; perhaps not NFC; space before a newline; perhaps garbled (see garbled_share); three newlines.
RARE, LOOSE, TRAILING, SUSPECT, BLANK = 1, 2, 4, 8, 16
# Flags of a character, besides those.
_LEAD, _CONTINUATION, _SPACE = 16, 32, 64
_NEWLINE = 128  # of \n and nothing else


def normalise(text: str, flags: int = RARE | LOOSE | TRAILING | BLANK) -> str:
    """NFC, newlines as \\n, no control characters (C1 controls become the signs of Windows-1252), no spaces at line
    ends, at most one blank line in a row, none at either end. Idempotent.

    NFC and not NFKC: full-width punctuation is how Chinese is written, and superscripts carry meaning. `flags` is what
    `scan` says about the text.
    """
    if flags & RARE and _RARE_CHARACTERS.search(text):
        text = _DROPPED.sub("", _NEWLINES.sub("\n", text).translate(_WINDOWS))
    if flags & (RARE | LOOSE) and not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if flags & (RARE | LOOSE | TRAILING) and (
        " \n" in text or "\t\n" in text or "\u00a0\n" in text or "\u3000\n" in text
    ):
        text = _SPACES.sub("\n", text)
    if flags & (RARE | TRAILING | BLANK) and "\n\n\n" in text:
        text = _BLANK_LINES.sub("\n\n", text)
    return text.strip(" \t\n\u00a0")


def scan(texts: list[str], codes: np.ndarray) -> list[int]:
    """Flags (RARE, LOOSE, TRAILING, SUSPECT, BLANK) of each text; a clean one has none. `codes`: their code_points."""
    if not texts:
        return []
    table = _character_flags()
    ends = np.cumsum([len(text) + 1 for text in texts])
    flags = np.zeros(len(texts), np.uint8)
    # the code points between these have no flag, so most characters of most texts are skipped
    places = np.flatnonzero((codes < 32) | (codes > 126))
    place_flags = table.take(codes[places])
    place_flags[np.searchsorted(places, ends - 1)] = 0  # separators

    def note(places: np.ndarray, flag: int) -> None:
        np.bitwise_or.at(flags, np.searchsorted(ends, places, side="right"), np.uint8(flag))

    for flag in (RARE, LOOSE, SUSPECT):
        note(places[place_flags & flag != 0], flag)
    lead = places[place_flags & _LEAD != 0]
    note(lead[table.take(codes[lead + 1]) & _CONTINUATION != 0], SUSPECT)  # each text is followed by a separator
    newline = places[place_flags == _NEWLINE]
    # for a newline that begins the batch this looks at the last separator
    note(newline[table.take(codes[newline - 1]) & _SPACE != 0], TRAILING)
    note(newline[2:][newline[2:] - newline[:-2] == 2], BLANK)
    return flags.tolist()


@functools.cache
def _character_flags() -> np.ndarray:
    """The flags of each code point, uint8 [0x110000]."""
    # Han and Hangul syllables, two thirds of all, have no flag but for the three below.
    every = as_text(np.concatenate((np.arange(0x3400), np.arange(0xA000, 0xAC00), np.arange(0xE000, 0x10000))))
    table = np.zeros(CODE_POINTS, np.uint8)
    for pattern, flag in (
        (_RARE_CHARACTERS, RARE),
        (GARBAGE, SUSPECT),
        (re.compile("[\u00c2-\u00f4]"), _LEAD),
        (re.compile(CONTINUATION), _CONTINUATION),
    ):
        _set_flag(table, pattern.findall(every), flag)
    _set_flag(table, "锟烫屯", SUSPECT)
    _set_flag(table, " \t\u00a0\u3000", _SPACE)
    # NFC may change characters that decompose, that combine with the one before them (a combining class, or second in
    # a composition), and jamo (UAX 15).
    decompositions = [text.split() for text in map(unicodedata.decomposition, every) if text and text[0] != "<"]
    seconds = [int(points[1], 16) for points in decompositions if len(points) > 1]
    _set_flag(table, [chr(point) for point in seconds if point < 0x10000], LOOSE)
    changes = [c for c in every if unicodedata.combining(c) or not unicodedata.is_normalized("NFC", c)]
    _set_flag(table, changes, LOOSE)
    table[0x1100:0x1200] |= np.uint8(LOOSE)
    table[0x10000:] |= np.uint8(LOOSE)
    table[10] = _NEWLINE
    return table


def _set_flag(table: np.ndarray, characters, flag: int) -> None:
    table[[ord(character) for character in characters]] |= np.uint8(flag)
