"""Mending of characters, before the normal form: text that was read in a wrong encoding, full-width letters,
traditional and simplified Chinese."""

import functools
import re
from collections.abc import Callable
from typing import Literal

from pydantic import Field

from pipeline.core.config import Strict
from pipeline.core.errors import UserError
from pipeline.data.cleaning.filters import MOJIBAKE

_WIDE = {0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20}
_WIDE_LETTERS = {wide: plain for wide, plain in _WIDE.items() if chr(plain).isalnum()}
_HAN = re.compile("[\u4e00-\u9fff]")
# Letters that GBK text becomes when it is read as Latin-1: nothing but the upper half, in pairs.
_LATIN = re.compile("[\u00a1-\u00fe]{2,}")
# Kana but the middle dot, which stands in foreign names in Chinese, and Hangul.
_FOREIGN = re.compile(
    "[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"
)
_FOREIGN_RUN = re.compile(rf"[\w]*{_FOREIGN.pattern}[\w]*")
_SENTENCES = re.compile(r"(?<=[。！？!?\n])")
# Forms that Japanese alone has: in JIS X 0208, and neither in GB 2312 nor in Big5 (without a few that Chinese prints).
_JAPANESE = re.compile(
    "[両乗亀亜仏仮価倹児円処剣剤剰労効勅勲単厳収唖営噛団囲図圏圧塁塩増壊壌壱売変奨嬢実対専尭巌巣巻帯帰庁広廃弐弾従徳徴応恵悩悪懐戦戯戻払"
    "抜択拝拠拡挙挿捜掲掻揺摂撃撹斉斎晩暁暦曽栄桜桝桟検楽様権歓歩歯歳歴殻毎気沢浄涙渇済渉渋渓満滝瀬焼犠猟獣畳痩発県砕稲穂穏穣竜粋粛"
    "経絵継続総緑縁縄縦繊繍聴脳臓艶荘蔵薫薬蛍蝋覇覧観訳読謡譲賛転軽辺逓遅郷酔醤醸釈鉄鉱銭鋳錬録関闘陥険隠雑霊頴頼顔顕駅駆騒験髄髪鴎鶏鹸麹"
    "麺黙齢込働峠畑枠匂辻栃栞喰]"
)
# Words that only Chinese has; and of the commonest ones three different, which names of Japanese offices do not have.
_CHINESE = re.compile("[這这們们你她它嗎吗呢吧很麼么呀啊哪]")
_CHINESE_TOO = frozenset("的是了在我他就都有不和把被也說说為为對对從从")
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
    """Characters of Chinese text to simplified or traditional ones, word by word, with OpenCC: pip install 'alma[zh]'.
    Japanese and Korean stay as they are, also where they stand in a Chinese document."""


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
    if MOJIBAKE.search(text):
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
    return lambda text: _of_chinese(text, convert) if _HAN.search(text) else text


def _of_chinese(text: str, convert: Callable[[str], str]) -> str:
    """The text with what is Chinese in it converted. Kana, Hangul and forms that Japanese alone has tell documents
    apart; in one of Japanese or Korean only lines and sentences that are plainly Chinese are, in a Chinese one all but
    the sentences and words with foreign letters."""
    foreign, japanese = len(_FOREIGN.findall(text)), _JAPANESE.findall(text)
    if not foreign and len(set(japanese)) < 2:
        return convert(text)
    if 9 * (foreign + 2 * len(japanese)) >= len(_HAN.findall(text)):
        return "".join(convert(part) if _plainly_chinese(part) else part for part in _parts(text))
    pieces = []
    for sentence in _SENTENCES.split(text):
        letters = len(_FOREIGN.findall(sentence))
        if letters * 7 >= 3 * len(_HAN.findall(sentence)):  # 30% of them
            pieces.append(sentence)
        elif letters:
            pieces.append(_around(sentence, convert))
        else:
            pieces.append(convert(sentence))
    return "".join(pieces)


def _parts(text: str) -> list[str]:
    """Lines, and those with foreign letters in sentences."""
    parts = []
    for line in text.splitlines(keepends=True):
        parts += _SENTENCES.split(line) if _FOREIGN.search(line) else [line]
    return parts


def _plainly_chinese(line: str) -> bool:
    if _FOREIGN.search(line) or not _HAN.search(line):
        return False
    return _CHINESE.search(line) is not None or len(_CHINESE_TOO.intersection(line)) >= 3


def _around(sentence: str, convert: Callable[[str], str]) -> str:
    """A Chinese sentence converted, but for the words in it that have foreign letters."""
    pieces, at = [], 0
    for run in _FOREIGN_RUN.finditer(sentence):
        pieces += [convert(sentence[at : run.start()]), run[0]]
        at = run.end()
    return "".join(pieces) + convert(sentence[at:])
