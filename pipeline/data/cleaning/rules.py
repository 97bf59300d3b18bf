"""The published quality rules as thresholds on statistics: Gopher, C4 and FineWeb, with the papers' values for English
and values fitted for Chinese.

    rules:
      use: [gopher_repetition, gopher_quality, c4, fineweb]
      en: {min_words: 30}          # one threshold changed
      zh: {max_top_2_gram: null}   # one rule off

Every rule is applied to every document, even after one has rejected it, so that the report can show how rules overlap
and what other thresholds would have done.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.core.config import Distinct, Strict, refuse_unused
from pipeline.data.cleaning.filters import BASIC_RULES, Filters

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

# The rules of each published set, as keys of Thresholds: min_ or max_ and the statistic (text_statistics.NAMES). In the
# order in which the first failure gives the reason, which is FineWeb's.
RULE_SETS = {
    "gopher_repetition": (
        "max_dup_paragraphs",
        "max_dup_paragraph_chars",
        "max_dup_lines",
        "max_dup_line_chars",
        "max_top_2_gram",
        "max_top_3_gram",
        "max_top_4_gram",
        "max_dup_5_grams",
        "max_dup_6_grams",
        "max_dup_7_grams",
        "max_dup_8_grams",
        "max_dup_9_grams",
        "max_dup_10_grams",
    ),
    "gopher_quality": (
        "min_words",
        "max_words",
        "min_mean_word",
        "max_mean_word",
        "max_hashes",
        "max_ellipses",
        "max_bullet_lines",
        "max_ellipsis_lines",
        "min_alpha_words",
        "min_stop_words",
        "min_stop_share",
    ),
    "c4": ("max_lorem_ipsum", "max_curly_brackets", "min_sentences"),
    "fineweb": ("min_line_punctuation", "max_short_lines", "max_dup_kept_chars", "max_newlines"),
}


class Thresholds(Strict):
    """Bounds of the rules for one language; null turns a rule off. The statistics are defined in
    pipeline/data/cleaning/text_statistics.py."""

    # Gopher, repetition: Rae et al., 2021, table A1
    max_dup_paragraphs: float | None = 0.3
    """Share of paragraphs that occurred earlier in the document."""
    max_dup_paragraph_chars: float | None = 0.2
    """Share of characters in such paragraphs."""
    max_dup_lines: float | None = 0.3
    """Share of lines that occurred earlier in the document."""
    max_dup_line_chars: float | None = 0.2
    """Share of characters in such lines."""
    max_top_2_gram: float | None = 0.20
    """Share of characters in the most frequent run of two words."""
    max_top_3_gram: float | None = 0.18
    """The same for three words."""
    max_top_4_gram: float | None = 0.16
    """The same for four words."""
    max_dup_5_grams: float | None = 0.15
    """Share of characters in runs of five words that occurred earlier in the document."""
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
    """Number of words without punctuation marks; in Chinese, characters."""
    max_words: float | None = 100_000
    """The same, upper bound."""
    min_mean_word: float | None = 3
    """Mean length of words (without CJK characters)."""
    max_mean_word: float | None = 10
    """The same, upper bound."""
    max_hashes: float | None = 0.1
    """Number of # per word."""
    max_ellipses: float | None = 0.1
    """Ellipses per word."""
    max_bullet_lines: float | None = 0.9
    """Share of lines that begin with a bullet."""
    max_ellipsis_lines: float | None = 0.3
    """Share of lines that end with an ellipsis."""
    min_alpha_words: float | None = 0.8
    """Share of words, punctuation marks included, that have a letter."""
    min_stop_words: float | None = 2
    """Different words among the, be, to, of, and, that, have, with; in Chinese, among 22 of the most common
    characters."""
    min_stop_share: float | None = None
    """Share of words that are one of these. Off in English, where no paper has it; in Chinese it is what distinguishes
    prose from strings of keywords."""
    # C4: Raffel et al., 2020, section 2.2
    max_lorem_ipsum: float | None = 0
    """Lines with `lorem ipsum`."""
    max_curly_brackets: float | None = 0
    """Lines with a {."""
    min_sentences: float | None = 5
    """Sentences in the lines that are kept."""
    # FineWeb: Penedo et al., 2024, section 3.6
    min_line_punctuation: float | None = 0.12
    """Share of lines that end with a mark that ends a sentence; in Chinese and Japanese, closing quotes and brackets
    may follow it, and an ellipsis counts."""
    max_short_lines: float | None = 0.67
    """Share of lines of at most `short_line` characters."""
    max_dup_kept_chars: float | None = 0.01
    """Share of characters in lines that occurred earlier, among the lines that are kept."""
    max_newlines: float | None = 0.3
    """Newlines per word."""
    short_line: int = Field(30, ge=0)
    """Length of a short line in characters, at most."""


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
    """Off: the words other than CJK characters are numbers and names."""
    max_mean_word: float | None = 15
    """Names of functions in manuals have 12 at the 99th percentile; base64 and mojibake have more."""
    min_alpha_words: float | None = 0.65
    """Punctuation marks count as words, and there is one per eight characters. Clean text: 0.70 at the 1st
    percentile."""
    min_stop_words: float | None = 3
    """Of 22 characters. Clean text has 13 of them in the median, 3 at the 1st percentile; mojibake has none."""
    min_stop_share: float | None = 0.04
    """Clean text: 0.12 in the median, 0.044 at the 1st percentile; lists of goods 0.013, strings of keywords 0.011."""
    min_sentences: float | None = 2
    """Answers and reviews of one paragraph have few full stops; commas separate what full stops do in English."""
    min_line_punctuation: float | None = 0.04
    """Clean answers: 0.089 at the 5th percentile, a novel 0.85; menus and strings of keywords have 0."""
    max_dup_kept_chars: float | None = 0.08
    """Clean text: 0.089 at the 99th percentile; short lines such as `示例：` occur in a manual more than once."""
    max_newlines: float | None = 0.15
    """Clean text: 0.09 at the 99th percentile; a line has more characters than words."""
    short_line: int = Field(12, ge=0)
    """Twelve characters carry as much as thirty letters."""


