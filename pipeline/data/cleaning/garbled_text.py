"""Characters that are garbage, and mojibake: text that was decoded with the wrong encoding."""

import re

# Characters that clean text does not have: replacement characters, controls, private use, noncharacters.
GARBAGE = re.compile("[\ufffd\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ue000-\uf8ff\ufffe\uffff]")
# UTF-8 decoded as Latin-1 or Windows-1252: the letter of a lead byte followed by the sign of a continuation byte; and
# UTF-8 decoded as GBK ("锟斤拷" is U+FFFD twice).
CONTINUATION = (
    "[\u0080-\u00bf\u20ac\u201a\u0192\u201e\u2026\u2020\u2021\u02c6\u2030\u2039\u0152\u2018-\u201d\u2022"
    "\u2122\u203a\u0153]"
)
MOJIBAKE = re.compile(f"[\u00c2-\u00f4]{CONTINUATION}{{1,3}}|锟斤拷|烫烫烫|屯屯屯")


def garbled_share(text: str) -> float:
    """Share of characters that are garbage or mojibake."""
    if text.isascii() and text.isprintable():
        return 0.0
    garbled = sum(map(len, GARBAGE.findall(text)))
    if not text.isascii():
        garbled += sum(map(len, MOJIBAKE.findall(text)))
    if garbled == 1:  # one stray sign, such as a page's only damaged byte, is accepted even in a short text
        return 0.0
    return min(1.0, garbled / max(1, len(text)))  # both expressions match control characters within mojibake
