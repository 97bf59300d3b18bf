"""HTML as text that keeps its structure: what a page says without what leads through the site, headings, tables and
code written as in Markdown.

Resiliparse's main content leaves out whole sections of documentation (docs/log.md, Correctness 23). Here nothing is
left out but elements that HTML, ARIA and the generators of documentation name as navigation; text comes out by the
same library, so that blocks, lists and white space are as in the other modes.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # an extra
    from resiliparse.parse.html import DOMNode, HTMLTree

_INSIDE = ("article", "main", "section", "[role=main]", "blockquote")  # whose own head and foot belong to the text
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
    # what pages without these elements call them
    *("#sidebar", "#footer", "#navigation", "#nav", "#navbar", "#menu", "#breadcrumbs", ".navbar", ".footer"),
    *(".site-footer", ".site-header", ".cookie-banner", ".sr-only", ".visually-hidden"),
]
_NO_DATA = "table, ul, ol, dl, pre, blockquote, h1, h2, h3, h4, h5, h6, form, iframe"
MAX_CELL = 500  # characters; a table with a longer cell is there for the layout of the page
_SPACE = re.compile(r"\s+")


def mark(tree: "HTMLTree") -> None:
    """Write Markdown's signs into a page: # before headings, a fence around preformatted text, | between cells."""
    body = tree.body
    if body is None:
        return
    for heading in _all(body, "h1, h2, h3, h4, h5, h6"):
        if heading.first_child and heading.text.strip():
            heading.insert_before(tree.create_text_node("#" * int(heading.tag[1]) + " "), heading.first_child)
    for block in _all(body, "pre:not(pre pre)"):
        code = block.text.strip("\n")
        if code.strip():
            fence = "```"
            while fence in code:
                fence += "`"
            _replace(tree, block, f"{fence}\n{code}\n{fence}")
    for table in _all(body, "table"):
        if rows := _rows(table):
            _replace(tree, table, _written(table, rows))


def _all(node: "DOMNode", selector: str) -> "tuple[DOMNode, ...]":
    """What a selector finds. A slice, for a step of an iteration over the result looks for all of it again."""
    found = node.query_selector_all(selector)
    return found[0 : len(found)]


def _rows(table: "DOMNode") -> list[list[str]] | None:
    """The cells of a table of data, each on one line; None if it is there for the layout of a page."""
    if table.query_selector(_NO_DATA):
        return None
    rows = []
    for line in _all(table, "tr"):
        row: list[str] = []
        for cell in line.child_nodes:
            if cell.tag not in ("td", "th"):
                continue
            text = _SPACE.sub(" ", cell.inner_text).strip().removesuffix("¶")
            if len(text) > MAX_CELL:
                return None
            span = cell.getattr("colspan") or ""
            row += [text.replace("|", "\\|")] + [""] * (min(int(span), 20) - 1 if span.isdecimal() else 0)
        if any(row):
            rows.append(row)
    return rows if len(rows) > 1 and max(map(len, rows)) > 1 else None


def _written(table: "DOMNode", rows: list[list[str]]) -> str:
    """Markdown's table; the first row is its head, as Markdown knows no table without one."""
    columns = max(map(len, rows))
    lines = ["| " + " | ".join(row + [""] * (columns - len(row))) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * columns)
    caption = table.query_selector("caption")
    title = _SPACE.sub(" ", caption.inner_text).strip() if caption else ""
    return "\n".join(([title, ""] if title else []) + lines)


def _replace(tree: "HTMLTree", node: "DOMNode", text: str) -> None:
    """Write `text` as it is where a node stands. The newline before it keeps its first line from the indentation of a
    list, which the others would not have."""
    written = tree.create_element("pre")
    written.append_child(tree.create_text_node(f"\n{text}\n"))
    node.replace_with(written)
