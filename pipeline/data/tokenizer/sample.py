"""The text that a tokenizer is trained and measured on: a bounded sample, balanced by source and language, drawn once
and kept."""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import faults
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.files import sha256_file, write_json
from pipeline.core.seeds import derive

BATCH = 1024  # documents whose languages are detected together

# A group of documents: (language, source). The language is "" unless the sample is balanced by language.
Group = tuple[str, str]


def draw(
    data: Artifact,
    split: str,
    limit: int,
    seed: int,
    path: Path,
    weights: dict[str, float] | None = None,
    balance: list[str] = ("source",),
    temperature: float | None = None,
) -> dict:
    """Write a sample of at most `limit` bytes as JSON lines {source, text}: documents in the order of a hash of their
    id, until their group has its bytes.

    A group is a source, a language, or a language within a source, as `balance` says (see `divided`). A resumed run
    keeps the sample. The last document of a group is cut between two characters. Returns the sha256 of the sample and
    bytes by source and language.
    """
    import numpy as np

    marker = path.with_suffix(".json")
    if marker.exists():
        report = json.loads(marker.read_text())
        if path.is_file() and sha256_file(path) == report["sha256"]:
            return report
    groups: dict[Group, int] = {}
    group_numbers, hashes, sizes = array("L"), array("Q"), array("Q")
    for text, source, identifier, language in _documents(data, split, "language" in balance):
        group_numbers.append(groups.setdefault((language, source), len(groups)))
        hashes.append(derive(seed, "sample", identifier))
        sizes.append(len(text.encode()))
    group_numbers = np.array(group_numbers, np.int64)
    hashes = np.array(hashes, np.uint64)
    sizes = np.array(sizes, np.int64)
    available = {group: int(sizes[group_numbers == number].sum()) for group, number in groups.items()}
    sources = sorted({source for _, source in groups})
    _check_weights(weights, sources)
    bytes_of_group = divided(available, limit, balance, temperature, weights)

    bytes_of_document = np.zeros_like(sizes)
    for group, number in groups.items():
        documents = np.flatnonzero(group_numbers == number)
        documents = documents[np.argsort(hashes[documents], kind="stable")]
        before = np.cumsum(sizes[documents]) - sizes[documents]
        bytes_of_document[documents] = np.clip(bytes_of_group[group] - before, 0, sizes[documents])
    written = np.zeros(len(groups), np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        for number, (text, source, _, _) in enumerate(_documents(data, split, False)):
            if bytes_of_document[number]:
                cut = text.encode()[: bytes_of_document[number]].decode(errors="ignore")
                written[group_numbers[number]] += len(cut.encode())
                handle.write(json.dumps({"source": source, "text": cut}, ensure_ascii=False).encode() + b"\n")
    faults.point("save")
    written_of_group = {group: int(written[number]) for group, number in groups.items()}
    report = {
        "sha256": sha256_file(path),
        "bytes": _without_zeros(_totals(written_of_group, 1)),
        "available": _totals(available, 1),
    }
    if "language" in balance:
        report["languages"] = _without_zeros(_totals(written_of_group, 0))
    write_json(marker, report)
    return report


def _check_weights(weights: dict[str, float] | None, sources: list[str]) -> None:
    unknown = sorted(set(weights or ()) - set(sources))
    if unknown:
        raise UserError(
            f"weights: the data has no source {unknown[0]!r}; it has {', '.join(sources) or 'none'}; use one of these"
        )


def _totals(sizes: dict[Group, int], part: int) -> dict[str, int]:
    """Bytes by language (part 0) or by source (part 1), sorted by name."""
    totals: dict[str, int] = {}
    for group in sorted(sizes, key=lambda group: group[part]):
        totals[group[part]] = totals.get(group[part], 0) + sizes[group]
    return totals


def _without_zeros(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size}


def _documents(data: Artifact, split: str, detect_languages: bool) -> Iterator[tuple[str, str, str, str]]:
    """(text, source, id, language); the language is "" unless it is to be detected."""
    from pipeline.data.tokens.documents import documents

    if not detect_languages:
        for document in documents(data, split):
            yield (*document, "")
        return
    batch = []
    for document in documents(data, split):
        batch.append(document)
        if len(batch) == BATCH:
            yield from _with_language(batch)
            batch = []
    yield from _with_language(batch)


def _with_language(batch: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str, str]]:
    from pipeline.data.cleaning.language import detect

    codes, _ = detect([text for text, _, _ in batch])
    for document, code in zip(batch, codes, strict=True):
        yield (*document, code)


def divided(
    available: dict[Group, int],
    limit: int,
    balance: list[str],
    temperature: float | None,
    weights: dict[str, float] | None,
) -> dict[Group, int]:
    """Bytes to take of each group: first `limit` is divided among the languages, then each language's bytes among its
    sources. What is not in `balance` keeps the proportions of the data.

    The weight of n bytes is n ** (1 / temperature) (Devlin et al., 2018, multilingual BERT, with 1/T = 0.7): 1 keeps
    the proportions of the data, more evens them out, None makes all equal.
    """

    def by_size(sizes: dict[str, int], balanced: bool) -> dict[str, float]:
        if not balanced:
            return {name: float(size) for name, size in sizes.items()}
        exponent = 1 / temperature if temperature else 0
        return {name: float(size) ** exponent for name, size in sizes.items()}

    result = {}
    languages = _totals(available, 0)
    language_bytes = shares(languages, limit, by_size(languages, "language" in balance))
    for language, language_limit in language_bytes.items():
        sources = {source: size for (name, source), size in available.items() if name == language}
        source_weights = weights
        if weights is None or "source" not in balance:
            source_weights = by_size(sources, "source" in balance)
        for source, size in shares(sources, language_limit, source_weights).items():
            result[language, source] = size
    return result


def shares(available: dict[str, int], limit: int, weights: dict[str, float] | None) -> dict[str, int]:
    """Bytes to take of each name: `limit` divided by weight, None meaning equal weights. What a name cannot fill is
    divided again among the others."""
    if weights is not None and any(value < 0 for value in weights.values()):
        raise UserError(f"weights: found {weights}; expected numbers of 0 or more")
    weight = dict.fromkeys(available, 1.0)
    if weights is not None:
        weight = {name: weights.get(name, 0.0) for name in available}
    result = dict.fromkeys(available, 0)
    unfilled = [name for name in sorted(available) if weight[name] > 0]
    rest = limit
    while unfilled:
        total = sum(weight[name] for name in unfilled)
        too_small = [name for name in unfilled if available[name] <= rest * weight[name] / total]
        if not too_small:
            for name in unfilled:
                result[name] = int(rest * weight[name] / total)
            break
        for name in too_small:
            result[name] = available[name]
            rest -= available[name]
        unfilled = [name for name in unfilled if name not in too_small]
    return result


def texts(path: Path) -> Iterator[str]:
    """The texts of a drawn sample."""
    for record in _records(path):
        yield record["text"]


def _records(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            yield json.loads(line)


def batches(path: Path, limit: int | None, count: int = 256) -> Iterator[tuple[str, list[str]]]:
    """(source, texts) of up to `count` texts of one source, of the first `limit` characters of a drawn sample."""
    pending: dict[str, list[str]] = {}
    num_characters = 0
    for record in _records(path):
        source, text = record["source"], record["text"]
        batch = pending.setdefault(source, [])
        batch.append(text)
        num_characters += len(text)
        if len(batch) == count:
            yield source, pending.pop(source)
        if limit is not None and num_characters >= limit:
            break
    yield from sorted(pending.items())
