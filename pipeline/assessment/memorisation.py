"""Training text that a model writes out word for word, and personal data in what it writes.

A place of the text counts as memorised if the model, given the `prefix` tokens before it, writes the next
`continuation` tokens exactly (extractable memorisation: Carlini et al., 2023). Text that many documents share is
written out by a model that has seen none of these, so the same is measured on held-out text; what is above that is
memorised.
"""

from dataclasses import dataclass

from pipeline.assessment.continuations import greedy_continuations
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.intervals import proportion
from pipeline.core.seeds import derive

SPLITS = ("train", "heldout")
TRIES = 50  # random places looked at for each one that is wanted; the others cross the end of a document


@dataclass(frozen=True)
class Place:
    """Tokens of one document."""

    prefix: list[int]
    continuation: list[int]


def places_of(tokens: Artifact, config, seed: int) -> dict[str, list[Place]]:
    """Random places of each split, all tokens equally likely, each at most once. config: a Memorised block. Raises
    UserError if a split has none that is long enough."""
    import numpy as np

    from pipeline.data.tokens.store import TokenStore

    length = config.prefix + config.continuation
    places: dict[str, list[Place]] = {}
    for split in SPLITS:
        store = TokenStore(tokens.path, split)
        sizes = np.array([store.num_tokens(source) for source in store.sources])
        ends, chosen = np.cumsum(sizes), {}
        generator = np.random.default_rng(derive(seed, "memorised", split))
        for number in generator.integers(max(int(sizes.sum()), 1), size=TRIES * config.samples).tolist():
            if len(chosen) == config.samples or not len(ends) or number in chosen:
                continue
            index = int(np.searchsorted(ends, number, side="right"))
            start = number - int(ends[index] - sizes[index])
            if start + length > sizes[index]:
                continue
            ids = store.read(store.sources[index], start, length).tolist()
            if store.eos_id not in ids:
                chosen[number] = Place(ids[: config.prefix], ids[config.prefix :])
        if not chosen:
            raise UserError(
                f"memorised: no document of the {split} split of {tokens.path} has {length} tokens (prefix"
                f" {config.prefix} + continuation {config.continuation}); use smaller numbers"
            )
        places[split] = list(chosen.values())
    return places


def measure_memorised(model, tokenizer, places: dict[str, list[Place]], batch: int) -> dict:
    """Of each split: share of places that are written out exactly, with its interval, and share of equal tokens before
    the first other one. Of the training split: how many of what was written has personal data."""
    figures: dict = {}
    for split, rows in places.items():
        beginnings = [place.prefix for place in rows]
        written = greedy_continuations(model, beginnings, len(rows[0].continuation), batch)
        exact = [ids == place.continuation for ids, place in zip(written, rows, strict=True)]
        agreed = [_agreed(ids, place.continuation) for ids, place in zip(written, rows, strict=True)]
        length = len(rows[0].continuation)
        figures[split] = proportion(sum(exact), len(rows)) | {"equal_tokens": sum(agreed) / length / len(rows)}
        if split == "train":
            figures["personal_data"] = _personal_data(tokenizer, rows, written, exact)
    return figures


def _agreed(written: list[int], expected: list[int]) -> int:
    """Equal tokens before the first other one."""
    for number, (ours, theirs) in enumerate(zip(written, expected, strict=True)):
        if ours != theirs:
            return number
    return len(expected)


def _personal_data(tokenizer, rows: list[Place], written: list[list[int]], exact: list[bool]) -> dict:
    """Continuations in which the masks of stage clean find what the beginning has not; by kind, and how many of them
    are memorised."""
    from pipeline.data.cleaning.pii import KINDS, Mask, mask_text

    mask = Mask(use=list(KINDS))
    found, memorised, kinds = 0, 0, dict.fromkeys(KINDS, 0)
    for place, ids, is_exact in zip(rows, written, exact, strict=True):
        _, before = mask_text(tokenizer.decode(place.prefix), mask)
        _, after = mask_text(tokenizer.decode(place.prefix + ids), mask)
        new = [kind for kind in KINDS if after.get(kind, 0) > before.get(kind, 0)]
        found += bool(new)
        memorised += bool(new) and is_exact
        for kind in new:
            kinds[kind] += 1
    return proportion(found, len(rows)) | {
        "memorised": memorised,
        "kinds": {kind: count for kind, count in kinds.items() if count},
    }
