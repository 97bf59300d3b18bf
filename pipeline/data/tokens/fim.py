"""Fill-in-the-middle: a piece of a document is cut in two places and its middle put last.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022:

    PSM   <prefix> P <suffix> S <middle> M eos
    SPM   <prefix> <suffix> S <middle> P M eos         (their second variant, which shares its sentinels with PSM)

In both the text is what stands between <prefix> and <suffix>, then what follows <middle>, then what stands between
<suffix> and <middle>: nothing is lost. Whether, how and where a piece is cut depends on the seed, the row's number and
the piece's place in the row alone.
"""

from typing import NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive, splitmix64_of

SPARE = 3  # tokens that a piece may grow by


class Fim(Strict):
    """Which pieces of documents are turned round. Cuts fall between tokens."""

    rate: float = Field(0.5, gt=0, le=1)
    """Share of the pieces; Bavarian et al. (2022) train with 0.5 to 0.9 and see left-to-right losses unchanged."""
    spm: float = Field(0.5, ge=0, le=1)
    """Share of these with the suffix first (SPM); Bavarian et al. (2022) train on both."""
    sources: list[str] | None = None
    """Sources whose documents are cut; none: all."""
    prefix: str = "<|fim_prefix|>"
    """The tokenizer's special token before a prefix."""
    suffix: str = "<|fim_suffix|>"
    """The special token before a suffix."""
    middle: str = "<|fim_middle|>"
    """The special token before a middle."""


class Cutter(NamedTuple):
    """What the sampler needs of it."""

    rate: float
    spm: float
    sources: frozenset | None
    ids: tuple[int, int, int]
    """Of prefix, suffix and middle."""
    key: int

    def cut(self, text: int, row: int, piece: int) -> tuple[int, int, bool] | None:
        """Where the middle of a piece of `text` tokens begins and ends, and whether its suffix comes first; None for
        a piece that is left as it is."""
        if text < 2:
            return None
        key = self.key ^ splitmix64_of(row << 20 | piece)
        if splitmix64_of(key) >= self.rate * 2**64:
            return None
        start, end = sorted(splitmix64_of(key + number) % (text + 1) for number in (1, 2))
        return start, end, splitmix64_of(key + 3) < self.spm * 2**64

    def turn(
        self, tokens: np.ndarray, text: int, begin: int, end: int, suffix_first: bool, into: np.ndarray
    ) -> tuple[int, int, int]:
        """Write a piece, turned round, to into[: len(tokens) + 3]; what follows its `text`, the end of the document if
        it has one, stays last.

        Returns where the sentinels stand.
        """
        before, after, last = self.ids
        first = 0 if suffix_first else begin  # of the prefix, what stands before the suffix
        middle = first + text - end + 2
        into[0], into[first + 1], into[middle] = before, after, last
        if first:
            into[1 : first + 1] = tokens[:first]
        if end < text:
            into[first + 2 : middle] = tokens[end:text]
        if first < end:
            into[middle + 1 : text + 3] = tokens[first:end]
        if text < len(tokens):
            into[text + 3] = tokens[text]
        return 0, first + 1, middle


def cutter(config: Fim, tokenizer, sources: list[str], seed: int) -> Cutter:
    """Raises UserError where the tokenizer has no such special tokens, or a source does not exist."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    names = {"prefix": config.prefix, "suffix": config.suffix, "middle": config.middle}
    for key, name in names.items():
        if name not in vocabulary or name not in special:
            has = ", ".join(sorted(special))
            raise UserError(
                f"fim.{key}: {name!r} is no special token of the tokenizer; it has {has}. Train it with the three"
                " sentinels, or name its own"
            )
    if len(set(names.values())) < 3:
        raise UserError(
            f"fim: prefix, suffix and middle must be three different tokens, found {', '.join(names.values())}"
        )
    for source in config.sources or ():
        if source not in sources:
            raise UserError(f"fim.sources: the tokens have no source {source!r}; they have {', '.join(sources)}")
    chosen = frozenset(config.sources) if config.sources is not None else None
    return Cutter(
        config.rate, config.spm, chosen, tuple(vocabulary[name] for name in names.values()), derive(seed, "fim")
    )
