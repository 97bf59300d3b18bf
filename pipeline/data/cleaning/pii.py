"""Personal data and secrets replaced by the name of their kind. Expressions find candidates; checksums and ranges
decide, so that few other numbers are masked."""

import functools
import re
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import field_validator, model_validator

from pipeline.core.config import Distinct, Strict, refuse_unused
from pipeline.data.cleaning import pii_checks, pii_patterns

# In the order in which they are searched for: an identity number may look like a card.
KINDS = ("secret", "email", "ip", "id_zh", "card", "mobile_zh", "phone")


class Mask(Strict):
    """Personal data and secrets to replace in the documents that are kept, each by its kind in brackets, such as
    [EMAIL]."""

    use: Annotated[list[Literal["secret", "email", "ip", "card", "id_zh", "mobile_zh", "phone"]], Distinct] = []
    """secret: private keys, tokens of AWS, GitHub, GitLab, Slack, Google, OpenAI, Stripe, npm, PyPI, JSON web
    tokens; email; ip: public addresses, but not section numbers and versions; card: bank cards in the form, with the
    prefix and with the checksum that cards have; id_zh: Chinese identity numbers with date and checksum; mobile_zh:
    Chinese mobile numbers; phone: other telephone numbers, written with a country code, an area code in brackets or
    separators. docs/clean.md has the precision of each."""
    form: str = "[{}]"
    """What replaces a kind; {} is its name in capitals."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not self.use:
            refuse_unused(self, "form", "says how a mask is written, and use names none")
        return self

    @field_validator("form")
    @classmethod
    def _valid_form(cls, form: str) -> str:
        try:
            form.format("EMAIL")
        except (ValueError, LookupError, AttributeError):
            raise ValueError("can have {} for the kind's name and no other field; braces are {{ and }}") from None
        return form


Check = Callable[[re.Match], bool]


def _always(_: re.Match) -> bool:
    return True


_RULES: dict[str, list[tuple[str, Check]]] = {
    "secret": [(pii_patterns.SECRET, _always)],
    "email": [
        (pii_patterns.EMAIL_ZH, _always),
        (pii_patterns.EMAIL, pii_checks.is_of_a_person),
    ],  # EMAIL matches the beginning of some
    "ip": [(pii_patterns.IP4, pii_checks.is_ipv4_address), (pii_patterns.IP6, pii_checks.is_ipv6_address)],
    "card": [
        (pii_patterns.CARD_LONG, pii_checks.is_card),
        (pii_patterns.CARD_SHORT, pii_checks.is_card),
        (pii_patterns.CARD, pii_checks.is_card),
    ],
    "id_zh": [(pii_patterns.IDENTITY_NUMBER, pii_checks.is_identity_number)],
    "mobile_zh": [
        (pii_patterns.MOBILE, pii_checks.is_not_a_count),
        (pii_patterns.MOBILE_AFTER_WORD, pii_checks.follows_phone_word),
    ],
    "phone": [
        (pii_patterns.PHONE_WITH_COUNTRY, pii_checks.has_phone_length),
        (pii_patterns.PHONE, _always),
        (pii_patterns.PHONE_AFTER_WORD, pii_checks.follows_phone_word),
    ],
}
_compiled = functools.cache(re.compile)  # when first used: 0.05 CPU-s of every process, and most recipes mask nothing
_SEVEN_DIGITS = re.compile(r"\d(?:[^\w\n]{0,2}\d){6}")
_NUMBERS = ("id_zh", "card", "mobile_zh", "phone")
MAX_PASSES = 4


def mask_text(text: str, mask: Mask) -> tuple[str, dict[str, int]]:
    """The text with the kinds of `mask.use` replaced, and how often each was."""
    totals: dict[str, int] = {}
    # A part of a longer number may be a number by itself once its neighbour is replaced. The number of passes is
    # bounded, because `form` may be an address itself.
    for _ in range(MAX_PASSES):
        text, counts = _mask_once(text, mask)
        if not counts:
            break
        for kind, number in counts.items():
            totals[kind] = totals.get(kind, 0) + number
    return text, totals


def _mask_once(text: str, mask: Mask) -> tuple[str, dict[str, int]]:
    counts: dict[str, int] = {}
    if not mask.use:
        return text, counts
    may_have_numbers = None  # not known yet
    for kind in KINDS:
        if kind not in mask.use:
            continue
        if kind == "secret" and not any(hint in text for hint in pii_patterns.SECRET_HINTS):
            continue
        if kind == "email" and "@" not in text:
            continue
        if kind in _NUMBERS:
            if may_have_numbers is None:
                may_have_numbers = _SEVEN_DIGITS.search(text) is not None
            if not may_have_numbers:
                continue
        replacement = mask.form.format(kind.upper())
        for pattern, check in _RULES[kind]:
            prerequisite = pii_patterns.PREREQUISITES.get(pattern)
            if prerequisite and not _compiled(prerequisite).search(text):
                continue
            text, number = _replace(text, _compiled(pattern), check, replacement)
            if number:
                counts[kind] = counts.get(kind, 0) + number
    return text, counts


def _replace(text: str, pattern: re.Pattern, check: Check, replacement: str) -> tuple[str, int]:
    number = 0

    def replace(match: re.Match) -> str:
        nonlocal number
        if not check(match):
            return match[0]
        number += 1
        return replacement

    return pattern.sub(replace, text), number
