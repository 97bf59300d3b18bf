"""`alma inspect tokenizer`: what a tokenizer does to a corpus."""

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.checks import tables
from pipeline.core import terminal
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.data.tokenizer.encode import alphabet, encoder, pattern, ranks
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokens.documents import documents

BATCH = 256
CURVE_BYTES = 3_000_000  # of held-out text, for compression by vocabulary size
# tiktoken's own files, under the names by which it looks for them in its cache, from a package that ships them.
REFERENCES = {
    "cl100k": (
        "cl100k_base",
        "9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
        "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
    ),
    "o200k": (
        "o200k_base",
        "fb374d419588a4632f3f557e76b4b70aebbca790",
        "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
    ),
}
PACKAGE = "litellm==1.109.1"
EXAMPLES = (
    "人工智能正在改变世界。",
    "床前明月光，疑是地上霜。",
    "我们在2024年11月22日发布了v3.5版本",
    "1234567890",
    "3.14159",
    "1,000,000",
    "    return x\n",
    "https://example.com/a?b=1",
)

Tokenize = Callable[[str], list[int]]


# ---- the report ------------------------------------------------------------------------------------------------------


def report(folder: Path, data: Artifact | None, limit: int, compare: Iterable[str]) -> dict:
    """Figures of at most `limit` bytes of each split of `data`. docs/tokenizer.md says what each means."""
    tokenizer = load_tokenizer(folder)
    backend, encode = tokenizer.backend_tokenizer, encoder(folder)
    others, missing = references(compare)
    corpus = _Corpus(backend, encode, others)
    if data:
        for split in ("train", "heldout"):
            corpus.add(data, split, limit)
    vocabulary = {index: token for token, index in backend.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    # by id, because the vocabulary comes from a hash table, whose order differs between processes
    plain = [index for index in sorted(vocabulary) if index not in special]
    spelled = {index: _spelled(backend, vocabulary[index]) for index in plain}
    longest = sorted(plain, key=lambda index: (-len(spelled[index]), index))[:20]
    splits = {}
    for text, ids in zip(EXAMPLES, encode(list(EXAMPLES)), strict=True):
        splits[text] = [_spelled(backend, backend.id_to_token(index)) for index in ids.tolist()]
    return {
        "folder": str(folder),
        "vocab_size": len(tokenizer),
        "encoder": encode.kind,
        "references": sorted(others),
        "references_missing": missing,
        "by_source": corpus.by_source.figures(),
        "by_language": corpus.by_language.figures(),
        "round_trip": corpus.round_trip(),
        "tokens_seen": int(corpus.counts.sum()),
        "unused": _unused(corpus.counts, spelled) if data else None,
        "rare": _rare(corpus.counts[plain]) if data else None,
        "longest": [spelled[index] for index in longest],
        "splits": splits,
        "curve": curve(backend, corpus.curve_texts) if corpus.curve_texts else None,
    }


def _unused(counts: np.ndarray, spelled: dict[int, str]) -> dict:
    unused = [index for index in spelled if counts[index] == 0]
    examples = [spelled[index] for index in unused if len(spelled[index].encode()) > 1]
    return {"tokens": len(unused), "of": len(spelled), "examples": examples[:30]}


def _rare(counts: np.ndarray) -> dict:
    return {"below_10": int((counts < 10).sum()), "below_100": int((counts < 100).sum())}


class _Corpus:
    """Counts over the documents of a corpus."""

    def __init__(self, backend, encode, others: dict[str, Tokenize]):
        self.backend, self.encode, self.others = backend, encode, others
        self.counts = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
        self.by_source, self.by_language = _Sizes(), _Sizes()
        self.num_texts = 0
        self.changed_texts: list[str] = []
        self.curve_texts: list[str] = []
        self.curve_bytes = 0

    def add(self, data: Artifact, split: str, limit: int) -> None:
        for source, texts in _batches(data, split, limit):
            encoded = self.encode(texts)
            self.counts += np.bincount(np.concatenate(encoded), minlength=len(self.counts))
            decoded = self.backend.decode_batch([ids.tolist() for ids in encoded], skip_special_tokens=False)
            self.num_texts += len(texts)
            self.changed_texts += [text for text, back in zip(texts, decoded, strict=True) if back != text]
            if split == "heldout":
                self._add_heldout(source, texts, [len(ids) for ids in encoded])

    def _add_heldout(self, source: str, texts: list[str], num_tokens: list[int]) -> None:
        from pipeline.data.cleaning.language import detect

        lengths = {"": num_tokens}
        for name, tokenize in self.others.items():
            lengths[name] = [len(tokenize(text)) for text in texts]
        self.by_source.add([source] * len(texts), texts, lengths)
        self.by_language.add(detect(texts)[0], texts, lengths)
        if self.curve_bytes < CURVE_BYTES:
            self.curve_texts += texts
            self.curve_bytes += sum(len(text.encode()) for text in texts)

    def round_trip(self) -> dict:
        result = {"texts": self.num_texts, "exact": self.num_texts - len(self.changed_texts)}
        if self.changed_texts:
            result["example"] = min(self.changed_texts, key=len)[:200]
        return result


class _Sizes:
    """Documents, bytes, characters and tokens by source or by language. The tokenizer itself has the name ""."""

    def __init__(self):
        self.documents, self.bytes, self.characters = defaultdict(int), defaultdict(int), defaultdict(int)
        self.tokens = defaultdict(lambda: defaultdict(int))  # key -> tokenizer -> tokens

    def add(self, keys: list[str], texts: list[str], lengths: dict[str, list[int]]) -> None:
        for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
            self.documents[key] += 1
            self.bytes[key] += len(text.encode())
            self.characters[key] += len(text)
            for name, counts in lengths.items():
                self.tokens[key][name] += counts[row]

    def figures(self) -> dict:
        """Largest first."""
        result = {}
        for key in sorted(self.bytes, key=lambda key: -self.bytes[key]):
            num_tokens = self.tokens[key][""]
            figures = {
                "documents": self.documents[key],
                "bytes": self.bytes[key],
                "bytes_per_token": round(self.bytes[key] / num_tokens, 4),
                "characters_per_token": round(self.characters[key] / num_tokens, 4),
            }
            for name, number in self.tokens[key].items():
                if name:
                    figures[f"{name}_bytes_per_token"] = round(self.bytes[key] / number, 4)
            result[key] = figures
        return result


def _batches(data: Artifact, split: str, limit: int) -> Iterator[tuple[str, list[str]]]:
    """(source, texts), at most `limit` bytes, in the published order."""
    pending, num_bytes = defaultdict(list), 0
    for text, source, _ in documents(data, split):
        pending[source].append(text)
        num_bytes += len(text.encode())
        if len(pending[source]) == BATCH:
            yield source, pending.pop(source)
        if num_bytes >= limit:
            break
    yield from sorted(pending.items())


def _spelled(backend, token: str) -> str:
    """The text of a token; bytes that are not a character as \\xNN."""
    byte_of = alphabet()
    is_byte_level = json.loads(backend.decoder.__getstate__())["type"] == "ByteLevel"
    if is_byte_level and all(char in byte_of for char in token):
        return bytes(map(byte_of.__getitem__, token)).decode(errors="backslashreplace")
    return token


# ---- compression by vocabulary size ----------------------------------------------------------------------------------


def curve(backend, texts: list[str]) -> list[dict] | None:
    """Bytes per token with the complete vocabulary and with its first 2^n tokens: a BPE vocabulary contains the
    vocabularies of all smaller trainings on the same text. None for other algorithms."""
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        return None
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["model"]["merges"]]
    merged = list(dict.fromkeys("".join(pair) for pair in pairs))
    total = len(spec["model"]["vocab"])
    num_single = total - len(merged)  # bytes or characters
    sizes = [2**power for power in range(8, 19) if num_single < 2**power < total]
    num_bytes = sum(len(text.encode()) for text in texts)
    count_tokens = _count_with_tiktoken if ranks(spec) is not None else _count_with_tokenizers
    points = []
    for size in [*sizes, total][-6:]:
        num_tokens = count_tokens(spec, set(merged[: size - num_single]), texts)
        points.append({"vocab_size": size, "bytes_per_token": round(num_bytes / num_tokens, 4)})
    return points


