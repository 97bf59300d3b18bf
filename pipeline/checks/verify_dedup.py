"""`alma verify dedup`: known near duplicates in a sample of the recipe's own corpus, and how many of them its
deduplication finds.

Documents that the recipe would keep are sampled, no two of them alike; edited copies of some are planted at known
similarities (exact Jaccard over sets of runs of tokens, counted here in plain Python); then the recipe's near-duplicate
step runs on all of them. What it finds stands beside what theory expects of its bands and rows.
"""

import math
import random
import re
from collections import defaultdict

from pipeline.core.errors import UserError
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import many, say

LEVELS = tuple(i / 20 for i in range(6, 20))  # 0.30, 0.35, ... 0.95: where the copies aim at
HIGH, LOW = 0.8, 0.6
TOKEN = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W_\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def prove(
    recipe: Recipe,
    stage: str | None,
    *,
    pairs: int = 600,
    recall: float | None = None,
    false_merges: float = 0.08,
    seed: int = 0,
) -> bool:
    """Whether recall at similarities of 0.8 and above reaches `recall`, and merges below 0.6 stay at or under
    `false_merges`, in each language that has enough documents.

    By default, `recall` is what theory expects of the bands at the planted similarities, less three standard errors, at
    most 0.98.
    """
    config = _config(recipe, stage)
    near = config.dedup.near
    if near is None:
        raise UserError(
            "stages.clean.dedup.near is off, so there is nothing to verify; leave the key out, or give it bands and"
            " rows"
        )
    rng = random.Random(seed)
    sampled = _sampled(config, 2 * pairs, near)
    say(
        f"near duplicates: {near.bands} bands of {near.rows} rows, runs of {near.shingle} tokens, believed from"
        f" {near.similarity:g} on"
    )
    passed, judged = True, 0
    for language, texts in sorted(sampled.items()):
        if len(texts) < 40:
            say(
                f"{language}: only {many(len(texts), 'document')} of the sample {'is' if len(texts) == 1 else 'are'}"
                " long enough for copies of known similarity; not judged"
            )
            continue
        judged += 1
        passed &= _judge(language, texts, pairs, near, recall, false_merges, rng)
    if not judged:
        raise UserError("no source has 40 documents of at least 50 tokens; verify needs a larger sample of the corpus")
    return passed


def _config(recipe: Recipe, stage: str | None):
    found = {name: config for name, config in recipe.stages.items() if config.kind == "clean" and stage in (None, name)}
    if not found:
        raise UserError(
            f"the recipe has no stage of kind clean{f' called {stage}' if stage else ''}; it has"
            f" {', '.join(recipe.stages)}"
        )
    return next(iter(found.values()))


def _sampled(config, number: int, near) -> dict[str, list[str]]:
    """Normalised texts by language (zh where most tokens are Han characters), evenly from all sources, long enough
    to be edited, no two nearly alike."""
    from pipeline.data.cleaning.normal_form import normalise
    from pipeline.data.dedup.minhash import near_duplicates
    from pipeline.data.sources.formats import Bad
    from pipeline.data.sources.records import read, text_of
    from pipeline.data.sources.templates import MissingField

    by_language: dict[str, list[str]] = defaultdict(list)
    for name, source in config.sources.items():
        taken = seen = 0
        for record in read(source, name):
            seen += 1
            if taken == number or seen == 50 * number:
                break
            try:
                text = normalise(text_of(source, record)) if not isinstance(record, Bad) else ""
            except MissingField:
                continue
            known = TOKEN.findall(text.lower())
            if 50 <= len(known) <= 20_000:
                taken += 1
                by_language["zh" if 2 * sum(map(bool, map(HAN.match, known))) > len(known) else "not zh"].append(text)
    for language, texts in by_language.items():
        labels = near_duplicates(texts, similarity=0.2)
        by_language[language] = [text for place, text in enumerate(texts) if labels[place] == place][:number]
    return by_language


