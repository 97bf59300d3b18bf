"""Repair of characters before normalising: mojibake, full-width letters, traditional and simplified Chinese."""

from typing import Literal

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.data.cleaning.chinese_script import script_converter
from pipeline.data.cleaning.mojibake import fix_mojibake

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_WIDE_LETTERS = {wide: plain for wide, plain in _WIDE.items() if chr(plain).isalnum()}


class Repair(Strict):
    """Changes to characters before anything is measured. All off by default."""

    mojibake: bool = False
    """Undo a wrong decoding: UTF-8 decoded as Windows-1252 or Latin-1 (`Ã©`, `â€™`; by ftfy), UTF-8 decoded as GBK
    (`浣犲ソ`), GBK decoded as Latin-1 (`ÄãºÃ`)."""
    full_width: Literal["keep", "letters", "all"] = "keep"
    """Convert full-width letters and digits (ＡＢＣ１２３) to plain ones, or all signs, including the punctuation that
    Chinese is written with."""
    script: Literal["keep", "simplified", "traditional"] = Field("keep")
    """Convert Chinese text to simplified or traditional characters, word by word, with OpenCC: pip install 'alma[zh]'.
    Japanese and Korean stay as they are, also within a Chinese document."""


def repair_text(text: str, repair: Repair) -> tuple[str, list[str]]:
    """The repaired text, and what was changed in it: of mojibake, full_width, script."""
    steps = {}
    if repair.mojibake:
        steps["mojibake"] = fix_mojibake
    if repair.full_width != "keep":
        steps["full_width"] = _narrow_letters if repair.full_width == "letters" else _narrow_all
    if repair.script != "keep":
        steps["script"] = script_converter(repair.script)
    changes = []
    for name, step in steps.items():
        repaired = step(text)
        if repaired != text:
            text = repaired
            changes.append(name)
    return text, changes


def _narrow_letters(text: str) -> str:
    return text if text.isascii() else text.translate(_WIDE_LETTERS)


def _narrow_all(text: str) -> str:
    return text if text.isascii() else text.translate(_WIDE)
