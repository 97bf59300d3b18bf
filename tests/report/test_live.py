"""The page of a run that goes on, over HTTP on this machine."""

import threading
import urllib.error
import urllib.request

import pytest
import reported_run
from html_page import Page

from pipeline.core.errors import UserError
from pipeline.report.live import Pages, server
from pipeline.report.page import Options, page_of
from pipeline.report.run_folder import read_run


def get(service, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{service.server_address[1]}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def service(tmp_path):
    root = reported_run.write(tmp_path / "demo")
    with server(Pages(root, lambda version: page_of(read_run(root), Options(live=version))), "127.0.0.1", 0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found, root
        found.shutdown()


def test_the_page_follows_the_run(service):
    found, root = service
    status, html = get(found, "/")
    assert status == 200 and len(Page(html).curve("pretrain-loss", "loss")["x"]) == 300
    status, version = get(found, "/version")
    assert status == 200 and f'"version": "{version}"' in html
    assert get(found, "/version")[1] == version, "nothing was written"
    with open(root / "pretrain" / ("3" * 12) / "metrics.jsonl", "a") as handle:
        handle.write('\n{"step": 301, "loss": 2.5}\n')
    assert get(found, "/version")[1] != version
    assert Page(get(found, "/")[1]).curve("pretrain-loss", "loss")["y"][-1] == 2.5


def test_other_paths_and_a_run_that_goes_away(service):
    found, root = service
    for path in ("/etc/passwd", "/../demo/clean", "/report.html"):
        assert get(found, path)[0] == 404
    root.rename(root.with_name("elsewhere"))
    status, text = get(found, "/")
    assert status == 503 and "is not there" in text
    root.with_name("elsewhere").rename(root)
    assert get(found, "/")[0] == 200


def test_a_port_that_is_taken(service):
    found, root = service
    with pytest.raises(UserError, match="cannot be used .*; give another port"):
        server(Pages(root, lambda version: ""), "127.0.0.1", found.server_address[1])
