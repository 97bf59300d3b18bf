"""What happens to the texts of a batch between reading and deduplication, in this order:

    repair -> normal form -> address -> language -> statistics -> rules -> lines -> masks -> signature

All statistics are computed for every document before any rule is applied, and stored with its outcome, so that the
report can show how the rules overlap.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.cleaning.blocklist import Block, is_blocked, load_phrases
from pipeline.data.cleaning.characters import code_points
from pipeline.data.cleaning.filters import BASIC_RULES, Filters, measure
from pipeline.data.cleaning.language import CHINESE, Language, detect, groups, groups_by_script
from pipeline.data.cleaning.normal_form import normalise, scan
from pipeline.data.cleaning.outcomes import Document
from pipeline.data.cleaning.perplexity_model import Perplexity, perplexities
from pipeline.data.cleaning.pii import Mask, mask_text
from pipeline.data.cleaning.quality_classifier import Quality, quality_scores
from pipeline.data.cleaning.rules import Rule, Rules, active_rules, bounds_of, same_bounds
from pipeline.data.cleaning.text_repair import Repair, repair_text
from pipeline.data.cleaning.token_hashes import SHINGLE, Shingles, Tokens, shingles, tokens
from pipeline.data.dedup.decontaminate import Decontaminate, find_matches, load_runs
from pipeline.data.dedup.minhash import Dedup, minhash, sign_texts
from pipeline.data.sources.formats import EXCERPT


@dataclass(frozen=True)
class Steps:
    """The blocks of clean's config that decide what is done to a document."""

    filters: Filters = Filters()
    rules: Rules = Rules()
    language: Language = Language()
    repair: Repair = Repair()
    block: Block = Block()
    mask: Mask = Mask()
    quality: Quality = Quality()
    perplexity: Perplexity = Perplexity()
    models: Path = Path()  # folder of the trained models
    dedup: Dedup = Dedup()
    decontaminate: Decontaminate | None = None
    keep_rejected: str = "excerpt"
    runs: Path | None = None  # the file of decontaminate.save_runs


def statistic_names(steps: Steps) -> list[str]:
    """What is measured of every document: the columns of its statistics."""
    names = [rule.key for rule in BASIC_RULES]
    if steps.rules.use:
        from pipeline.data.cleaning.text_statistics import NAMES

        names += NAMES
    if steps.block.words:
        names.append("blocked_words")
    if steps.quality.good:
        names.append("quality")
    if steps.perplexity.like:
        names.append("perplexity")
    return names


def reasons(steps: Steps) -> list[tuple[str, Rule | None]]:
    """All reasons that a recipe has for dropping a document, in the order in which the first one is given; the bits of
    `Outcome.failed`. Those that are not a bound on a statistic have no rule."""
    all_reasons: list[tuple[str, Rule | None]] = []
    if steps.block.urls:
        all_reasons.append(("blocked_url", None))
    if steps.language.keep:
        all_reasons += [("language", None), ("uncertain_language", None)]
    if steps.decontaminate:
        all_reasons.append(("contaminated", None))
    rules = active_rules(steps.filters, steps.rules) + _further_rules(steps)
    return all_reasons + [(rule.reason, rule) for rule in rules]


def _further_rules(steps: Steps) -> list[Rule]:
    names, rules = statistic_names(steps), []
    if steps.block.words:
        bounds = same_bounds(steps.block.min_words - 0.5)
        rules.append(Rule("blocked_words", "block.min_words", names.index("blocked_words"), True, bounds))
    if steps.quality.good:
        bounds = same_bounds(steps.quality.min_score)
        rules.append(Rule("low_quality", "quality.min_score", names.index("quality"), False, bounds))
    if steps.perplexity.like:
        bounds = bounds_of([steps.perplexity.max_en, steps.perplexity.max_zh, None])
        rules.append(Rule("high_perplexity", "perplexity.max_{}", names.index("perplexity"), True, bounds))
    return rules


