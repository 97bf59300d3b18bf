"""Text of pages with their structure as Markdown."""

import time

import pytest

from pipeline.data.sources.records import read
from pipeline.data.sources.sources import Source
from pipeline.data.sources.web_pages import extract_text

pytest.importorskip("resiliparse")
DOCUMENTATION = """<!DOCTYPE html><html><head><title>t</title></head><body>
<header><a href="/">Site</a></header><nav><ul><li>Menu entry 1</li><li>Menu entry 2</li></ul></nav>
<div class="related"><h3>Navigation</h3><a>next</a></div><div class="sphinxsidebar"><p>This page</p></div>
<div class="document"><h1>Installing<a class="headerlink" href="#i">¶</a></h1>
<p>Short.</p><p>第一段说明如何安装。</p>
<h2>Commands</h2><pre class="sh"><span>$ pip</span> install x
    --user

  done</pre><div class="sidebar"><h3>注意</h3><p>侧栏也是正文。</p></div>
<h3>Options</h3><table><caption>All of them</caption><tr><th>key</th><th>meaning</th></tr>
<tr><td><code>a|b</code></td><td><p>either</p><p>of them</p></td></tr><tr><td colspan="2">none</td></tr></table>
<article><header>Inner head</header><p>Inner text.</p><aside>A note.</aside><footer>Inner foot</footer></article>
<ol><li>first<pre>cmd --flag
cmd2</pre></li><li>second</li></ol>
<table><tr><td><p>layout</p><ul><li>of a page</li></ul></td><td>right</td></tr></table></div>
<aside>Advertisement</aside><footer>Copyright</footer></body></html>"""


def test_structure_keeps_headings_tables_and_code(tmp_path):
    """correctness 23: what the page says in the form of Markdown, and nothing that leads through the site."""
    (tmp_path / "a.html").write_text(DOCUMENTATION, encoding="utf-8")
    text = next(read(Source(path=str(tmp_path / "a.html"), extract="structure"), "s")).fields["text"]
    for block in (
        "# Installing",
        "Short.",
        "第一段说明如何安装。",
        "## Commands",
        "```\n$ pip install x\n    --user\n\n  done\n```",
        "### 注意",
        "侧栏也是正文。",
        "All of them\n\n| key | meaning |\n| --- | --- |\n| a\\|b | either of them |\n| none |  |",
        "Inner head",
        "A note.",
        "Inner foot",
        "```\ncmd --flag\ncmd2\n```",
        "layout",
        "right",
    ):
        assert f"\n{block}\n" in f"\n{text}\n" or block in ("layout", "right", "A note.") and block in text, (
            block,
            text,
        )
    for gone in ("Site", "Menu entry", "Navigation", "This page", "¶", "Advertisement", "Copyright", "| layout"):
        assert gone not in text, gone
    whole = next(read(Source(path=str(tmp_path / "a.html"), extract="all"), "s")).fields["text"]
    assert "Menu entry 1" in whole and "# Installing" not in whole


@pytest.mark.parametrize(
    "page",
    [
        "",
        "<",
        "<table>",
        "<html></html>",
        "<pre></pre>",
        "<h1></h1>",
        "<table><tr><td colspan=999999999>a<td>b<tr><td>c",
    ]
    + ["<table><tr><td>" * 300, "<pre>" * 300 + "x", "<h1>" * 300 + "x", "<pre>```\nx\n```</pre>", "<td>a|b"],
)
def test_structure_of_odd_pages(page):
    """correctness 23: no page of broken markup ends a stage."""
    found = extract_text(page, "structure")
    assert found.visible.text <= found.visible.page == extract_text(page, "all").visible.page and len(found.text) < 3000


def test_iterations_over_a_large_page_are_not_quadratic():
    """correctness 23: 3,000 headings, tables and blocks took 28 s for each 2,600 of them."""
    page = "<h2>a b</h2><pre>c</pre><table><tr><td>d<td>e<tr><td>f<td>g</table>" * 3000
    began = time.process_time()
    text = extract_text(page, "structure").text
    assert text.count("## a b") == text.count("| d | e |") == text.count("```\nc\n```") == 3000
    assert time.process_time() - began < 10
