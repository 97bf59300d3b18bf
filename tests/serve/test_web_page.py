"""The web page of `alma serve`, as a server sends it. tests/serve/test_chat_page.py opens it."""

import asyncio
import base64
import hashlib
import re

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("starlette")

from pipeline.serve.server import App, Limits  # noqa: E402


def asked(route: str, key: str | None = None):
    """The server's answer, without a port."""

    async def ask():
        transport = httpx.ASGITransport(app=App({}, Limits(), key).asgi())
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(route)

    return asyncio.run(ask())


def test_the_page_needs_no_key_and_no_network():
    answer = asked("/", key="secret")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    assert asked("/v1/models", key="secret").status_code == 401
    assert "secret" not in answer.text and "{{" not in answer.text
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:,)|https?://|@import|url\(""", answer.text)


def test_only_its_own_script_and_style_may_run():
    """By the hashes in its policy; nothing in the page is called by an attribute, which the policy would stop."""
    answer = asked("/")
    policy = answer.headers["content-security-policy"]
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        [text] = re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy and not re.search(r"<[^>]+\s(?:on\w+|style)=", answer.text)
    assert "innerHTML" not in answer.text, "what a model writes is text"


def test_all_texts_are_in_both_languages():
    page = asked("/").text
    languages = {}
    for language, block in re.findall(r"^  (en|zh): \{\n(.*?)^  \},", page, re.MULTILINE | re.DOTALL):
        languages[language] = dict(re.findall(r"(\w+): \"([^\"]*)\"", block))
    assert languages["en"].keys() == languages["zh"].keys()
    named = set(re.findall(r'data-say="(\w+)"', page)) | set(re.findall(r"words\.(\w+)", page))
    assert named and named <= languages["en"].keys()
    assert all(languages["zh"].values()) and not re.search("[\u4e00-\u9fff]", "".join(languages["en"].values()))
