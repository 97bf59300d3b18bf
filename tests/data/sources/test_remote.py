"""Sources at an address: fetched once, read like local files."""

import http.server
import threading
from functools import partial

import pytest

from pipeline.core.errors import UserError
from pipeline.data.sources.records import read
from pipeline.data.sources.sources import Source


@pytest.fixture
def server(tmp_path):
    (tmp_path / "www").mkdir()
    (tmp_path / "www/a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(tmp_path / "www"))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}", tmp_path / "www"
        running.shutdown()


def test_an_address_is_read_like_a_file(server, tmp_path, monkeypatch):
    address, folder = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = list(read(Source(path=f"{address}/a.jsonl"), "s"))
    assert [(item.fields["text"], item.place) for item in found] == [("one", "a.jsonl:1"), ("two", "a.jsonl:2")]
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    assert len(list(read(Source(path=f"{address}/a.jsonl"), "s"))) == 3  # what changed is fetched again
    with pytest.raises(UserError, match="sources.s: .*/none.jsonl cannot be read"):
        list(read(Source(path=f"{address}/none.jsonl"), "s"))


def test_patterns_of_another_file_system(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/corpus/{name}.txt", f"text {name}".encode())
    assert [item.fields["text"] for item in read(Source(path="memory://corpus/*.txt"), "s")] == ["text a", "text b"]
    with pytest.raises(UserError, match="no file matches"):
        list(read(Source(path="memory://corpus/*.csv"), "s"))
    with pytest.raises(UserError, match="cannot be read|is not installed"):
        list(read(Source(path="nosuchscheme://x/y.txt"), "s"))
