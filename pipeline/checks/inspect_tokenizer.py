"""What a tokenizer does to a corpus: `alma inspect tokenizer`."""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipeline.core import terminal
from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.data.tokenizer.encode import alphabet, encoder, pattern, ranks
from pipeline.data.tokenizer.fast_tokenizer import load_tokenizer
from pipeline.data.tokens.documents import documents

BATCH = 256
# tiktoken's own files, under the names by which it looks for them in its cache, in a package that ships them: no other
# download is needed.
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


def report(folder: Path, data: Artifact | None, limit: int, compare: Iterable[str]) -> dict:
    """The figures, of at most `limit` bytes of each split of `data`, the whole corpus if it is smaller. See
    docs/tokenizer.md for what each says."""
    tokenizer = load_tokenizer(folder)
    backend, encode = tokenizer.backend_tokenizer, encoder(folder)
    others, missing = references(compare)
    used = np.zeros(max(backend.get_vocab().values()) + 1, np.int64)
    by_source, by_language = _table(), _table()
    checked, lost, curve_texts, curve_bytes = 0, [], [], 0
    for split in ("train", "heldout") if data else ():
        for source, texts in _batches(data, split, limit):
            encoded = encode(texts)
            counted = np.concatenate(encoded)
            used += np.bincount(counted, minlength=len(used))
            for text, back in zip(
                texts, backend.decode_batch([ids.tolist() for ids in encoded], skip_special_tokens=False), strict=True
            ):
                checked += 1
                if back != text:
                    lost.append(text)
            if split == "heldout":
                lengths = {
                    "": [len(ids) for ids in encoded],
                    **{name: [len(other(text)) for text in texts] for name, other in others.items()},
                }
                _add(by_source, [source] * len(texts), texts, lengths)
                _add(by_language, _languages(texts), texts, lengths)
                if curve_bytes < 3_000_000:
                    curve_texts += texts
                    curve_bytes += sum(len(text.encode()) for text in texts)
    vocabulary = {index: token for token, index in backend.get_vocab().items()}
    special = set(tokenizer.all_special_ids)
    # by id: the vocabulary comes from a hash table, whose order is another in each process
    plain = [index for index in sorted(vocabulary) if index not in special]
    unused = [index for index in plain if used[index] == 0]
    spelled = {index: _spelled(backend, vocabulary, index) for index in plain}
    longest = sorted(plain, key=lambda index: (-len(spelled[index]), index))[:20]
    return {
        "folder": str(folder),
        "vocab_size": len(tokenizer),
        "encoder": encode.kind,
        "references": sorted(others),
        "references_missing": missing,
        "by_source": _rates(by_source),
        "by_language": _rates(by_language),
        "round_trip": {
            "texts": checked,
            "exact": checked - len(lost),
            **({"example": min(lost, key=len)[:200]} if lost else {}),
        },
        "tokens_seen": int(used.sum()),
        "unused": (
            {
                "tokens": len(unused),
                "of": len(plain),
                "examples": [spelled[index] for index in unused if len(spelled[index].encode()) > 1][:30],
            }
            if data
            else None
        ),
        "rare": (
            {"below_10": int((used[plain] < 10).sum()), "below_100": int((used[plain] < 100).sum())} if data else None
        ),
        "longest": [spelled[index] for index in longest],
        "splits": {
            text: [_shown(backend, ids, index) for index in range(len(ids))]
            for text, ids in zip(EXAMPLES, (ids.tolist() for ids in encode(list(EXAMPLES))), strict=True)
        },
        "curve": curve(backend, curve_texts) if curve_texts else None,
    }


def curve(backend, texts: list[str]) -> list[dict] | None:
    """Bytes per token with the first half, quarter, ... of the vocabulary: a BPE vocabulary contains that of every
    smaller training on the same text. None for another kind."""
    from tokenizers import Tokenizer

    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        return None
    vocabulary, merges = spec["model"]["vocab"], spec["model"]["merges"]
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in merges]
    results = list(dict.fromkeys("".join(pair) for pair in pairs))
    fixed = len(vocabulary) - len(results)  # bytes or characters
    size = sum(len(text.encode()) for text in texts)
    tokens = ranks(spec)
    found = []
    sizes = sorted(
        {
            fixed + len(results),
            *(number for power in range(8, 19) if fixed < (number := 2**power) < fixed + len(results)),
        }
    )
    for number in sizes[-6:]:
        kept = set(results[: number - fixed])
        if tokens is not None:
            import tiktoken

            order = alphabet()
            small = {
                token: rank
                for token, rank in (
                    (bytes(map(order.__getitem__, name)), vocabulary[name])
                    for name in [*(name for name in vocabulary if len(name) == 1 and name in order), *kept]
                )
            }
            engine = tiktoken.Encoding("curve", pat_str=pattern(spec), mergeable_ranks=small, special_tokens={})
            count = sum(len(engine.encode_ordinary(text)) for text in texts)
        else:
            spec["model"]["merges"] = [
                pair for pair in merges if "".join(pair if isinstance(pair, list) else pair.split(" ")) in kept
            ]
            left = Tokenizer.from_str(json.dumps(spec))
            count = sum(len(encoding) for encoding in left.encode_batch_fast(texts, add_special_tokens=False))
        found.append({"vocab_size": number, "bytes_per_token": round(size / count, 4)})
    return found


