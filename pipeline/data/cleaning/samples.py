"""A few documents of each reason: those with the smallest record ids, so that the sample is the same in any order."""

import numpy as np

SAMPLES = 5


def candidate_rows(ids: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose record ids are among the SAMPLES smallest."""
    return rows[np.isin(ids[rows], np.unique(ids[rows])[:SAMPLES])]


def merge_samples(samples: list[tuple], more: list[tuple]) -> list[tuple]:
    """Of samples (id, source, place, ...) those with the smallest ids, one per id, so that a text that was copied
    often is shown once."""
    by_id: dict[str, tuple] = {}
    for sample in sorted([*samples, *more], key=lambda sample: sample[:3]):
        by_id.setdefault(sample[0], sample)
    return list(by_id.values())[:SAMPLES]
