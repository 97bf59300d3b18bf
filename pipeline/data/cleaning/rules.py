"""The published quality rules as thresholds on statistics: Gopher, C4 and FineWeb, with the papers' values for English
and values fitted for Chinese.

    rules:
      use: [gopher_repetition, gopher_quality, c4, fineweb]
      en: {min_words: 30}          # one threshold changed
      zh: {max_top_2_gram: null}   # one rule off

Every rule is asked about every document, also behind one that has rejected it, so that the ledger can say how rules
overlap and what another threshold would have done.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from pipeline.core.config import Strict, idle
from pipeline.data.cleaning.filters import BASIC, Filters, measured

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

GROUPS = ("gopher_repetition", "gopher_quality", "c4", "fineweb")


class Thresholds(Strict):
    """Bounds of the rules for one language; null turns a rule off. The names say what is measured
    (pipeline/data/cleaning/text_statistics.py)."""

    # Gopher, repetition: Rae et al., 2021, table A1
    max_dup_paragraphs: float | None = 0.3
    """Share of paragraphs that stood in the document before."""
    max_dup_paragraph_chars: float | None = 0.2
    """Share of characters in such paragraphs."""
    max_dup_lines: float | None = 0.3
    """Share of lines that stood in the document before."""
    max_dup_line_chars: float | None = 0.2
    """Share of characters in such lines."""
    max_top_2_gram: float | None = 0.20
    """Share of characters in the most frequent run of two words."""
    max_top_3_gram: float | None = 0.18
    """The same for three words."""
    max_top_4_gram: float | None = 0.16
    """The same for four words."""
    max_dup_5_grams: float | None = 0.15
    """Share of characters in runs of five words that stood in the document before."""
    max_dup_6_grams: float | None = 0.14
    """The same for six words."""
    max_dup_7_grams: float | None = 0.13
    """The same for seven words."""
    max_dup_8_grams: float | None = 0.12
    """The same for eight words."""
    max_dup_9_grams: float | None = 0.11
    """The same for nine words."""
    max_dup_10_grams: float | None = 0.10
    """The same for ten words."""
    # Gopher, quality: Rae et al., 2021, section A1.1
    min_words: float | None = 50
    """Words without signs of punctuation; in Chinese, characters."""
    max_words: float | None = 100_000
    """The most of them."""
    min_mean_word: float | None = 3
    """Mean length of words (without CJK characters)."""
    max_mean_word: float | None = 10
    """The most of it."""
    max_hashes: float | None = 0.1
    """Signs # for each word."""
    max_ellipses: float | None = 0.1
    """Ellipses for each word."""
    max_bullet_lines: float | None = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alpha_words: float | None = 0.8
    """Share of words, signs of punctuation among them, that have a letter."""
    min_stop_words: float | None = 2
    """Different words among the, be, to, of, and, that, have, with; in Chinese, among 22 of the commonest
    characters."""
    min_stop_share: float | None = None
    """Share of words that are of these. Off in English, where no paper has it; in Chinese it is what tells prose
    from strings of key words."""
    # C4: Raffel et al., 2020, section 2.2
    max_lorem_ipsum: float | None = 0
    """Lines with `lorem ipsum`."""
    max_curly_brackets: float | None = 0
    """Lines with a {."""
    min_sentences: float | None = 5
    """Sentences in the lines that are left."""
    # FineWeb: Penedo et al., 2024, section 3.6
    min_line_punctuation: float | None = 0.12
    """Share of lines that end with a mark of the end of a sentence; in Chinese and Japanese quotes and brackets may
    close behind it, and an ellipsis is one."""
    max_short_lines: float | None = 0.67
    """Share of lines of at most `short_line` characters."""
    max_dup_kept_chars: float | None = 0.01
    """Share of characters in lines that stood before, among the lines that are left."""
    max_newlines: float | None = 0.3
    """Newlines for each word."""
    short_line: int = Field(30, ge=0)
    """Characters of a short line."""


class Chinese(Thresholds):
    """Where Chinese differs: fitted on 1,832 clean documents (manuals, answers, reviews, a novel), see
    docs/clean.md. A character is a word here."""

    max_top_2_gram: float | None = 0.2
    """Two characters are about one word; clean text has 0.06 in the median, 0.20 at the 99th percentile."""
    max_top_3_gram: float | None = 0.2
    """Clean text: 0.05 in the median, 0.15 at the 95th percentile."""
    max_top_4_gram: float | None = 0.2
    """Four characters are about two words, so this is what `max_top_2_gram` is in English."""
    max_dup_5_grams: float | None = 0.3
    """Five characters are three words: repetition is far more common. Clean text: 0.03 in the median, 0.29 at the
    99th percentile."""
    max_dup_6_grams: float | None = 0.28
    """Clean text: 0.25 at the 99th percentile."""
    max_dup_7_grams: float | None = 0.26
    """Clean text: 0.24 at the 99th percentile."""
    max_dup_8_grams: float | None = 0.24
    """Clean text: 0.23 at the 99th percentile."""
    max_dup_9_grams: float | None = 0.22
    """Clean text: 0.20 at the 99th percentile."""
    max_dup_10_grams: float | None = 0.2
    """Ten characters are about six words, of which English allows 0.14. Clean text: 0.17 at the 99th percentile."""
    min_words: float | None = 50
    """Characters, and words of other scripts: about 30 words."""
    max_words: float | None = 200_000
    """Characters, and words of other scripts."""
    min_mean_word: float | None = None
    """Off: the words that are left beside CJK characters are numbers and names."""
    max_mean_word: float | None = 15
    """Names of functions in manuals have 12 at the 99th percentile; base64 and text read in a wrong encoding more."""
    min_alpha_words: float | None = 0.65
    """Signs of punctuation count as words, and there is one for eight characters. Clean text: 0.70 at the 1st
    percentile."""
    min_stop_words: float | None = 3
    """Of 22 characters. Clean text has 13 kinds of them in the median, 3 at the 1st percentile; text read in a wrong
    encoding has none."""
    min_stop_share: float | None = 0.04
    """Clean text: 0.12 in the median, 0.044 at the 1st percentile; lists of goods 0.013, strings of key words 0.011."""
    min_sentences: float | None = 2
    """Answers and reviews of one paragraph have few full stops, for commas part what English parts with them."""
    min_line_punctuation: float | None = 0.04
    """Clean answers: 0.089 at the 5th percentile, a novel 0.85; menus and strings of key words have 0."""
    max_dup_kept_chars: float | None = 0.08
    """Clean text: 0.089 at the 99th percentile; short lines such as `示例：` stand in a manual more than once."""
    max_newlines: float | None = 0.15
    """Clean text: 0.09 at the 99th percentile; a line has more characters than words."""
    short_line: int = Field(12, ge=0)
    """Twelve characters say what thirty letters do."""


