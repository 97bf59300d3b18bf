"""Which language a text is in, and so which thresholds apply to it. The detector's model is in the installed package;
nothing is fetched at run time."""

import functools
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Strict, refuse_unused

if TYPE_CHECKING:  # the recipe's models load without numpy
    import numpy as np

# Groups of languages that have thresholds of their own.
ENGLISH, CHINESE, OTHER = range(3)
GROUPS = ("en", "zh", "other")
# eldc.LANGUAGES, listed here so that a recipe is checked without loading its model (200 ms); a test compares the two.
DETECTED = (
    "am ar az be bg bn ca cs da de el en es et eu fa fi fr gu he hi hr hu hy is it ja ka kn ko ku lo lt lv ml mr ms nl"
    " no or pa pl pt ro ru sk sl sq sr sv ta te th tl tr uk ur vi yo zh"
).split()
# Characters that are examined. The language of a page shows in its first lines: of 1,405 documents cut at 1,000
# characters 99.6% (English) and all (Chinese) were detected correctly. The middle of longer texts outvotes lists and
# menus at the top.
HEAD, MIDDLE = 700, 700


class Language(Strict):
    """Documents in other languages are dropped. Detected by eldc (Apache-2.0), which distinguishes 60 languages."""

    keep: list[str] = []
    """ISO 639-1 codes, such as [en, zh]; empty: nothing is detected or dropped, and the rules recognise Chinese by its
    script."""
    min_confidence: float = Field(0.0, ge=0, le=1)
    """Smallest score of the language. 0.65 was FineWeb's for English with another model, whose scores are not
    comparable; here the 5th percentile is 0.69 for English web pages, mails and manuals, and 0.91 for Chinese ones
    (docs/log.md)."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not self.keep:
            refuse_unused(self, "min_confidence", "is for detected languages, and without keep no language is detected")
        return self

    @field_validator("keep")
    @classmethod
    def _detectable(cls, keep: list[str]) -> list[str]:
        """A code that is never detected would silently drop every document in that language."""
        for code in keep:
            if code not in DETECTED:
                raise ValueError(
                    f"{code!r} is not a language that can be detected; expected {', '.join(DETECTED)} (Chinese is zh,"
                    " in both scripts)"
                )
        return keep


@functools.cache
def _detector():
    import eldc

    eldc.init()
    return eldc.instance()


def detect(texts: list[str]) -> tuple[list[str], "np.ndarray"]:
    """Language code and score, float32 [N], of each text; `und` and 0 for a text without letters. 40,000 texts a second
    (docs/log.md)."""
    import numpy as np

    detector, codes, scores = _detector(), [], np.zeros(len(texts), np.float32)
    for index, text in enumerate(texts):
        if len(text) > HEAD + MIDDLE:
            half = (len(text) - MIDDLE) // 2
            text = f"{text[:HEAD]}\n{text[half : half + MIDDLE]}"
        details = detector.detect_details(text)
        codes.append(details.language)
        scores[index] = details.scores.get(details.language, 0.0)
    return codes, scores


def groups(codes: list[str]) -> "np.ndarray":
    """Group of languages of each code, int64 [N]."""
    import numpy as np

    group_of = {"en": ENGLISH, "zh": CHINESE}
    return np.array([group_of.get(code, OTHER) for code in codes], np.int64)


def groups_by_script(counts: "np.ndarray") -> "np.ndarray":
    """The same without a detector, from characters by class (Tokens.counts): Chinese where a fifth of the letters are
    CJK, because one of them carries as much as three or four letters."""
    import numpy as np

    from pipeline.data.cleaning.characters import CJK, LETTER

    return np.where(counts[:, CJK] * 4 > counts[:, LETTER], CHINESE, ENGLISH)
