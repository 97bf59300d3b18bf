"""Fill-in-the-middle: a segment of a document is cut at two places, and its middle is written last.

Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022:

    PSM   <prefix> P <suffix> S <middle> M eos
    SPM   <prefix> <suffix> S <middle> P M eos         (their second variant, which shares its sentinels with PSM)

Nothing is lost: in both, the text is what is between <prefix> and <suffix>, then what follows <middle>, then what is
between <suffix> and <middle>. Whether, how and where a segment is cut depends only on the seed, the row's number and
the segment's place in the row.
"""

from typing import NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.core.seeds import derive, splitmix64_of

SENTINELS = 3  # tokens by which a segment grows


class Fim(Strict):
    """Which segments of documents are trained on in fill-in-the-middle order. Cuts are between tokens."""

    rate: float = Field(0.5, gt=0, le=1)
    """Share of the segments; Bavarian et al. (2022) train with 0.5 to 0.9 and see left-to-right losses unchanged."""
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
    """Decides where segments are cut, and writes them."""

    rate: float
    spm: float
    sources: frozenset | None
    ids: tuple[int, int, int]
    """Of the sentinels before prefix, suffix and middle."""
    key: int

    def cut(self, size: int, row: int, segment: int) -> tuple[int, int, bool] | None:
        """(begin of the middle, its end, whether the suffix comes first) for a segment of `size` tokens of text; None
        for a segment that stays as it is."""
        if size < 2:
            return None
        key = self.key ^ splitmix64_of(row << 20 | segment)
        if splitmix64_of(key) >= self.rate * 2**64:
            return None
        first, second = splitmix64_of(key + 1) % (size + 1), splitmix64_of(key + 2) % (size + 1)
        suffix_first = splitmix64_of(key + 3) < self.spm * 2**64
        return min(first, second), max(first, second), suffix_first

    def write(
        self, tokens: np.ndarray, size: int, begin: int, end: int, suffix_first: bool, into: np.ndarray
    ) -> tuple[int, int, int]:
        """Write a segment whose middle is begin .. end to into[: len(tokens) + 3]. `tokens` is `size` tokens of text,
        and the end of the document if the segment has it, which stays last. Returns the slots of the sentinels."""
        prefix_id, suffix_id, middle_id = self.ids
        prefix_end = 0 if suffix_first else begin  # tokens between <prefix> and <suffix>
        suffix_slot = prefix_end + 1
        middle_slot = suffix_slot + 1 + size - end
        into[0], into[suffix_slot], into[middle_slot] = prefix_id, suffix_id, middle_id
        if prefix_end:
            into[1:suffix_slot] = tokens[:prefix_end]
        if end < size:
            into[suffix_slot + 1 : middle_slot] = tokens[end:size]
        if prefix_end < end:
            into[middle_slot + 1 : size + SENTINELS] = tokens[prefix_end:end]
        if size < len(tokens):
            into[size + SENTINELS] = tokens[size]
        return 0, suffix_slot, middle_slot


def cutter(config: Fim, tokenizer, sources: list[str], seed: int) -> Cutter:
    """Raises UserError if the tokenizer lacks one of the sentinels as a special token, or if a source does not
    exist."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    special |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    sentinels = {"prefix": config.prefix, "suffix": config.suffix, "middle": config.middle}
    for key, name in sentinels.items():
        if name not in vocabulary or name not in special:
            raise UserError(
                f"fim.{key}: {name!r} is not a special token of the tokenizer; it has {', '.join(sorted(special))}."
                " Train it with the three sentinels in special_tokens, or set fim.prefix, fim.suffix and fim.middle to"
                " its own"
            )
    if len(set(sentinels.values())) < SENTINELS:
        raise UserError(
            f"fim: prefix, suffix and middle must be three different tokens, found {', '.join(sentinels.values())}"
        )
    for source in config.sources or ():
        if source not in sources:
            raise UserError(f"fim.sources: the tokens have no source {source!r}; they have {', '.join(sources)}")
    chosen = frozenset(config.sources) if config.sources is not None else None
    ids = tuple(vocabulary[name] for name in sentinels.values())
    return Cutter(config.rate, config.spm, chosen, ids, derive(seed, "fim"))
