"""`alma verify dedup`: planted near duplicates in a sample of the recipe's own corpus, and how many of them its
deduplication finds.

The sample is documents that the recipe would keep, no two of them similar. Edited copies of some are planted at
similarities from 0.3 to 0.95 (exact Jaccard similarity of the sets of token runs, computed here in plain Python). Then
the recipe's near-duplicate step runs on all of them, and what it finds is shown next to what theory expects of its
bands and rows.
"""

import math
import random
import re
from collections import defaultdict

from pipeline.core.errors import UserError
from pipeline.core.recipe import Recipe
from pipeline.core.terminal import plural, say

LEVELS = tuple(i / 20 for i in range(6, 20))  # similarities that copies aim at: 0.30, 0.35, ... 0.95
HIGH, LOW = 0.8, 0.6
LEAST_DOCUMENTS = 40  # of a language, for a judgement
SHORTEST, LONGEST = 50, 20_000  # tokens of a sampled document
TOKEN = re.compile(
    r"[\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    r"|[^\W_\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def verify(
    recipe: Recipe,
    stage: str | None,
    *,
    pairs: int = 600,
    recall: float | None = None,
    false_merges: float = 0.08,
    seed: int = 0,
) -> bool:
    """Whether recall at similarities of 0.8 and above reaches `recall`, and merges below 0.6 are at most
    `false_merges`, in each language that has enough documents.

    By default, `recall` is what theory expects of the bands at the planted similarities, less three standard errors, at
    most 0.98.
    """
    config = _clean_config(recipe, stage)
    near = config.dedup.near
    if near is None:
        raise UserError(
            "stages.clean.dedup.near is off, so there is nothing to verify; remove the key, or give it bands and rows"
        )
    generator = random.Random(seed)
    by_language = _sample(config, 2 * pairs)
    say(
        f"near duplicates: {near.bands} bands of {near.rows} rows, runs of {near.shingle} tokens, accepted from a"
        f" similarity of {near.similarity:g}"
    )
    passed, num_judged = True, 0
    for language, texts in sorted(by_language.items()):
        if len(texts) < LEAST_DOCUMENTS:
            verb = "is" if len(texts) == 1 else "are"
            say(
                f"{language}: only {plural(len(texts), 'document')} of the sample {verb} long enough for copies of a"
                " given similarity; not judged"
            )
            continue
        num_judged += 1
        planted = _Planted(language, texts, pairs, near, generator)
        planted.print_table()
        passed &= planted.judge(recall, false_merges)
    if not num_judged:
        raise UserError(
            f"no source has {LEAST_DOCUMENTS} documents of at least {SHORTEST} tokens; verify needs a larger sample of"
            " the corpus"
        )
    return passed


def _clean_config(recipe: Recipe, stage: str | None):
    for name, config in recipe.stages.items():
        if config.kind == "clean" and stage in (None, name):
            return config
    name = f" with the name {stage}" if stage else ""
    raise UserError(f"recipe {recipe.name}: has no stage of kind clean{name}; it has {', '.join(recipe.stages)}")


# ---- the sample ------------------------------------------------------------------------------------------------------


def _sample(config, number: int) -> dict[str, list[str]]:
    """Normalised texts by language (zh if most tokens are Han characters), evenly from all sources, long enough to be
    edited, no two of them similar."""
    from pipeline.data.dedup.minhash import near_duplicates

    by_language: dict[str, list[str]] = defaultdict(list)
    for name, source in config.sources.items():
        for text in _texts_of(source, name, number):
            by_language[_language(text)].append(text)
    result = {}
    for language, texts in by_language.items():
        labels = near_duplicates(texts, similarity=0.2)
        different = [text for place, text in enumerate(texts) if labels[place] == place]
        result[language] = different[:number]
    return result


def _texts_of(source, name: str, number: int):
    """At most `number` texts of a source, from its first 50 * `number` records."""
    from pipeline.data.cleaning.normal_form import normalise
    from pipeline.data.sources.formats import Bad
    from pipeline.data.sources.records import read, text_of
    from pipeline.data.sources.templates import MissingField

    num_texts = 0
    for num_records, record in enumerate(read(source, name)):
        if num_texts == number or num_records == 50 * number:
            return
        if isinstance(record, Bad):
            continue
        try:
            text = normalise(text_of(source, record))
        except MissingField:
            continue
        if SHORTEST <= len(_tokens(text)) <= LONGEST:
            num_texts += 1
            yield text


def _tokens(text: str) -> list[str]:
    return TOKEN.findall(text.lower())


def _language(text: str) -> str:
    tokens = _tokens(text)
    num_han = sum(HAN.match(token) is not None for token in tokens)
    return "zh" if 2 * num_han > len(tokens) else "not zh"


# ---- planted pairs ---------------------------------------------------------------------------------------------------


class _Planted:
    """Documents of one language with edited copies of some of them, deduplicated."""

    def __init__(self, language: str, texts: list[str], pairs: int, near, generator: random.Random):
        from pipeline.data.dedup.minhash import near_duplicates

        self.language, self.near = language, near
        if len(texts) < pairs:
            originals = [generator.choice(texts) for _ in range(pairs)]
        else:
            originals = generator.sample(texts, pairs)
        originals = list(dict.fromkeys(originals))
        copies = []
        for number, text in enumerate(originals):
            similarity = LEVELS[number % len(LEVELS)]
            copies.append(_edited(text, similarity, generator.choice(texts), near.shingle, language, generator))
        others = [text for text in texts if text not in set(originals)]
        self.num_pairs = len(originals)
        self.num_documents = len(texts) + len(copies)
        self.similarities = [_jaccard(one, other, near.shingle) for one, other in zip(originals, copies, strict=True)]
        self.labels = near_duplicates([*originals, *copies, *others], near=near).tolist()
        self.is_found = [
            self.labels[number] == self.labels[number + self.num_pairs] for number in range(self.num_pairs)
        ]

    def found_share(self, pairs: list[int]) -> float:
        return sum(self.is_found[pair] for pair in pairs) / max(1, len(pairs))

    def expected_share(self, pairs: list[int], estimated: bool = True) -> float:
        chances = [chance(self.similarities[pair], self.near, estimated) for pair in pairs]
        return sum(chances) / max(1, len(pairs))

    def print_table(self) -> None:
        say(f"\n{self.language}: {self.num_pairs} planted pairs among {self.num_documents} documents")
        say(f"  {'similarity':<12}{'pairs':>6}{'found':>8}{'bands alone':>13}{'expected':>10}")
        for tenth in range(2, 10):
            low, high = tenth / 10, (tenth + 1) / 10
            pairs = [pair for pair, similarity in enumerate(self.similarities) if low <= similarity < high]
            if pairs:
                bands_alone = self.expected_share(pairs, estimated=False)
                say(
                    f"  {low:.1f} to {high:.1f}  {len(pairs):>6}{self.found_share(pairs):>8.3f}{bands_alone:>13.3f}"
                    f"{self.expected_share(pairs):>10.3f}"
                )

    def judge(self, recall: float | None, false_merges: float) -> bool:
        similar = [pair for pair, similarity in enumerate(self.similarities) if similarity >= HIGH]
        different = [pair for pair, similarity in enumerate(self.similarities) if similarity < LOW]
        actual_recall, merged = self.found_share(similar), self.found_share(different)
        if recall is None:
            expected = self.expected_share(similar)
            standard_error = math.sqrt(max(1e-4, expected * (1 - expected)) / max(1, len(similar)))
            recall = min(0.98, expected) - 3 * standard_error
        num_unrelated = self._unrelated_merges()
        passed = actual_recall >= recall and merged <= false_merges and num_unrelated == 0
        say(
            f"  recall at {HIGH} and above {actual_recall:.3f} (bar {recall:.3f}), merged below {LOW} {merged:.3f}"
            f" (bar {false_merges:g}), unrelated documents merged {num_unrelated}: {'holds' if passed else 'FAILS'}"
        )
        return passed

    def _unrelated_merges(self) -> int:
        """Clusters with documents that are not copies of each other."""
        originals_of = defaultdict(set)
        for number, label in enumerate(self.labels):
            is_copy = self.num_pairs <= number < 2 * self.num_pairs
            originals_of[label].add(number - self.num_pairs if is_copy else number)
        return sum(len(originals) > 1 for originals in originals_of.values())


def _jaccard(one: str, other: str, size: int) -> float:
    one_runs, other_runs = _runs(one, size), _runs(other, size)
    return len(one_runs & other_runs) / len(one_runs | other_runs)


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    tokens = _tokens(text)
    return {tuple(tokens[begin : begin + size]) for begin in range(max(1, len(tokens) - size + 1))}


def _edited(text: str, similarity: float, other: str, size: int, language: str, generator: random.Random) -> str:
    """A copy of about this similarity: scattered tokens replaced, a block removed, or a block of another document
    inserted."""
    ends = [0, *(match.end() for match in TOKEN.finditer(text))]
    parts = [text[begin:end] for begin, end in zip(ends, ends[1:], strict=False)]  # each a token and what is before it
    space = "" if language == "zh" else " "
    foreign = [space + token for token in TOKEN.findall(other)]
    number, kind = len(parts), generator.randrange(3)
    if kind == 0:  # m replaced tokens far apart change size * m of n runs on both sides
        num_replaced = round(number * (1 - similarity) / (1 + similarity) / size * 1.15)
        for place in generator.sample(range(number), min(number, num_replaced)):
            parts[place] = generator.choice(foreign)
    elif kind == 1:
        length = round(number * (1 - similarity))
        begin = generator.randrange(number - length + 1)
        del parts[begin : begin + length]
    else:
        begin = generator.randrange(number + 1)
        length = round(number * (1 / similarity - 1))
        parts[begin:begin] = [generator.choice(foreign) for _ in range(length)]
    return "".join(parts).strip()


# ---- theory ----------------------------------------------------------------------------------------------------------


def chance(similarity: float, near, estimated: bool = True) -> float:
    """Probability that a pair is found: at least one band has equal rows, and, if `estimated`, the estimated similarity
    is at least `near.similarity`.

    The estimate counts equal places among bands * rows independent ones. Its joint distribution with the bands is
    exact: a band is equal or it is not.
    """
    bands, rows = near.bands, near.rows
    if not estimated or not near.similarity:
        return 1 - (1 - similarity**rows) ** bands
    least = math.ceil(near.similarity * bands * rows - 1e-9)
    # distribution of the equal places in one band, 0 .. rows
    band = [math.comb(rows, k) * similarity**k * (1 - similarity) ** (rows - k) for k in range(rows + 1)]
    incomplete_band = [*band[:-1], 0.0]
    all_pairs, without_equal_band = [1.0], [1.0]
    for _ in range(bands):
        all_pairs = _convolved(all_pairs, band)
        without_equal_band = _convolved(without_equal_band, incomplete_band)
    return sum(all_pairs[least:]) - sum(without_equal_band[least:])


def _convolved(a: list[float], b: list[float]) -> list[float]:
    result = [0.0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            result[i + j] += x * y
    return result
