"""Files of data with anything changed in them, read in every way that a stage reads them.

    python tests/helpers/reader_fuzzer.py 0 2000        # prints the seeds that end in an exception, and the peak of memory

The rule (correctness 29): a bad record or a UserError, never another exception, 20 s or 1 GB.
"""

import copy
import faulthandler
import gzip
import io
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.data.chat.chat_sources import ChatSource, PreferenceSource, PromptSource
from pipeline.data.chat.conversations import load_conversations, load_pairs, load_prompts
from pipeline.data.cleaning.blocklist import Block, is_blocked, load_phrases
from pipeline.data.sources.byte_ranges import cut_source, read_piece
from pipeline.data.sources.packages import fetch
from pipeline.data.sources.records import Record, parse, read, text_of
from pipeline.data.sources.sources import Source, needed_fields
from pipeline.data.sources.templates import MissingField
from pipeline.data.tokens import import_shards, pack_units
from pipeline.data.tokens.documents import documents
from pipeline.data.tokens.store import TokenStore

LIMIT_S, LIMIT_BYTES = 20, 1 << 30
ROWS = [
    {
        "text": f"Line {i} is here.\n第{i}行，在这里。",
        "url": f"http://a.b/{i}",
        "n": i,
        "list": ["a", "b"],
        "none": None,
    }
    for i in range(40)
]


# ---- whole files -----------------------------------------------------------------------------------------------------


def _lines() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS)).encode()


def _csv(sign: str) -> bytes:
    quoted = [(f'"{row["text"]}"' if sign == "," else row["text"].replace("\n", " "), row["url"]) for row in ROWS]
    return "\n".join([f"text{sign}url", *(f"{text}{sign}{url}" for text, url in quoted)]).encode()


def _text() -> bytes:
    return "\n\n".join(row["text"] for row in ROWS).encode()


def _parquet(**options) -> bytes:
    times = pyarrow.array(range(len(ROWS)), pyarrow.timestamp("ns"))
    table = pyarrow.Table.from_pylist(ROWS).append_column("at", times)
    table = table.append_column("meta", pyarrow.array([{"a": i, "b": ["x"]} for i in range(len(ROWS))]))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=15, **options)
    return buffer.getvalue()


def _warc() -> bytes:
    found = b""
    for row in ROWS:
        page = f"<html><head><meta charset=utf-8></head><body><p>{row['text']}</p></body></html>".encode()
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + page
        head = (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {row['url']}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        found += head.encode() + body + b"\r\n\r\n"
    return found


def _html() -> bytes:
    return ("<html><body>" + "".join(f"<div><p>{row['text']}</p></div>" for row in ROWS) + "</body></html>").encode()


def _npy(values, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values, **options))
    return buffer.getvalue()


SOURCES: dict[str, tuple[Callable[[], bytes], dict]] = {
    "a.jsonl": (_lines, {"where": {"n": list(range(30))}}),
    "a.json": (lambda: json.dumps(ROWS, ensure_ascii=False).encode(), {}),
    "b.json": (
        lambda: json.dumps({"data": [{"rows": ROWS[:20]}, {"rows": ROWS[20:]}]}).encode(),
        {"records": "data[*].rows[*]"},
    ),
    "c.json": (lambda: json.dumps({row["url"]: row for row in ROWS}, indent=1).encode(), {}),
    "d.json": (_lines, {}),
    "a.csv": (lambda: _csv(","), {}),
    "a.tsv": (lambda: _csv("\t"), {}),
    "a.txt": (_text, {}),
    "b.txt": (_text, {"sample_by": "paragraph"}),
    "c.md": (_text, {"sample_by": "line"}),
    "a.parquet": (_parquet, {"text": "{text}{meta.a}"}),
    "b.parquet": (lambda: _parquet(compression="none", use_dictionary=False), {"part": (0.0, 0.9)}),
    "c.parquet": (lambda: _parquet(compression="zstd", data_page_version="2.0", write_page_checksum=True), {}),
    "a.warc": (_warc, {}),
    "a.html": (_html, {}),
}
PACKED = {".gz": gzip.compress, ".zst": zstandard.compress}
ENCODINGS = ("gb18030", "big5", "utf-16", "utf-16-le", "utf-32", "shift_jis", "latin-1", "iso2022_jp", "hz", "utf-7")


# ---- changes ---------------------------------------------------------------------------------------------------------

