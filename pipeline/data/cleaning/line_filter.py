"""Removing lines from documents (C4's rules; rules.Lines)."""

import re

import numpy as np

from pipeline.data.cleaning.word_split import WordBatch

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]|\[编辑\]|\[來源請求\]|\[来源请求\]")
_BLANK_LINES = re.compile("\n{3,}")


def drop_lines(texts: list[str], batch: WordBatch, kept: np.ndarray, citations: bool) -> list[str]:
    """The texts without the lines that are not `kept`, bool [L]. Between the others one blank line stays where there
    were some, because blank lines separate paragraphs. `citations`: remove marks of citations, too."""
    is_blank = batch.line_last <= batch.line_first
    has_dropped = np.add.reduceat(~kept & ~is_blank, batch.lines[:-1]) > 0
    shortened = []
    for index, text in enumerate(texts):
        if has_dropped[index]:
            mine = slice(batch.lines[index], batch.lines[index + 1])
            stays = (kept[mine] | is_blank[mine]).tolist()
            lines = [line for line, line_stays in zip(text.split("\n"), stays, strict=True) if line_stays]
            text = _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")
        if citations and "[" in text:
            text = _CITATION.sub("", text)
        shortened.append(text)
    return shortened
