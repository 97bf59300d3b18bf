"""The text that a tokenizer is trained and measured on: a bounded sample, balanced by source and language, drawn
once and kept."""

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
    id, until their group's share is full.

    A group is a source, a language, or a language's part of a source, as `balance` says (see `divided`). Kept for a
    resumed run. The last document of a share is cut at a whole character.
    """
    import numpy as np

    marker = path.with_suffix(".json")
    if marker.exists():
        known = json.loads(marker.read_text())
        if path.is_file() and sha256_file(path) == known["sha256"]:
            return known
    groups: dict[tuple[str, str], int] = {}
    group, keys, sizes = array("L"), array("Q"), array("Q")
    for text, source, identifier, language in _documents(data, split, "language" in balance):
        group.append(groups.setdefault((language, source), len(groups)))
        keys.append(derive(seed, "sample", identifier))
        sizes.append(len(text.encode()))
    group, keys, sizes = np.array(group, np.int64), np.array(keys, np.uint64), np.array(sizes, np.int64)
    available = {name: int(sizes[group == number].sum()) for name, number in groups.items()}
    sources = sorted({source for _, source in groups})
    if weights is not None and set(weights) - set(sources):
        raise UserError(
            f"weights: the data has no source {sorted(set(weights) - set(sources))[0]!r}; it has"
            f" {', '.join(sources) or 'none'}"
        )
    share = divided(available, limit, balance, temperature, weights)
    allowed = np.zeros_like(sizes)
    for name, number in groups.items():
        rows = np.flatnonzero(group == number)
        rows = rows[np.argsort(keys[rows], kind="stable")]
        allowed[rows] = np.clip(share[name] - (np.cumsum(sizes[rows]) - sizes[rows]), 0, sizes[rows])
    taken = np.zeros(len(groups), np.int64)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        for row, (text, source, _, _) in enumerate(_documents(data, split, False)):
            if allowed[row]:
                cut = text.encode()[: allowed[row]].decode(errors="ignore")
                taken[group[row]] += len(cut.encode())
                handle.write(json.dumps({"source": source, "text": cut}, ensure_ascii=False).encode() + b"\n")
    faults.point("save")
    known = {
        "sha256": sha256_file(path),
        "bytes": _summed(groups, taken, 1),
        "available": {
            source: sum(size for (_, name), size in available.items() if name == source) for source in sources
        },
    }
    if "language" in balance:
        known["languages"] = _summed(groups, taken, 0)
    write_json(marker, known)
    return known


def _summed(groups: dict, taken, part: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, number in groups.items():
        found[name[part]] = found.get(name[part], 0) + int(taken[number])
    return {name: size for name, size in sorted(found.items()) if size}


def _documents(data: Artifact, split: str, languages: bool) -> Iterator[tuple[str, str, str, str]]:
    """(text, source, id, language), the last "" unless it is wanted."""
    from pipeline.data.tokens.documents import documents

    if not languages:
        yield from ((*document, "") for document in documents(data, split))
        return
    from pipeline.data.cleaning.language import detect

    def named(held):
        codes, _ = detect([text for text, _, _ in held])
        yield from ((*document, code) for document, code in zip(held, codes, strict=True))

    held = []
    for document in documents(data, split):
        held.append(document)
        if len(held) == BATCH:
            yield from named(held)
            held = []
    yield from named(held)


def divided(
    available: dict[tuple[str, str], int],
    limit: int,
    balance: list[str],
    temperature: float | None,
    weights: dict[str, float] | None,
) -> dict[tuple[str, str], int]:
    """Bytes to take of each group (language, source). Languages first, then within each the sources; what is not in
    `balance` is taken as it comes.

    The weight of a part of n bytes is n ** (1 / temperature) (Devlin et al., 2018, multilingual BERT, with 1/T = 0.7):
    1 leaves shares as they are in the data, more evens them out, none makes them equal.
    """

    def parts(part: int, kind: str, names: dict[tuple[str, str], int], limit: int) -> dict[str, int]:
        size = _totals(names, part)
        if kind not in balance:
            given = {name: float(number) for name, number in size.items()}
        elif kind == "source" and weights is not None:
            given = weights
        else:
            given = {name: float(number) ** (1 / temperature if temperature else 0) for name, number in size.items()}
        return shares(size, limit, given)

    found = {}
    for language, bytes_ in parts(0, "language", available, limit).items():
        inside = {name: size for name, size in available.items() if name[0] == language}
        for source, share in parts(1, "source", inside, bytes_).items():
            found[language, source] = share
    return found


def _totals(names: dict[tuple[str, str], int], part: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in names.items():
        found[name[part]] = found.get(name[part], 0) + size
    return found


def shares(available: dict[str, int], limit: int, weights: dict[str, float] | None) -> dict[str, int]:
    """Bytes to take of each source: `limit` divided by weight, and what a source cannot fill divided again among the
    others."""
    weight = {source: 1.0 if weights is None else weights.get(source, 0.0) for source in available}
    if weights is not None and any(value < 0 for value in weights.values()):
        raise UserError(f"weights: must not be negative, found {weights}")
    share = dict.fromkeys(available, 0)
    open_ones = [source for source in sorted(available) if weight[source] > 0]
    left = limit
    while open_ones:
        total = sum(weight[source] for source in open_ones)
        full = [source for source in open_ones if available[source] <= left * weight[source] / total]
        if not full:
            return share | {source: int(left * weight[source] / total) for source in open_ones}
        for source in full:
            share[source] = available[source]
            left -= available[source]
        open_ones = [source for source in open_ones if source not in full]
    return share


def texts(path: Path) -> Iterator[str]:
    """The texts of a drawn sample."""
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            yield json.loads(line)["text"]


def batches(path: Path, limit: int | None, count: int = 256) -> Iterator[tuple[str, list[str]]]:
    """(source, texts) of one source each, of the first `limit` characters of a drawn sample."""
    held: dict[str, list[str]] = {}
    read = 0
    with open(path, encoding="utf-8", newline="\n") as handle:
        for line in handle:
            record = json.loads(line)
            batch = held.setdefault(record["source"], [])
            batch.append(record["text"])
            read += len(record["text"])
            if len(batch) == count:
                yield record["source"], held.pop(record["source"])
            if limit is not None and read >= limit:
                break
    yield from sorted(held.items())