class Other(Thresholds):
    """Languages that are neither: English's values without its words."""

    min_stop_words: float | None = None
    """Off: the words are English."""


class Lines(Strict):
    """Lines that are taken out of a document before it is counted, where `c4` is used (Raffel et al., 2020)."""

    min_words: int = Field(3, ge=0)
    """Lines of fewer words go (runs without spaces)."""
    min_tokens_zh: int = Field(4, ge=0)
    """Lines of fewer characters and signs go, in a Chinese document."""
    max_word_length: int = Field(1000, ge=1)
    """Lines with a longer run without spaces go, outside Chinese."""
    javascript: bool = True
    """Lines that mention JavaScript go."""
    policy: bool = True
    """Lines about cookies, terms of use and privacy go, in both languages."""
    terminal_punctuation: bool = False
    """Lines that end without a mark go. FineWeb left this rule of C4 out, for it alone removes 30% of tokens."""
    citations: bool = True
    """[1], [edit] and [citation needed] go."""


class Rules(Strict):
    """Published quality rules. Off unless `use` names them."""

    use: list[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]] = []
    """Which rules: all four are FineWeb's pipeline."""
    en: Thresholds = Thresholds()
    """Thresholds for English: the papers' values."""
    zh: Chinese = Chinese()
    """Thresholds for Chinese: fitted, see docs/clean.md."""
    other: Other = Other()
    """Thresholds for every other language."""
    lines: Lines = Lines()
    """What C4 takes out of a document."""

    @model_validator(mode="after")
    def nothing_idle(self):
        group = {key: name for name, key, _, _ in listed()} | {"short_line": "fineweb"}
        for block in ("en", "zh", "other"):
            thresholds = getattr(self, block)
            for key in type(thresholds).model_fields:
                if group[key] not in self.use:
                    try:
                        idle(thresholds, key, f"is of the rules {group[key]}, which use does not name")
                    except ValueError as error:
                        raise ValueError(f"{block}.{error}") from None
        if "c4" not in self.use and self.lines != Lines():
            raise ValueError("lines says what the rules c4 take out, which use does not name; leave it out")
        return self


def listed() -> list[tuple[str, str, str, bool]]:
    """(group, key, statistic, is an upper bound) of each published rule, in the order in which the first failure
    gives the reason."""
    from pipeline.data.cleaning.text_statistics import NAMES

    group = {
        name: GROUPS[0] if "dup_" in name and name != "dup_kept_chars" or name.startswith("top_") else GROUPS[1]
        for name in NAMES
    }
    group.update(dict.fromkeys(("lorem_ipsum", "curly_brackets", "sentences"), GROUPS[2]))
    group.update(dict.fromkeys(("line_punctuation", "short_lines", "dup_kept_chars", "newlines"), GROUPS[3]))
    return [
        (group[name], f"{side}_{name}", name, side == "max")
        for name in NAMES
        for side in ("min", "max")
        if f"{side}_{name}" in Thresholds.model_fields
    ]


@dataclass(frozen=True)
class Rule:
    """A bound on one statistic, for English, Chinese and other languages; NaN where it is off."""

    reason: str
    key: str  # in the recipe; with {} for the language where each has its own
    column: int
    upper: bool
    bounds: tuple[float, float, float]

    def fails(self, values: "np.ndarray", kind: "np.ndarray", scale: float = 1.0) -> "np.ndarray":
        """Which documents fail, bool [N], with the bounds times `scale`."""
        import numpy as np

        bound = np.array(self.bounds)[kind] * scale
        return values[:, self.column] > bound if self.upper else values[:, self.column] < bound


def active(filters: Filters, rules: Rules) -> list[Rule]:
    """The rules of `filters`, then the published ones that a recipe uses. Their columns are filters.BASIC, then
    statistics.NAMES."""
    found = [
        Rule(
            reason,
            f"filters.{key}",
            column,
            upper,
            _bounds([getattr(filters, key) if measured(filters, key) else None] * 3),
        )
        for column, (reason, key, upper) in enumerate(BASIC)
    ]
    if rules.use:
        from pipeline.data.cleaning.text_statistics import NAMES

        for group, key, name, upper in listed():
            bounds = [getattr(block, key) for block in (rules.en, rules.zh, rules.other)]
            if group in rules.use and any(bound is not None for bound in bounds):
                found.append(Rule(key, f"rules.{{}}.{key}", len(BASIC) + NAMES.index(name), upper, _bounds(bounds)))
    return found


def _bounds(values: list[float | None]) -> tuple[float, ...]:
    return tuple(float("nan") if value is None else float(value) for value in values)