MAGIC = [
    *(
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\n",
        b"\r\n",
        b'"',
        b"'",
        b",",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
    ),
    *(b"\\ud800", b"\\udc00", b"\\u0000", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"NaN", b"1e999", b"-0"),
    *(
        b"\x93NUMPY\x01\x00",
        b"PAR1",
        b"MMIDIDX\x00\x00",
        b"\x1f\x8b\x08",
        b"\x28\xb5\x2f\xfd",
        b"WARC/1.0\r\n",
        b"PK\x03\x04",
    ),
    *(
        b'"text": ',
        b'{"text": null}\n',
        b'{"text": [1, null]}\n',
        b'{"text": {"a": 1}}\n',
        b'[["a"]]\n',
        b"null\n",
        b"9" * 5000,
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"\n" * 3000,
        b"\x00" * 5000,
        b"<div>" * 3000,
        b'"' * 999,
        b"Content-Length: 99999999999\r\n",
    ),
]
NUMBERS = [
    0,
    1,
    127,
    255,
    1 << 15,
    (1 << 16) - 1,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
]


def changed(data: bytes, draw: random.Random) -> bytes:
    """The same bytes but for a few changes."""
    raw = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        if not raw:
            break
        # heads and ends hold what files say of themselves
        at = draw.choice(
            [draw.randrange(len(raw)), draw.randrange(min(200, len(raw))), max(0, len(raw) - draw.randrange(1, 300))]
        )
        length = draw.choice([1, 1, 2, 4, 8, draw.randrange(1, 300)])
        how = draw.randrange(11)
        if how <= 1:
            raw[at] ^= 1 << draw.randrange(8)
        elif how == 2:
            raw[at : at + length] = draw.randbytes(len(raw[at : at + length]))
        elif how == 3:
            del raw[at : at + length]
        elif how == 4:
            raw[at:at] = draw.choice(MAGIC)
        elif how == 5:
            raw[at : at + 8] = struct.pack("<Q", draw.choice(NUMBERS))[: draw.choice([1, 2, 4, 8])]
        elif how == 6:
            raw[at:at] = raw[at : at + draw.randrange(1, 2000)]
        elif how == 7:
            del raw[at:]
        elif how == 8:
            raw[at : at + length] = draw.choice([b"\x00", b"\xff", b"\n", b" "]) * len(raw[at : at + length])
        elif how == 9:
            other = draw.randrange(len(raw))
            raw[at : at + length], raw[other : other + length] = raw[other : other + length], raw[at : at + length]
        else:
            raw += draw.choice(MAGIC)
    return bytes(raw)


# ---- reading ---------------------------------------------------------------------------------------------------------


def _read_source(folder: Path, draw: random.Random) -> None:
    name = draw.choice(list(SOURCES))
    make, keys = SOURCES[name]
    data, keys = make(), dict(keys)
    if draw.random() < 0.15 and not name.endswith(("parquet", "warc", "html")):
        keys["encoding"] = draw.choice(ENCODINGS)
        data = data.decode().encode(draw.choice([keys["encoding"], "utf-16-le", "utf-16-be"]), "replace")
        if draw.random() < 0.5:
            data = data.removeprefix(b"\xff\xfe")
    elif draw.random() < 0.05:
        data = data.decode(errors="replace").encode("utf-16-le")
    if draw.random() < 0.2:
        keys["format"] = draw.choice(["jsonl", "json", "parquet", "txt", "csv", "tsv", "warc", "html"])
        keys = {key: value for key, value in keys.items() if key in ("format", "text", "where", "part")}
    pack = draw.choice([None, None, ".gz", ".zst"])
    if pack and not name.endswith("parquet") and keys.get("format") != "parquet":
        before = draw.random() < 0.5
        data = PACKED[pack](changed(data, draw) if before else data)
        data, name = data if before else changed(data, draw), name + pack
    else:
        data = changed(data, draw)
    (folder / name).write_bytes(data)
    source = Source(path=str(folder / name), **keys)
    needed = draw.choice([None, needed_fields(source, "url", "{meta.b.0}")])
    ExternalContent(folder / "hashes.json").sources({"x": source})
    for item in read(source, "x", needed=needed):
        _use(source, item)
    for piece in cut_source(source, "x", draw.choice([64, 4096, 1 << 20]), needed):
        for chunk in read_piece(piece, source, "x", needed)[0]:
            for item in parse(chunk):
                _use(source, item)


def _use(source: Source, item) -> None:
    if isinstance(item, Record):
        try:
            text_of(source, item)
        except MissingField:
            pass
    else:
        assert item.place and item.reason, item
        (getattr(item, "raw", "") + item.place).encode(errors="backslashreplace")