def _judge(
    language: str, texts: list[str], pairs: int, near, recall: float | None, false_merges: float, rng: random.Random
) -> bool:
    from pipeline.data.dedup.minhash import near_duplicates

    bases = [rng.choice(texts) for _ in range(pairs)] if len(texts) < pairs else rng.sample(texts, pairs)
    bases = list(dict.fromkeys(bases))
    copies = [
        _edited(text, LEVELS[i % len(LEVELS)], rng.choice(texts), near.shingle, language, rng)
        for i, text in enumerate(bases)
    ]
    exact = [_jaccard(a, b, near.shingle) for a, b in zip(bases, copies, strict=True)]
    others = [text for text in texts if text not in set(bases)]
    labels = near_duplicates([*bases, *copies, *others], near=near).tolist()
    hits = [labels[i] == labels[i + len(bases)] for i in range(len(bases))]
    say(f"\n{language}: {len(bases)} planted pairs among {len(texts) + len(copies)} documents")
    say(f"  {'similarity':<12}{'pairs':>6}{'found':>8}{'bands alone':>13}{'expected':>10}")
    for begin in range(2, 10):
        inside = [i for i, similarity in enumerate(exact) if begin / 10 <= similarity < (begin + 1) / 10]
        if inside:
            alone = sum(chance(exact[i], near, believed=False) for i in inside) / len(inside)
            expected = sum(chance(exact[i], near) for i in inside) / len(inside)
            say(
                f"  {begin / 10:.1f} to {(begin + 1) / 10:.1f} "
                f" {len(inside):>6}{sum(hits[i] for i in inside) / len(inside):>8.3f}{alone:>13.3f}{expected:>10.3f}"
            )
    high, low = (
        [i for i, similarity in enumerate(exact) if test(similarity)]
        for test in (lambda s: s >= HIGH, lambda s: s < LOW)
    )
    found = sum(hits[i] for i in high) / max(1, len(high))
    expected = sum(chance(exact[i], near) for i in high) / max(1, len(high))
    bar = (
        recall
        if recall is not None
        else min(0.98, expected) - 3 * math.sqrt(max(1e-4, expected * (1 - expected)) / max(1, len(high)))
    )
    wrong = sum(hits[i] for i in low) / max(1, len(low))
    families = defaultdict(set)
    for i, label in enumerate(labels):
        families[label].add(i - len(bases) if len(bases) <= i < 2 * len(bases) else i)
    strangers = sum(len(members) > 1 for members in families.values())
    good = found >= bar and wrong <= false_merges and strangers == 0
    say(
        f"  recall at {HIGH} and above {found:.3f} (bar {bar:.3f}), merged below {LOW} {wrong:.3f} (bar"
        f" {false_merges:g}), unrelated documents merged {strangers}: {'holds' if good else 'FAILS'}"
    )
    return good


def chance(similarity: float, near, believed: bool = True) -> float:
    """Probability that a pair is found: at least one band of equal rows, and, if `believed`, an estimate of
    `near.similarity` or more.

    The estimate counts equal places of bands * rows independent ones, so its joint distribution with the bands is
    exact: a band is equal or it is not.
    """
    bands, rows = near.bands, near.rows
    if not believed or not near.similarity:
        return 1 - (1 - similarity**rows) ** bands
    least = math.ceil(near.similarity * bands * rows - 1e-9)
    # Distribution of equal places when no band is whole: each band has 0 ... rows - 1 equal places.
    one = [math.comb(rows, k) * similarity**k * (1 - similarity) ** (rows - k) for k in range(rows + 1)]
    every, none = [1.0], [1.0]
    for _ in range(bands):
        every = _convolved(every, one)
        none = _convolved(none, [*one[:-1], 0.0])
    return sum(every[least:]) - sum(none[least:])


def _convolved(a: list[float], b: list[float]) -> list[float]:
    found = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            found[i + j] += x * y
    return found


def _jaccard(a: str, b: str, size: int) -> float:
    a, b = (TOKEN.findall(text.lower()) for text in (a, b))
    a, b = ({tuple(known[i : i + size]) for i in range(max(1, len(known) - size + 1))} for known in (a, b))
    return len(a & b) / len(a | b)


def _edited(text: str, similarity: float, other: str, size: int, language: str, rng: random.Random) -> str:
    """A copy of about this similarity: scattered tokens replaced, a block cut out, or a block of another document
    put in."""
    spans = [match.span() for match in TOKEN.finditer(text)]
    ends = [0, *(end for _, end in spans)]
    pieces = [text[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]
    space = "" if language == "zh" else " "
    foreign = [space + token for token in TOKEN.findall(other)]
    number, kind = len(pieces), rng.randrange(3)
    if kind == 0:  # of n runs, m replaced tokens far apart change size * m on both sides
        for at in rng.sample(
            range(number), min(number, round(number * (1 - similarity) / (1 + similarity) / size * 1.15))
        ):
            pieces[at] = rng.choice(foreign)
    elif kind == 1:
        length = round(number * (1 - similarity))
        begin = rng.randrange(number - length + 1)
        del pieces[begin : begin + length]
    else:
        at = rng.randrange(number + 1)
        pieces[at:at] = [rng.choice(foreign) for _ in range(round(number * (1 / similarity - 1)))]
    return "".join(pieces).strip()
