"""Damaged files: a bad record or a UserError, whatever was changed, in bounded time and memory."""

import json
import os
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from paths import HELPERS

from pipeline.core.artifact import Artifact
from pipeline.core.errors import UserError
from pipeline.data.cleaning.blocklist import load_phrases
from pipeline.data.cleaning.normal_form import normalise
from pipeline.data.cleaning.token_hashes import tokens
from pipeline.data.sources.formats import NULS, Bad
from pipeline.data.sources.line_chunks import WITHOUT_MARK
from pipeline.data.sources.packages import fetch
from pipeline.data.sources.records import Record, encoding_advice, read
from pipeline.data.sources.source_checks import first_record
from pipeline.data.sources.sources import Source
from pipeline.data.tokens import import_shards
from pipeline.data.tokens.documents import documents
from pipeline.data.tokens.store import TokenStore

FUZZER = HELPERS / "reader_fuzzer.py"


@pytest.mark.parametrize(
    "first, last",
    [
        (0, 120),
        pytest.param(120, 1320, marks=pytest.mark.slow),
        pytest.param(1320, 2520, marks=pytest.mark.slow),
        pytest.param(2520, 3720, marks=pytest.mark.slow),
    ],
)
def test_changed_files_are_read_or_refused_with_a_sentence(first, last):
    """correctness 29: all formats of sources, packed and in other encodings; conversations, pairs and prompts; token
    shards of other tools, packed tokens, published documents, block lists, packages. In a process of its own, which is
    ended where a file takes 20 s, and fails where memory grows by 1 GB."""
    command = [sys.executable, str(FUZZER), str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    files, refused, failed = (int(part.split()[0]) for part in done.stdout.splitlines()[-1].split(", ")[:3])
    assert files == last - first and failed == 0
    assert files / 10 < refused < files / 2  # both happen, so the changes are neither idle nor all alike


TEXT = "The first line.\n第一行，很短。\nanother line\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_a_mark_says_which_it_is(tmp_path, name, encoding, order):
    """correctness 29: it ended in a traceback; taking one order for the other would make Chinese of anything."""
    rows = {"a.txt": TEXT, "a.csv": "text\na\n", "a.json": '[{"text": "第一"}]'}
    data = rows.get(name, '{"text": "第一"}\n')
    path = tmp_path / name
    path.write_bytes(data.encode(f"{encoding}-{order}"))
    source = Source(path=str(path), encoding=encoding)
    assert [item.reason for item in read(source, "x")] == [WITHOUT_MARK.format(encoding)]
    with pytest.raises(UserError, match=f"say encoding: {encoding}-le or {encoding}-be"):
        first_record(source, "x", None)
    assert all(isinstance(item, Record) for item in read(Source(path=str(path), encoding=f"{encoding}-{order}"), "x"))
    path.write_bytes(data.encode(encoding))  # with a mark
    assert all(isinstance(item, Record) for item in read(source, "x"))


def test_utf16_that_is_read_as_utf8_is_bad(tmp_path):
    """correctness 29: English in UTF-16 is UTF-8 full of NULs, and short Chinese lines are other people's letters."""
    path = tmp_path / "a.txt"
    for order in ("le", "be"):
        path.write_bytes("plain English text".encode(f"utf-16-{order}"))
        (item,) = read(Source(path=str(path)), "x")
        assert isinstance(item, Bad) and item.reason == NULS and "utf-16" in encoding_advice(Source(path="a"), NULS)
    path.write_bytes(b"one NUL\0 in a text happens")
    assert [item.fields["text"] for item in read(Source(path=str(path)), "x")] == ["one NUL\0 in a text happens"]


HEADERS = [
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), ",  # TokenError
    b"{'descr': '<u2' 'fortran_order': \x00, 'shape': (3,)}",  # SyntaxError
    b"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,)}",
    b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",  # a pickle
    b"{'descr': [('a', '<u2'), ('a', '<u2')], 'fortran_order': False, 'shape': (3,)}",
    b"(" * 3000,
    b"\xff\xfe{}",
]


@pytest.mark.parametrize("header", HEADERS)
def test_damaged_headers_of_arrays(tmp_path, header):
    """correctness 29"""
    path = tmp_path / "a.npy"
    header = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(6))
    with pytest.raises(UserError, match="a.npy: (cannot be read as a numpy array|holds )"):
        import_shards.open_shard(path, import_shards.Shards(path=str(path)))
    index = {"vocab_size": 9, "eos_id": 3, "dtype": "uint16", "splits": {"train": {}}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    path.rename(tmp_path / "token_bytes.npy")
    with pytest.raises(UserError, match="token_bytes.npy: (damaged|holds)"):
        TokenStore(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"splits": 3}',
        "\ud800",
        '{"vocab_size": "9", "eos_id": 3, "dtype": "uint16", "splits": {"train": {}}}',
    ]
    + ['{"vocab_size": 9, "eos_id": 3, "dtype": "u99", "splits": {"train": {}}}', "[" * 99_999]
    + ['{"vocab_size": 9, "eos_id": 3, "dtype": "uint16", "splits": {"train": {"a": [{"id_bytes": 1}]}}}'],
)
def test_damaged_indexes_of_packed_tokens(tmp_path, text):
    """correctness 29"""
    (tmp_path / "index.json").write_bytes(text.encode(errors="surrogatepass"))
    np.save(tmp_path / "token_bytes.npy", np.zeros(9, np.int32))
    with pytest.raises(UserError, match="index.json: damaged .*; run stage pack again"):
        TokenStore(tmp_path)


def test_damaged_documents_are_named(tmp_path):
    """correctness 29: of an output of clean, in the stages that read it."""
    path = tmp_path / "train/part-00000.parquet"
    path.parent.mkdir()
    table = pyarrow.table({key: ["a" * 99] * 9 for key in ("text", "source", "id")})
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    raw = path.read_bytes()
    for data in (raw[:-9], b"junk", raw[:20] + b"\xff" * 40 + raw[60:], raw.replace(b"a" * 99, b"\xff" * 99)):
        path.write_bytes(data)
        with pytest.raises(UserError, match="part-00000.parquet: cannot be read as parquet .*; run stage clean again"):
            list(documents(Artifact(tmp_path, {}), "train"))


def test_a_damaged_archive_of_a_package_is_named(tmp_path, monkeypatch):
    """correctness 29"""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("t-1.0-py3-none-any.whl", "t-1.0.tar.gz"):
        folder = tmp_path / f"alma/archives/t==1.0-{'wheel' if name.endswith('whl') else 'sdist'}"
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / name, "w") as opened:
            opened.writestr("t/a.txt", "a" * 500)
        raw = (folder / name).read_bytes()
        for data in (b"", raw[:100], raw.replace(b"aaa", b"aab")):
            (folder / name).write_bytes(data)
            with pytest.raises(UserError, match=f"{name}, member t/a.txt: the archive is damaged .*; remove it"):
                fetch("t==1.0", "t/a.txt", "0" * 64, folder.name.rpartition("-")[2])


def test_phrases_of_block_lists_have_the_form_of_the_texts(tmp_path):
    """correctness 29: a NUL broke the list, and a decomposed letter never matched."""
    path = tmp_path / "words.txt"
    path.write_text("cafe\u0301 noir\nbad\0 word\n\0\n", encoding="utf-8")
    batch = tokens([normalise("un caf\u00e9 noir"), normalise("a bad word"), normalise("nothing")])
    assert load_phrases((str(path),)).count(batch).tolist() == [1, 1, 0]
