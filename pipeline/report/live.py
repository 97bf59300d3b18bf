"""A report that is served while its run goes on: the page is made again when the run has written something, and the
browser asks for that every five seconds. One thread a request, on this machine only unless told otherwise."""

import hashlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.core.errors import UserError

SHOWN = ("metrics.jsonl", "manifest.json", "run.json", "lock.json", "report.json", "samples.jsonl", "complete.json")


def version_of(path: Path) -> str:
    """A hash of names, sizes and times of the files that a report reads. A beating lock does not count."""
    lines = []
    for folder in sorted(path.iterdir()):
        for file in sorted(folder.glob("*/*")) + sorted(folder.glob("*/checkpoints/*/complete.json")):
            if file.name in SHOWN:
                entry = file.stat()
                lines.append(f"{file} {entry.st_size} {entry.st_mtime_ns}")
        lines.append(f"{folder} {(folder / 'lock.json').exists()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class Pages:
    """The newest page of a run, made when somebody asks for it and the run has changed."""

    def __init__(self, path: Path, make: Callable[[str], str]):
        """make(version) -> html; it may raise UserError, which the browser then shows."""
        self.path, self.make = path, make
        self.lock = threading.Lock()
        self.version, self.html = "", ""

    def version_now(self) -> str:
        try:
            return version_of(self.path)
        except OSError:  # a folder was renamed at this moment: the stage is publishing
            return self.version

    def page(self) -> str:
        with self.lock:  # one browser makes it, others wait for the same
            version = self.version_now()
            if version != self.version or not self.html:
                self.html, self.version = self.make(version), version
            return self.html


def server(pages: Pages, host: str, port: int) -> ThreadingHTTPServer:
    """A server of `/` (the page) and `/version`. Raises UserError if the address cannot be used."""

    class Handler(BaseHTTPRequestHandler):
        timeout = 30  # seconds for a client to send its request

        def do_GET(self) -> None:
            if self.path == "/":
                try:
                    self._answer(200, "text/html", pages.page())
                except (UserError, OSError) as error:
                    self._answer(503, "text/plain", f"{error}\n")
            elif self.path == "/version":
                self._answer(200, "text/plain", pages.version_now())
            else:
                self._answer(404, "text/plain", "there is / and /version\n")

        def _answer(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_) -> None:
            pass

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port}: {host}:{port} cannot be used ({error.strerror}); give another port") from None