def _read_shards(folder: Path, draw: random.Random) -> None:
    kind = draw.choice(["megatron", "datatrove", "npy", "raw"])
    tokens, ends = np.arange(300, dtype=np.uint16) % 97, np.array([100, 180, 300])
    files = {"a.npy": _npy(tokens)}
    if kind == "megatron":
        lengths = np.diff(ends, prepend=0).astype("<i4")
        offsets = ((ends - lengths) * 2).astype("<i8").tobytes()
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 3, 4)
        index = head + lengths.tobytes() + offsets + np.arange(4, dtype="<i8").tobytes()
        files = {"a.bin": tokens.tobytes(), "a.idx": index}
    elif kind == "datatrove":
        files = {"a.ds": tokens.tobytes(), "a.ds.index": ends.astype("<u8").tobytes()}
    elif kind == "raw":
        files = {"a.bin": tokens.tobytes()}
    which = draw.choice(list(files))
    for name, data in files.items():
        (folder / name).write_bytes(changed(data, draw) if name == which else data)
    source = import_shards.Shards(path=str(folder / next(iter(files))), dtype="uint16" if kind == "raw" else None)
    ExternalContent(folder / "hashes.json").sources({"x": source}, "shards")
    for path in import_shards.files(source, "x"):
        shard = import_shards.open_shard(path, source)
        for begin in range(0, len(shard.tokens), 128):
            unit = pack_units.Unit("train", path, folder / "out.npz", 0, 0, "x", source, 0, begin, begin + 128, 7)
            pack_units._worker.update(token_bytes=np.ones(1 << 16, np.int32), eos_id=3, dtype=np.dtype(np.uint16))
            pack_units.imported(unit)


def _read_packed(folder: Path, draw: random.Random) -> None:
    entry = {"file": "train/x-00000", "tokens": 6, "documents": 2, "bytes": 9, "id_bytes": 2}
    index = {"vocab_size": 9, "eos_id": 3, "dtype": "uint16", "splits": {"train": {"x": [entry]}, "heldout": {}}}
    files = {
        "index.json": json.dumps(index).encode(),
        "token_bytes.npy": _npy(range(9), dtype=np.int32),
        "train/x-00000.tokens.npy": _npy([1, 2, 3, 4, 5, 3], dtype=np.uint16),
        "train/x-00000.documents.npy": _npy([[3, 4], [6, 5]], dtype=np.int64),
        "train/x-00000.ids.npy": _npy([97, 98], dtype=np.uint8),
        "train/x-00000.id_ends.npy": _npy([1, 2], dtype=np.int64),
    }
    which = draw.choice(list(files))
    (folder / "train").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(changed(data, draw) if name == which else data)
    store = TokenStore(folder)
    if store.misfit() is None:
        for source in store.sources:
            store.read(source, 0, store.num_tokens(source))
            store.document_spans(source, 0, store.num_tokens(source))
            store.documents(source)


def _read_documents(folder: Path, draw: random.Random) -> None:
    table = pyarrow.table({key: [row["url"] for row in ROWS] for key in ("text", "source", "id")})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, row_group_size=15, compression=draw.choice(["zstd", "none"]))
    (folder / "train").mkdir()
    path = folder / "train/part-00000.parquet"
    path.write_bytes(changed(buffer.getvalue(), draw))
    for _ in documents(Artifact(folder, {}), "train"):
        pass
    pack_units._worker.update(
        token_bytes=np.ones(300, np.int32),
        eos_id=3,
        encode=lambda texts: [np.frombuffer(text.encode(), np.uint8) for text in texts],
    )
    pack_units.encoded(pack_units.Unit("train", path, folder / "out.npz", 0, 1))


def _read_list(folder: Path, draw: random.Random) -> None:
    path = folder / f"{draw.random()}.txt"
    path.write_bytes(changed("buy cheap pills\n# remark\n赌博网站\nexample.com\nexample.com/path\n".encode(), draw))
    block = Block(words=[str(path)], urls=[str(path)])
    load_phrases(tuple(block.words))
    is_blocked("http://www.example.com/path?x", tuple(block.urls))


def _read_package(folder: Path, draw: random.Random) -> None:
    import os

    os.environ["XDG_CACHE_HOME"] = str(folder)
    wheel, inner = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("rows.jsonl", _lines())
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("t/rows.zip", inner.getvalue())
        opened.writestr("t/rows.jsonl", _lines())
    kept = folder / "alma/archives/t==1.0-wheel"
    kept.mkdir(parents=True)
    (kept / "t-1.0-py3-none-any.whl").write_bytes(changed(wheel.getvalue(), draw))
    fetch("t==1.0", draw.choice(["t/rows.jsonl", "t/rows.zip!rows.jsonl"]), "0" * 64)


