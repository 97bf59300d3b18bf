"""HTML as text that keeps its structure: the page without navigation, with headings, tables and code as in Markdown.

Resiliparse's main content drops entire sections of documentation (docs/log.md, Correctness 23). Here only elements
that HTML, ARIA and documentation generators name as navigation are dropped; the text is extracted by the same library,
so that blocks, lists and white space are as in the other modes.
"""

import re
from typing import TYPE_CHECKING

from pipeline.data.sources.html_elements import elements

if TYPE_CHECKING:  # an optional dependency
    from resiliparse.parse.html import DOMNode, HTMLTree

_INSIDE = ("article", "main", "section", "[role=main]", "blockquote")  # their own header and footer belong to the text
NAVIGATION = [
    *("nav", "[role=navigation]", "[role=search]", "[role=contentinfo]", "[role=menubar]", "[role=menu]"),
    *("button", "select", "dialog", "template"),
    *(f"{name}:not({', '.join(f'{inside} {name}' for inside in _INSIDE)})" for name in ("footer", "aside")),
    f"header:not(:has(h1)):not({', '.join(f'{inside} header' for inside in _INSIDE)})",
    # generators: Sphinx and its themes, Javadoc, DocBook, Doxygen, texinfo, MkDocs, Docusaurus
    *(".sphinxsidebar", ".related", ".headerlink", ".linenos", ".wy-nav-side", ".wy-nav-top", ".rst-versions"),
    *(".skip-nav", ".top-nav", ".sub-nav", ".bottom-nav", ".topNav", ".subNav", ".bottomNav", ".fixedNav"),
    *(".navheader", ".navfooter", ".docnav", ".nav-panel", "#nav-path", "#side-nav", ".md-sidebar", ".md-header"),
    *(".theme-doc-toc-mobile", ".breadcrumb", ".breadcrumbs", ".pagination", ".edit-this-page"),
    # the same by the usual ids and classes
    *("#sidebar", "#footer", "#navigation", "#nav", "#navbar", "#menu", "#breadcrumbs", ".navbar", ".footer"),
    *(".site-footer", ".site-header", ".cookie-banner", ".sr-only", ".visually-hidden"),
]
_LAYOUT = "table, ul, ol, dl, pre, blockquote, h1, h2, h3, h4, h5, h6, form, iframe"
MAX_CELL = 500  # characters; a table with a longer cell only arranges the page
_SPACE = re.compile(r"\s+")


def write_markdown(tree: "HTMLTree") -> None:
    """Write Markdown into a page: # before headings, a fence around preformatted text, tables with |."""
    body = tree.body
    if body is None:
        return
    for heading in elements(body, "h1, h2, h3, h4, h5, h6"):
        if heading.first_child and heading.text.strip():
            heading.insert_before(tree.create_text_node("#" * int(heading.tag[1]) + " "), heading.first_child)
    for block in elements(body, "pre:not(pre pre)"):
        _write_line_ends(tree, block)
        code = block.text.strip("\n")
        if code.strip():
            fence = "```"
            while fence in code:
                fence += "`"
            _replace(tree, block, f"{fence}\n{code}\n{fence}")
    for table in elements(body, "table"):
        if rows := _rows(table):
            _replace(tree, table, _markdown_table(table, rows))


def _write_line_ends(tree: "HTMLTree", block: "DOMNode") -> None:
    """Newlines in preformatted text whose lines are elements."""
    for end in elements(block, "br"):
        end.replace_with(tree.create_text_node("\n"))
    for line in elements(block, "div, p, li, tr"):
        if not line.text.endswith("\n"):
            line.append_child(tree.create_text_node("\n"))


def _rows(table: "DOMNode") -> list[list[str]] | None:
    """The cells of a table of data, each on one line; None for a table that only arranges the page."""
    if table.query_selector(_LAYOUT):
        return None
    rows = []
    below: dict[int, int] = {}  # column -> in how many of the next rows a cell of an earlier row reaches into it
    for line in elements(table, "tr"):
        row: list[str] = []
        _skip_spanned(row, below)
        for cell in line.child_nodes:
            if cell.tag not in ("td", "th"):
                continue
            text = _SPACE.sub(" ", cell.inner_text).strip().removesuffix("¶")
            if len(text) > MAX_CELL:
                return None
            for column in range(len(row), len(row) + _span(cell, "colspan", 20)):
                below[column] = _span(cell, "rowspan", 1000) - 1
                row.append("")
            row[-_span(cell, "colspan", 20)] = text.replace("|", "\\|")
            _skip_spanned(row, below)
        if any(row):
            rows.append(row)
    return rows if len(rows) > 1 and max(map(len, rows)) > 1 else None


def _skip_spanned(row: list[str], below: dict[int, int]) -> None:
    """Leave the next columns of a row empty into which cells of earlier rows reach."""
    while below.get(len(row), 0) > 0:
        below[len(row)] -= 1
        row.append("")


def _span(cell: "DOMNode", name: str, most: int) -> int:
    written = cell.getattr(name) or ""
    return max(1, min(int(written), most)) if re.fullmatch("[0-9]{1,9}", written) else 1


def _markdown_table(table: "DOMNode", rows: list[list[str]]) -> str:
    """The first row becomes the header, because Markdown has no table without one."""
    columns = max(map(len, rows))
    lines = ["| " + " | ".join(row + [""] * (columns - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * columns)
    caption = table.query_selector("caption")
    title = _SPACE.sub(" ", caption.inner_text).strip() if caption else ""
    if title:
        lines = [title, "", *lines]
    return "\n".join(lines)


def _replace(tree: "HTMLTree", node: "DOMNode", text: str) -> None:
    """Replace a node by preformatted text. The newline before it keeps the first line from getting the indentation of
    a list, which the other lines would not get."""
    block = tree.create_element("pre")
    block.append_child(tree.create_text_node(f"\n{text}\n"))
    node.replace_with(block)
