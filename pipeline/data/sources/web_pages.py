"""Web pages as records: the character set decoded, the main text extracted from HTML.

Text is extracted with resiliparse (Apache-2.0; `pip install 'alma[web]'`): 1,326 MB of HTML in 38 s on two cores
(docs/log.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.core.errors import UserError
from pipeline.data.sources import bounded_call, html_elements, html_nesting, html_structure
from pipeline.data.sources.formats import EXCERPT, Bad, Chunk, Page, Skipped, VisibleText
from pipeline.data.sources.html_charset import charset_label, decode_page
from pipeline.data.sources.http_body import BadBody, decode_body
from pipeline.data.sources.text_encoding import printable

# CPU time for the extraction of a page. A usual page takes 0.01 s, a table of 0.5 MB 0.3 s.
SECONDS, SECONDS_PER_MB = 5, 2


def archive_pages(chunk: Chunk, extract: str) -> Iterator[tuple[int, Page | Bad | Skipped]]:
    """The texts of a chunk of warc_chunks as records {text, url, date}."""
    for position, item in chunk.data:
        place = f"{chunk.file}:{position}"
        if isinstance(item, Bad):
            yield position, item
            continue
        if isinstance(item, str):
            yield position, Skipped(place, item)
            continue
        body = item["body"]
        if "codings" in item:
            try:
                body = decode_body(body, item["codings"], item["cut"])
            except BadBody as error:
                yield position, Bad(place, str(error), item["url"][:EXCERPT])
                continue
        media = "text/plain" if item["plain"] else "text/html"
        label = "utf-8" if item.get("utf8") else charset_label(item["type"])
        yield position, parse_page(body, media, extract, place, {"url": item["url"], "date": item["date"]}, label)


def parse_page(raw: bytes, media: str, extract: str, place: str, fields: dict[str, str], label: str = "") -> Page | Bad:
    """A page or plain text as the record {text, **fields}; `label` is the character set that its server declared."""
    decoded = decode_page(raw, label, media != "text/plain")
    if decoded is None:
        return Bad(place, "in no known character set", _excerpt(raw))
    text = decoded.text.replace("\0", "")
    changed = {"replaced_bytes": decoded.replaced} if decoded.replaced else {}
    if media == "text/plain":
        return Page({"text": text, **fields}, changed, None)
    try:
        seconds = SECONDS + SECONDS_PER_MB * len(text) / 1e6
        extracted = bounded_call.call(extract_text, text, extract, seconds=seconds)
    except bounded_call.OutOfBounds as error:
        return Bad(place, f"HTML whose extraction {error}", _excerpt(raw))
    if extracted.flattened:
        changed["flattened_elements"] = extracted.flattened
    return Page({"text": extracted.text, **fields}, changed, extracted.visible)


def _excerpt(raw: bytes) -> str:
    return printable(raw[:EXCERPT]).replace("\0", "\\x00")


@dataclass(frozen=True, slots=True)
class Extracted:
    """The text of a page, how much of the page it is, and how many elements were flattened because they are nested too
    deeply."""

    text: str
    visible: VisibleText
    flattened: int


def extract_text(page: str, extract: str) -> Extracted:
    """`extract`: main drops what does not look like the main content; structure drops navigation and writes headings,
    tables and code as Markdown; all drops nothing."""
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise UserError("reading HTML needs resiliparse, which is not installed; run pip install 'alma[web]'") from None
    tree = HTMLTree.parse(html_elements.mark_single_characters(page.replace(html_elements.MARK, "")))
    flattened = html_nesting.flatten(tree) if html_nesting.may_be_deep(page) else 0
    html_elements.rewrite(tree, page)
    options = {"preserve_formatting": True, "list_bullets": True, "alt_texts": False, "links": False, "noscript": False}
    complete_text = extract_plain_text(tree, **options).replace(html_elements.MARK, "")
    if extract == "all":
        text = complete_text
    elif extract == "main":
        text = extract_plain_text(
            tree, main_content=True, skip_elements=[html_elements.CAPTIONS, *html_elements.STRUCK], **options
        )
    else:
        html_structure.write_markdown(tree)
        text = extract_plain_text(tree, skip_elements=[*html_structure.NAVIGATION, *html_elements.STRUCK], **options)
    text = text.replace(html_elements.MARK, "")
    return Extracted(text, VisibleText(_visible_characters(complete_text), _visible_characters(text)), flattened)


def _visible_characters(text: str) -> int:
    """Number of characters without spaces and the signs with which Markdown writes structure."""
    return len(text) - sum(map(text.count, " \n\t#|`-"))
