"""The documentation as a site: it is built without a complaint, and reading it asks for nothing from the network. `make
docs` installs what is needed (extra `docs`)."""

import html.parser
import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import site_hooks
from paths import ROOT

DOCS = ROOT / "docs"
pytestmark = pytest.mark.slow
LOADING = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}


class Links(html.parser.HTMLParser):
    """What a page loads, what it links to, and the names of its places."""

    def __init__(self, text: str):
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in LOADING and values.get(LOADING[tag]) and values.get("rel") not in ("canonical", "alternate"):
            self.loaded.append(values[LOADING[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if values.get("id"):
            self.places.add(values["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs_static_i18n", reason="make docs, or pip install 'alma[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def read(site) -> dict[Path, Links]:
    return {path: Links(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_there_in_both_languages(site):
    names = [path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")]
    english = [name for name in names if not name.endswith(".zh")]
    assert all((site / f"{name}.html").exists() and (site / "zh" / f"{name}.html").exists() for name in english)
    chinese = (site / "zh" / "index.html").read_text(encoding="utf-8")
    assert "快速导览" in chinese and '<html lang="zh"' in chinese


@pytest.mark.parametrize(
    "html, expected",
    [
        ("<p>逐字节相同。\n本页用</p>\n<p>两个</p>", "<p>逐字节相同。本页用</p>\n<p>两个</p>"),
        ("<p>环境\n必须在</p>", "<p>环境必须在</p>"),
        (
            "<p>见<a>运行</a>，\n<code>x</code> 和\n<code>y</code></p>",
            "<p>见<a>运行</a>，<code>x</code> 和\n<code>y</code></p>",
        ),
        ("<p>见<a href='x'>运行</a>\n<strong>网页</strong></p>", "<p>见<a href='x'>运行</a><strong>网页</strong></p>"),
        (
            "<pre><code># 一\n二</code></pre>\n<p>三\nfour\n五</p>",
            "<pre><code># 一\n二</code></pre>\n<p>三\nfour\n五</p>",
        ),
        ("<ul>\n<li>一。</li>\n<li>二</li>\n</ul>", "<ul>\n<li>一。</li>\n<li>二</li>\n</ul>"),
    ],
)
def test_lines_of_a_chinese_sentence_are_joined(html, expected):
    assert site_hooks.joined(html) == expected


def test_nothing_is_loaded_from_the_network(site, read):
    foreign = {url for page in read.values() for url in page.loaded if urlsplit(url).scheme in ("http", "https")}
    assert not foreign
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert "url(http" not in styles and "@import" not in styles


def test_links_lead_to_pages(site, read):
    broken = []
    for path, page in read.items():
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html" or not parts.path:
                continue
            target = (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target = target / "index.html"
            if not target.exists():
                broken.append(f"{path.relative_to(site)}: {link}")
    assert not broken, "\n".join(broken)


def test_links_of_chinese_pages_to_english_ones_lead_to_their_headings(site, read):
    """Those that tests/helpers/site_hooks.py writes."""
    links = [link for link in read[site / "zh" / "clean.html"].links if link.startswith("../clean.html#")]
    assert links and all(urlsplit(link).fragment in read[site / "clean.html"].places for link in links)


def test_the_search_has_both_languages(site):
    """Its index is in a script, so that it is also there where a page is opened as a file."""
    assert (site / "search" / "search_index.js").exists()
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert set(index["config"]["lang"]) >= {"en", "zh"}
    texts = {entry["location"]: entry["text"] for entry in index["docs"]}
    assert any(name.startswith("zh/dpo.html") and "选中\u200b的\u200b回答" in text for name, text in texts.items())
