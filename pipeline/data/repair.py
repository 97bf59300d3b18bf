"""Mending of characters, before the normal form: text that was read in a wrong encoding, full-width letters,
traditional and simplified Chinese."""

import functools
import re
from typing import Literal

from pydantic import Field

from pipeline.data.filters import _MOJIBAKE
from pipeline.errors import UserError
from pipeline.recipe import Strict

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_WIDE_LETTERS = {wide: plain for wide, plain in _WIDE.items() if chr(plain).isalnum()}
_HAN = re.compile("[\u4e00-\u9fff]")
# Letters that GBK text becomes when it is read as Latin-1: nothing but the upper half, in pairs.
_LATIN = re.compile("[\u00a1-\u00fe]{2,}")
_COMMON = frozenset(
    "的是了在不有和我这就也为以之其而于者一人中大上个国他来到时们说要会可对能好都没那得着下自过后作里用道行所然家种事成方多经么去法学如同现当动面起看定天分还进部其些主样理心本前开但因只从想实"
)


class Repair(Strict):
    """What is done to characters before anything is measured. All off by default."""

    mojibake: bool = False
    """Undo a wrong encoding: UTF-8 that was read as Windows-1252 or Latin-1 (`Ã©`, `â€™`; by ftfy), UTF-8 read as
    GBK (`浣犲ソ`), GBK read as Latin-1 (`ÄãºÃ`)."""
    full_width: Literal["keep", "letters", "all"] = "keep"
    """Full-width letters and digits (ＡＢＣ１２３) to plain ones, or all signs, also the punctuation with which Chinese
    is written."""
    script: Literal["keep", "simplified", "traditional"] = Field("keep")
    """Chinese characters to simplified or traditional ones, word by word, with OpenCC: pip install 'alma[zh]'."""


def repaired(text: str, repair: Repair) -> tuple[str, list[str]]:
    """The mended text, and what was done to it: of mojibake, full_width, script."""
    done = []
    for name, mend in (
        ("mojibake", unbroken if repair.mojibake else None),
        ("full_width", _narrow(repair.full_width)),
        ("script", _converter(repair.script)),
    ):
        if mend:
            mended = mend(text)
            if mended != text:
                text = mended
                done.append(name)
    return text, done


def unbroken(text: str) -> str:
    """The text that was written, where it is plain that this one is it read in a wrong encoding; else the same text."""
    if text.isascii():
        return text
    if _HAN.search(text):
        mended = _from_gbk(text)
        if mended is not None:
            return mended
    elif _LATIN.search(text):
        mended = _from_latin(text)
        if mended is not None:
            return mended
    if _MOJIBAKE.search(text):
        import ftfy

        return ftfy.fix_encoding(text)
    return text


def _from_gbk(text: str) -> str | None:
    """UTF-8 read as GBK. Chinese that is really written so is no valid UTF-8 when it is packed as GBK again: of
    67,568 passages none (docs/log.md)."""
    han = "".join(_HAN.findall(text[:2000]))[:200]
    if len(han) < 4 or sum(sign in _COMMON for sign in han) * 20 > len(han):
        return None
    raw = _packed(text, "gb18030")
    mended = None if raw is None else _unpacked(raw, "utf-8")
    if mended is not None:
        return mended
    # A character whose bytes were odd in number lost its last one: mend what can be mended, if that is nearly all.
    mended = text.encode("gb18030", "replace").decode(errors="replace")
    return mended if mended.count("\ufffd") * 20 < len(mended) and _likely(mended) else None


def _from_latin(text: str) -> str | None:
    """GBK read as Latin-1 (or Windows-1252): every foreign letter stands in a pair, and the pairs are common
    Chinese."""
    raw = _packed(text, "latin-1") or _packed(text, "cp1252")
    if raw is None or _unpacked(raw, "utf-8") is not None:  # UTF-8 read as one of the two is ftfy's case
        return None
    mended = _unpacked(raw, "gb18030")
    return mended if mended is not None and _likely(mended) else None


def _packed(text: str, encoding: str) -> bytes | None:
    """None if the encoding does not have all characters: then the text was not read in it."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return None


def _unpacked(raw: bytes, encoding: str) -> str | None:
    """None if the bytes are no text in this encoding."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _likely(text: str) -> bool:
    """A fifth of the Han characters of Chinese text are among the hundred commonest."""
    han = _HAN.findall(text[:4000])
    return len(han) >= 4 and sum(sign in _COMMON for sign in han) * 6 > len(han)


def _narrow(which: str):
    if which == "keep":
        return None
    table = _WIDE if which == "all" else _WIDE_LETTERS
    return lambda text: text if text.isascii() else text.translate(table)


@functools.cache
def _converter(script: str):
    if script == "keep":
        return None
    try:
        import opencc
    except ImportError:
        raise UserError(
            f"repair.script: {script} needs OpenCC, which is not installed; run pip install 'alma[zh]', or say"
            " repair.script: keep"
        ) from None
    convert = opencc.OpenCC("t2s" if script == "simplified" else "s2t").convert
    return lambda text: convert(text) if _HAN.search(text) else text
