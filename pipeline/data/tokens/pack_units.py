"""One unit of work of stage `pack`: a row group of cleaned documents that is encoded, or a stretch of a token file that
is taken over.

A unit leaves one .npz, whole or not at all: for each source its tokens, (end, bytes) of each document and its id; in
`meta` the counts, and what is bad, with place and reason.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core import faults
from pipeline.core.errors import UserError
from pipeline.data.sources.arrow_values import open_parquet
from pipeline.data.tokens.documents import check_columns, readable
from pipeline.data.tokens.import_shards import Shards

BATCH = 512  # documents encoded at a time: bounds memory inside a row group


class Unit(NamedTuple):
    """A row group of a parquet file of documents, or tokens begin .. end of a file of tokens."""

    split: str
    path: Path
    output: Path
    rows: int
    """Documents, as far as they are known before."""
    group: int = 0
    source: str = ""
    """Of a file of tokens: its source, ..."""
    shards: Shards | None = None
    number: int = 0
    """... which of the source's files it is, ..."""
    begin: int = 0
    end: int = 0
    key: int = 0
    """... and what its held-out documents are drawn with."""


_worker: dict = {}


def prepare(tokenizer: str, eos_id: int, dtype: str) -> None:
    """Once in a process. Processes are the parallelism here, so the library's own threads stay off."""
    from pipeline.data.tokenizer.encode import encoder
    from pipeline.data.tokenizer.tokenizer_folder import read_backend
    from pipeline.data.tokens.store import token_bytes

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = token_bytes(read_backend(tokenizer))
    _worker.update(encode=encoder(tokenizer), eos_id=eos_id, dtype=np.dtype(dtype), sizes=sizes)


def make(unit: Unit) -> None:
    parts, meta = adopted(unit) if unit.shards else encoded(unit)
    _publish(unit.output, parts, meta)


def meta_of(path: Path) -> dict:
    with np.load(path) as unit:
        return json.loads(str(unit["meta"]))


class Part(NamedTuple):
    """Documents of one source."""

    tokens: list[np.ndarray]
    """Of each, its end-of-document token left out."""
    bytes: list[int]
    names: list[bytes]


def encoded(unit: Unit) -> tuple[dict[str, Part], dict]:
    """Text to tokens."""
    import pyarrow

    parts: dict[str, Part] = {}
    bad, inexact, row = [], 0, 0
    with readable(unit.path), open_parquet(unit.path) as opened:
        check_columns(opened, unit.path)
        for batch in opened.iter_batches(
            batch_size=BATCH, row_groups=[unit.group], columns=["text", "source", "id"], use_threads=False
        ):
            texts, good = [], []
            for raw, source, id_ in zip(
                batch.column(0).cast(pyarrow.large_binary()).to_pylist(),
                batch.column(1).to_pylist(),
                batch.column(2).to_pylist(),
                strict=True,
            ):
                text, reason = _text(raw, source)
                if reason:
                    bad.append(
                        {
                            "split": unit.split,
                            "file": unit.path.name,
                            "row_group": unit.group,
                            "row": row,
                            "reason": reason,
                        }
                    )
                else:
                    texts.append(text)
                    good.append((source, len(raw), (id_ or f"{unit.path.stem}/{unit.group}/{row}").encode()))
                row += 1
            if not texts:
                continue
            arrays = _worker["encode"](texts)
            spelled = np.concatenate([[0], np.cumsum(_worker["sizes"][np.concatenate(arrays)], dtype=np.int64)])
            spelled = np.diff(spelled[np.cumsum([0, *map(len, arrays)])])
            for array, (source, size, name), spells in zip(arrays, good, spelled.tolist(), strict=True):
                part = parts.setdefault(source, Part([], [], []))
                part.tokens.append(array)
                part.bytes.append(size)
                part.names.append(name)
                inexact += spells != size
    return parts, {"bad": bad, "inexact": inexact}


def _text(raw: bytes | None, source: str | None) -> tuple[str, str | None]:
    if source is None:
        return "", "no source"
    if not raw:
        return "", "no text"
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"


def adopted(unit: Unit) -> tuple[dict[str, Part], dict]:
    """Tokens as they are. Their bytes are those that they spell; a document's id is its file and its first token there.

    Raises UserError for a token beyond the vocabulary.
    """
    from pipeline.data.tokens.import_shards import documents_in, held_out, open_shard

    eos_id, sizes = _worker["eos_id"], _worker["sizes"]
    shard = open_shard(unit.path, unit.shards)
    first, ends = documents_in(shard, unit.begin, unit.end, eos_id)
    begins = np.concatenate([[first], ends[:-1]])[: len(ends)]
    tokens = np.asarray(shard.tokens[first : ends[-1] if len(ends) else first])
    if len(tokens) and (tokens.max() >= len(sizes) or tokens.min() < 0):
        place = int(np.flatnonzero((tokens >= len(sizes)) | (tokens < 0))[0])
        raise UserError(
            f"{unit.path}: token {first + place} is {tokens[place]}, beyond the vocabulary of {len(sizes)}; "
            "its tokens belong to another tokenizer than inputs.tokenizer, or are of another dtype"
        )
    closed = np.zeros(len(ends), bool)
    full = ends > begins
    closed[full] = tokens[ends[full] - 1 - first] == eos_id
    empty = ends - begins - closed == 0
    mine = held_out(begins, unit.key ^ unit.number, unit.shards.holdout) == (unit.split == "heldout")
    part = Part([], [], [])
    for begin, end in zip(begins[mine & ~empty].tolist(), (ends - closed)[mine & ~empty].tolist(), strict=True):
        ids = tokens[begin - first : end - first]
        part.tokens.append(ids)
        part.bytes.append(int(sizes[ids].sum()))
        part.names.append(f"{unit.path.name}@{begin}".encode(errors="backslashreplace"))
    bad = [
        {"split": unit.split, "source": unit.source, "file": unit.path.name, "token": int(place), "reason": "no tokens"}
        for place in begins[mine & empty]
    ]
    return ({unit.source: part} if part.tokens else {}), {
        "bad": bad,
        "inexact": 0,
        "closed": int((mine & ~empty & ~closed).sum()),
    }


def _publish(output: Path, parts: dict[str, Part], meta: dict) -> None:
    arrays, counts = {}, {}
    for number, (source, part) in enumerate(sorted(parts.items())):
        ends = np.cumsum([len(ids) + 1 for ids in part.tokens], dtype=np.int64)
        tokens = np.full(int(ends[-1]), _worker["eos_id"], dtype=_worker["dtype"])
        text = np.ones(len(tokens), dtype=bool)
        text[ends - 1] = False
        tokens[text] = np.concatenate(part.tokens)
        arrays[f"tokens{number}"] = tokens
        arrays[f"documents{number}"] = np.stack([ends, np.array(part.bytes, dtype=np.int64)], axis=1)
        arrays[f"ids{number}"] = np.frombuffer(b"".join(part.names), np.uint8)
        arrays[f"id_ends{number}"] = np.cumsum([len(name) for name in part.names], dtype=np.int64)
        counts[source] = {
            "tokens": len(tokens),
            "documents": len(part.names),
            "bytes": sum(part.bytes),
            "id_bytes": sum(map(len, part.names)),
        }
    arrays["meta"] = np.array(json.dumps({"sources": counts, **meta}))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    with open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
        handle.flush()
        os.fsync(handle.fileno())
    faults.point("save")
    os.replace(temporary, output)
