"""Which language a text is in, and so which thresholds judge it. The model is inside the installed package; nothing
is fetched at run time."""

import functools
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Strict, idle

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

ENGLISH, CHINESE, OTHER = range(3)
# eldc.LANGUAGES, written out so that a recipe is checked without loading its model (200 ms); a test compares the two.
KNOWN = (
    "am ar az be bg bn ca cs da de el en es et eu fa fi fr gu he hi hr hu hy is it ja ka kn ko ku lo lt lv ml mr ms nl"
    " no or pa pl pt ro ru sk sl sq sr sv ta te th tl tr uk ur vi yo zh"
).split()
# Characters that are looked at. The language of a page shows in its first lines, and of 1,405 documents cut at 1,000
# characters 99.6% (English) and all (Chinese) were named rightly; lists and menus at the top are outvoted by taking the
# middle of longer texts as well.
HEAD, MIDDLE = 700, 700


class Language(Strict):
    """Documents in other languages are left out. Detected by eldc (Apache-2.0), which knows 60 languages."""

    keep: list[str] = []
    """ISO 639-1 codes, such as [en, zh]; empty: nothing is detected, nothing left out, and the rules tell Chinese by
    its script."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Smallest score of the language. 0.65 was FineWeb's for English with another model, whose scores are not
    comparable; here the 5th percentile is 0.69 for English web pages, mails and manuals, and 0.91 for Chinese ones
    (docs/log.md)."""

    @model_validator(mode="after")
    def nothing_idle(self):
        if not self.keep:
            idle(self, "min_confidence", "is of detected languages, and without keep none is detected")
        return self

    @field_validator("keep")
    @classmethod
    def _named(cls, keep: list[str]) -> list[str]:
        """A code that is never detected would leave out a whole language without a word."""
        for code in keep:
            if code not in KNOWN:
                raise ValueError(
                    f"{code!r} is no language that is detected; known are {', '.join(KNOWN)} (Chinese is zh, in both"
                    " scripts)"
                )
        return keep


@functools.cache
def _detector():
    import eldc

    eldc.init()
    return eldc.instance()


def detect(texts: list[str]) -> tuple[list[str], "np.ndarray"]:
    """(code, score) of each text; `und` and 0 where there is nothing to go by. 40,000 texts a second (docs/log.md)."""
    import numpy as np

    detector, codes, scores = _detector(), [], np.zeros(len(texts), np.float32)
    for index, text in enumerate(texts):
        if len(text) > HEAD + MIDDLE:
            half = (len(text) - MIDDLE) // 2
            text = f"{text[:HEAD]}\n{text[half : half + MIDDLE]}"
        found = detector.detect_details(text)
        codes.append(found.language)
        scores[index] = found.scores.get(found.language, 0.0)
    return codes, scores


def kinds(codes: list[str]) -> "np.ndarray":
    """Which thresholds judge texts in these languages."""
    import numpy as np

    return np.array([{"en": ENGLISH, "zh": CHINESE}.get(code, OTHER) for code in codes], np.int64)


def kinds_by_script(counts: "np.ndarray") -> "np.ndarray":
    """The same without a detector, from characters by class (text.Tokens.counts): Chinese where a fifth of the
    letters are CJK, for one of them says as much as three or four letters."""
    import numpy as np

    from pipeline.data.cleaning.text_arrays import CJK, LETTER

    return np.where(counts[:, CJK] * 4 > counts[:, LETTER], CHINESE, ENGLISH)
