"""What happens to the texts of a batch between reading and deduplication, in this order:

    repair -> normal form -> address -> language -> statistics -> rules -> lines -> masks -> signature

All statistics are computed for every document before any rule is asked, and stored with its outcome, so that the ledger
can say how the rules overlap.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.cleaning.blocklist import Block, blocked, phrases
from pipeline.data.cleaning.classifiers import Perplexity, Quality, perplexities, scores
from pipeline.data.cleaning.filters import BASIC, Filters, measure
from pipeline.data.cleaning.language import Language, detect, kinds, kinds_by_script
from pipeline.data.cleaning.pii import Mask, masked
from pipeline.data.cleaning.rules import Rule, Rules, active
from pipeline.data.cleaning.text_arrays import SHINGLE, code_points, looks, normalise, shingles, tokens
from pipeline.data.cleaning.text_repair import Repair, repaired
from pipeline.data.dedup.decontaminate import Decontaminate
from pipeline.data.dedup.minhash import Dedup, signatures, signed
from pipeline.data.sources.formats import EXCERPT


@dataclass(frozen=True)
class Steps:
    """The blocks of clean's config that say what is done to a document."""

    filters: Filters = Filters()
    rules: Rules = Rules()
    language: Language = Language()
    repair: Repair = Repair()
    block: Block = Block()
    mask: Mask = Mask()
    quality: Quality = Quality()
    perplexity: Perplexity = Perplexity()
    models: Path = Path()  # where the trained models are
    dedup: Dedup = Dedup()
    decontaminate: Decontaminate | None = None
    keep_rejected: str = "excerpt"
    runs: Path | None = None  # the file of decontaminate.save


def columns(steps: Steps) -> list[str]:
    """What is measured of every document: the columns of its statistics."""
    found = [key for _, key, _ in BASIC]
    if steps.rules.use:
        from pipeline.data.cleaning.text_statistics import NAMES

        found += NAMES
    for name, used in (
        ("blocked_words", steps.block.words),
        ("quality", steps.quality.good),
        ("perplexity", steps.perplexity.like),
    ):
        found += [name] * bool(used)
    return found


def reasons(steps: Steps) -> list[tuple[str, Rule | None]]:
    """All reasons that a recipe has for leaving a document out, in the order in which the first one is given; the
    bits of `failed`. Those that are no bound on a statistic have no rule."""
    found: list[tuple[str, Rule | None]] = []
    if steps.block.urls:
        found.append(("blocked_url", None))
    if steps.language.keep:
        found += [("language", None), ("uncertain_language", None)]
    if steps.decontaminate:
        found.append(("contaminated", None))
    found += [(rule.reason, rule) for rule in active(steps.filters, steps.rules)]
    if steps.block.words:
        found.append(
            (
                "blocked_words",
                Rule(
                    "blocked_words",
                    "block.min_words",
                    columns(steps).index("blocked_words"),
                    True,
                    (steps.block.min_words - 0.5,) * 3,
                ),
            )
        )
    if steps.quality.good:
        found.append(
            (
                "low_quality",
                Rule(
                    "low_quality",
                    "quality.min_score",
                    columns(steps).index("quality"),
                    False,
                    (steps.quality.min_score,) * 3,
                ),
            )
        )
    if steps.perplexity.like:
        bounds = [
            float("nan") if bound is None else bound
            for bound in (steps.perplexity.max_en, steps.perplexity.max_zh, None)
        ]
        found.append(
            (
                "high_perplexity",
                Rule("high_perplexity", "perplexity.max_{}", columns(steps).index("perplexity"), True, tuple(bounds)),
            )
        )
    return found


