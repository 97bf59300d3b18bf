"""The page in headless Chromium: every section is drawn, nothing is loaded, no error is logged, in both color schemes
and on a phone. `make test-browser` runs it; it needs the extra `browser` and a Chromium (CHROMIUM=path, or on the PATH).

ALMA_SCREENSHOTS=FOLDER ALMA_RUN=runs/small make test-browser      # pictures of a run of yours
"""

import os
import time
from pathlib import Path

import pytest
import reported_run
from chromium import MARKS, PHONE, SCREEN, launched

from pipeline.report.page import SECTIONS, Options, page_of
from pipeline.report.run_folder import read_run

pytestmark = MARKS


@pytest.fixture(scope="module")
def browser():
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """language -> file of the page of one run."""
    folder = tmp_path_factory.mktemp("browser")
    run = read_run(reported_run.write(folder / "demo"))
    found = {}
    for language in ("en", "zh"):
        found[language] = folder / f"{language}.html"
        found[language].write_text(page_of(run, Options(language)), encoding="utf-8")
    return found


def opened(browser, file: Path, viewport: dict, scheme: str):
    """(page, everything that it logged or asked for beside the file)."""
    complaints: list[str] = []
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda asked: complaints.append(asked.url) if not asked.url.startswith("file:") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=60_000)
    return page, complaints


@pytest.mark.parametrize("language, viewport, scheme", [("en", SCREEN, "light"), ("zh", PHONE, "dark")])
def test_every_section_is_drawn(browser, files, language, viewport, scheme):
    page, complaints = opened(browser, files[language], viewport, scheme)
    for name in SECTIONS:
        box = page.locator(f"section#{name}").bounding_box()
        assert box["height"] > 60, name
        assert box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] + 1, f"{name} is wider than the screen"
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    plots = page.locator(".plot")
    assert plots.count() >= 8
    for number in range(plots.count()):
        plot = plots.nth(number)
        assert plot.get_attribute("data-drawn") == "yes"
        assert plot.locator(".scatterlayer .trace").count() >= 1, plot.get_attribute("id")
    text = page.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
    assert text == ("rgb(228, 232, 238)" if scheme == "dark" else "rgb(29, 36, 48)"), "axes have the page's color"
    assert complaints == []


def test_the_policy_stops_scripts_that_get_into_the_page(browser, files, tmp_path):
    """Even if a text were not escaped, the browser would not run it."""
    html = files["en"].read_text(encoding="utf-8").replace("<main>", "<main><script>document.title = 'taken'</script>")
    assert "document.title = 'taken'" in html
    (tmp_path / "bad.html").write_text(html, encoding="utf-8")
    page, complaints = opened(browser, tmp_path / "bad.html", SCREEN, "light")
    assert page.title() == "Report of demo" and "Content Security Policy" in complaints[0]


def test_colors_follow_the_system_while_the_page_is_open(browser, files):
    page, complaints = opened(browser, files["en"], SCREEN, "light")
    page.emulate_media(color_scheme="dark")
    dark = "getComputedStyle(document.querySelector('.plot .xtick text')).fill == 'rgb(228, 232, 238)'"
    deadline = time.time() + 20
    while not page.evaluate(dark):  # wait_for_function compiles text, which the page's policy forbids
        assert time.time() < deadline
        time.sleep(0.1)
    assert complaints == []


@pytest.mark.skipif("ALMA_RUN" not in os.environ, reason="pictures are made with ALMA_RUN=FOLDER")
def test_pictures(browser, tmp_path):
    """report-SECTION.png of a real run, for the documentation."""
    target = Path(os.environ.get("ALMA_SCREENSHOTS", "docs"))
    run = read_run(Path(os.environ["ALMA_RUN"]))
    for language, viewport, scheme in (("en", SCREEN, "light"), ("zh", PHONE, "dark")):
        file = tmp_path / f"{language}.html"
        file.write_text(page_of(run, Options(language)), encoding="utf-8")
        page, complaints = opened(browser, file, viewport, scheme)
        assert complaints == []
        if language == "zh":
            page.locator("#curves").scroll_into_view_if_needed()
            page.evaluate("document.querySelector('#curves').scrollIntoView()")
            page.screenshot(path=target / "report-phone-zh.png")
            continue
        page.screenshot(path=target / "report-top.png")
        for name in ("normal", "curves", "masks", "data"):
            page.evaluate(f"document.querySelector('#{name}').scrollIntoView()")
            page.evaluate("window.scrollBy(0, -40)")
            page.screenshot(path=target / f"report-{name}.png")