class Other(Thresholds):
    """Other languages: English's values without its stop words."""

    min_stop_words: float | None = None
    """Off: the stop words are English."""


class Lines(Strict):
    """Lines that are removed from a document before it is measured, where `c4` is used (Raffel et al., 2020)."""

    min_words: int = Field(3, ge=0)
    """Remove lines of fewer words (runs without spaces)."""
    min_tokens_zh: int = Field(4, ge=0)
    """Remove lines of fewer characters and signs, in a Chinese document."""
    max_word_length: int = Field(1000, ge=1)
    """Remove lines with a longer run without spaces, outside Chinese."""
    javascript: bool = True
    """Remove lines that mention JavaScript."""
    policy: bool = True
    """Remove lines about cookies, terms of use and privacy, in both languages."""
    terminal_punctuation: bool = False
    """Remove lines that end without a punctuation mark. FineWeb does not use this rule of C4, because it alone
    removes 30% of tokens."""
    citations: bool = True
    """Remove [1], [edit] and [citation needed]."""


class Rules(Strict):
    """Published quality rules. Off unless `use` names them."""

    use: Annotated[list[Literal["gopher_repetition", "gopher_quality", "c4", "fineweb"]], Distinct] = []
    """Which sets of rules: all four are FineWeb's pipeline."""
    en: Thresholds = Thresholds()
    """Thresholds for English: the papers' values."""
    zh: Chinese = Chinese()
    """Thresholds for Chinese: fitted, see docs/clean.md."""
    other: Other = Other()
    """Thresholds for every other language."""
    lines: Lines = Lines()
    """Lines that C4 removes from a document."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        set_of = {key: name for name, keys in RULE_SETS.items() for key in keys}
        set_of["short_line"] = "fineweb"
        for language, thresholds in self.thresholds().items():
            for key in type(thresholds).model_fields:
                if set_of[key] not in self.use:
                    try:
                        refuse_unused(thresholds, key, f"belongs to the rules {set_of[key]}, which use does not name")
                    except ValueError as error:
                        raise ValueError(f"{language}.{error}") from None
        if "c4" not in self.use and self.lines != Lines():
            raise ValueError("lines belongs to the rules c4, which use does not name; remove it")
        return self

    def thresholds(self) -> dict[str, Thresholds]:
        """By group of languages, in the order of language.GROUPS."""
        return {"en": self.en, "zh": self.zh, "other": self.other}


@dataclass(frozen=True)
class Rule:
    """A bound on one statistic, for English, Chinese and other languages; NaN where it is off."""

    reason: str
    key: str  # in the recipe; with {} for the language where each has its own
    column: int  # of the statistic
    is_upper: bool
    bounds: tuple[float, float, float]

    def fails(self, statistics: "np.ndarray", groups: "np.ndarray", scale: float = 1.0) -> "np.ndarray":
        """Which documents fail with the bounds times `scale`, bool [N]. `statistics` [N, columns], `groups` [N]."""
        import numpy as np

        bound = np.array(self.bounds)[groups] * scale
        values = statistics[:, self.column]
        return values > bound if self.is_upper else values < bound


def active_rules(filters: Filters, rules: Rules) -> list[Rule]:
    """The rules of `filters`, then the published ones that a recipe uses. Their columns are those of
    filters.BASIC_RULES, then text_statistics.NAMES."""
    active = []
    for column, rule in enumerate(BASIC_RULES):
        bounds = same_bounds(filters.bound(rule.key))
        active.append(Rule(rule.reason, f"filters.{rule.key}", column, rule.is_upper, bounds))
    if rules.use:
        from pipeline.data.cleaning.text_statistics import NAMES

        for name, keys in RULE_SETS.items():
            for key in keys if name in rules.use else ():
                values = [getattr(thresholds, key) for thresholds in rules.thresholds().values()]
                if any(value is not None for value in values):
                    side, _, statistic = key.partition("_")
                    column = len(BASIC_RULES) + NAMES.index(statistic)
                    active.append(Rule(key, f"rules.{{}}.{key}", column, side == "max", bounds_of(values)))
    return active


def same_bounds(value: float | None) -> tuple[float, float, float]:
    """The bounds of a rule that is the same for all languages."""
    return bounds_of([value] * 3)


def bounds_of(values: list[float | None]) -> tuple[float, ...]:
    """As floats; NaN, which no value crosses, for None."""
    return tuple(float("nan") if value is None else float(value) for value in values)
