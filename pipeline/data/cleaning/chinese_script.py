"""Simplified and traditional Chinese (OpenCC), in documents that may be Japanese or Korean or quote them."""

import functools
import re
from collections.abc import Callable

from pipeline.core.errors import UserError
from pipeline.data.cleaning.mojibake import HAN

# Kana except the middle dot, which Chinese uses in foreign names, and Hangul.
_FOREIGN = re.compile(
    "[\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3]"
)
_FOREIGN_RUN = re.compile(rf"[\w]*{_FOREIGN.pattern}[\w]*")
_SENTENCE_END = re.compile(r"(?<=[。！？!?\n])")
# Characters that only Japanese has: in JIS X 0208, and neither in GB 2312 nor in Big5 (without a few that Chinese
# prints).
_JAPANESE = re.compile(
    "[両乗亀亜仏仮価倹児円処剣剤剰労効勅勲単厳収唖営噛団囲図圏圧塁塩増壊壌壱売変奨嬢実対専尭巌巣巻帯帰庁広廃弐弾従徳徴応恵悩悪懐戦戯戻払"
    "抜択拝拠拡挙挿捜掲掻揺摂撃撹斉斎晩暁暦曽栄桜桝桟検楽様権歓歩歯歳歴殻毎気沢浄涙渇済渉渋渓満滝瀬焼犠猟獣畳痩発県砕稲穂穏穣竜粋粛"
    "経絵継続総緑縁縄縦繊繍聴脳臓艶荘蔵薫薬蛍蝋覇覧観訳読謡譲賛転軽辺逓遅郷酔醤醸釈鉄鉱銭鋳錬録関闘陥険隠雑霊頴頼顔顕駅駆騒験髄髪鴎鶏鹸麹"
    "麺黙齢込働峠畑枠匂辻栃栞喰]"
)
# Characters that only Chinese has; and very common ones. Those of them that are common in Japanese words too (有, 不,
# 在, 和, 被) are not among them: a title in Japanese or Korean consists of Chinese characters alone.
_CHINESE = re.compile("[這这們们你她它嗎吗呢吧很麼么呀啊哪]")
_CHINESE_TOO = frozenset("的是了我他就都把也說说对對从從为")


@functools.cache
def script_converter(script: str) -> Callable[[str], str]:
    """A function that converts the Chinese parts of a text to `simplified` or `traditional` characters."""
    try:
        import opencc
    except ImportError:
        raise UserError(
            f"repair.script: {script} needs OpenCC, which is not installed; run pip install 'alma[zh]', or set"
            " repair.script: keep"
        ) from None
    convert = opencc.OpenCC("t2s" if script == "simplified" else "s2t").convert

    def convert_text(text: str) -> str:
        return _convert_chinese(text, convert) if HAN.search(text) else text

    return convert_text


def _convert_chinese(text: str, convert: Callable[[str], str]) -> str:
    """Convert the Chinese parts of a text. Kana, Hangul and characters that only Japanese has tell documents apart: in
    a Japanese or Korean document only lines and sentences that are clearly Chinese are converted, in a Chinese one
    everything but sentences and words with foreign letters."""
    num_foreign, japanese = len(_FOREIGN.findall(text)), _JAPANESE.findall(text)
    if not num_foreign and len(set(japanese)) < 2:
        return convert(text)
    if 9 * (num_foreign + 2 * len(japanese)) >= len(HAN.findall(text)):
        return "".join(convert(part) if _is_clearly_chinese(part) else part for part in _parts(text))
    converted = []
    for sentence in _SENTENCE_END.split(text):
        num_foreign = len(_FOREIGN.findall(sentence))
        if num_foreign * 7 >= 3 * len(HAN.findall(sentence)):  # 30% of the letters
            converted.append(sentence)
        elif num_foreign:
            converted.append(_convert_around_foreign(sentence, convert))
        else:
            converted.append(convert(sentence))
    return "".join(converted)


def _parts(text: str) -> list[str]:
    """Lines, and those with foreign letters in sentences."""
    parts = []
    for line in text.splitlines(keepends=True):
        parts += _SENTENCE_END.split(line) if _FOREIGN.search(line) else [line]
    return parts


def _is_clearly_chinese(line: str) -> bool:
    if _FOREIGN.search(line) or _JAPANESE.search(line) or not HAN.search(line):
        return False
    return _CHINESE.search(line) is not None or len(_CHINESE_TOO.intersection(line)) >= 3


def _convert_around_foreign(sentence: str, convert: Callable[[str], str]) -> str:
    """A Chinese sentence converted, except the words in it that have foreign letters."""
    parts, at = [], 0
    for run in _FOREIGN_RUN.finditer(sentence):
        parts += [convert(sentence[at : run.start()]), run[0]]
        at = run.end()
    return "".join(parts) + convert(sentence[at:])
