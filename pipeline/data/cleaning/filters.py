"""Which documents are no text worth learning from. Few rules, each with one number, right for English and Chinese with
the same number.

Thresholds of web pipelines (Gopher: Rae et al., 2021, table A1; C4: Raffel et al., 2020; FineWeb: Penedo et al., 2024)
count words, and with their defaults nearly all Chinese goes: words of under two characters fail Gopher's mean word
length, short lines fail FineWeb's line rule. The rules here count tokens (a CJK character, or a word) and characters by
class. docs/clean.md gives what they do on clean text.
"""

import re
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.core.config import Strict

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.cleaning.text_arrays import Tokens

# Characters that stand in clean text by accident only: replacement characters, controls, private use, noncharacters.
GARBAGE = re.compile("[\ufffd\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\ufffe\uffff]")
# UTF-8 read as Latin-1 or Windows-1252: a lead byte's letter before a continuation byte's sign; and UTF-8 read as GBK
# ("锟斤拷" is U+FFFD twice).
CONTINUATION = (
    "[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u2039\u0152\u2018-\u201d\u2022"
    "\u2122\u203a\u0153]"
)
MOJIBAKE = re.compile(f"[\u00c2-\u00f4]{CONTINUATION}{{1,3}}|锟斤拷|烫烫烫|屯屯屯")


class Filters(Strict):
    """Documents outside these bounds are left out, each under the name of the rule. A rule is turned off with the
    bound that nothing crosses (0, or 1 for a share, which is then not measured)."""

    min_tokens: int = Field(20, ge=1)
    """too_short: fewer tokens than this. Gopher asks for 50 words of a web page; 20 keeps definitions, reviews and
    short poems, in both languages."""
    min_letters: float = Field(0.5, ge=0, le=1)
    """few_letters: share of letters (CJK characters are letters) among what is not space.
    English and Chinese prose have 0.8 to 0.97, tables of numbers far less."""
    max_garbled: float = Field(0.005, ge=0, le=1)
    """garbled: share of replacement, control and private-use characters and of mojibake such as `Ã©`, `â€™`, `锟斤拷`,
    measured before normalising."""
    max_mean_word: float = Field(15, ge=1)
    """long_words: mean length of words outside CJK, where most letters are outside CJK. 
    Gopher allows 10 for English; 15 leaves room for compounds and links, base64 and hex dumps have far more."""
    max_repeated_lines: float = Field(0.3, ge=0, le=1)
    """repeated_lines: share of characters in lines that stood in the document before (Gopher: 0.2; a song's refrain
    stays below 0.3)."""
    max_repeated_shingles: float = Field(0.3, ge=0, le=1)
    """repeated_ngrams: share of runs of five tokens that stood in the document before (Gopher: 0.15 of the
    characters in repeated 5-grams of words)."""


# (reason, key of Filters, is an upper bound) of each rule, in the order in which the first failure gives the reason.
BASIC = (
    ("garbled", "max_garbled", True),
    ("too_short", "min_tokens", False),
    ("few_letters", "min_letters", False),
    ("long_words", "max_mean_word", True),
    ("repeated_lines", "max_repeated_lines", True),
    ("repeated_ngrams", "max_repeated_shingles", True),
)


def measured(filters: Filters, key: str) -> bool:
    """Whether a rule is measured: not the shares that cost time, where no share can be above their bound."""
    return key not in ("max_garbled", "max_repeated_lines", "max_repeated_shingles") or getattr(filters, key) < 1


def measure(
    raw: list[str],
    texts: list[str],
    tokens: "Tokens",
    shingles: "tuple[np.ndarray, np.ndarray]",
    look: list[int],
    filters: Filters,
) -> "np.ndarray":
    """What each rule of BASIC looks at, float64 [N, 6], NaN where it is off. `raw` is before and `texts` after
    normalising, `look` what text.looks says of `raw`; tokens and shingles are those of `texts`."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import CJK, DIGIT, LETTER, SUSPECT, SYMBOL

    visible = np.maximum(1, tokens.counts[:, [LETTER, DIGIT, CJK, SYMBOL]].sum(1))
    letters = tokens.counts[:, LETTER] + tokens.counts[:, CJK]
    in_words = tokens.counts[:, LETTER] + tokens.counts[:, DIGIT]
    found = np.full((len(texts), len(BASIC)), np.nan)
    if measured(filters, "max_garbled"):
        found[:, 0] = [garbled(text) if mark & SUSPECT else 0.0 for text, mark in zip(raw, look, strict=True)]
    found[:, 1] = np.diff(tokens.starts)
    found[:, 2] = letters / visible
    found[:, 3] = np.where(in_words > tokens.counts[:, CJK], in_words / np.maximum(1, tokens.words), 0)
    if measured(filters, "max_repeated_lines"):
        found[:, 4] = list(map(repeated_lines, texts))
    if measured(filters, "max_repeated_shingles"):
        found[:, 5] = _repeated(*shingles)
    return found


def garbled(text: str) -> float:
    """Share of characters that are garbage or mojibake."""
    if text.isascii() and text.isprintable():
        return 0.0
    bad = sum(map(len, GARBAGE.findall(text)))
    if not text.isascii():
        bad += sum(map(len, MOJIBAKE.findall(text)))
    if bad == 1:  # one stray sign, such as a page's only damaged byte, is let pass in a short text too
        return 0.0
    return min(1.0, bad / max(1, len(text)))  # controls within mojibake are found by both expressions


def repeated_lines(text: str) -> float:
    """Share of characters in lines that stood in the text before."""
    if "\n" not in text:
        return 0.0
    lines = [line.strip() for line in text.split("\n")]
    unique = set(lines)
    total = sum(map(len, lines))
    return 0.0 if len(unique) == len(lines) or not total else (total - sum(map(len, unique))) / total


def _repeated(hashes: "np.ndarray", starts: "np.ndarray") -> "np.ndarray":
    """Share of each text's shingles that stood in it before, float [N]."""
    import numpy as np

    sizes = np.diff(starts)
    # A text's number above the upper 44 bits of the hash: equal only within a text, and sorted without an index, which
    # is three times faster. That two different shingles of a text of 100,000 agree in 44 bits is expected 3 times in
    # 10,000 such texts.
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(44), sizes) | hashes >> np.uint64(20)
    keys.sort()
    again = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(44)
    return np.bincount(again.astype(np.int64), minlength=len(sizes)) / np.maximum(1, sizes)