def _count_with_tiktoken(spec: dict, merged: set[str], texts: list[str]) -> int:
    """Tokens of the texts with only these merged tokens, for byte-level BPE."""
    import tiktoken

    byte_of, vocabulary = alphabet(), spec["model"]["vocab"]
    single = [token for token in vocabulary if len(token) == 1 and token in byte_of]
    smaller = {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in [*single, *merged]}
    engine = tiktoken.Encoding("curve", pat_str=pattern(spec), mergeable_ranks=smaller, special_tokens={})
    return sum(len(engine.encode_ordinary(text)) for text in texts)


def _count_with_tokenizers(spec: dict, merged: set[str], texts: list[str]) -> int:
    from tokenizers import Tokenizer

    smaller = json.loads(json.dumps(spec))
    smaller["model"]["merges"] = []
    for pair in spec["model"]["merges"]:
        parts = pair if isinstance(pair, list) else pair.split(" ")
        if "".join(parts) in merged:
            smaller["model"]["merges"].append(pair)
    tokenizer = Tokenizer.from_str(json.dumps(smaller))
    return sum(len(encoding) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))


# ---- published vocabularies ------------------------------------------------------------------------------------------


def references(names: Iterable[str]) -> tuple[dict[str, Tokenize], list[str]]:
    """Name -> function from text to ids, for published vocabularies; and why others are missing."""
    import tiktoken

    from pipeline.data.sources.packages import fetch

    tokenizers, missing = {}, []
    for name in names:
        if name not in REFERENCES:
            raise UserError(f"--compare {name}: is not a vocabulary to compare with; use {', '.join(REFERENCES)}")
        encoding, file, sha256 = REFERENCES[name]
        member = f"litellm/litellm_core_utils/tokenizers/{file}"
        try:
            cached = fetch(PACKAGE, member, sha256, where=f"--compare {name}")
        except UserError as error:  # no network: the report says so and does not compare
            missing.append(f"{name}: {error}")
            continue
        with _tiktoken_cache(cached.parent):
            tokenizers[name] = tiktoken.get_encoding(encoding).encode_ordinary
    return tokenizers, missing