def references(names: Iterable[str]) -> tuple[dict, list[str]]:
    """Name -> function from text to ids, for known vocabularies; and why others are missing."""
    import tiktoken

    from pipeline.data.sources.packages import fetch

    found, missing = {}, []
    for name in names:
        if name not in REFERENCES:
            raise UserError(f"--compare {name}: unknown; there is {', '.join(REFERENCES)}")
        known, file, sha256 = REFERENCES[name]
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        try:
            os.environ["TIKTOKEN_CACHE_DIR"] = str(
                fetch(
                    PACKAGE, f"litellm/litellm_core_utils/tokenizers/{file}", sha256, where=f"--compare {name}"
                ).parent
            )
            found[name] = tiktoken.get_encoding(known).encode_ordinary
        except UserError as error:  # no network: the report goes without it, and says so
            missing.append(f"{name}: {error}")
        finally:
            (
                os.environ.pop("TIKTOKEN_CACHE_DIR", None)
                if before is None
                else os.environ.update(TIKTOKEN_CACHE_DIR=before)
            )
    return found, missing


def _table():
    return defaultdict(lambda: [0, 0, 0, defaultdict(int)])  # documents, bytes, characters, tokens by tokenizer


def _add(table, keys: list[str], texts: list[str], lengths: dict[str, list[int]]) -> None:
    for row, (key, text) in enumerate(zip(keys, texts, strict=True)):
        entry = table[key]
        entry[0] += 1
        entry[1] += len(text.encode())
        entry[2] += len(text)
        for name, counts in lengths.items():
            entry[3][name] += counts[row]


def _rates(table) -> dict:
    found = {}
    for key, (count, size, characters, tokens) in sorted(table.items(), key=lambda item: -item[1][1]):
        found[key] = {
            "documents": count,
            "bytes": size,
            "bytes_per_token": round(size / tokens[""], 4),
            "characters_per_token": round(characters / tokens[""], 4),
        }
        found[key] |= {f"{name}_bytes_per_token": round(size / number, 4) for name, number in tokens.items() if name}
    return found


def _languages(texts: list[str]) -> list[str]:
    from pipeline.data.cleaning.language import detect

    return detect(texts)[0]


def _batches(data: Artifact, split: str, limit: int):
    """(source, texts), at most `limit` bytes, in the published order."""
    held, read = defaultdict(list), 0
    for text, source, _ in documents(data, split):
        held[source].append(text)
        read += len(text.encode())
        if len(held[source]) == BATCH:
            yield source, held.pop(source)
        if read >= limit:
            break
    yield from sorted(held.items())


def _spelled(backend, vocabulary: dict[int, str], index: int) -> str:
    """The text of one token; bytes that are no character as \\xNN."""
    token, order = vocabulary[index], alphabet()
    if json.loads(backend.decoder.__getstate__())["type"] == "ByteLevel" and all(char in order for char in token):
        return bytes(map(order.__getitem__, token)).decode(errors="backslashreplace")
    return token


def _shown(backend, ids: list[int], at: int) -> str:
    return _spelled(backend, {ids[at]: backend.id_to_token(ids[at])}, ids[at])


def show(found: dict) -> None:
    """The report as text."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)
    terminal.show(f"{found['folder']}: {found['vocab_size']} tokens, encoded by {found['encoder']}")
    for title in ("by_source", "by_language"):
        if found[title]:
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for column in (
                title.removeprefix("by_"),
                "documents",
                "MB",
                "bytes per token",
                "characters per token",
                *(f"{name}: bytes per token" for name in found["references"]),
            ):
                table.add_column(column, justify="left" if column == title.removeprefix("by_") else "right")
            for key, row in found[title].items():
                rates = [
                    row["bytes_per_token"],
                    row["characters_per_token"],
                    *(row[f"{name}_bytes_per_token"] for name in found["references"]),
                ]
                table.add_row(
                    key, f"{row['documents']:,}", f"{row['bytes'] / 1e6:.2f}", *(f"{rate:.3f}" for rate in rates)
                )
            console.print(table)
    for line in found["references_missing"]:
        terminal.show(f"not compared with {line}")
    trip = found["round_trip"]
    if trip["texts"]:
        terminal.show(
            f"round trip: {trip['exact']:,} of {trip['texts']:,} documents come back exactly"
            + (f"; not so {trip['example'][:80]!r}" if "example" in trip else "")
        )
        unused = found["unused"]
        terminal.show(
            f"never used in {found['tokens_seen']:,} tokens: {unused['tokens']:,} of {unused['of']:,}; fewer than 10"
            f" times: {found['rare']['below_10']:,}, than 100: {found['rare']['below_100']:,}"
        )
        if unused["examples"]:
            terminal.show("  such as " + " ".join(repr(token) for token in unused["examples"][:12]))
    if found["curve"]:
        terminal.show(
            "compression by size (one training, prefixes of its merges): "
            + ", ".join(f"{row['vocab_size']:,}: {row['bytes_per_token']:.3f}" for row in found["curve"])
        )
    terminal.show("longest tokens: " + " ".join(repr(token[:40]) for token in found["longest"][:12]))
    for text, parts in found["splits"].items():
        terminal.show(f"  {text!r}: " + "|".join(part.replace("\n", "\\n") for part in parts))
