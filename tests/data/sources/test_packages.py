"""Members of Python packages as sources, with pip replaced by a local index."""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import pytest

from pipeline.core.errors import UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.data.sources import packages
from pipeline.data.sources.records import read
from pipeline.data.sources.sources import Source

ROWS = [
    {"title": "晨风", "body": "1.清晨的风。\n2.鸟名。"},
    {"title": "Tea, green", "body": 'He said "so".'},
    {"title": "é", "body": "x" * 50},
]


def lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def records(**keys) -> list:
    return list(read(Source(**keys), "x"))


@pytest.fixture
def package(tmp_path, monkeypatch) -> dict:
    """A tiny wheel that pip finds in a folder: the real pip, and no network."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as opened:
        opened.writestr("words.txt", "晨风\n")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "tinytext-1.0-py3-none-any.whl", "w") as opened:
        opened.writestr("tinytext/rows.jsonl", lines(ROWS))
        opened.writestr("tinytext/words.zip", inner.getvalue())
        opened.writestr("tinytext-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n")
        opened.writestr(
            "tinytext-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        opened.writestr("tinytext-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    return {
        "package": "tinytext==1.0",
        "member": "tinytext/rows.jsonl",
        "sha256": hashlib.sha256(lines(ROWS)).hexdigest(),
        "shelf": shelf,
    }


def test_a_member_of_a_package(package):
    shelf = package.pop("shelf")
    assert [item.fields for item in records(**package)] == ROWS
    inner = {
        "package": "tinytext==1.0",
        "member": {"tinytext/words.zip!words.txt": hashlib.sha256("晨风\n".encode()).hexdigest()},
        "sample_by": "line",
    }
    assert [item.fields for item in records(**inner)] == [{"text": "晨风"}]
    with pytest.raises(UserError, match="member tinytext/rows.jsonl has sha256 [0-9a-f]{64}, the recipe expects 0{64}"):
        records(**{**package, "sha256": "0" * 64})
    with pytest.raises(UserError, match="has no member 'tinytext/row.jsonl'; it has tinytext/rows.jsonl"):
        records(**{**package, "member": "tinytext/row.jsonl", "sha256": "1" * 64})
    for path in shelf.iterdir():
        path.unlink()
    assert [item.fields for item in records(**package)] == ROWS  # from the cache
    assert ExternalContent(Path("unused")).sources({"x": Source(**package)})["x"]["files"] == [
        ["tinytext/rows.jsonl", package["sha256"]]
    ]


def test_pip_that_fails_is_quoted(package):
    package.pop("shelf")
    with pytest.raises(UserError, match="pip could not download the wheel of nosuch==9.*No matching distribution"):
        records(**{**package, "package": "nosuch==9"})


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(packages.Path, "expanduser", unknown)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UserError, match="has no home folder here: set HOME, or XDG_CACHE_HOME to a folder for them"):
        packages.cache_folder()
