"""`alma push`: which files, and what a hub receives."""

import base64
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import tuned
from huggingface_hub import constants

from pipeline import cli
from pipeline.core.errors import UserError
from pipeline.serve.push import upload_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """What a Hugging Face hub answers to an upload of small files, and what it was sent."""

    def log_message(self, *_):
        pass

    def _send(self, body, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.server.asked.append(self.path)
        self._send({"id": "org/m", "sha": COMMIT, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.server.refuses:
            self._send({"error": "no"}, 403)
        elif self.path.endswith("/repos/create"):
            self.server.created.append(json.loads(body))
            self._send({"url": f"{self.server.address}/org/m"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif "/commit/" in self.path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._send(
                {"commitUrl": f"{self.server.address}/org/m/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
            )
        else:
            self._send({"errors": [], "warnings": []})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.created, server.files, server.refuses = [], [], {}, False
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tuned.base(tmp_path_factory.mktemp("push")) / "model"
    (folder / "README.md").write_text("# a model\n")
    (folder / "logs").mkdir()
    (folder / "logs/secret.log").write_text("/home/me")
    (folder / "run.json").write_text("{}")
    return folder


def push(*words) -> None:
    cli.app(["push", *map(str, words)], standalone_mode=False)


def test_a_dry_run_lists_what_would_be_sent_and_sends_nothing(model, hub, capsys):
    push(model, "org/m", "--dry-run")
    shown = capsys.readouterr().out
    names = {line.split()[-1] for line in shown.splitlines()[:-1]}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert not {"run.json", "logs/secret.log"} & names and "nothing was sent" in shown
    assert upload_of(str(model)).files == sorted(names) and not hub.asked


def test_the_hub_receives_those_files_in_one_commit(model, hub, capsys):
    push(model, "org/m", "--private")
    assert hub.files == {name: (model / name).read_bytes() for name in upload_of(str(model)).files}
    assert [(entry["name"], entry["organization"], entry["visibility"]) for entry in hub.created] == [
        ("m", "org", "private")
    ]
    assert sum("/commit/" in path for path in hub.asked) == 1
    assert f"to {hub.address}/org/m/commit/{COMMIT}" in capsys.readouterr().out


def test_what_cannot_be_pushed_is_one_sentence(model, hub, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model: is not the name of a repository; expected ORG/NAME, or modelscope:"):
        push(model, "model")
    with pytest.raises(UserError, match="contains no model"):
        push(tmp_path, "org/m")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="org/m: the hub cannot be reached .*; try again"):
        push(model, "org/m")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    hub.refuses = True
    with pytest.raises(UserError, match="the hub refuses it \\(403\\); run hf auth login, or set HF_TOKEN"):
        push(model, "org/m")


class ModelScope:
    """The library's client (its real one is not installed with the tests): what it was asked."""

    calls: list = []
    error: Exception | None = None
    endpoint = "https://www.modelscope.cn"

    def create_repo(self, repo_id, *, visibility, exist_ok):
        self.calls.append((repo_id, visibility, exist_ok))
        if self.error:
            raise self.error

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message, use_cache):
        self.calls.append((repo_id, folder_path, allow_patterns, use_cache))


@pytest.fixture
def modelscope(monkeypatch):
    monkeypatch.setattr("pipeline.core.optional_packages.is_installed", lambda package: True)
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.api"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(HubApi=ModelScope))
    monkeypatch.setattr(ModelScope, "calls", [])
    return ModelScope


def test_modelscope_receives_the_same_files(model, modelscope, hub, capsys):
    push(model, "modelscope:org/m", "--dry-run")
    assert not modelscope.calls and "to modelscope:org/m; nothing was sent" in capsys.readouterr().out
    push(model, "modelscope:org/m", "--private")
    files = upload_of(str(model)).files
    assert modelscope.calls == [("org/m", "private", True), ("org/m", str(model), files, False)] and not hub.asked
    assert "to https://www.modelscope.cn/models/org/m" in capsys.readouterr().out


def test_what_modelscope_refuses_is_one_sentence(model, modelscope, monkeypatch):
    monkeypatch.setattr(ModelScope, "error", ValueError("Token does not exist, please login first."))
    with pytest.raises(UserError, match="org/m: ModelScope .* Token does not exist.*; run modelscope login, or set"):
        push(model, "modelscope:org/m")
    monkeypatch.setattr(ModelScope, "error", KeyError("a fault of alma"))
    with pytest.raises(KeyError):
        push(model, "modelscope:org/m")
    monkeypatch.setattr("pipeline.core.optional_packages.is_installed", lambda package: package != "modelscope")
    with pytest.raises(
        UserError, match=r"modelscope:org/m needs the package modelscope.*pip install 'alma\[modelscope\]'"
    ):
        push(model, "modelscope:org/m")
    with pytest.raises(UserError, match="modelscope:m: is not the name of a repository"):
        push(model, "modelscope:m")
