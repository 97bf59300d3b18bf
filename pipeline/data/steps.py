"""What happens to the texts of a batch between reading and deduplication, in this order:

    repair -> normal form -> address -> language -> statistics -> rules -> lines -> masks -> signature

All statistics are computed for every document before any rule is asked, and stored with its outcome, so that the ledger can say how the rules overlap.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np

from pipeline.data.dedup import Dedup, Near, signatures, signed
from pipeline.data.filters import Filters, measure
from pipeline.data.language import Language, detect, kinds, kinds_by_script
from pipeline.data.rules import Rules, active
from pipeline.data.sources import EXCERPT
from pipeline.data.text import SHINGLE, looks, normalise, shingles, tokens


@dataclass(frozen=True)
class Steps:
    """The blocks of clean's config that say what is done to a document."""

    filters: Filters = Filters()
    rules: Rules = Rules()
    language: Language = Language()
    dedup: Dedup = Dedup()


def extra(steps: Steps) -> list[str]:
    """Reasons beside the rules' bounds, in the order in which they are given; the bits of `failed` are these, then rules.active."""
    return ["language", "uncertain_language"]


def judge(raw: list[tuple[dict, str]], steps: Steps) -> None:
    """Fill in the rows of a batch of texts: text, hash and signature, or why it is left out; statistics, and all rules that it fails."""
    before = [text for _, text in raw]
    look = looks(before)
    texts = list(map(normalise, before, look))
    hashed = tokens(texts)
    shingled = shingles(hashed)

    reasons = extra(steps)
    failed = np.zeros((len(texts), len(reasons)), bool)
    codes, kind = None, kinds_by_script(hashed.counts)
    if steps.language.keep:
        codes, scores = detect(texts)
        kind = kinds(codes)
        failed[:, 0] = [code not in steps.language.keep for code in codes]
        failed[:, 1] = ~failed[:, 0] & (scores < steps.language.min_confidence)

    values = measure(before, texts, hashed, shingled, look)
    batch = kept_lines = None
    if steps.rules.use:
        from pipeline.data import statistics, words

        batch = words.analyse(texts)
        short = np.array([block.short_line for block in (steps.rules.en, steps.rules.zh, steps.rules.other)])[kind]
        published, kept_lines = statistics.measure(batch, kind == 1, steps.rules.lines if "c4" in steps.rules.use else None, short)
        values = np.concatenate((values, published), axis=1)
    rules = active(steps.filters, steps.rules)
    failed = np.concatenate((failed, np.stack([rule.fails(values, kind) for rule in rules], axis=1)), axis=1)
    reasons += [rule.reason for rule in rules]

    final = texts
    if "c4" in steps.rules.use:
        from pipeline.data.lines import without

        final = without(texts, batch, kept_lines, steps.rules.lines.citations)
    _fill(raw, texts, final, failed, reasons, shingled, steps.dedup.near)
    stored = values.astype(np.float32)
    for index, (row, _) in enumerate(raw):
        row["statistics"] = stored[index].tobytes()
        row["kind"] = int(kind[index])
        row["language"] = codes[index] if codes else None


def _fill(raw: list[tuple[dict, str]], texts: list[str], final: list[str], failed: np.ndarray, reasons: list[str], shingled: tuple, near: Near | None) -> None:
    first = np.where(failed.any(1), failed.argmax(1), -1).tolist()
    masks = (failed @ (np.int64(1) << np.arange(len(reasons), dtype=np.int64))).tolist()
    good = [i for i in range(len(raw)) if first[i] < 0]
    table: dict[int, bytes | None] = dict.fromkeys(good)
    if near:
        same = [i for i in good if final[i] is texts[i] and near.shingle == SHINGLE]
        table.update(zip(same, map(bytes, signatures(*_of(shingled, same), near.bands * near.rows)), strict=True))
        others = sorted(set(good) - set(same))
        if others:
            table.update(zip(others, map(bytes, signed([final[i] for i in others], near)), strict=True))
    for index, (row, _) in enumerate(raw):
        row["failed"] = masks[index]
        row["excerpt"] = texts[index][:EXCERPT]
        if first[index] >= 0:
            row.update(status="filtered", reason=reasons[first[index]])
    for index, signature in sorted(table.items()):
        row, text = raw[index][0], final[index]
        if not text.strip():
            row.update(status="filtered", reason="nothing_left")
            continue
        data = text.encode()
        row.update(text=text, size=len(data), hash=hashlib.blake2b(data, digest_size=16).digest(), signature=signature)


def _of(shingled: tuple[np.ndarray, np.ndarray], rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of some of the texts."""
    hashes, starts = shingled
    sizes = np.diff(starts)
    if len(rows) == len(sizes):
        return shingled
    chosen = np.zeros(len(sizes), bool)
    chosen[rows] = True
    return hashes[np.repeat(chosen, sizes)], np.concatenate(([0], np.cumsum(sizes[chosen])))
