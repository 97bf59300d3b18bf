"""The web page of `alma serve` in headless Chromium: chat, two models, probabilities of tokens, both languages, both
color schemes, a phone. `make test-browser` runs it.

ALMA_SCREENSHOTS=docs ALMA_RUN=runs/quickstart:ppo make test-browser      # pictures with a model of yours
"""

import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest
import tuned
from chromium import MARKS, PHONE, SCREEN, launched

uvicorn = pytest.importorskip("uvicorn")

from pipeline.serve.generator import Generator  # noqa: E402
from pipeline.serve.server import App, Limits  # noqa: E402

pytestmark = MARKS


@contextlib.contextmanager
def served(models, key=None):
    """The address of a server in a thread of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(App(models, Limits(), key).asgi(), log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser():
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tuned.base(tmp_path_factory.mktemp("page"), length=256) / "model"
    return {"runs/x:sft": Generator(base), "runs/x:ppo": Generator(base)}


@pytest.fixture(scope="module")
def address(models):
    with served(models) as url:
        yield url


def opened(browser, url: str, viewport=SCREEN, scheme="light", locale="en-US"):
    """(page, what it complained of or asked of others)."""
    complaints: list[str] = []

    def noted(message) -> None:
        if message.type != "debug" and not message.text.startswith("[DOM] Password field"):  # a hint for logins
            complaints.append(f"{message.type}: {message.text}")

    page = browser.new_context(viewport=viewport, color_scheme=scheme, locale=locale).new_page()
    page.on("console", noted)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else complaints.append(asked.url))
    page.goto(url)
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    return page, complaints


def ask(page, text: str, answers: int):
    page.fill("#message", text)
    page.click("#send")
    page.wait_for_selector(f".turn:last-child .answer:nth-of-type({answers})[data-done=yes]", timeout=120_000)
    page.wait_for_selector("#send:not([disabled])", timeout=120_000)


@pytest.mark.parametrize(
    "viewport, scheme, locale, send", [(SCREEN, "light", "en-US", "Send"), (PHONE, "dark", "zh-CN", "发送")]
)
def test_two_models_answer_with_probabilities(browser, address, models, viewport, scheme, locale, send):
    page, complaints = opened(browser, address, viewport, scheme, locale)
    assert page.inner_text("#send") == send and page.evaluate("document.documentElement.lang") == locale[:2]
    page.check("#probabilities")
    page.click("#settings summary")
    page.fill("#max_tokens", "8")
    page.fill("#temperature", "0")
    ask(page, "What is a red cat?", 2)
    heads = page.locator(".answer h3").all_inner_texts()
    assert heads == ["runs/x:sft", "runs/x:ppo"]
    generator, answers = models["runs/x:sft"], page.locator(".said").all_text_contents()
    said = []
    from pipeline.serve.generator import Sampling

    ids = generator.prompt([{"role": "user", "content": "What is a red cat?"}])
    sampling = Sampling(max_new_tokens=8, temperature=0, top_logprobs=5)
    generator.generate(ids, sampling, [1], lambda row, token: said.append(token))
    assert answers[0] == answers[1] and answers[0].replace("·", "") == "".join(token.text for token in said)
    spans = page.locator(".answer:first-of-type .t")
    assert spans.count() == len(said)
    spans.nth(1).click()
    assert page.locator("#token .bar").count() == 5
    shown = float(page.locator("#token .bar.taken span").inner_text().rstrip("%")) / 100
    assert shown == pytest.approx(2.718281828 ** said[1].logprob, abs=0.001)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 23, 28)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert complaints == []


def test_conversation_text_mode_and_errors(browser, address):
    page, complaints = opened(browser, address)
    page.select_option("#model-b", "")
    page.click("#settings summary")
    page.fill("#max_tokens", "4")
    ask(page, "<b>What</b> is a red cat?", 1)
    assert page.locator(".asked").inner_text() == "<b>What</b> is a red cat?"
    ask(page, "And a dog?", 1)
    assert page.locator(".turn").count() == 2
    page.select_option("#mode", "text")
    assert page.locator(".turn").count() == 0, "another mode is another conversation"
    ask(page, "What is", 1)
    assert page.locator(".said").inner_text() and complaints == []
    page.fill("#max_tokens", "100000")
    ask(page, "What is", 1)
    assert "this server gives at most" in page.locator(".error").inner_text()
    page.select_option("#language", "zh")
    assert page.inner_text("#clear") == "清空"
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_the_key_is_asked_for(browser, models):
    with served(models, key="k") as url:
        page, _ = opened(browser, url)
        assert "API key" in page.inner_text("#notice")
        page.fill("#key", "k")
        page.locator("#key").blur()
        page.wait_for_selector("#model-a option[value='runs/x:sft']", state="attached")
        assert page.locator("#notice").is_hidden()


@pytest.mark.skipif("ALMA_RUN" not in os.environ, reason="pictures are made with ALMA_RUN=RUN:STAGE")
def test_pictures(browser):
    """chat-page.png and chat-page-zh.png, for the documentation."""
    from pipeline.serve.target import resolve

    target = resolve(os.environ["ALMA_RUN"])
    folder = Path(os.environ.get("ALMA_SCREENSHOTS", "docs"))
    with served({target.title: Generator(target.folder)}) as url:
        for locale, viewport, scheme in (("en-US", SCREEN, "light"), ("zh-CN", PHONE, "dark")):
            page, _ = opened(browser, url, viewport, scheme, locale)
            page.check("#probabilities")
            ask(page, os.environ.get("ALMA_QUESTION", "What is a whale?"), 1)
            page.locator(".t").nth(1).click()
            page.screenshot(path=folder / f"chat-page{'-zh' if locale == 'zh-CN' else ''}.png")