CHATS = [
    {
        "messages": [{"role": "user", "content": "第一个问题"}, {"role": "assistant", "content": "Answer one."}],
        "margin": "1",
    },
    {"conversations": [{"from": "human", "value": "Second question"}, {"from": "gpt", "value": "第二个回答"}]},
    {"instruction": "Third", "input": "with input", "output": "third answer"},
    {"prompt": "Fourth question", "completion": "fourth answer", "answer": "four"},
    {"prompt": "Fifth", "chosen": "good answer", "rejected": "bad answer", "margin": 0.5},
    {
        "chosen": [{"role": "user", "content": "six"}, {"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "user", "content": "six"}, {"role": "assistant", "content": "no"}],
    },
]
ODD = [
    *(
        None,
        True,
        0,
        -1,
        1e308,
        "",
        " ",
        "\ud800",
        "a\udfffb",
        "\0",
        "x" * 3000,
        [],
        {},
        [[]],
        [None],
        ["a", "b"],
        [1, 2],
        {"a": 1},
    ),
    *(
        [{"role": "user"}],
        [{"role": 3, "content": []}],
        [{"content": "x"}],
        {"role": "assistant", "content": None},
        [["a", {}]],
    ),
    *([{"type": "text", "text": "a"}], {"type": "image"}, "system", "nobody", [[[[["deep"]]]]], 10**30, float("nan")),
]


def _places(node, key=()):
    yield key
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield from _places(child, (*key, name))


def _odd_record(draw: random.Random):
    row = copy.deepcopy(draw.choice(CHATS))
    for _ in range(draw.choice([0, 1, 1, 2, 4])):
        places = [place for place in _places(row) if place]
        if not places:
            break
        *path, last = draw.choice(places)
        holder = row
        for name in path:
            holder = holder[name]
        if draw.random() < 0.8:
            holder[last] = copy.deepcopy(draw.choice(ODD))
        elif isinstance(holder, dict) and draw.random() < 0.5:
            holder[draw.choice(["weight", "tool_calls", "images", "label", "system", "history", "text"])] = holder.pop(
                last
            )
        else:
            del holder[last]
    return row


def _read_chats(folder: Path, draw: random.Random) -> None:
    lines = "".join(json.dumps(_odd_record(draw)) + "\n" for _ in range(12)).encode()
    (folder / "a.jsonl").write_bytes(changed(lines, draw) if draw.random() < 0.5 else lines)
    path = str(folder / "a.jsonl")
    template = draw.random() < 0.3
    if (which := draw.randrange(3)) == 0:
        turns = [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{completion}"}]
        load_conversations(
            {"x": ChatSource(path=path, **({"messages": turns, "answer": "{answer}"} if template else {}))}, 0.3
        )
    elif which == 1:
        keys = {"prompt": "{prompt}", "chosen": "{chosen}", "rejected": "{rejected}", "margin": "{margin}"}
        load_pairs({"x": PreferenceSource(path=path, **(keys if template else {}))}, 0.3)
    else:
        load_prompts(
            {"x": PromptSource(path=path, **({"prompt": "{prompt}", "answer": "{answer}"} if template else {}))}, 0.3
        )


READERS = [_read_source] * 12 + [_read_shards, _read_packed, _read_chats] * 2
READERS += [_read_documents, _read_list, _read_package]


def try_seed(seed: int, folder: Path) -> bool:
    """Whether a seed's file was refused with a sentence. Raises what no reader may raise."""
    draw = random.Random(seed)
    try:
        draw.choice(READERS)(folder, draw)
    except UserError as error:
        assert 0 < len(str(error)) < 5000
        return True
    return False


def peak() -> int:
    """Bytes of memory that this process had at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def main(first: int, last: int) -> int:
    failed = refused = 0
    start = memory = peak()
    for seed in range(first, last):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        begun = time.time()
        with tempfile.TemporaryDirectory() as folder:
            try:
                refused += try_seed(seed, Path(folder))
            except Exception:
                failed += 1
                print(f"seed {seed}:\n{traceback.format_exc()}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        if time.time() - begun > LIMIT_S / 4 or peak() - memory > LIMIT_BYTES / 8:
            print(f"seed {seed}: {time.time() - begun:.1f} s, {(peak() - memory) >> 20} MB more", flush=True)
        memory = max(memory, peak())
    print(f"{last - first} files, {refused} refused, {failed} failed, peak {memory >> 20} MB")
    return 1 if failed or memory - start > LIMIT_BYTES else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
