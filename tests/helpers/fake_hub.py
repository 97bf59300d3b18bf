"""A Hugging Face hub on this machine: what its library asks for when it downloads a repository, from a folder."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """repositories: ORG/NAME -> folder. asked: paths of the requests for anything of
    these, without those for headers alone."""

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.gated, self.asked = repositories, gated, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(with_body=False)

    def do_GET(self):
        if any(repository in self.path for repository in self.server.repositories):
            self.server.asked.append(self.path)
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else ""
        folder = self.server.repositories.get(repository)
        if folder is None:
            return self._refuse(401 if is_api else 404, "RepoNotFound")
        if repository in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if revision not in (COMMIT, "v1"):
            return self._refuse(404, "RevisionNotFound")
        if is_api:
            answer = json.dumps(self._listing(repository, folder, is_tree=parts[2] == "tree")).encode()
            return self._send(answer, {"Content-Type": "application/json"}, with_body)
        path = folder / "/".join(parts[4:])
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content = path.read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        return self._send(content, headers, with_body)

    def _listing(self, repository: str, folder: Path, is_tree: bool) -> list | dict:
        """The files of a repository: what `list_repo_tree` or `model_info` asks for."""
        entries = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, size = str(path.relative_to(folder)), path.stat().st_size
            if is_tree:
                entries.append({"type": "file", "path": name, "size": size, "oid": "0" * 40})
            else:
                entries.append({"rfilename": name, "size": size})
        return entries if is_tree else {"id": repository, "sha": COMMIT, "siblings": entries}

    def _send(self, content: bytes, headers: dict, with_body: bool) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def _refuse(self, code: int, name: str) -> None:
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
