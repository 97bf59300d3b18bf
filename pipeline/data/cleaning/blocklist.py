"""Block lists: phrases and addresses for which documents are dropped. Small spam lists for English and Chinese are
included; larger ones are files of the user."""

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from pipeline.core.config import Strict, refuse_unused
from pipeline.core.errors import UserError

if TYPE_CHECKING:  # the recipe's models load without numpy
    from pipeline.data.cleaning.phrase_matcher import PhraseMatcher

BUILTIN = Path(__file__).parent / "lists"


class Block(Strict):
    """Drop documents with listed phrases, or from listed addresses. Off by default."""

    words: list[str] = []
    """Files of phrases, one per line, `#` begins a comment; `spam` means the included lists (gambling, forged papers,
    pills, adult services; English and Chinese). A phrase matches whole words, whatever their case and the punctuation
    between them; Chinese matches anywhere."""
    min_words: int = Field(3, ge=1)
    """blocked_words: this many different listed phrases or more. C4 drops a page for one word of its list, and with it
    much of what is written about medicine and sex."""
    urls: list[str] = []
    """Files of domains (example.com, with its subdomains), beginnings of addresses (example.com/path) and words, one
    per line; `spam` means the included words."""
    url: str = "{url}"
    """The address of a record: a field or a template. Records without one pass."""

    @model_validator(mode="after")
    def no_unused_keys(self):
        if not self.words:
            refuse_unused(self, "min_words", "counts phrases of words, and there are no words")
        if not self.urls:
            refuse_unused(self, "url", "is compared with urls, and there are no urls")
        return self


@functools.lru_cache(8)
def load_phrases(files: tuple[str, ...]) -> "PhraseMatcher":
    from pipeline.data.cleaning.phrase_matcher import PhraseMatcher

    return PhraseMatcher(_read_lines(files, ("spam_en.txt", "spam_zh.txt"), "block.words"))


# ---- addresses -------------------------------------------------------------------------------------------------------


_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://")


@functools.lru_cache(8)
def _load_addresses(files: tuple[str, ...]) -> tuple[frozenset, tuple[str, ...], frozenset]:
    domains, beginnings, words = set(), [], set()
    for line in _read_lines(files, ("spam_urls.txt",), "block.urls"):
        line = _SCHEME.sub("", line.lower()).removeprefix("www.")
        if "/" in line.rstrip("/"):
            beginnings.append(line)
        elif "." in line:
            domains.add(line.rstrip("/"))
        else:
            words.add(line)
    return frozenset(domains), tuple(beginnings), frozenset(words)


def is_blocked(address: str, files: tuple[str, ...]) -> bool:
    """Whether an address is listed: its domain or one above it, its beginning, or a word in it."""
    domains, beginnings, words = _load_addresses(files)
    address = _SCHEME.sub("", address.strip().lower()).removeprefix("www.")
    host = re.split(r"[/?#]", address, maxsplit=1)[0].rpartition("@")[2].partition(":")[0]
    parts = host.split(".")
    if any(".".join(parts[i:]) in domains for i in range(len(parts))):
        return True
    if address.startswith(beginnings):
        return True
    return not words.isdisjoint(re.split(r"[^a-z0-9\u4e00-\u9fff]+", address))


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_lines(files: tuple[str, ...], builtin: tuple[str, ...], where: str) -> list[str]:
    """The entries of list files; raises UserError, which begins with `where`."""
    entries = []
    for name in files:
        paths = [BUILTIN / file for file in builtin] if name == "spam" else [Path(name).expanduser()]
        for path in paths:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except FileNotFoundError:
                raise UserError(
                    f"{where}: {name} does not exist (in {Path.cwd()}); give a file with one entry per line, or spam"
                ) from None
            except UnicodeDecodeError:
                raise UserError(f"{where}: {name} is not UTF-8 text; give a file with one entry per line") from None
            except OSError as error:
                raise UserError(f"{where}: {name} cannot be read: {error.strerror}") from None
            entries += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return entries
