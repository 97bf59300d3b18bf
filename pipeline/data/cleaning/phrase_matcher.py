"""Listed phrases in texts, found by the hashes of their tokens."""

import numpy as np

from pipeline.core.seeds import splitmix64
from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.token_hashes import Tokens, tokens

_ODD = np.uint64(0x9E3779B97F4A7C15)


class PhraseMatcher:
    def __init__(self, phrases: list[str]):
        texts = sorted({text for text in map(normalise, phrases) if text})  # normalised like the texts to search
        hashed = tokens(texts) if texts else None
        first_tokens = []
        keys: dict[int, list[np.uint64]] = {}
        for index in range(len(texts)):
            run = hashed.hashes[hashed.starts[index] : hashed.starts[index + 1]]
            if len(run):
                first_tokens.append(run[0])
                keys.setdefault(len(run), []).append(_run_hashes(run[None, :])[0])
        self.by_length = {length: np.unique(np.array(keys[length], np.uint64)) for length in sorted(keys)}
        self.may_begin = np.zeros(1 << 16, bool)  # by the upper bits of a token: nearly all tokens begin no phrase
        if first_tokens:
            self.may_begin[_upper_bits(np.array(first_tokens, np.uint64))] = True

    def count(self, batch: Tokens) -> np.ndarray:
        """How many different phrases each text has, int64 [N]."""
        number = len(batch.starts) - 1
        places = np.flatnonzero(self.may_begin[_upper_bits(batch.hashes)])
        owner = np.searchsorted(batch.starts, places, "right") - 1
        pairs = [np.zeros((2, 0), np.int64)]  # (text, number of the phrase)
        for length, keys in self.by_length.items():
            fits = places + length <= batch.starts[owner + 1]
            begin, text = places[fits], owner[fits]
            if not len(begin):
                continue
            hashes = _run_hashes(batch.hashes[begin[:, None] + np.arange(length)])
            phrase = np.minimum(np.searchsorted(keys, hashes), len(keys) - 1)
            is_hit = keys[phrase] == hashes
            pairs.append(np.stack((text[is_hit], phrase[is_hit] + length * (1 << 32))))
        different = np.unique(np.concatenate(pairs, axis=1), axis=1)
        return np.bincount(different[0], minlength=number)


def _upper_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(48)).astype(np.int64)


def _run_hashes(runs: np.ndarray) -> np.ndarray:
    """One hash per row, uint64 [N]."""
    hashes = np.zeros(len(runs), np.uint64)
    for column in range(runs.shape[1]):
        hashes = hashes * _ODD + runs[:, column]
    return splitmix64(hashes)
