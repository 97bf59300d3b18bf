"""Undoing mojibake: UTF-8 decoded as Latin-1, Windows-1252 or GBK, and GBK decoded as Latin-1."""

import re

from pipeline.data.cleaning.garbled_text import MOJIBAKE

HAN = re.compile("[\u4e00-\u9fff]")
# Letters that GBK text becomes when it is decoded as Latin-1: only the upper half, in pairs.
_LATIN_PAIRS = re.compile("[\u00a1-\u00fe]{2,}")
# The most common characters of Chinese.
_COMMON = frozenset(
    "的是了在不有和我这就也为以之其而于者一人中大上个国他来到时们说要会可对能好都没那得着下自过后作里用道行所然家种事成方多经么去法学如同现当动面起看定天分还进部其些主样理心本前开但因只从想实"
)


def fix_mojibake(text: str) -> str:
    """The original text if this one was clearly decoded with the wrong encoding; otherwise the same text."""
    if text.isascii():
        return text
    if HAN.search(text):
        fixed = _from_gbk(text)
    elif _LATIN_PAIRS.search(text):
        fixed = _from_latin(text)
    else:
        fixed = None
    if fixed is not None:
        return fixed
    if MOJIBAKE.search(text):
        import ftfy

        return ftfy.fix_encoding(text)
    return text


def _from_gbk(text: str) -> str | None:
    """Undo UTF-8 decoded as GBK. Real Chinese is not valid UTF-8 when it is encoded as GBK again: not one of 67,568
    passages (docs/log.md)."""
    han = "".join(HAN.findall(text[:2000]))[:200]
    if len(han) < 4 or sum(sign in _COMMON for sign in han) * 20 > len(han):
        return None
    raw = _encode(text, "gb18030")
    fixed = None if raw is None else _decode(raw, "utf-8")
    if fixed is not None:
        return fixed
    # A character with an odd number of bytes lost its last one: fix the rest, if that is nearly all of the text.
    fixed = text.encode("gb18030", "replace").decode(errors="replace")
    return fixed if fixed.count("\ufffd") * 20 < len(fixed) and _is_likely_chinese(fixed) else None


def _from_latin(text: str) -> str | None:
    """Undo GBK decoded as Latin-1 (or Windows-1252): every foreign letter is in a pair, and the pairs are common
    Chinese."""
    raw = _encode(text, "latin-1") or _encode(text, "cp1252")
    if raw is None or _decode(raw, "utf-8") is not None:  # UTF-8 decoded as one of the two is left to ftfy
        return None
    fixed = _decode(raw, "gb18030")
    return fixed if fixed is not None and _is_likely_chinese(fixed) else None


def _encode(text: str, encoding: str) -> bytes | None:
    """None if the encoding lacks some of the characters: then the text was not decoded with it."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return None


def _decode(raw: bytes, encoding: str) -> str | None:
    """None if the bytes are invalid in this encoding."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _is_likely_chinese(text: str) -> bool:
    """A fifth of the Han characters of Chinese text are among the hundred most common ones."""
    han = HAN.findall(text[:4000])
    return len(han) >= 4 and sum(sign in _COMMON for sign in han) * 6 > len(han)
