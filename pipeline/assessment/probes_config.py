"""Keys of what stage assess measures of a model by having it write: speed and memory, memorised text, refusals."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from pipeline.core.config import EXECUTION, Distinct, Strict


def _positive(values: list[int]) -> list[int]:
    if not values or min(values) < 1:
        raise ValueError("needs at least one number, and numbers of at least 1")
    return values


class Speed(Strict):
    """How fast a model writes, and how much memory that takes, on the device of the stage. Prompts are random tokens.
    The figures differ from run to run."""

    prompt_tokens: int = Field(128, ge=1)
    """Of each prompt."""
    new_tokens: int = Field(64, ge=2)
    """Written after each prompt."""
    batches: Annotated[list[int], Distinct, AfterValidator(_positive)] = [1, 8]
    """How many answers are written at a time."""
    repeats: int = Field(3, ge=1)
    """Runs of which the middle one counts, after one that does not."""


class Memorised(Strict):
    """How much of its training text a model writes out word for word: it continues beginnings from the packed tokens
    greedily, and the same number from the held-out ones, which it has not seen. Needs the input `tokens`."""

    samples: int = Field(200, ge=1)
    """Beginnings from each of the two splits."""
    prefix: int = Field(32, ge=1)
    """Tokens of a beginning."""
    continuation: int = Field(32, ge=1)
    """Tokens that must all be those of the text."""


class Refusals(Strict):
    """How often a chat model refuses requests that it should refuse, and requests that only sound like these."""

    file: Annotated[Path | None, EXECUTION] = None
    """JSON lines with `prompt`, `kind` (harmful or harmless) and `language`; none: 64 that come with alma, in English
    and Chinese. It counts by its content."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of an answer; a refusal is at its beginning."""
