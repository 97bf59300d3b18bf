"""Pages and WET files as records; how much of a page extraction kept."""

import gzip
import json
import subprocess
import sys

import pytest
from harness import succeed
from warc import items, page, record

from pipeline.data.sources.web_pages import extract_text

pytest.importorskip("resiliparse")
EN = (
    "The bridge was built by the people of the town, and it stood for a hundred years before the river took it away. "
    * 3
)
ZH = "这座桥是镇上的人自己修的，在河水把它冲走之前，它在那里站了一百年，人们每天都从上面走过去。" * 3


def test_wet_and_html(tmp_path):
    wet = (
        record("warcinfo", b"x")
        + record("conversion", ZH.encode(), "http://b.cn/1", "text/plain")
        + record("conversion", EN.encode(), "http://b.cn/2")
    )
    found = items(tmp_path, gzip.compress(wet), "x.warc.wet.gz")
    assert [(item.fields["text"], item.fields["url"]) for item in found] == [
        (ZH, "http://b.cn/1"),
        (EN, "http://b.cn/2"),
    ]
    (item,) = items(tmp_path, page(ZH, "gbk"), "p.html")
    assert ZH in item.fields["text"] and "Menu" not in item.fields["text"]


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


@pytest.mark.parametrize("unit_bytes", [1024, 4 << 20])
def test_the_share_that_extraction_kept_is_reported(tmp_path, unit_bytes):
    """correctness 23: by source, in report.json, the summary and `alma inspect data`; against counts of the texts."""
    prose = [
        "The bridge stood for a hundred years.",
        "Nobody has seen the river so low.",
        "They went home in the dark.",
    ]
    pages = [DOCUMENTATION.replace("Short.", f"{number} {text} {ZH[:40]}") for number, text in enumerate(prose)]
    for number, content in enumerate(pages):
        (tmp_path / f"{number}.html").write_text(content, encoding="utf-8")
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": ZH[:40]}) + "\n", encoding="utf-8")
    recipe = {
        "name": "r",
        "stages": {"clean": {"unit_bytes": unit_bytes, "workers": 1, "holdout": 0, "dedup": {"near": False}}},
    }
    recipe["stages"]["clean"]["sources"] = {
        "main": {"path": "*.html"},
        "kept": {"path": "*.html", "extract": "structure"},
        "plain": {"path": "plain.jsonl"},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    succeed("clean", "r.yaml", cwd=tmp_path)
    output = tmp_path / "runs/r/clean/current"
    sources = json.loads((output / "report.json").read_text())["sources"]

    def letters(text: str) -> int:
        return sum(not sign.isspace() and sign not in "#|`-" for sign in text)

    shown = sum(letters(extract_text(content, "all").text) for content in pages)
    for name, mode in (("main", "main"), ("kept", "structure")):
        extracted = sum(letters(extract_text(content, mode).text) for content in pages)
        assert sources[name]["extraction"] == {
            "pages": 3,
            "characters_shown": shown,
            "characters_extracted": extracted,
            "share": round(extracted / shown, 4),
        }
    assert "extraction" not in sources["plain"]
    assert sources["main"]["extraction"]["share"] < sources["kept"]["extraction"]["share"] < 1
    summary = json.loads((output / "manifest.json").read_text())["metrics"]["summary"]["measure"]
    assert f"main {sources['main']['extraction']['share']:.0%}" in summary
    inspected = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "inspect", "data", "r.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "extracted from 3 pages of main: " in inspected.stdout and inspected.returncode == 0, inspected
