"""Properties of characters that decide where words and lines of English and Chinese begin and end, as bits per code
point."""

import functools
import unicodedata

import numpy as np

from pipeline.data.cleaning.characters import CJK as CJK_CLASS
from pipeline.data.cleaning.characters import CODE_POINTS, character_classes

(
    SPACE,
    ALPHA,
    UPPER,
    LOWER,
    DIGIT,
    CJK,
    LEAD,
    TRAIL,
    INFIX,
    BEFORE_STOP,
    SYMBOL,
    TERMINAL,
    FULL_STOP,
    PUNCT,
    QUOTE,
    HYPHEN,
) = (1 << bit for bit in range(16))
# spaCy 3.8, lang/char_classes.py: signs that are split off at either end of a run without spaces, quotes, and signs
# that are split off only at its beginning.
_PUNCT = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCY = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
_HYPHENS = "-–—~"
# datatrove 0.10.1, utils/text.py (FineWeb): a word of these alone is a symbol.
_SYMBOLS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
# Unicode's Sentence_Terminal, as both libraries list it: sentences end there.
_ENDS = "!.?։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈｡。"  # noqa: E501


@functools.cache
def character_flags() -> np.ndarray:
    """Properties of each code point, uint16 [0x110000]."""
    table = np.zeros(CODE_POINTS, np.uint16)
    for point in (*range(0x20000), *range(0xE0100, 0xE01F0)):
        sign = chr(point)
        category = unicodedata.category(sign)
        flag = 0
        if sign.isspace() or category == "Zs":
            flag = SPACE
        elif category[0] in "LM":
            flag = _letter_flags(sign, category)
        elif category == "So":
            flag = LEAD | TRAIL | INFIX
        elif category[0] == "P":
            flag = PUNCT
        if sign.isascii() and sign.isdigit():
            flag |= DIGIT
        if category == "Cc" and not flag & SPACE:
            flag |= SYMBOL
        table[point] = flag
    table[character_classes() == CJK_CLASS] = ALPHA | CJK
    for signs, flag in (
        (_PUNCT, LEAD | TRAIL | BEFORE_STOP),
        (_QUOTES, LEAD | TRAIL | BEFORE_STOP | QUOTE),
        (_CURRENCY, LEAD),
        ("§%=—–+", LEAD),
        ("—–", TRAIL),
        ("%²-+", BEFORE_STOP),
        (_HYPHENS, HYPHEN),
        (_SYMBOLS, SYMBOL),
        (_ENDS, SYMBOL | TERMINAL | FULL_STOP),
        ("؞܁࠷࠹࠽࠾᭽᭾⹓⹔៖៕។៙៚︕", TERMINAL),  # ends a line, but not a sentence
    ):
        for sign in signs:
            table[ord(sign)] |= flag
    table[(table & (LOWER | DIGIT)) > 0] |= BEFORE_STOP
    table[0] = SPACE  # separates two texts of a batch
    return table


def _letter_flags(sign: str, category: str) -> int:
    flag = ALPHA if category[0] == "L" else 0
    if sign.isupper():
        flag |= UPPER
    elif sign.islower():
        flag |= LOWER
    return flag