def judge(raw: list[tuple[dict, str]], steps: Steps) -> None:
    """Fill in the rows of a batch of texts: text, hash and signature, or why it is left out; statistics, all rules
    that it fails, and what was changed in it: `changed` comes with what was done to read it (a dict), and leaves as
    JSON."""
    before, changed = [text for _, text in raw], [dict(row.get("changed") or {}) for row, _ in raw]
    if steps.repair != Repair():
        for index, text in enumerate(before):
            before[index], done = repaired(text, steps.repair)
            changed[index].update(dict.fromkeys(done, 1))
    points = code_points(before)
    look = looks(before, points)
    texts = list(map(normalise, before, look))
    hashed = tokens(texts, points if texts == before else None)
    shingled = shingles(hashed)

    codes, kind = None, kinds_by_script(hashed.counts)
    marks: dict[str, np.ndarray] = {}
    if steps.block.urls:
        marks["blocked_url"] = np.array([blocked(row.get("url") or "", tuple(steps.block.urls)) for row, _ in raw])
    if steps.language.keep:
        codes, sure = detect(texts)
        kind = kinds(codes)
        marks["language"] = np.array([code not in steps.language.keep for code in codes])
        marks["uncertain_language"] = ~marks["language"] & (sure < steps.language.min_confidence)

    if steps.decontaminate:
        from pipeline.data.dedup.decontaminate import load, matches

        found = matches(hashed, load(steps.runs), steps.decontaminate)
        marks["contaminated"] = np.array([match is not None for match in found])
        for (row, _), match in zip(raw, found, strict=True):
            row["matched"] = json.dumps(match) if match else None

    values = [measure(before, texts, hashed, shingled, look, steps.filters)]
    batch = kept_lines = None
    if steps.rules.use:
        from pipeline.data.cleaning import text_statistics, word_split

        batch = word_split.analyse(texts)
        short = np.array([block.short_line for block in (steps.rules.en, steps.rules.zh, steps.rules.other)])[kind]
        published, kept_lines = text_statistics.measure(
            batch, kind == 1, steps.rules.lines if "c4" in steps.rules.use else None, short
        )
        values.append(published)
    if steps.block.words:
        values.append(phrases(tuple(steps.block.words)).count(hashed)[:, None])
    if steps.quality.good:
        values.append(scores(hashed, steps.models)[:, None])
    if steps.perplexity.like:
        values.append(perplexities(hashed, steps.models)[:, None])
    measured = np.concatenate(values, axis=1).astype(np.float32)
    failed = np.stack(
        [marks[name] if rule is None else rule.fails(measured, kind) for name, rule in reasons(steps)], axis=1
    )

    final = texts
    if "c4" in steps.rules.use:
        from pipeline.data.cleaning.line_filter import without

        final = without(texts, batch, kept_lines, steps.rules.lines.citations)
    if steps.mask.use:
        final = list(final)
        for index in np.flatnonzero(~failed.any(1)).tolist():
            text, counts = masked(final[index], steps.mask)
            if counts:
                final[index] = text
                changed[index].update(counts)
    _fill(raw, texts, final, failed, shingled, steps)
    for index, (row, _) in enumerate(raw):
        if final[index] is not texts[index] and len(final[index].split("\n")) < len(texts[index].split("\n")):
            changed[index]["lines"] = texts[index].count("\n") - final[index].count("\n")
        row["statistics"] = measured[index].tobytes()
        row["kind"] = int(kind[index])
        row["language"] = codes[index] if codes else None
        row["changed"] = json.dumps(changed[index]) if changed[index] else None


def _fill(
    raw: list[tuple[dict, str]], texts: list[str], final: list[str], failed: np.ndarray, shingled: tuple, steps: Steps
) -> None:
    names, near = [name for name, _ in reasons(steps)], steps.dedup.near
    first = np.where(failed.any(1), failed.argmax(1), -1).tolist()
    masks = (failed @ (np.int64(1) << np.arange(len(names), dtype=np.int64))).tolist()
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
        row["excerpt"] = excerpt(texts[index], steps.mask)
        if first[index] >= 0:
            row.update(status="filtered", reason=names[first[index]], whole=whole(texts[index], steps))
    for index, signature in sorted(table.items()):
        row, text = raw[index][0], final[index]
        if not text.strip():
            row.update(status="filtered", reason="nothing_left", whole=whole(texts[index], steps))
            continue
        data = text.encode()
        row.update(text=text, size=len(data), hash=hashlib.blake2b(data, digest_size=16).digest(), signature=signature)


def excerpt(text: str, mask: Mask) -> str:
    """How a text begins, for the report and what was left out. What the recipe masks is masked here, too; more than
    an excerpt is read, so that nothing is cut in two before it is seen."""
    return masked(text[: 4 * EXCERPT], mask)[0][:EXCERPT]


def whole(text: str, steps: Steps) -> str | None:
    """What rejected/ keeps of a text beside its excerpt: with keep_rejected: full all of it, masked."""
    return masked(text, steps.mask)[0] if steps.keep_rejected == "full" else None


def _of(shingled: tuple[np.ndarray, np.ndarray], rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of some of the texts."""
    hashes, starts = shingled
    sizes = np.diff(starts)
    if len(rows) == len(sizes):
        return shingled
    chosen = np.zeros(len(sizes), bool)
    chosen[rows] = True
    return hashes[np.repeat(chosen, sizes)], np.concatenate(([0], np.cumsum(sizes[chosen])))
