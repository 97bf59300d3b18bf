"""Which files a path or pattern means: links, loops, what is no file, names that are not UTF-8."""

import glob
import json
import os
import socket
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from harness import succeed

from pipeline.core.errors import UserError
from pipeline.core.fingerprint import ExternalContent
from pipeline.data.sources import globs
from pipeline.data.sources.globs import find
from pipeline.data.sources.records import Record, read
from pipeline.data.sources.sources import Source, files
from pipeline.data.tokens import import_shards

LINE = b'{"text": "a"}\n'


def write(path: Path, data: bytes = LINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def names(pattern: str) -> list[str]:
    return [name for name, _ in find(pattern, "sources.x")]


@pytest.fixture
def tree(tmp_path) -> Path:
    for name in ("a.jsonl", "1/b.jsonl", "1/2/c.jsonl", "1/2/d.txt", ".hidden/e.jsonl", "1/.f.jsonl", "3/2/g[1].jsonl"):
        write(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.jsonl", "**/*.jsonl", "**", "**/*", "*/*", "*/2/*", "**/2/**", "1/**/*.[jt]*", "**/**/c.*", "?/b.jsonl"]
    + ["**/c.jsonl", ".hidden/*", "*/.f.jsonl", "1/2/../*.jsonl", "3/2/g[[]1].jsonl", "**/2/c.jsonl"],
)
def test_patterns_mean_what_the_standard_library_says(tree, pattern, monkeypatch):
    monkeypatch.chdir(tree)
    expected = sorted({os.path.realpath(path) for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)})
    assert sorted(os.path.realpath(path) for _, path in find(pattern, "x")) == expected
    assert sorted(os.path.realpath(path) for _, path in find(f"{tree}/{pattern}", "x")) == expected


def test_loops_of_links_are_read_once(tree):
    """correctness 39: one loop used to be read 41 times, and two of them would not end."""
    expected = names(f"{tree}/**/*.jsonl")
    (tree / "1/up").symlink_to(tree)
    (tree / "1/2/up").symlink_to("..")
    (tree / "self").symlink_to(".")
    (tree / "0-other").symlink_to("1")  # the name that is no link is taken, whichever comes first
    (tree / "0-a.jsonl").symlink_to("a.jsonl")
    assert names(f"{tree}/**/*.jsonl") == expected and "1/2/c.jsonl" in expected
    source = Source(path=[f"{tree}/**/*.jsonl", f"{tree}/1/../a.jsonl", f"{tree}/0-a.jsonl", f"{tree}/*/b.jsonl"])
    assert [relative for relative, _ in files(source, "x")] == expected
    assert names(f"{tree}/0-other/*.jsonl") == ["b.jsonl"]  # a link that is named is followed
    assert names(f"{tree}/0-*/**/c.jsonl") == ["0-other/2/c.jsonl"]


def test_two_different_links_into_one_folder_lose_nothing(tmp_path):
    write(tmp_path / "store/chinese/a.jsonl")
    (tmp_path / "store/zh").symlink_to("chinese")
    assert names(f"{tmp_path}/**/zh/*.jsonl") == ["store/zh/a.jsonl"]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path has 108 bytes at most
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


