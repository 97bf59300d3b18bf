"""One unit of work of stage `pack`: a row group of cleaned documents that is encoded, or a range of a token file that
is imported.

A unit writes one .npz, complete or not at all: for each source its tokens, (end, bytes) of each document and its id; in
`meta` the counts, and what was bad, with place and reason.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.core import faults
from pipeline.core.errors import UserError
from pipeline.data.sources.arrow_values import open_parquet
from pipeline.data.tokens.documents import check_columns, damage_reported
from pipeline.data.tokens.import_shards import Shards, documents_in, held_out, open_shard

BATCH = 512  # documents encoded at a time, to bound memory within a row group


class Unit(NamedTuple):
    """A row group of a parquet file of documents, or tokens begin .. end of a token file."""

    split: str
    path: Path
    output: Path
    rows: int
    """Documents of a row group; 1 for a token file, whose documents are not counted yet."""
    group: int = 0
    source: str = ""
    """Of a token file: its source."""
    shards: Shards | None = None
    file_number: int = 0
    """Which of the source's files it is."""
    begin: int = 0
    end: int = 0
    key: int = 0
    """Decides, with the file number and their places, which documents are held out."""


class Documents(NamedTuple):
    """Documents of one source."""

    tokens: list[np.ndarray]
    """Of each document, without the end-of-document token."""
    bytes: list[int]
    ids: list[bytes]


_worker: dict = {}


def prepare(tokenizer: str, eos_id: int, dtype: str) -> None:
    """Once per process. The library's own threads are off, because units run in several processes."""
    from pipeline.data.tokenizer.encode import encoder
    from pipeline.data.tokenizer.fast_tokenizer import token_bytes
    from pipeline.data.tokenizer.tokenizer_folder import read_backend

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sizes = token_bytes(read_backend(tokenizer))
    _worker.update(encode=encoder(tokenizer), eos_id=eos_id, dtype=np.dtype(dtype), token_bytes=sizes)


def process(unit: Unit) -> None:
    """Encode or import the unit, and publish its .npz."""
    by_source, meta = imported(unit) if unit.shards else encoded(unit)
    _publish(unit.output, by_source, meta)


def meta_of(path: Path) -> dict:
    with np.load(path) as unit:
        return json.loads(str(unit["meta"]))


# ---- documents of stage clean ----------------------------------------------------------------------------------------


def encoded(unit: Unit) -> tuple[dict[str, Documents], dict]:
    """The tokens of a row group, by source, and the unit's meta."""
    import pyarrow

    by_source: dict[str, Documents] = {}
    bad, num_inexact, row = [], 0, 0
    with damage_reported(unit.path), open_parquet(unit.path) as table:
        check_columns(table, unit.path)
        for batch in table.iter_batches(
            batch_size=BATCH, row_groups=[unit.group], columns=["text", "source", "id"], use_threads=False
        ):
            raw_texts = batch.column(0).cast(pyarrow.large_binary()).to_pylist()
            sources, ids = batch.column(1).to_pylist(), batch.column(2).to_pylist()
            texts, origins = [], []
            for raw, source, id_ in zip(raw_texts, sources, ids, strict=True):
                text, reason = _decoded(raw, source)
                if reason:
                    place = {"split": unit.split, "file": unit.path.name, "row_group": unit.group, "row": row}
                    bad.append(place | {"reason": reason})
                else:
                    texts.append(text)
                    document_id = id_ or f"{unit.path.stem}/{unit.group}/{row}"
                    origins.append((source, len(raw), document_id.encode()))
                row += 1
            if texts:
                num_inexact += _encode(texts, origins, by_source)
    return by_source, {"bad": bad, "inexact": num_inexact}


def _decoded(raw: bytes | None, source: str | None) -> tuple[str, str | None]:
    """(text, why the document is bad)."""
    if source is None:
        return "", "no source"
    if not raw:
        return "", "no text"
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 at byte {error.start}"


def _encode(texts: list[str], origins: list[tuple[str, int, bytes]], by_source: dict[str, Documents]) -> int:
    """Append the tokens of texts with their (source, bytes, id) to `by_source`. Returns how many texts their tokens do
    not spell byte for byte."""
    token_arrays = _worker["encode"](texts)
    cumulative = np.concatenate([[0], np.cumsum(_worker["token_bytes"][np.concatenate(token_arrays)], dtype=np.int64)])
    ends = np.cumsum([0, *map(len, token_arrays)])
    spelled_bytes = np.diff(cumulative[ends]).tolist()
    num_inexact = 0
    for tokens, (source, num_bytes, id_), spelled in zip(token_arrays, origins, spelled_bytes, strict=True):
        documents = by_source.setdefault(source, Documents([], [], []))
        documents.tokens.append(tokens)
        documents.bytes.append(num_bytes)
        documents.ids.append(id_)
        num_inexact += spelled != num_bytes
    return num_inexact