@contextlib.contextmanager
def _tiktoken_cache(folder: Path) -> Iterator[None]:
    previous = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if previous is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = previous


# ---- as text ---------------------------------------------------------------------------------------------------------


def show(figures: dict) -> None:
    """Print the report."""
    terminal.show(f"{figures['folder']}: {figures['vocab_size']} tokens, encoded by {figures['encoder']}")
    for key in ("by_source", "by_language"):
        if figures[key]:
            _print_rates(key.removeprefix("by_"), figures[key], figures["references"])
    for line in figures["references_missing"]:
        terminal.show(f"not compared with {line}")
    if figures["round_trip"]["texts"]:
        _print_corpus(figures)
    if figures["curve"]:
        points = ", ".join(f"{point['vocab_size']:,}: {point['bytes_per_token']:.3f}" for point in figures["curve"])
        terminal.show(f"bytes per token by vocabulary size (one training, prefixes of its merges): {points}")
    terminal.show("longest tokens: " + " ".join(repr(token[:40]) for token in figures["longest"][:12]))
    for text, tokens in figures["splits"].items():
        terminal.show(f"  {text!r}: " + "|".join(token.replace("\n", "\\n") for token in tokens))


def _print_rates(name: str, rows: dict, references: list[str]) -> None:
    columns = [name, "documents", "MB", "bytes per token", "characters per token"]
    table = tables.new_table(*columns, *(f"{other}: bytes per token" for other in references), text=(name,))
    for key, row in rows.items():
        rates = [row["bytes_per_token"], row["characters_per_token"]]
        rates += [row[f"{other}_bytes_per_token"] for other in references]
        sizes = [f"{row['documents']:,}", f"{row['bytes'] / 1e6:.2f}"]
        table.add_row(key, *sizes, *(f"{rate:.3f}" for rate in rates))
    tables.console().print(table)


def _print_corpus(figures: dict) -> None:
    round_trip, unused, rare = figures["round_trip"], figures["unused"], figures["rare"]
    example = f"; changed is {round_trip['example'][:80]!r}" if "example" in round_trip else ""
    terminal.show(
        f"round trip: {round_trip['exact']:,} of {round_trip['texts']:,} documents come back exactly{example}"
    )
    terminal.show(
        f"never used in {figures['tokens_seen']:,} tokens: {unused['tokens']:,} of {unused['of']:,}; fewer than 10"
        f" times: {rare['below_10']:,}, than 100: {rare['below_100']:,}"
    )
    if unused["examples"]:
        terminal.show("  such as " + " ".join(repr(token) for token in unused["examples"][:12]))
