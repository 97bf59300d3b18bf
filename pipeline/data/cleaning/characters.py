"""Code points of a batch of texts as one numpy array, their classes, and their lower case."""

import functools
import unicodedata

import numpy as np

SPACE, LETTER, DIGIT, CJK, SYMBOL = range(5)  # classes
CODE_POINTS = 0x110000


def code_points(texts: list[str]) -> np.ndarray:
    """Code points of texts, each followed by a 0: uint16, or uint32 if some are beyond the first plane."""
    joined = "\0".join(texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-16-le"), np.uint16)
    return codes if len(codes) == len(joined) else np.frombuffer(joined.encode("utf-32-le"), np.uint32)


def as_text(points: np.ndarray) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def character_classes() -> np.ndarray:
    """Class of each code point, uint8 [0x110000]."""
    table = np.full(CODE_POINTS, SYMBOL, np.uint8)
    # the code points between these are Han (planes 2 and 3) or unassigned
    points = np.concatenate((np.arange(0x20000), np.arange(0xE0100, 0xE01F0)))
    # the first letter of Lu, Nd, Zs, ...
    category = np.frombuffer("".join(map(unicodedata.category, as_text(points))).encode(), np.uint8)[::2]
    class_of = np.full(256, SYMBOL, np.uint8)
    for letters, character_class in ((b"LM", LETTER), (b"N", DIGIT), (b"Z", SPACE)):
        class_of[list(letters)] = character_class
    table[points] = class_of.take(category)
    table[[9, 10]] = SPACE
    # Han with extensions and compatibility forms, kana, bopomofo. Hangul is written with spaces, so its words are runs.
    small = ((0x3005, 0x3008), (0x3041, 0x3100), (0x3105, 0x3130), (0x31A0, 0x31C0), (0x31F0, 0x3200))
    for low, high in (*small, (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000)):
        table[low:high] = CJK
    table[0] = SPACE  # separates two texts of a batch
    return table


@functools.cache
def _lower_case_tables() -> tuple[np.ndarray, np.ndarray]:
    """Of each code point: its lower case, uint32 [0x110000], and the class of that, uint8. Look-ups are four times
    faster than str.lower."""
    lower = np.arange(CODE_POINTS, dtype=np.uint32)
    # without U+0130, which becomes two characters, and surrogates
    points = np.concatenate((np.arange(0x130), np.arange(0x131, 0xD800), np.arange(0xE000, 0x20000)))
    lower[points] = np.frombuffer(as_text(points).lower().encode("utf-32-le"), np.uint32)
    return lower, character_classes()[lower]


def lower_case_classes() -> np.ndarray:
    """Class of the lower case of each code point, uint8 [0x110000]."""
    return _lower_case_tables()[1]


def lower_and_classes(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower case, of the same dtype, and class (uint8) of code points. In most texts nearly all are ASCII, which cost
    a quarter of a look-up by index."""
    lower, classes = _lower_case_tables()
    beyond_ascii = np.flatnonzero(codes > 127)
    if 4 * len(beyond_ascii) > len(codes):
        return lower.take(codes).astype(codes.dtype), classes.take(codes)
    is_capital = (codes - codes.dtype.type(65)) < 26
    lowered = codes + (is_capital.astype(codes.dtype) << codes.dtype.type(5))
    class_of = np.frombuffer(bytearray(codes.astype(np.uint8)).translate(classes[:256].tobytes()), np.uint8)
    others = codes[beyond_ascii]
    lowered[beyond_ascii], class_of[beyond_ascii] = lower.take(others), classes.take(others)
    return lowered, class_of


def lower_specials(text: str) -> str:
    """The text in lower case if it has characters whose lower case is not one character that depends on nothing else:
    dotted I, and sigma, which differs at the end of a word. Otherwise the text itself."""
    return text.lower() if "\u0130" in text or "\u03a3" in text else text
