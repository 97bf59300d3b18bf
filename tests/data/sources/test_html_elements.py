"""Elements of pages whose text resiliparse loses, changes or joins with its neighbours."""

import re

import pytest

from pipeline.data.sources.web_pages import extract_text

pytest.importorskip("resiliparse")
MODES = ("main", "structure", "all")
BEGIN, END = (f"<p>{end} of a page that has enough words to be main content.</p>" for end in ("The begin", "The end"))


def between(fragment: str, mode: str) -> str:
    """The text that a fragment becomes on a page."""
    text = extract_text(f"<html><body>{BEGIN}{fragment}{END}</body></html>", mode).text
    assert text.count(" of a page that has enough words") == 2 and "\ufdd0" not in text
    return text.partition("content.")[2].rpartition("The end")[0].strip()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("single", ["天", "「", "—", "→", "あ", "한", "５", "“", "₂", "é", "b", "𠀀"])
def test_a_character_that_is_alone_in_an_element_is_not_lost(mode, single):
    """correctness 3 and 23: in the main content `今<b>天</b>` was `今`, and a cell 是 was empty. In HTML the text of a
    paragraph is all characters between its tags."""
    spelled = "".join(f"&#{ord(character)};" for character in single)
    for written in (single, spelled, f"\n {single}\n"):
        page = f"<p>今<b>{written}</b>气 and <a href='x'>{written}</a>, a sentence with words.</p>"
        expected = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page)).replace(spelled, single)
        assert between(page, mode) == expected
    table = f"<table><tr><td>one</td><td>{single}</td></tr><tr><td>{single}</td><td>two</td></tr></table>"
    cells = re.sub(r"\| --- \|.*|[|\s]", "", between(table, mode))
    assert cells == f"one{single}{single}two"


def test_what_is_struck_out_is_no_part_of_a_number():
    page = "<p>The price is now <s>100</s><del>90</del>80 yuan for all of them.</p>"
    assert between(page, "main") == between(page, "structure") == "The price is now 80 yuan for all of them."


def test_signs_of_icon_fonts_stay_out_of_the_main_content():
    assert between("<p>Save <i>\ue601</i><i>&#xe602;</i>the file, a sentence with words.</p>", "main") == (
        "Save the file, a sentence with words."
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "fragment, text",
    [
        # the readings of characters, in brackets as a browser without ruby shows them
        ("<p>私は<ruby>東<rt>とう</rt>京<rt>きょう</rt></ruby>へ行きました。</p>", "私は東京(とうきょう)へ行きました。"),
        ("<p>これは<ruby>漢<rp>（</rp><rt>かん</rt><rp>）</rp></ruby>字。</p>", "これは漢（かん）字。"),
        ("<p>這是<ruby><rb>繁</rb><rt>ㄈㄢˊ</rt></ruby>體字的文章。</p>", "這是繁(ㄈㄢˊ)體字的文章。"),
        # formulas, once
        (
            "<p>Let <math><semantics><mi>x</mi><annotation encoding='application/x-tex'>{\\displaystyle x^{2}}</annotation>"
            "</semantics></math> be it.</p>",
            "Let $x^{2}$ be it.",
        ),
        (
            "<p>Let <span class='katex'><span class='katex-mathml'><math><semantics><mi>a</mi><annotation encoding="
            "'application/x-tex'>a_1</annotation></semantics></math></span><span class='katex-html'>a1</span></span> be.</p>",
            "Let $a_1$ be.",
        ),
        ("<p>Let <script type='math/tex'>b^2</script> be the area.</p>", "Let $b^2$ be the area."),
        (
            "<p>So <math><mfrac><mrow><mi>a</mi><mo>+</mo><mn>1</mn></mrow><msup><mi>x</mi><mn>10</mn></msup></mfrac></math> it is.</p>",
            "So (a+1)/(x^10) it is.",
        ),
        # powers are not digits of the number before them
        ("<p>It has 2<sup>10</sup> bytes, 10<sup>-3</sup> of H<sub>2</sub>O.</p>", "It has 2¹⁰ bytes, 10⁻³ of H₂O."),
        ("<p>The 1<sup>st</sup> of them<sup>[1]</sup> is here.</p>", "The 1st of them[1] is here."),
        ("<p>He said <q>so <q>it</q> is</q> of it.</p>", "He said “so ‘it’ is” of it."),
        # numbers that the page shows
        ("<ol start='3'><li>the third item of it</li><li>the fourth item of it</li></ol>", "3. the third item of it\n4. the fourth item of it"),
        ("<ol type='a'><li>an item of this list</li><li value='27'>another item of it</li></ol>", "a. an item of this list\naa. another item of it"),
        ("<ol reversed type='I'><li>an item of this list</li><li>another item of it</li></ol>", "II. an item of this list\nI. another item of it"),
        ("<details><summary>How long is it</summary>As long as this.</details>", "How long is it\nAs long as this."),
    ],
)  # fmt: skip
def test_text_that_was_lost_changed_or_joined(mode, fragment, text):
    """correctness 3 and 23"""
    assert between(fragment, mode) == text


def test_code_in_a_figure_is_kept_and_captions_of_pictures_are_not_main_content():
    """correctness 23: generators of blogs (Hexo) write every listing into a figure; all of them were lost in every
    mode."""
    listing = "<figure class='highlight'><pre>x = 1\n    y = 2</pre></figure>"
    assert between(listing, "main") == between(listing, "all") == "x = 1\n    y = 2"
    assert between(listing, "structure") == "```\nx = 1\n    y = 2\n```"
    picture = "<figure><img src='a.png'><figcaption>A view of the town</figcaption></figure>"
    assert [between(picture, mode) for mode in MODES] == ["", "A view of the town", "A view of the town"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "lines", ["a = 1<br>  b = 2<br><br>c", "<div>a = 1</div><div>  b = 2</div><div>\n</div><div>c</div>"]
)
def test_lines_of_code_that_are_elements_are_not_joined(mode, lines):
    """correctness 3 and 23: `a = 1  b = 2c` in structure."""
    code = between(f"<pre><code>{lines}</code></pre>", mode).strip("`\n")
    assert [line for line in code.split("\n") if line] == ["a = 1", "  b = 2", "c"]


def test_cells_that_span_rows_do_not_move_the_others():
    """correctness 23: `t` was in the first column."""
    table = (
        "<table><tr><th rowspan='2'>name</th><th colspan='2'>score</th></tr><tr><th>a</th><th>b</th></tr>"
        "<tr><td>x</td><td rowspan='2'>1</td><td>2</td></tr><tr><td>y</td><td>3</td></tr></table>"
    )
    rows = between(table, "structure").split("\n")
    assert rows == ["| name | score |  |", "| --- | --- | --- |", "|  | a | b |", "| x | 1 | 2 |", "| y |  | 3 |"]