WRONG = {
    "dangling": (lambda path: path.symlink_to("gone/far.jsonl"), r"is a link to gone/far.jsonl, which does not exist"),
    "of itself": (lambda path: path.symlink_to(path.name), r"(Too many levels of symbolic links|is a link to)"),
    "folder": (lambda path: path.mkdir(), "which is a folder, so none of its files would be read"),
    "pipe": (_pipe, "is a pipe; a source is read several times, so give a file"),
    "socket": (_socket, "is a socket"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_matches_and_cannot_be_read_is_refused(tree, kind):
    """correctness 39: it used to be skipped without a word, or to hang."""
    make, said = WRONG[kind]
    make(tree / "1/z.jsonl")
    with pytest.raises(UserError, match=f"^sources.x: .*z.jsonl.*{said}"):
        files(Source(path=f"{tree}/**/*.jsonl"), "x")
    if kind != "folder":
        with pytest.raises(UserError, match=f"^sources.x: .*z.jsonl.*{said}"):
            files(Source(path=f"{tree}/1/z.jsonl"), "x")
    assert names(f"{tree}/1/b*.jsonl") == ["b.jsonl"]  # nobody asked for it


def test_a_link_to_a_folder_that_is_not_mounted_is_refused(tree):
    (tree / "2023").symlink_to("/nowhere/disk2")
    for pattern in ("**/*.jsonl", "*/*.jsonl"):
        with pytest.raises(UserError, match="2023 is a link to /nowhere/disk2, which does not exist"):
            names(f"{tree}/{pattern}")
    assert names(f"{tree}/*.jsonl") == ["a.jsonl"]
    (tree / "2023").unlink()
    (tree / "old.log").symlink_to("gone")  # no folder, by its name, and no match
    assert "a.jsonl" in names(f"{tree}/**/*.jsonl")


def test_folders_that_hold_matches_are_no_mistake(tmp_path):
    write(tmp_path / "out.jsonl/part-0.jsonl")  # as Spark writes
    assert names(f"{tmp_path}/**/*.jsonl") == ["out.jsonl/part-0.jsonl"]
    with pytest.raises(UserError, match="matches .*out.jsonl, which is a folder"):
        names(f"{tmp_path}/*.jsonl")
    with pytest.raises(UserError, match="out.jsonl is a folder; give a file or a pattern such as"):
        names(f"{tmp_path}/out.jsonl")


def test_folders_and_files_that_may_not_be_read(tree, monkeypatch):
    """Root, whom tests may run as, may read all."""
    monkeypatch.setattr(globs.os, "access", lambda path, mode: "b.jsonl" not in str(path))
    with pytest.raises(UserError, match="b.jsonl cannot be read: permission denied"):
        names(f"{tree}/**/*.jsonl")
    listed = os.listdir

    def refused(folder):
        if str(folder).endswith("/1/2"):
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.undo()
    monkeypatch.setattr(globs.os, "listdir", refused)
    with pytest.raises(UserError, match="the folder .*/1/2 cannot be listed: Permission denied"):
        names(f"{tree}/**/*.jsonl")


@pytest.mark.parametrize("path", ["x" * 5000, "x" * 300 + "/*.jsonl", "a\0b.jsonl", "a.jsonl/b.jsonl", "", "nosuch/*"])
def test_paths_that_cannot_be(tree, path, monkeypatch):
    monkeypatch.chdir(tree)
    with pytest.raises(UserError, match="^sources.x: "):
        names(path)


def test_foreign_shards_are_found_in_the_same_way(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    (tmp_path / "link").symlink_to(".")
    shards = import_shards.Shards(path=f"{tmp_path}/**/*.npy")
    assert [path.name for path in import_shards.files(shards, "x")] == ["a.npy"]
    (tmp_path / "b.npy").symlink_to("gone.npy")
    for path in (f"{tmp_path}/*.npy", str(tmp_path)):
        with pytest.raises(UserError, match="shards.x.path: .*b.npy is a link to gone.npy"):
            import_shards.files(import_shards.Shards(path=path), "x")


def test_names_that_are_not_utf8(tmp_path):
    """correctness 28: out of a zip file that was packed in GBK. The hash cache, the fingerprint, the manifest, reports,
    rejections, messages, and worker processes have such names."""
    folder, name = os.fsencode(tmp_path), "测试".encode("gbk")
    rows = [{"text": f"第{i}篇文章写的是第{i}件事情，它足够长，可以留在语料之中。"} for i in range(300)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with open(folder + b"/" + name + b".jsonl", "wb") as handle:
        handle.write(lines + b"nonsense\n" * 3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:5]), tmp_path / "a.parquet")
    os.rename(tmp_path / "a.parquet", folder + b"/" + name + b".parquet")
    source = Source(path=f"{tmp_path}/*")
    found = list(read(source, "x"))
    assert len(found) == 308 and {os.fsencode(item.place.partition(":")[0]) for item in found} == {
        name + b".jsonl",
        name + b".parquet",
    }
    cache = tmp_path / "cache/hashes.json"
    first = ExternalContent(cache).sources({"x": source})
    assert ExternalContent(cache).sources({"x": source}) == first and len(json.loads(cache.read_text())) == 2
    keys = {"sources": {"a": {"path": "*.jsonl"}, "b": {"path": "*.parquet"}}, "holdout": 0.1, "unit_bytes": 4096}
    stages = {"clean": keys | {"workers": 2, "dedup": {"near": None, "exact": False}}}
    (tmp_path / "r.yaml").write_text(json.dumps({"name": "t", "stages": stages}))
    said = succeed("clean", "r.yaml", cwd=tmp_path)
    report = json.loads((tmp_path / "runs/t/clean/current/report.json").read_text())
    assert report["sources"]["a"]["bad"] == {"malformed JSON": 3} and report["total"]["documents_out"] == 305, said
    listed = json.loads((tmp_path / "runs/t/clean/current/manifest.json").read_text())
    assert os.fsencode(json.dumps(listed)) and "udcb2" in json.dumps(listed)
    assert isinstance(found[0], Record)
