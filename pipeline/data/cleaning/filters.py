"""Basic filters: which documents are not text worth training on. Few rules, each with one number that is right for
English and for Chinese.

Thresholds of web pipelines (Gopher: Rae et al., 2021, table A1; C4: Raffel et al., 2020; FineWeb: Penedo et al., 2024)
count words, and with their defaults nearly all Chinese is rejected: words of under two characters fail Gopher's mean
word length, short lines fail FineWeb's line rule. The rules here count tokens (a CJK character, or a word) and
characters by class. docs/clean.md has measurements on clean text.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.data.cleaning.garbled_text import garbled_share

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

    from pipeline.data.cleaning.token_hashes import Shingles, Tokens


class Filters(Strict):
    """Documents outside these bounds are dropped, each with the name of the rule as the reason. To turn a rule off,
    give the bound that no document crosses (0, or 1 for a share, which is then not measured)."""

    min_tokens: int = Field(20, ge=1)
    """too_short: fewer tokens than this. Gopher requires 50 words of a web page; 20 keeps definitions, reviews and
    short poems, in both languages."""
    min_letters: float = Field(0.5, ge=0, le=1)
    """few_letters: share of letters (CJK characters are letters) among the characters that are not white space.
    English and Chinese prose have 0.8 to 0.97, tables of numbers far less."""
    max_garbled: float = Field(0.005, ge=0, le=1)
    """garbled: share of replacement, control and private-use characters and of mojibake such as `Ã©`, `â€™`, `锟斤拷`,
    measured before normalising."""
    max_mean_word: float = Field(15, ge=1)
    """long_words: mean length of words outside CJK, where most letters are outside CJK.
    Gopher allows 10 for English; 15 leaves room for compounds and links, base64 and hex dumps have far more."""
    max_repeated_lines: float = Field(0.3, ge=0, le=1)
    """repeated_lines: share of characters in lines that occurred earlier in the document (Gopher: 0.2; a song's
    refrain stays below 0.3)."""
    max_repeated_shingles: float = Field(0.3, ge=0, le=1)
    """repeated_ngrams: share of runs of five tokens that occurred earlier in the document (Gopher: 0.15 of the
    characters in repeated 5-grams of words)."""

    def bound(self, key: str) -> float | None:
        """The bound of a rule; None if it is off and not measured: the shares that take time, at a bound of 1."""
        value = getattr(self, key)
        is_costly = key in ("max_garbled", "max_repeated_lines", "max_repeated_shingles")
        return None if is_costly and value >= 1 else value


@dataclass(frozen=True)
class BasicRule:
    reason: str
    key: str  # of Filters

    @property
    def is_upper(self) -> bool:
        return self.key.startswith("max_")


# In the order in which the first failure gives the reason.
BASIC_RULES = (
    BasicRule("garbled", "max_garbled"),
    BasicRule("too_short", "min_tokens"),
    BasicRule("few_letters", "min_letters"),
    BasicRule("long_words", "max_mean_word"),
    BasicRule("repeated_lines", "max_repeated_lines"),
    BasicRule("repeated_ngrams", "max_repeated_shingles"),
)


def measure(
    raw: list[str], texts: list[str], tokens: "Tokens", shingles: "Shingles", flags: list[int], filters: Filters
) -> "np.ndarray":
    """The statistic of each of BASIC_RULES, float64 [N, 6], NaN where it is not measured. `raw` is before and `texts`
    after normalising, `flags` what normal_form.scan returns for `raw`; tokens and shingles are those of `texts`."""
    import numpy as np

    from pipeline.data.cleaning.characters import CJK, DIGIT, LETTER, SYMBOL
    from pipeline.data.cleaning.normal_form import SUSPECT

    counts = tokens.counts
    visible = np.maximum(1, counts[:, [LETTER, DIGIT, CJK, SYMBOL]].sum(1))
    in_words = counts[:, LETTER] + counts[:, DIGIT]
    mean_word = in_words / np.maximum(1, tokens.words)
    statistics = {
        "min_tokens": np.diff(tokens.starts),
        "min_letters": (counts[:, LETTER] + counts[:, CJK]) / visible,
        "max_mean_word": np.where(in_words > counts[:, CJK], mean_word, 0),
    }
    if filters.bound("max_garbled") is not None:
        statistics["max_garbled"] = np.array(
            [garbled_share(text) if flag & SUSPECT else 0.0 for text, flag in zip(raw, flags, strict=True)]
        )
    if filters.bound("max_repeated_lines") is not None:
        statistics["max_repeated_lines"] = np.array(list(map(_repeated_line_share, texts)))
    if filters.bound("max_repeated_shingles") is not None:
        statistics["max_repeated_shingles"] = _repeated_shingle_share(*shingles)
    not_measured = np.full(len(texts), np.nan)
    return np.stack([statistics.get(rule.key, not_measured) for rule in BASIC_RULES], axis=1)


def _repeated_line_share(text: str) -> float:
    """Share of characters in lines that occurred earlier in the text."""
    if "\n" not in text:
        return 0.0
    lines = [line.strip() for line in text.split("\n")]
    unique = set(lines)
    total = sum(map(len, lines))
    if len(unique) == len(lines) or not total:
        return 0.0
    return (total - sum(map(len, unique))) / total


def _repeated_shingle_share(hashes: "np.ndarray", starts: "np.ndarray") -> "np.ndarray":
    """Share of each text's shingles that occurred earlier in it, float [N]."""
    import numpy as np

    sizes = np.diff(starts)
    # The text's number in the bits above the upper 44 of the hash: keys are equal only within a text, and are sorted
    # without an index, which is three times faster. Two different shingles of a text of 100,000 tokens agree in 44 bits
    # in 3 of 10,000 such texts.
    keys = np.repeat(np.arange(len(sizes), dtype=np.uint64) << np.uint64(44), sizes) | hashes >> np.uint64(20)
    keys.sort()
    repeated = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(44)
    return np.bincount(repeated.astype(np.int64), minlength=len(sizes)) / np.maximum(1, sizes)
