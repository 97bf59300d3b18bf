"""Block lists: phrases and addresses that documents are left out for. Small lists of spam for English and Chinese
come with the program; larger ones are files of the user's."""

import functools
import re
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from pipeline.core.config import Strict, idle
from pipeline.core.errors import UserError
from pipeline.data.cleaning.text_arrays import Tokens, mixed, normalise, tokens

BUILTIN = Path(__file__).parent / "lists"
_ODD = np.uint64(0x9E3779B97F4A7C15)


class Block(Strict):
    """Documents with listed phrases, or from listed addresses, are left out. Off by default."""

    words: list[str] = []
    """Files of phrases, one a line, `#` begins a remark; `spam` stands for the lists that come with the program
    (gambling, forged papers, pills, adult services; English and Chinese). A phrase matches whole words, whatever its
    case and the signs between; Chinese matches anywhere."""
    min_words: int = Field(3, ge=1)
    """blocked_words: so many different listed phrases and more. C4 leaves a page out for one word of its list, and
    with it much of what is written about medicine and sex."""
    urls: list[str] = []
    """Files of domains (example.com, with all below it), beginnings of addresses (example.com/path) and words, one a
    line; `spam` stands for the words that come with the program."""
    url: str = "{url}"
    """Where a record has its address: a field or a template. Records without one pass."""

    @model_validator(mode="after")
    def nothing_idle(self):
        if not self.words:
            idle(self, "min_words", "counts phrases of words, and there are no words")
        if not self.urls:
            idle(self, "url", "is compared with urls, and there are no urls")
        return self


# ---- phrases ---------------------------------------------------------------------------------------------------------


class Phrases:
    """Phrases as runs of token hashes."""

    def __init__(self, listed: list[str]):
        texts = sorted({text for text in map(normalise, listed) if text})  # the form of the texts that are searched
        hashed = tokens(texts) if texts else None
        self.by_length: dict[int, np.ndarray] = {}
        first = []
        for index in range(len(texts)):
            run = hashed.hashes[hashed.starts[index] : hashed.starts[index + 1]]
            if len(run):
                first.append(run[0])
                self.by_length.setdefault(len(run), []).append(_rolled(run[None, :])[0])
        self.by_length = {
            number: np.unique(np.array(keys, np.uint64)) for number, keys in sorted(self.by_length.items())
        }
        self.begins = np.zeros(1 << 16, bool)  # a sieve: nearly all tokens begin no phrase
        if first:
            self.begins[(np.array(first, np.uint64) >> np.uint64(48)).astype(np.int64)] = True

    def count(self, batch: Tokens) -> np.ndarray:
        """How many different phrases stand in each text, int64 [N]."""
        number = len(batch.starts) - 1
        at = np.flatnonzero(self.begins[(batch.hashes >> np.uint64(48)).astype(np.int64)])
        owner = np.searchsorted(batch.starts, at, "right") - 1
        found = []
        for length, keys in self.by_length.items():
            fits = at + length <= batch.starts[owner + 1]
            begin, text = at[fits], owner[fits]
            rolled = _rolled(batch.hashes[begin[:, None] + np.arange(length)]) if len(begin) else np.zeros(0, np.uint64)
            place = np.minimum(np.searchsorted(keys, rolled), len(keys) - 1)
            hit = keys[place] == rolled
            found.append(np.stack((text[hit], place[hit] + length * (1 << 32))))
        if not found:
            return np.zeros(number, np.int64)
        pairs = np.unique(np.concatenate(found, axis=1), axis=1)
        return np.bincount(pairs[0], minlength=number)


def _rolled(runs: np.ndarray) -> np.ndarray:
    """One hash for each row, uint64 [N]."""
    value = np.zeros(len(runs), np.uint64)
    for column in range(runs.shape[1]):
        value = value * _ODD + runs[:, column]
    return mixed(value)


@functools.lru_cache(8)
def phrases(files: tuple[str, ...]) -> Phrases:
    return Phrases(_lines(files, ("spam_en.txt", "spam_zh.txt"), "block.words"))


# ---- addresses -------------------------------------------------------------------------------------------------------


@functools.lru_cache(8)
def _addresses(files: tuple[str, ...]) -> tuple[frozenset, tuple[str, ...], frozenset]:
    domains, beginnings, words = set(), [], set()
    for line in _lines(files, ("spam_urls.txt",), "block.urls"):
        line = re.sub(r"^[a-z][a-z0-9+.-]*://", "", line.lower()).removeprefix("www.")
        if "/" in line.rstrip("/"):
            beginnings.append(line)
        elif "." in line:
            domains.add(line.rstrip("/"))
        else:
            words.add(line)
    return frozenset(domains), tuple(beginnings), frozenset(words)


def blocked(address: str, files: tuple[str, ...]) -> bool:
    """Whether an address is listed: its domain or one above it, how it begins, or a word in it."""
    domains, beginnings, words = _addresses(files)
    address = re.sub(r"^[a-z][a-z0-9+.-]*://", "", address.strip().lower()).removeprefix("www.")
    host = re.split(r"[/?#]", address, maxsplit=1)[0].rpartition("@")[2].partition(":")[0]
    parts = host.split(".")
    if any(".".join(parts[i:]) in domains for i in range(len(parts))):
        return True
    return (
        address.startswith(beginnings)
        if beginnings and address.startswith(beginnings)
        else not words.isdisjoint(re.split(r"[^a-z0-9\u4e00-\u9fff]+", address))
    )


def _lines(files: tuple[str, ...], builtin: tuple[str, ...], where: str) -> list[str]:
    found = []
    for name in files:
        for path in [BUILTIN / part for part in builtin] if name == "spam" else [Path(name).expanduser()]:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                raise UserError(
                    f"{where}: {name} does not exist (in {Path.cwd()}); give a file with one entry a line, or spam"
                ) from None
            except UnicodeDecodeError:
                raise UserError(f"{where}: {name} is no UTF-8 text; give a file with one entry a line") from None
            except OSError as error:
                raise UserError(f"{where}: {name} cannot be read: {error.strerror}") from None
            found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return found