def clean_batch(documents: list[Document], steps: Steps) -> None:
    """Fill in the outcomes of a batch: text, hash and signature, or why the document is dropped; its statistics, all
    rules that it fails, and what was changed in it."""
    raw = _repaired_texts(documents, steps.repair)
    points = code_points(raw)
    flags = scan(raw, points)
    texts = list(map(normalise, raw, flags))
    hashed = tokens(texts, points if texts == raw else None)
    shingled = shingles(hashed)

    failed_checks = _check_addresses(documents, steps)
    group = groups_by_script(hashed.counts)
    if steps.language.keep:
        group = _detect_languages(documents, texts, failed_checks, steps)
    if steps.decontaminate:
        _find_evaluation_sets(documents, hashed, failed_checks, steps)
    statistics = [measure(raw, texts, hashed, shingled, flags, steps.filters)]
    final = texts
    if steps.rules.use:
        published, final = _published_statistics(texts, group, steps)
        statistics.append(published)
    statistics += _model_statistics(hashed, steps)
    measured = np.concatenate(statistics, axis=1).astype(np.float32)
    failed = np.stack(
        [failed_checks[name] if rule is None else rule.fails(measured, group) for name, rule in reasons(steps)], axis=1
    )
    if steps.mask.use:
        final = _masked(documents, final, failed, steps.mask)

    _reject(documents, texts, failed, steps)
    _accept(documents, texts, final, failed, shingled, steps)
    for index, document in enumerate(documents):
        outcome = document.outcome
        if final[index] is not texts[index]:
            removed_lines = texts[index].count("\n") - final[index].count("\n")
            if removed_lines > 0:
                document.changed["lines"] = removed_lines
        outcome.statistics = measured[index].tobytes()
        outcome.kind = int(group[index])
        outcome.changed = json.dumps(document.changed) if document.changed else None


# ---- before the rules ------------------------------------------------------------------------------------------------


def _repaired_texts(documents: list[Document], repair: Repair) -> list[str]:
    texts = [document.text for document in documents]
    if repair == Repair():
        return texts
    for index, document in enumerate(documents):
        texts[index], changes = repair_text(document.text, repair)
        for change in changes:
            document.changed[change] = 1
    return texts


def _check_addresses(documents: list[Document], steps: Steps) -> dict[str, np.ndarray]:
    """Reason without a rule -> the documents that fail, bool [N]."""
    if not steps.block.urls:
        return {}
    files = tuple(steps.block.urls)
    return {"blocked_url": np.array([is_blocked(document.url or "", files) for document in documents])}


def _detect_languages(
    documents: list[Document], texts: list[str], failed_checks: dict[str, np.ndarray], steps: Steps
) -> np.ndarray:
    """Returns the group of languages of each document, int64 [N]."""
    codes, confidence = detect(texts)
    is_other = np.array([code not in steps.language.keep for code in codes])
    failed_checks["language"] = is_other
    failed_checks["uncertain_language"] = ~is_other & (confidence < steps.language.min_confidence)
    for document, code in zip(documents, codes, strict=True):
        document.outcome.language = code
    return groups(codes)


def _find_evaluation_sets(
    documents: list[Document], hashed: Tokens, failed_checks: dict[str, np.ndarray], steps: Steps
) -> None:
    matches = find_matches(hashed, load_runs(steps.runs), steps.decontaminate)
    failed_checks["contaminated"] = np.array([match is not None for match in matches])
    for document, match in zip(documents, matches, strict=True):
        document.outcome.matched = json.dumps(match) if match else None


# ---- statistics ------------------------------------------------------------------------------------------------------


def _published_statistics(texts: list[str], group: np.ndarray, steps: Steps) -> tuple[np.ndarray, list[str]]:
    """The statistics of the published rules, and the texts without the lines that C4's rules remove."""
    from pipeline.data.cleaning import text_statistics
    from pipeline.data.cleaning.line_filter import drop_lines
    from pipeline.data.cleaning.word_split import split_words

    lines = steps.rules.lines if "c4" in steps.rules.use else None
    words = split_words(texts)
    short_line = np.array([thresholds.short_line for thresholds in steps.rules.thresholds().values()])[group]
    statistics, kept_lines = text_statistics.measure(words, group == CHINESE, lines, short_line)
    if lines:
        texts = drop_lines(texts, words, kept_lines, lines.citations)
    return statistics, texts


