"""Lines taken out of documents (C4's rules; pipeline/data/cleaning/rules.py: Lines)."""

import re

import numpy as np

from pipeline.data.cleaning.word_split import Batch

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]|\[编辑\]|\[來源請求\]|\[来源请求\]")
_BLANK = re.compile("\n{3,}")


def without(texts: list[str], batch: Batch, kept: np.ndarray, citations: bool) -> list[str]:
    """The texts without the lines that are not kept, bool [L]. Blank lines between what is left stay, one at a time,
    for they part paragraphs."""
    blank = batch.line_last <= batch.line_first
    some_gone = np.add.reduceat(~kept & ~blank, batch.lines[:-1]) > 0
    found = []
    for index, text in enumerate(texts):
        if some_gone[index]:
            first = batch.lines[index]
            keep = (kept | blank)[first : batch.lines[index + 1]].tolist()
            text = "\n".join(line for line, keeping in zip(text.split("\n"), keep, strict=True) if keeping)
            text = _BLANK.sub("\n\n", text).strip("\n")
        if citations and "[" in text:
            text = _CITATION.sub("", text)
        found.append(text)
    return found