# ---- token files of other tools --------------------------------------------------------------------------------------


def imported(unit: Unit) -> tuple[dict[str, Documents], dict]:
    """The tokens of a range, as they are, and the unit's meta. A document's bytes are those that its tokens spell; its
    id is the file and its first token there.

    Raises UserError for a token beyond the vocabulary.
    """
    eos_id, token_bytes = _worker["eos_id"], _worker["token_bytes"]
    shard = open_shard(unit.path, unit.shards)
    first, ends = documents_in(shard, unit.begin, unit.end, eos_id)
    begins = np.concatenate([[first], ends[:-1]])[: len(ends)]
    tokens = np.asarray(shard.tokens[first : ends[-1] if len(ends) else first])
    _check_vocabulary(unit.path, first, tokens, len(token_bytes))
    is_closed = np.zeros(len(ends), bool)  # does it end with the end-of-document token?
    not_empty = ends > begins
    is_closed[not_empty] = tokens[ends[not_empty] - 1 - first] == eos_id
    has_tokens = ends - begins - is_closed > 0
    is_heldout = held_out(begins, unit.key ^ unit.file_number, unit.shards.holdout)
    in_split = is_heldout == (unit.split == "heldout")

    chosen = in_split & has_tokens
    documents = Documents([], [], [])
    for begin, end in zip(begins[chosen].tolist(), (ends - is_closed)[chosen].tolist(), strict=True):
        document = tokens[begin - first : end - first]
        documents.tokens.append(document)
        documents.bytes.append(int(token_bytes[document].sum()))
        documents.ids.append(f"{unit.path.name}@{begin}".encode(errors="backslashreplace"))
    bad = []
    for begin in begins[in_split & ~has_tokens].tolist():
        place = {"split": unit.split, "source": unit.source, "file": unit.path.name, "token": begin}
        bad.append(place | {"reason": "no tokens"})
    meta = {"bad": bad, "inexact": 0, "closed": int((chosen & ~is_closed).sum())}
    return ({unit.source: documents} if documents.tokens else {}), meta


def _check_vocabulary(path: Path, first: int, tokens: np.ndarray, vocab_size: int) -> None:
    if not len(tokens) or (tokens.max() < vocab_size and tokens.min() >= 0):
        return
    place = int(np.flatnonzero((tokens >= vocab_size) | (tokens < 0))[0])
    raise UserError(
        f"{path}: token {first + place} is {tokens[place]}, beyond the vocabulary of {vocab_size}; its tokens are from"
        " another tokenizer than inputs.tokenizer, or have another dtype"
    )


# ---- publishing ------------------------------------------------------------------------------------------------------


def _publish(output: Path, by_source: dict[str, Documents], meta: dict) -> None:
    arrays, counts = {}, {}
    for number, (source, documents) in enumerate(sorted(by_source.items())):
        ends = np.cumsum([len(tokens) + 1 for tokens in documents.tokens], dtype=np.int64)
        stream = np.full(int(ends[-1]), _worker["eos_id"], dtype=_worker["dtype"])
        is_text = np.ones(len(stream), dtype=bool)
        is_text[ends - 1] = False
        stream[is_text] = np.concatenate(documents.tokens)
        id_lengths = [len(id_) for id_ in documents.ids]
        arrays[f"tokens{number}"] = stream
        arrays[f"documents{number}"] = np.stack([ends, np.array(documents.bytes, dtype=np.int64)], axis=1)
        arrays[f"ids{number}"] = np.frombuffer(b"".join(documents.ids), np.uint8)
        arrays[f"id_ends{number}"] = np.cumsum(id_lengths, dtype=np.int64)
        counts[source] = {
            "tokens": len(stream),
            "documents": len(documents.ids),
            "bytes": sum(documents.bytes),
            "id_bytes": sum(id_lengths),
        }
    arrays["meta"] = np.array(json.dumps({"sources": counts} | meta))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    with open(temporary, "wb") as handle:
        np.savez(handle, **arrays)
        handle.flush()
        os.fsync(handle.fileno())
    faults.point("save")
    os.replace(temporary, output)