def _model_statistics(hashed: Tokens, steps: Steps) -> list[np.ndarray]:
    """Columns [N, 1] of block list, classifier and language model."""
    columns = []
    if steps.block.words:
        columns.append(load_phrases(tuple(steps.block.words)).count(hashed))
    if steps.quality.good:
        columns.append(quality_scores(hashed, steps.models))
    if steps.perplexity.like:
        columns.append(perplexities(hashed, steps.models))
    return [column[:, None] for column in columns]


# ---- after the rules -------------------------------------------------------------------------------------------------


def _masked(documents: list[Document], texts: list[str], failed: np.ndarray, mask: Mask) -> list[str]:
    """The texts with personal data of those that fail no rule masked."""
    texts = list(texts)
    for index in np.flatnonzero(~failed.any(1)).tolist():
        text, counts = mask_text(texts[index], mask)
        if counts:
            texts[index] = text
            documents[index].changed.update(counts)
    return texts


def _reject(documents: list[Document], texts: list[str], failed: np.ndarray, steps: Steps) -> None:
    names = [name for name, _ in reasons(steps)]
    bits = (failed @ (np.int64(1) << np.arange(len(names), dtype=np.int64))).tolist()
    first = np.where(failed.any(1), failed.argmax(1), -1).tolist()
    for index, document in enumerate(documents):
        outcome = document.outcome
        outcome.failed = bits[index]
        outcome.excerpt = excerpt_of(texts[index], steps.mask)
        if first[index] >= 0:
            outcome.reject("filtered", names[first[index]])
            outcome.whole = rejected_text(texts[index], steps)


def _accept(
    documents: list[Document], texts: list[str], final: list[str], failed: np.ndarray, shingled: Shingles, steps: Steps
) -> None:
    """The final text of the documents that fail no rule, unless nothing is left of it, with hash and signature."""
    good = np.flatnonzero(~failed.any(1)).tolist()
    signatures = _signatures(good, texts, final, shingled, steps)
    for index in good:
        outcome, text = documents[index].outcome, final[index]
        if not text.strip():
            outcome.reject("filtered", "nothing_left")
            outcome.whole = rejected_text(texts[index], steps)
            continue
        encoded = text.encode()
        outcome.text, outcome.size = text, len(encoded)
        outcome.hash = hashlib.blake2b(encoded, digest_size=16).digest()
        outcome.signature = signatures.get(index)


def _signatures(
    good: list[int], texts: list[str], final: list[str], shingled: Shingles, steps: Steps
) -> dict[int, bytes]:
    """Signatures for near duplicates, from the shingles of the texts that no step has changed since."""
    near = steps.dedup.near
    if not near:
        return {}
    unchanged = [index for index in good if final[index] is texts[index] and near.shingle == SHINGLE]
    changed = sorted(set(good) - set(unchanged))
    signatures = minhash(*_of_texts(shingled, unchanged), near.bands * near.rows)
    by_index = dict(zip(unchanged, map(bytes, signatures), strict=True))
    if changed:
        signatures = sign_texts([final[index] for index in changed], near)
        by_index.update(zip(changed, map(bytes, signatures), strict=True))
    return by_index


def _of_texts(shingled: Shingles, chosen: list[int]) -> Shingles:
    """The shingles of some of the texts."""
    hashes, starts = shingled
    sizes = np.diff(starts)
    if len(chosen) == len(sizes):
        return shingled
    is_chosen = np.zeros(len(sizes), bool)
    is_chosen[chosen] = True
    return hashes[np.repeat(is_chosen, sizes)], np.concatenate(([0], np.cumsum(sizes[is_chosen])))


# ---- what is shown of a document -------------------------------------------------------------------------------------


def excerpt_of(text: str, mask: Mask) -> str:
    """The beginning of a text, for reports and rejected/, masked like the texts of the shards. More than an excerpt is
    searched, so that nothing is cut in two before it is masked."""
    return mask_text(text[: 4 * EXCERPT], mask)[0][:EXCERPT]


def rejected_text(text: str, steps: Steps) -> str | None:
    """The complete text for rejected/, masked, with keep_rejected: full; otherwise None."""
    return mask_text(text, steps.mask)[0] if steps.keep_rejected == "full" else None
